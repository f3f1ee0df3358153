"""Tracing: a real collector gets one span per call, and one per verb of a message."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from prefixcache.client import codec
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.service_process import LAYOUT, running, sizes

pytest.importorskip("opentelemetry.sdk", reason="the extra 'tracing' is not installed")
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A gRPC server that takes spans as any collector does."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

    spans: list[Any] = []

    class Collector(trace_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            return trace.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(None).wait()


def attributes(span: Any) -> dict[str, Any]:
    return {
        entry.key: entry.value.int_value or entry.value.string_value for entry in span.attributes
    }


def test_a_collector_gets_a_span_per_call_and_one_per_verb_of_a_message(
    sockets: Path, collector: tuple[str, list[Any]]
) -> None:
    endpoint, spans = collector
    flags = [*sizes(64, 4), "--trace", endpoint]
    with running(f"unix:{sockets}/traced.sock", *flags) as service:
        with grpc.insecure_channel(service.target) as channel:
            stub: Any = PrefixCacheStub(channel)  # type: ignore[no-untyped-call]
            request = pb.LookupRequest(tokens=bytes(8))
            codec.write_namespace(Namespace("model"), request.namespace)
            stub.Lookup(request, metadata=[("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")])
            with pytest.raises(grpc.RpcError):
                stub.Acquire(pb.AcquireRequest(tokens=bytes(8)))
        with prefixcache.connect(service.target) as client:
            session = client.attach("model", LAYOUT, name="traced")
            leases = [session.acquire([number]) for number in range(8)]
            with session.batch() as batch:
                for lease in leases:
                    batch.commit(lease, 1)
            with pytest.raises(InvalidRequest):
                session.acquire(range(1000))
            session.close()
        assert service.stop() == 0
    by_name: dict[str, list[Any]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    (lookup,) = by_name["prefixcache/lookup"]
    assert (lookup.trace_id.hex(), lookup.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    refused = [span for span in by_name["prefixcache/acquire"] if span.status.code == 2]
    assert len(refused) == 1
    assert "no worker has this key" in refused[0].status.message
    (commits,) = by_name["prefixcache/commit"]
    assert attributes(commits) == {"prefixcache.ops": 8, "prefixcache.worker": "traced"}
    assert 0 < commits.end_time_unix_nano - commits.start_time_unix_nano < 10**10
