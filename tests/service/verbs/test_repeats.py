"""A request id stands for one request: repeated it gets its answer, with another one a refusal."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any, Protocol

import grpc
import pytest

from patience import PATIENCE_S
from prefixcache.client import codec, unary
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, ServiceProcess, running, sizes

PROMPT = pack(range(8))


class Refused(Exception):
    """What the service answered instead: a code and a message."""


class Caller(Protocol):
    """One worker, by either way of calling."""

    def ask(self, verb: str, **fields: Any) -> Any: ...


class Unary:
    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._key = ""

    def ask(self, verb: str, **fields: Any) -> Any:
        rpc = unary.RPCS[verb]
        method: Any = self._channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        try:
            request = rpc.request(**fields)
            if verb != "snapshot":
                request.worker_key = self._key
            answer = method(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from None
        if verb == "attach":
            self._key = answer.worker_key
        return answer


class Session:
    """One op at a time."""

    def __init__(self, channel: grpc.Channel) -> None:
        method: Any = channel.stream_stream(
            unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )

        self._out: queue.Queue[pb.OpBatch | None] = queue.Queue()
        self._call = method(iter(self._out.get, None), timeout=PATIENCE_S)

    def ask(self, verb: str, **fields: Any) -> Any:
        batch = pb.OpBatch()
        getattr(batch.ops.add(id=1), verb).CopyFrom(unary.RPCS[verb].request(**fields))
        self._out.put(batch)
        (result,) = next(self._call).results
        if result.HasField("error"):
            code = next(one for one in grpc.StatusCode if one.value[0] == result.error.code)
            raise Refused(code.name, result.error.message)
        return getattr(result, verb)

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("r")
    with running(f"unix:{folder}/s.sock", *sizes(64, 4)) as service:
        yield service


@pytest.fixture(params=["unary", "session"])
def caller(service: ServiceProcess, request: pytest.FixtureRequest) -> Iterator[Caller]:
    with grpc.insecure_channel(service.target) as channel:
        one: Unary | Session = Unary(channel) if request.param == "unary" else Session(channel)
        layout = pb.Layout()
        codec.write_layout(LAYOUT, layout)
        one.ask("attach", namespace=pb.Namespace(model="tiny"), layout=layout)
        yield one
        one.ask("detach")
        if isinstance(one, Session):
            one.close()


def lease(caller: Caller, tokens: bytes = PROMPT, **more: Any) -> int:
    return int(caller.ask("acquire", tokens=tokens, **more).grant.lease)


def held(caller: Caller) -> list[tuple[int, int, int]]:
    """All that leases hold."""
    leases = caller.ask("snapshot").leases
    return [(one.lease, one.num_committed, one.num_blocks) for one in leases]


FIRST: dict[str, dict[str, Any]] = {
    "commit": {"num_tokens": 8},
    "extend": {"num_tokens": 20},
    "fork": {"count": 2},
    "truncate": {"num_tokens": 6},
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("commit", {"num_tokens": 7}),
    ("commit", {"num_tokens": 8, "new_tokens": pack([1])}),
    ("extend", {"num_tokens": 24}),
    ("fork", {"count": 3}),
    ("fork", {"count": 2, "shared_table": True}),
    ("truncate", {"num_tokens": 5}),
]


@pytest.mark.parametrize("verb", FIRST)
def test_the_same_request_gets_the_same_answer_and_is_done_once(caller: Caller, verb: str) -> None:
    own = lease(caller)
    caller.ask("commit", lease=own, num_tokens=8)
    once = caller.ask(verb, lease=own, request_id="r", **FIRST[verb])
    before = held(caller)
    assert caller.ask(verb, lease=own, request_id="r", **FIRST[verb]) == once
    assert held(caller) == before


@pytest.mark.parametrize(("verb", "other"), OTHERS)
def test_another_request_under_the_same_id_is_refused_and_changes_nothing(
    caller: Caller, verb: str, other: dict[str, Any]
) -> None:
    own = lease(caller)
    caller.ask("commit", lease=own, num_tokens=8)
    caller.ask(verb, lease=own, request_id="r", **FIRST[verb])
    before = held(caller)
    with pytest.raises(Refused, match=rf"(?s)INVALID_ARGUMENT.*'r'.*{verb} of lease {own}\b"):
        caller.ask(verb, lease=own, request_id="r", **other)
    assert held(caller) == before


def test_an_id_that_was_another_lease_s_is_refused(caller: Caller) -> None:
    """Whoever is told "8 are committed" believes it."""
    first, second = lease(caller), lease(caller, pack(range(100, 108)))
    assert caller.ask("commit", lease=first, num_tokens=8, request_id="r").num_tokens == 8
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        caller.ask("commit", lease=second, num_tokens=8, request_id="r")
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        caller.ask("truncate", lease=first, num_tokens=8, request_id="r")
    assert caller.ask("commit", lease=second, num_tokens=8, request_id="s").num_tokens == 8


def test_an_answer_dies_with_its_lease(caller: Caller) -> None:
    own = lease(caller)
    caller.ask("commit", lease=own, num_tokens=8, request_id="r")
    caller.ask("release", lease=own)
    with pytest.raises(Refused, match=r"NOT_FOUND|FAILED_PRECONDITION"):
        caller.ask("commit", lease=own, num_tokens=8, request_id="r")
    other = lease(caller)
    assert caller.ask("commit", lease=other, num_tokens=8, request_id="r").num_tokens == 8


def test_an_acquire_under_the_id_of_another_is_refused(caller: Caller) -> None:
    own = lease(caller, request_id="a")
    assert lease(caller, request_id="a") == own
    for other in ({"tokens": pack(range(9))}, {"tokens": PROMPT, "reserve": 4}):
        with pytest.raises(Refused, match=r"INVALID_ARGUMENT.*'a'.*id of its own"):
            lease(caller, request_id="a", **other)
    caller.ask("release", lease=own)
    assert lease(caller, pack(range(9)), request_id="a") != own
