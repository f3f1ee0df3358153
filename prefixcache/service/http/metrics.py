"""Metrics for Prometheus: read from the service's state when they are scraped.

Nothing is counted for them on the way of a request but what is counted anyhow; a scrape reads one
moment and writes it out family by family, giving the event loop back in between.

A service with several trust domains gives every series the label `domain`, empty for the one
without a name.

Labels are bounded, and so is a scrape: the first `MOST_SERIES` namespaces have series of their own,
all later ones are summed under `model="(other)"`; a salt is a secret, so namespaces that differ in
nothing else share their series.  They are summed as requests are granted, not when they are read.
Verbs, fates, states and errors are fixed lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from prefixcache import __version__
from prefixcache.core.ledger import FATES, MOST_SERIES, OTHER
from prefixcache.core.stats import SeriesCounts
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe.latency import NUM_BUCKETS, SUM
from prefixcache.texts import escape
from prefixcache.types import Counts, Namespace, Partial

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FIRST_BITS, _LAST_BITS = 12, 30
"""Bounds of the histograms: 4.1 microseconds to 1.07 seconds, each twice the one before."""

_NAMESPACE = ("tenant", "model", "adapter")
_FOLD = f"Namespaces after the first {MOST_SERIES} are summed as model={OTHER.model!r}."


class Scrape(Collector):
    """All families of one moment.

    Args:
        domains: The state of each trust domain, by its name.
    """

    def __init__(self, domains: Mapping[str, Handlers]) -> None:
        self._domains = {name: _Domain(handlers) for name, handlers in domains.items()}
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Give the families.  What they show is read when this is first asked for one."""
        if len(self._domains) == 1:
            for domain in self._domains.values():
                yield from domain.collect()
        else:
            yield from _joined(self._domains)
        yield from self._process.collect()


def _joined(domains: Mapping[str, _Domain]) -> Iterable[Metric]:
    """Give the families of several domains, every sample labelled with its domain's name."""
    joined: dict[str, Metric] = {}
    for name, domain in domains.items():
        for family in domain.collect():
            samples = [
                sample._replace(labels={"domain": name, **sample.labels})
                for sample in family.samples
            ]
            family.samples = []
            joined.setdefault(family.name, family).samples += samples
    return joined.values()


class _Domain:
    """The families of one trust domain."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    def collect(self) -> Iterator[Metric]:
        """Give the families."""
        yield from self._service()
        yield from self._verbs()
        yield from self._events()
        yield from self._shadows()
        cache = self._handlers.backing.cache
        if cache is not None:
            counts = cache.counts(now=monotonic())
            yield from self._ledger(cache.series())
            yield _gauge(
                "prefixcache_namespaces", "Namespaces with requests.", counts.num_namespaces
            )
            yield from self._pool(counts)
            yield from self._eviction(counts)
            yield from self._tier(counts)

    def _service(self) -> Iterator[Metric]:
        handlers, settings = self._handlers, self._handlers.settings
        yield _gauge(
            "prefixcache_build_info",
            "Always 1; what is running, in its labels.",
            {(__version__, settings.policy, str(settings.partial)): 1},
            ("version", "policy", "partial"),
        )
        yield _gauge(
            "prefixcache_uptime_seconds", "Time since the service started.", handlers.uptime_s
        )
        failed = dict.fromkeys(((part,) for part in handlers.failures.causes()), 1)
        if handlers.backing.state is not None:
            failed[("state",)] = int(bool(handlers.backing.state.condition.failure))
        yield _gauge(
            "prefixcache_part_failed",
            "1 for each part that has ended though the service goes on: see its log.",
            failed,
            ("part",),
        )
        yield _gauge("prefixcache_draining", "1 while no new leases are given.", handlers.draining)
        yield _gauge("prefixcache_workers", "Attached workers.", len(handlers.workers))
        yield _gauge("prefixcache_sessions", "Open sessions.", handlers.workers.num_streams)
        told = handlers.workers.progress()
        yield _gauge(
            "prefixcache_requests_in_hand", "Requests that workers say they compute.", told.in_hand
        )
        yield _gauge(
            "prefixcache_requests_untaken",
            "Requests that workers say were handed to them and they have not taken.",
            told.untaken,
        )
        yield _gauge(
            "prefixcache_longest_stall_seconds",
            "The longest time that a worker with requests in hand has made no step.",
            told.longest_stalled_s,
        )
        yield _gauge(
            "prefixcache_oldest_untaken_seconds",
            "The longest time that a request has lain untaken before a worker.",
            told.oldest_untaken_s,
        )

    def _events(self) -> Iterator[Metric]:
        events = self._handlers.events
        yield _gauge("prefixcache_watchers", "Watchers of events.", events.watchers)
        yield _counter("prefixcache_events", "Events made for watchers.", events.num_events)
        yield _counter(
            "prefixcache_event_gaps",
            "Times that a watcher had fallen too far behind, and got the whole state again.",
            events.num_gaps,
        )

    def _shadows(self) -> Iterator[Metric]:
        shadows = self._handlers.shadows
        if shadows is None:
            return
        for name, part, text in (
            ("prompt", "tokens", "Prompt tokens that a shadow cache has seen."),
            ("reused", "reused", "Of these, tokens that it would have reused."),
            ("actual_reused", "actual", "Of these, tokens that the service did reuse."),
        ):
            yield _counter(
                f"prefixcache_shadow_{name}_tokens",
                text,
                {(told["name"],): told["whole"][part] for told in shadows.results},
                ("shadow",),
            )
        yield _counter(
            "prefixcache_shadow_dropped_requests",
            "Requests that the shadow caches have not seen, because they could not keep up.",
            shadows.num_dropped,
        )

    def _verbs(self) -> Iterator[Metric]:
        handlers = self._handlers
        durations = HistogramMetricFamily(
            "prefixcache_verb_duration_seconds",
            "Time that the service spent on one operation, waiting for others not included.",
            labels=("verb",),
        )
        for verb, row in handlers.latency.rows.items():
            if row[SUM]:
                durations.add_metric((verb,), *_buckets(row))
        yield durations
        yield _counter(
            "prefixcache_refused",
            "Operations that were answered with an error.",
            handlers.latency.refused,
            ("verb", "error"),
        )
        waits = HistogramMetricFamily(
            "prefixcache_wait_duration_seconds",
            "Time that requests waited for a prefix which another lease was computing.",
        )
        waits.add_metric((), *_buckets(handlers.deliveries.waits))
        yield waits

    def _ledger(self, series: Mapping[Namespace, SeriesCounts]) -> Iterator[Metric]:
        tokens = {
            (*_labels(space), fate): getattr(counts.ledger, fate)
            for space, counts in series.items()
            for fate in FATES
        }
        yield _counter(
            "prefixcache_prompt_tokens",
            "Tokens of granted prompts by what became of them; the fates sum to all prompt tokens. "
            + _FOLD,
            tokens,
            (*_NAMESPACE, "fate"),
        )
        yield _counter(
            "prefixcache_requests",
            f"Granted requests. {_FOLD}",
            {_labels(space): counts.requests for space, counts in series.items()},
            _NAMESPACE,
        )
        yield _counter(
            "prefixcache_flights_saved",
            "Requests that read what another lease was computing, in place of computing it again. "
            + _FOLD,
            {_labels(space): counts.joins for space, counts in series.items()},
            _NAMESPACE,
        )

    def _pool(self, counts: Counts) -> Iterator[Metric]:
        states = ("free", "private", "indexed", "quarantined", "leaving")
        yield _gauge(
            "prefixcache_pool_blocks",
            "Blocks of the pool by state; the states sum to the pool.",
            {(state,): getattr(counts, state) for state in states},
            ("state",),
        )
        yield _gauge(
            "prefixcache_pool_evictable_blocks",
            "Of the indexed blocks, those that no lease protects.",
            counts.evictable,
        )
        yield _gauge("prefixcache_block_size_tokens", "Tokens of a block.", counts.block_size)
        sizes = self._handlers.backing.sizes
        if sizes is not None:
            yield _gauge(
                "prefixcache_pool_size_bytes",
                "Memory of all blocks.",
                sizes.num_blocks * sizes.block_bytes,
            )
        yield _gauge(
            "prefixcache_smallest_hit_tokens",
            "Length of the shortest prefix that can be reused.",
            counts.block_size if self._handlers.settings.partial is Partial.OFF else 1,
        )
        yield _gauge("prefixcache_tree_nodes", "Nodes of all radix trees.", counts.nodes)
        yield _gauge(
            "prefixcache_ghost_blocks", "Evicted blocks that are still remembered.", counts.ghosts
        )
        yield _gauge("prefixcache_leases", "Leases that are out.", counts.num_leases)
        yield _gauge("prefixcache_flights", "Prefixes that are being computed.", counts.num_flights)
        yield _gauge(
            "prefixcache_waiting_requests", "Requests that wait for a flight.", counts.waiting
        )

    def _tier(self, counts: Counts) -> Iterator[Metric]:
        names = {"host": counts.host_blocks, "disk": counts.disk_blocks}
        if not any(names.values()) and not counts.has_remote:
            return
        tier = ("tier",)
        if any(names.values()):
            yield _gauge(
                "prefixcache_tier_capacity_blocks",
                "Blocks that fit below the pool.",
                {(name,): number for name, number in names.items() if number},
                tier,
            )
            yield _gauge(
                "prefixcache_tier_blocks",
                "Of these, those that hold something.",
                {
                    (name,): used
                    for name, used in (("host", counts.host_used), ("disk", counts.disk_used))
                    if names[name]
                },
                tier,
            )
            yield self._holdings()
        names["remote"] = counts.has_remote
        yield _counter(
            "prefixcache_hauled_blocks",
            "Blocks that were copied to a tier, and from it to the pool.",
            {
                ways: number
                for ways, number in (
                    (("host", "down"), counts.sunk - counts.disk_written + counts.disk_moved),
                    (
                        ("host", "up"),
                        counts.restored - counts.disk_restored - counts.remote_restored,
                    ),
                    (("disk", "down"), counts.disk_written),
                    (("disk", "up"), counts.disk_restored),
                    (("remote", "down"), counts.remote_stored),
                    (("remote", "up"), counts.remote_restored),
                )
                if names[ways[0]]
            },
            ("tier", "way"),
        )
        yield _counter(
            "prefixcache_spoilt_blocks",
            "Blocks that lay below not as they were written: computed again, read by nobody.",
            counts.spoilt,
        )
        yield _counter(
            "prefixcache_hauls_declined",
            "Requests that did not wait for what lies below the pool: computing it is about as "
            "quick (slow), as much as may be was on its way (busy), there was no room for it.",
            {
                ("slow",): counts.declined_slow,
                ("busy",): counts.declined_busy,
                ("room",): counts.declined_room,
            },
            ("reason",),
        )
        if counts.has_remote:
            yield _counter(
                "prefixcache_remote_unstored_blocks",
                "Blocks that should have been stored for other machines: the store was too slow, "
                "or failed.",
                counts.remote_unstored,
            )
            yield _counter(
                "prefixcache_remote_wrong_blocks",
                "Blocks that came from there and were not what their names say: read by nobody.",
                counts.remote_wrong,
            )
            yield _counter(
                "prefixcache_remote_late",
                "Questions that the store did not answer in time.",
                counts.remote_late,
            )
        gains = {
            ("host",): counts.host_advantage,
            ("disk",): counts.disk_advantage,
            ("remote",): counts.remote_advantage,
        }
        if any(gains.values()):
            yield _gauge(
                "prefixcache_fetch_advantage",
                "How many times as long as fetching it computing would have taken, of late.",
                {named: gain for named, gain in gains.items() if gain},
                tier,
            )

    def _holdings(self) -> Metric:
        cache = self._handlers.backing.cache
        told = [] if cache is None else cache.holdings(MOST_SERIES)
        return _gauge(
            "prefixcache_tenant_tier_blocks",
            f"Blocks that a tenant has below the pool; of {MOST_SERIES} tenants at most.",
            {
                (escape(one.tenant), tier): number
                for one in told
                for tier, number in (("host", one.host), ("disk", one.disk))
            },
            ("tenant", "tier"),
        )

    def _eviction(self, counts: Counts) -> Iterator[Metric]:
        yield _counter("prefixcache_evicted_blocks", "Blocks evicted.", counts.evicted)
        if counts.eviction_age_s is not None:
            yield _gauge(
                "prefixcache_eviction_age_seconds",
                "Time since the last use of what was evicted last; absent before an eviction.",
                counts.eviction_age_s,
            )


def _labels(space: Namespace) -> tuple[str, str, str]:
    return escape(space.tenant), escape(space.model), escape(space.adapter)


def _buckets(row: list[int]) -> tuple[list[tuple[str, float]], float]:
    """Give a histogram's cumulative buckets and its sum.  A row's bucket k is below 2^k ns."""
    count, buckets = sum(row[:_FIRST_BITS]), []
    for bits in range(_FIRST_BITS, _LAST_BITS + 1):
        count += row[bits]
        buckets.append((repr((1 << bits) / 1e9), float(count)))
    buckets.append(("+Inf", float(count + sum(row[_LAST_BITS + 1 : NUM_BUCKETS]))))
    return buckets, row[SUM] / 1e9


Samples = float | Mapping[Any, float]


def _gauge(name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    return _fill(GaugeMetricFamily(name, text, labels=labels), samples)


def _counter(
    name: str,
    text: str,
    samples: Samples,
    labels: tuple[str, ...] = (),
) -> Metric:
    return _fill(CounterMetricFamily(name, text, labels=labels), samples)


def _fill(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    if isinstance(samples, Mapping):
        for labels, value in samples.items():
            family.add_metric(labels, value)
    else:
        family.add_metric((), float(samples))
    return family


class _One(Collector):
    """One family, as `generate_latest` wants it."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


async def exposition(scrape: Scrape) -> bytes:
    """Write all families in Prometheus' text format.  Other work of the loop runs in between."""
    families = list(scrape.collect())  # at once: the sums must be of one moment
    parts = []
    for family in families:
        parts.append(generate_latest(_One(family)))
        await asyncio.sleep(0)
    return b"".join(parts)
