"""Texts that clients choose: none that cannot be shown comes in, and none goes out as it is."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from patience import PATIENCE_S
from prefixcache.client import codec, unary
from prefixcache.service.observe import log
from prefixcache.texts import MAX_TEXT, escape, is_plain
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, ServiceProcess, running, sizes

BAD = {
    "title": "m\x1b]0;owned\x07",
    "clipboard": "m\x1b]52;c;ZWNobyBoaQ==\x07",
    "clear": "m\x1b[2J",
    "c1": "m\x9b2J",
    "newline": "m\n2026-01-01 [info] all is well",
    "return": "m\rx",
    "null": "m\x00x",
    "line separator": "m\u2028x",
    "bidi override": "m\u202ex",
    "bidi isolate": "m\u2066x",
    "zero width": "m\u200bx",
    "byte order mark": "m\ufeffx",
    "filler": "m\u3164x",
    "variation": "m\ufe0fx",
    "tag": "m\U000e0041x",
    "private": "m\ue000x",
    "long": "m" * (MAX_TEXT + 1),
}
REQUESTS = {verb: rpc.request for verb, rpc in unary.RPCS.items()}
SESSION = {
    field.name: field.message_type._concrete_class
    for field in pb.Op.DESCRIPTOR.oneofs_by_name["op"].fields
}


def text_fields(descriptor: Descriptor, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Give the way to every text of a message."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (*above, field.name)
        elif field.message_type is not None:
            yield from text_fields(field.message_type, (*above, field.name))


def put(message: Any, way: tuple[str, ...], text: str) -> None:
    for name in way[:-1]:
        message = getattr(message, name)
        message.SetInParent()
    if message.DESCRIPTOR.fields_by_name[way[-1]].is_repeated:
        getattr(message, way[-1]).append(text)
    else:
        setattr(message, way[-1], text)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running(f"unix:{tmp_path_factory.mktemp('t')}/s.sock", *sizes(64, 4)) as service:
        yield service


@pytest.fixture(scope="module")
def channel(service: ServiceProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.target) as channel:
        yield channel


def attach_request() -> pb.AttachRequest:
    request = pb.AttachRequest()
    codec.write_namespace(Namespace("tiny"), request.namespace)
    codec.write_layout(LAYOUT, request.layout)
    return request


@pytest.fixture(scope="module")
def key(channel: grpc.Channel) -> str:
    return str(call(channel, "attach", attach_request()).worker_key)


def call(channel: grpc.Channel, verb: str, request: Any) -> Any:
    rpc = unary.RPCS[verb]
    method: Any = channel.unary_unary(
        rpc.path, rpc.request.SerializeToString, rpc.response.FromString
    )
    return method(request, timeout=PATIENCE_S)


UNARY = [(v, way) for v, cls in REQUESTS.items() for way in text_fields(cls.DESCRIPTOR)]


@pytest.mark.parametrize(("verb", "way"), UNARY, ids=lambda one: str(one))
def test_no_text_of_any_call_has_what_does_not_show_itself(
    channel: grpc.Channel, key: str, verb: str, way: tuple[str, ...]
) -> None:
    if way == ("worker_key",) and verb != "lookup":
        return  # a secret of the service's making: a wrong one names no worker
    for bad in BAD.values():
        request = attach_request() if verb == "attach" else REQUESTS[verb]()
        if "worker_key" in request.DESCRIPTOR.fields_by_name and verb != "attach":
            request.worker_key = key
        put(request, way, bad)
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, verb, request)
        told = refused.value.details()
        assert is_plain(told)
        if way != ("worker_key",):
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, told


IN_SESSION = [(v, way) for v, cls in SESSION.items() for way in text_fields(cls.DESCRIPTOR)]


def test_no_text_of_any_op_has_either_and_the_other_ops_go_on(channel: grpc.Channel) -> None:
    def ops() -> Iterator[pb.OpBatch]:
        batch = pb.OpBatch()
        batch.ops.add(id=1, attach=attach_request())
        for number, (verb, way) in enumerate(IN_SESSION):
            for place, bad in enumerate(BAD.values()):
                op = batch.ops.add(id=1000 + number * 100 + place)
                if verb == "attach":
                    op.attach.CopyFrom(attach_request())
                put(getattr(op, verb), way, bad)
        batch.ops.add(id=2, lookup=pb.LookupRequest(tokens=pack([1])))
        yield batch

    method: Any = channel.stream_stream(
        unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
    )
    results = next(iter(method(ops(), timeout=PATIENCE_S))).results
    assert len(results) == len(IN_SESSION) * len(BAD) + 2
    for result in results:
        if result.id >= 1000:
            assert result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], result
            assert is_plain(result.error.message)
        else:
            assert not result.HasField("error")


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_watcher_is_checked_as_well(channel: grpc.Channel, bad: str) -> None:
    method: Any = channel.unary_stream(
        unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
    )
    with pytest.raises(grpc.RpcError) as refused:
        next(method(pb.WatchRequest(namespace=pb.Namespace(model=bad)), timeout=PATIENCE_S))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_that_are_no_text_are_refused(channel: grpc.Channel) -> None:
    surrogate = b"\x0a\x05\x0a\x03\xed\xa0\x80"  # namespace { model: "\ud800" }
    method: Any = channel.unary_unary(unary.RPCS["lookup"].path, bytes, bytes)
    with pytest.raises(grpc.RpcError) as refused:
        method(surrogate, timeout=PATIENCE_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_letters_of_every_writing_are_welcome(channel: grpc.Channel) -> None:
    for model in ("mistral-7b@main", "модель", "模型", "नमूना", "🦙 llama", "e\u0301"):
        request = attach_request()
        request.namespace.model = model
        call(channel, "attach", request)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("bad", [text for name, text in BAD.items() if name != "long"])
def test_the_log_shows_no_control_characters_of_others(
    monkeypatch: pytest.MonkeyPatch, bad: str, terminal: bool
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    try:
        root.handlers.clear()
        log.set_up("info")
        told = structlog.get_logger("texts")
        told.info(bad, text=bad, more=[bad], deep={bad: (bad, {bad})}, error=ValueError(bad))
        try:
            raise ValueError(bad)
        except ValueError:
            told.exception("failed")
            logging.getLogger("library").exception("failed with %s", bad)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.configure(**before)
    shown = screen.getvalue()
    assert bad not in shown
    kept = shown.replace("\n", "") if bad.find("\n") < 0 else shown
    for char in set(bad) - {"\x1b", "\n"}:
        assert is_plain(char) or char not in kept
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert not any(line.startswith("2026-01-01") for line in shown.split("\n"))


def test_escaping_leaves_what_is_plain_and_is_one_line() -> None:
    assert escape("модель 🦙") == "модель 🦙"
    assert all(is_plain(escape(bad)) for bad in BAD.values())
    assert escape("\ud800") == "\\ud800"
