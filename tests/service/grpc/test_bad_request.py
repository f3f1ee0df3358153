"""A message is read only if what it becomes in memory is bounded, too."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from prefixcache.service.grpc.bad_request import BadRequest, count_parts, reader
from prefixcache.service.verbs.workers import MOST_FINISHED
from prefixcache.v1 import prefixcache_pb2 as pb

NO_END = 1 << 60
NAMESPACE = pb.Namespace(model="m", adapter="a", tenant="t", salt="s")
FULL = pb.AcquireRequest(
    worker_key="k",
    namespace=NAMESPACE,
    namespace_index=1,
    tokens=bytes(8),
    reserve=1,
    wait_s=1.0,
    request_id="r",
    recompute=True,
    min_partial=200,
)


def naive_count(message: Any) -> int:
    """Count the fields of a message that was read."""
    count = 0
    for field, value in message.ListFields():
        for one in value if field.is_repeated else [value]:
            count += 1 + (naive_count(one) if field.message_type else 0)
    return count


def drawn(rng: random.Random) -> pb.OpBatch:
    batch = pb.OpBatch()
    for _ in range(rng.randrange(20)):
        op = batch.ops.add(id=rng.choice([0, 1, 2**63]))
        match rng.randrange(4):
            case 0:
                op.acquire.CopyFrom(FULL)
            case 1:
                op.attach.namespace.CopyFrom(NAMESPACE)
                op.attach.finished.extend(["", "key"] * rng.randrange(4))
            case 2:
                op.renew.stalled_s = rng.choice([0.0, 1.5])
            case 3:
                op.snapshot.SetInParent()
    return batch


def test_parts_are_those_of_the_message_that_is_read() -> None:
    rng = random.Random(7)
    for _ in range(200):
        batch = drawn(rng)
        data = batch.SerializeToString()
        assert count_parts(data, pb.OpBatch.DESCRIPTOR, NO_END) == naive_count(batch)


def test_a_message_that_ends_anywhere_or_has_any_byte_changed_raises_nothing_else() -> None:
    rng = random.Random(8)
    data = bytearray(drawn(rng).SerializeToString())
    for at in range(len(data)):
        for odd in (data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]):
            try:
                count_parts(bytes(odd), pb.OpBatch.DESCRIPTOR, NO_END)
            except DecodeError:
                continue


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (pb.OpBatch, b"\x0a\x00" * 500_000),  # ops of nothing
        (pb.OpBatch, b"\x0a\x04\x12\x02\x0a\x00" * 200_000),  # each with an attach, a namespace
        (pb.OpBatch, b"\x0a\x80\x89\x7a" + b"\x12\x00\x1a\x00" * 500_000),  # one op, many verbs
        (pb.AttachRequest, b"\x3a\x00" * 500_000),  # keys of workers that have finished
        (pb.LookupRequest, b"\x0a\x00" * 500_000),  # one namespace, again and again
        (pb.LookupRequest, b"\xf8\x07\x00" * 500_000),  # a field that nobody knows
    ],
)
def test_a_message_of_tiny_parts_is_refused_before_it_is_read(message: Any, body: bytes) -> None:
    is_batch = message is pb.OpBatch
    told = reader(message, 4096 if is_batch else 0)(body)
    assert isinstance(told, BadRequest)
    most, fewer = ("67,584", "ops at a time (--max-ops)") if is_batch else ("2,048", "of them")
    assert f"more than {most} fields: send fewer {fewer}" in told


def test_as_many_parts_as_are_allowed_are_read_and_not_one_more() -> None:
    read, most = reader(pb.OpBatch, 4096), 67_584
    assert len(read(b"\x0a\x00" * most).ops) == most
    assert isinstance(read(b"\x0a\x00" * (most + 1)), BadRequest)


def test_as_many_ops_as_are_allowed_are_read_with_all_their_fields() -> None:
    batch = pb.OpBatch(ops=[pb.Op(id=2**63, acquire=FULL)] * 4096)
    assert reader(pb.OpBatch, 4096)(batch.SerializeToString()) == batch
    alone = pb.OpBatch(ops=[pb.Op(id=1, acquire=pb.AcquireRequest(tokens=bytes(8 << 20)))])
    assert reader(pb.OpBatch, 4096)(alone.SerializeToString()) == alone


def test_an_attach_that_speaks_for_as_many_lost_workers_as_are_heard_is_read() -> None:
    attach = pb.AttachRequest(finished=["0" * 64] * MOST_FINISHED)
    assert reader(pb.AttachRequest)(attach.SerializeToString()) == attach
