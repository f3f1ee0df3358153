"""Words survive the wire, and errors arrive as what they were."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from prefixcache import errors
from prefixcache.client import calls, codec
from prefixcache.client.ops import Step, read_result
from prefixcache.outline import Branch, Extent, NamespaceOutline, Order, Outline
from prefixcache.types import (
    COUNTS,
    BlockId,
    Committed,
    Copy,
    Ended,
    Explanation,
    Grant,
    HoldingInfo,
    Layout,
    LeaseId,
    LeaseInfo,
    Ledger,
    Lookup,
    Namespace,
    PoolHandle,
    Released,
    Reset,
    Snapshot,
    Span,
    TableUpdate,
    WorkerId,
    pack,
)
from prefixcache.v1 import prefixcache_pb2 as pb

SPACE = Namespace("model", "adapter", "tenant", "salt")
SHOWN = Namespace("model", "adapter", "tenant")
"""Answers never have a salt."""
LEDGER = Ledger(1, 2, 3, 4, 5, 6)
COPIES = (Copy(BlockId(0), BlockId(9), 3), Copy(BlockId(7), BlockId(0), 1))
GRANT = Grant(LeaseId(2**40), array("i", [0, 5, 2**30]), 7, 2, COPIES, LEDGER, 30.0)
BARE = Grant(LeaseId(1), array("i"), 0, 0, (), Ledger(), 0.5)
LEASE = LeaseInfo(LeaseId(3), WorkerId("w1"), SHOWN, 10, 8, 3, 12.5)
ANSWERS: list[tuple[str, Any]] = [
    ("acquire", GRANT),
    ("acquire", BARE),
    ("commit", Committed(0, 0)),
    ("commit", Committed(12, 3)),
    ("extend", TableUpdate(0, array("i"))),
    ("extend", TableUpdate(3, array("i", [0, 4]), COPIES)),
    ("truncate", TableUpdate(1, array("i", [8]), COPIES)),
    ("fork", ()),
    ("fork", (GRANT, BARE)),
    ("release", Released(0)),
    ("release", Released(4)),
    ("renew", 3),
    ("cancel", None),
    ("detach", Ended()),
    ("detach", Ended((LeaseId(1), LeaseId(2**40)), 3, 4)),
    ("lookup", Lookup(0, 0, 0, 0)),
    ("lookup", Lookup(9, 4, 2, 1)),
    ("explain", Explanation((), Ledger(), None, b"", 0)),
    ("explain", Explanation((Span(0, 4, "hit"), Span(4, 9, "evicted")), LEDGER, 0, pack([7]), 2)),
    ("explain", Explanation((), Ledger(), None, b"", 0, holding=HoldingInfo("", 0, 0, 0, 0))),
    ("explain", Explanation((), Ledger(), None, b"", 0, holding=HoldingInfo("acme", 1, 2, 3, 4))),
    ("reset", Reset(0, 0)),
    ("reset", Reset(5, 2)),
    ("snapshot", Snapshot(block_size=16)),
    (
        "snapshot",
        Snapshot(
            **{name: number for number, name in enumerate(COUNTS, 1)}
            | {"ledger": LEDGER, "has_remote": True},
            leases=(LEASE,),
            namespaces={SHOWN: LEDGER},
            holdings=(HoldingInfo("acme", 1, 2, 3, 4), HoldingInfo("", 0, 0, 1, 0)),
        ),
    ),
]


@pytest.mark.parametrize(("verb", "answer"), ANSWERS)
def test_every_answer_survives_the_wire_also_when_it_is_all_zeros(verb: str, answer: Any) -> None:
    result = pb.OpResult(id=1)
    write = codec.WRITE.get(verb, codec.write_snapshot)
    list(write(answer, getattr(result, verb)) or ())
    arrived = pb.OpResult.FromString(result.SerializeToString())
    assert arrived.WhichOneof("result") == verb
    assert read_result(arrived) == answer


def test_an_outline_survives_the_wire() -> None:
    extents = Extent(1, 2, 30, 4), Extent()
    zeros = Branch(0, 0, 0, 0, b"", *extents, 0, 0, False, False, None, 0.0, None, None, 0)
    full = Branch(1, 8, 9, 3, pack([7]), *extents[::-1], 5, 6, True, True, 1.5, 0.5, 7, 0, 8)
    for outline in (
        Outline(16, (), 0),
        Outline(4, (NamespaceOutline(SHOWN, (zeros, full)), NamespaceOutline(SHOWN, ())), 3),
    ):
        message = pb.TreeResponse()
        list(codec.write_outline(outline, message))
        arrived = pb.TreeResponse.FromString(message.SerializeToString())
        assert codec.read_outline(arrived) == outline
    for order in Order:
        asked = calls.outline(SPACE, order=order, max_branches=5).request
        assert codec.read_order(asked.order) is order
    assert codec.read_order(pb.TreeRequest().order) is Order.TOKENS


def test_a_pool_handle_survives_the_wire() -> None:
    for kind in codec.POOL_KINDS:
        handle = PoolHandle(kind, "name", 5825, 16, Layout(30, 3, 64, "float16"), 2**63 + 1, 4096)
        message = pb.PoolHandle()
        codec.write_pool(handle, message)
        assert codec.read_pool(pb.PoolHandle.FromString(message.SerializeToString())) == handle


@pytest.mark.parametrize(
    "cls",
    [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.CacheError)],
)
def test_every_error_arrives_as_what_it_was(cls: type[errors.CacheError]) -> None:
    error = cls("why, with numbers: 42")
    if isinstance(error, errors.PoolExhausted):
        error.retry_after_s = 1.5
    message = pb.Status()
    codec.write_error(error, message)
    arrived = codec.read_error(message)
    assert type(arrived) is cls
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_an_error_of_a_newer_service_arrives_by_its_status() -> None:
    arrived = codec.make_error("QuotaExceeded", "RESOURCE_EXHAUSTED", "too much", 2.0)
    assert isinstance(arrived, errors.PoolExhausted)
    assert arrived.retry_after_s == 2.0
    assert type(codec.make_error("", "DATA_LOSS", "gone")) is errors.CacheError
    assert "does not know" in str(read_result(pb.OpResult(id=1)))


def test_a_step_is_cut_only_where_the_limits_demand_it() -> None:
    step = Step(iter(range(100)))
    replies = [step.ask("lookup", tokens=pack(range(number * 25))) for number in range(10)]
    (whole,) = step.cut(10_000, 100)
    assert [op.id for op in pb.OpBatch.FromString(whole).ops] == list(range(10))
    parts = step.cut(800, 100)
    assert all(len(part) <= 800 for part in parts)
    sent = [op.id for part in parts for op in pb.OpBatch.FromString(part).ops]
    refused = [reply.op_id for reply in replies if reply.done]
    assert sorted(sent + refused) == list(range(10))
    assert sent == sorted(sent)
    assert refused
    for reply in replies:
        if reply.done:
            with pytest.raises(errors.InvalidRequest, match="800 bytes"):
                reply.result()


def test_an_answer_asked_for_too_early_says_so() -> None:
    reply = Step(iter(range(9))).ask("snapshot")
    with pytest.raises(errors.InvalidRequest, match="leave the `with` block"):
        reply.result()


def test_numbers_that_no_message_can_hold_fail_alone() -> None:
    step = Step(iter(range(9)))
    huge = step.ask("extend", lease=1, num_tokens=2**70)
    fine = step.ask("extend", lease=1, num_tokens=20)
    assert isinstance(huge.error, errors.InvalidRequest)
    (whole,) = step.cut(1000, 100)
    assert [op.id for op in pb.OpBatch.FromString(whole).ops] == [fine.op_id]


def test_a_text_that_is_no_utf_8_is_shown_and_said_to_be() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"^tenant is '\\udcff': no UTF-8 can hold"):
        codec.put(pb.Namespace(), tenant="\udcff")
    with (
        pytest.raises(errors.InvalidRequest, match=r"^reset: '\\udcff': no UTF-8 can hold"),
        codec.no_foreign_errors("reset"),
    ):
        pb.Namespace(tenant="\udcff")
