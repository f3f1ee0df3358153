"""Answers of the verbs of workers and leases."""

from __future__ import annotations

from array import array

from prefixcache.client.codec.words import (
    read_copies,
    read_ledger,
    read_pool,
    read_segments,
    write_copies,
    write_ledger,
    write_segments,
)
from prefixcache.types import (
    Attachment,
    Committed,
    Ended,
    Grant,
    LeaseId,
    Released,
    TableUpdate,
)
from prefixcache.v1 import prefixcache_pb2 as pb


def read_attach(message: pb.AttachResponse) -> Attachment:
    """Read an answer of attach.  The key and the limits stay with the message."""
    return Attachment(message.worker, read_pool(message.pool), message.ttl_s)


def write_grant(answer: Grant, message: pb.Grant) -> None:
    """Fill `message`: one lease."""
    message.block_table = answer.block_table.tobytes()
    _write_rest(answer, message)


def _write_rest(answer: Grant, message: pb.Grant) -> None:
    message.lease = answer.lease
    message.num_cached = answer.num_cached
    message.num_pending = answer.num_pending
    if answer.copies:
        write_copies(answer.copies, message.copies)
    write_ledger(answer.ledger, message.ledger)
    message.ttl_s = answer.ttl_s
    if answer.approximate:
        write_segments(answer.segments, message.segments)
        message.approximate = True


def read_grant(message: pb.Grant, shared_table: bytes = b"") -> Grant:
    """Read what `write_grant` wrote."""
    return Grant(
        LeaseId(message.lease),
        array("i", message.block_table or shared_table),
        message.num_cached,
        message.num_pending,
        read_copies(message.copies),
        read_ledger(message.ledger),
        message.ttl_s,
        read_segments(message.segments),
        message.approximate,
    )


def write_acquire(answer: Grant, message: pb.AcquireResponse) -> None:
    """Fill `message`."""
    write_grant(answer, message.grant)


def read_acquire(message: pb.AcquireResponse) -> Grant:
    """Read what `write_acquire` wrote."""
    return read_grant(message.grant)


def write_fork(
    answer: tuple[Grant, ...], message: pb.ForkResponse, *, shared: bool = False
) -> None:
    """Fill `message`: the children, and once for all, if `shared`, their table."""
    message.SetInParent()
    if shared:
        message.shared_table = answer[0].block_table.tobytes()
    write = _write_rest if shared else write_grant
    for grant in answer:
        write(grant, message.children.add())


def read_fork(message: pb.ForkResponse) -> tuple[Grant, ...]:
    """Read what `write_fork` wrote, in either form."""
    table = message.shared_table
    return tuple([read_grant(child, table) for child in message.children])


def write_commit(answer: Committed, message: pb.CommitResponse) -> None:
    """Fill `message`."""
    message.num_tokens = answer.num_tokens
    message.num_indexed = answer.num_indexed


def read_commit(message: pb.CommitResponse) -> Committed:
    """Read what `write_commit` wrote."""
    return Committed(message.num_tokens, message.num_indexed)


def write_update(answer: TableUpdate, message: pb.ExtendResponse | pb.TruncateResponse) -> None:
    """Fill `message`: how a block table changed."""
    message.keep = answer.keep
    if answer.blocks:
        message.blocks = answer.blocks.tobytes()
    if answer.copies:
        write_copies(answer.copies, message.copies)


def read_update(message: pb.ExtendResponse | pb.TruncateResponse) -> TableUpdate:
    """Read what `write_update` wrote."""
    return TableUpdate(message.keep, array("i", message.blocks), read_copies(message.copies))


def write_release(answer: Released, message: pb.ReleaseResponse) -> None:
    """Fill `message`."""
    message.num_freed = answer.num_freed


def read_release(message: pb.ReleaseResponse) -> Released:
    """Read what `write_release` wrote."""
    return Released(message.num_freed)


def write_renew(answer: int, message: pb.RenewResponse) -> None:
    """Fill `message` with how many are in line."""
    message.SetInParent()
    message.num_in_line = answer


def read_renew(message: pb.RenewResponse) -> int:
    """Read what `write_renew` wrote."""
    return int(message.num_in_line)


def write_nothing(answer: None, message: pb.CancelResponse) -> None:
    """Say in `message` that the op was done; there is nothing else to say."""
    message.SetInParent()


def read_nothing(message: pb.CancelResponse) -> None:
    """Read what `write_nothing` wrote."""


def write_detach(answer: Ended, message: pb.DetachResponse) -> None:
    """Fill `message`."""
    message.leases.extend(answer.leases)
    message.num_freed = answer.num_freed
    message.num_quarantined = answer.num_quarantined


def read_detach(message: pb.DetachResponse) -> Ended:
    """Read what `write_detach` wrote."""
    leases = tuple([LeaseId(lease) for lease in message.leases])
    return Ended(leases, message.num_freed, message.num_quarantined)
