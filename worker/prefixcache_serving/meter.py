"""What the front counts, for Prometheus.

Each front has a registry of its own; nothing in it names a client, a prompt or a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefixcache.types import Ledger

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Meter:
    """Counters and histograms of one front."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"prefixcache_front_{name}", what, labels, registry=self._registry)

        self.answered = counter("requests", "Requests by what became of them.", "path", "status")
        self.refused = counter("queue_full", "Requests that found the queue full.")
        self.gone = counter("clients_gone", "Clients that left before their answer was whole.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts that workers began.")
        self.cached = counter("cached_tokens", "Of these, tokens that were not computed.")
        self.approximate = counter(
            "approximate_tokens", "Tokens of prompts that were taken from segments."
        )
        self.generated = counter("generated_tokens", "Tokens that workers generated.")
        self.moved = counter("moved", "Answers that went on on another worker.")
        self.recomputed = counter("recomputed_tokens", "Tokens computed again because of that.")
        self.late = counter("late_tokens", "Tokens of workers that did not have the answer now.")
        self.set_down = counter("set_down", "Answers set down until their slow reader has read.")
        self.started = counter("workers_started", "Starts of workers, replacements included.")
        self.first_s = Histogram(
            "prefixcache_front_first_token_seconds",
            "From the request's last byte to the answer's first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count_prompt(self, ledger: Ledger) -> None:
        """Count the tokens of a prompt that a worker began."""
        self.prompt.inc(ledger.total)
        self.cached.inc(cached_of(ledger))
        self.approximate.inc(ledger.approximate)

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Show a number that is asked for when somebody looks."""
        Gauge(f"prefixcache_front_{name}", what, registry=self._registry).set_function(value)

    def watch_each(
        self, name: str, what: str, label: str, values: Callable[[], Mapping[str, float]]
    ) -> None:
        """Show numbers by a label, likewise."""
        self._registry.register(_Each(f"prefixcache_front_{name}", what, label, values))

    def exposition(self) -> bytes:
        """Write all of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Each(Collector):
    """Numbers by a label, read when somebody looks."""

    def __init__(
        self, name: str, what: str, label: str, values: Callable[[], Mapping[str, float]]
    ) -> None:
        self._name, self._what, self._label, self._values = name, what, label, values

    def collect(self) -> Iterator[Metric]:
        """Read them."""
        family = GaugeMetricFamily(self._name, self._what, labels=[self._label])
        for one, value in self._values().items():
            family.add_metric([one], value)
        yield family


def cached_of(ledger: Ledger) -> int:
    """Give how many tokens of a prompt were not computed for this request.

    >>> cached_of(Ledger(hit=32, partial=3, joined=16, cold=9))
    51
    """
    return ledger.hit + ledger.partial + ledger.joined
