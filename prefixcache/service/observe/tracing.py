"""Tracing by OpenTelemetry: one span per unary call, one per verb of a session's message.

```
acquire ────────────────          a unary call; a child of the caller's span, if it sent one
acquire ───  (prefixcache.ops 16) a message of a session: never one span per op
extend  ──   (prefixcache.ops 64)
```
Spans are made when their work is done, and sent by a thread of the library.  Needs the extra
`tracing`; the standard variables (OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, …) work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from time import time_ns
from typing import Any

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from prefixcache import __version__
from prefixcache.service.failures import Failures

_DELAY_MS = 1000


class Tracer:
    """Makes spans and sends them to a collector.

    Args:
        endpoint: where it takes OTLP over gRPC, as http://127.0.0.1:4317; https for TLS.
        failures: is told when it ends by an error: calls go on without spans.
    """

    def __init__(self, endpoint: str, failures: Failures) -> None:
        self._failures = failures
        resource = Resource.create({"service.name": "prefixcache", "service.version": __version__})
        exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https:"))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS)
        )
        self._tracer = self._provider.get_tracer("prefixcache", __version__)

    def traced(self, name: str, call: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        """Wrap a unary call in a span."""

        async def wrapped(request: Any, context: Any) -> Any:
            span = self._failures.spare("tracing", self._begin, name, context)
            try:
                return await call(request, context)
            except BaseException:
                self._failures.spare("tracing", _mark, span, context)
                raise
            finally:
                if span is not None:
                    self._failures.spare("tracing", span.end)

        return wrapped

    def _begin(self, name: str, context: Any) -> Span:
        carrier = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        return self._tracer.start_span(
            f"prefixcache/{name}", propagate.extract(carrier), SpanKind.SERVER
        )

    def message(self, verbs: Mapping[str, tuple[int, int]], worker: str) -> None:
        """Make the spans of a message that has just been answered.

        Args:
            verbs: by verb, how many ops there were and how many ns all of them took.
            worker: whose they were.
        """
        now = time_ns()
        for verb, (count, ns) in verbs.items():
            span = self._tracer.start_span(
                f"prefixcache/{verb}",
                kind=SpanKind.SERVER,
                attributes={"prefixcache.ops": count, "prefixcache.worker": worker},
                start_time=now - ns,
            )
            span.end(now)

    def close(self) -> None:
        """Send what is left.  Blocks for some seconds if nobody takes it.  Idempotent."""
        self._provider.shutdown()


def _mark(span: Span | None, context: Any) -> None:
    """Say in a span that its call has failed."""
    if span is None:
        return
    text = context.details() or "cancelled"
    span.set_status(Status(StatusCode.ERROR, text if isinstance(text, str) else text.decode()))
