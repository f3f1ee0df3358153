"""Answers of the verbs that look: lookup, explain, snapshot."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from prefixcache.client.codec.steering import read_quota_info, write_quota_info
from prefixcache.client.codec.words import (
    read_ledger,
    read_namespace,
    show_namespace,
    write_ledger,
)
from prefixcache.types import (
    COUNTS,
    Explanation,
    LeaseId,
    LeaseInfo,
    Lookup,
    PastRequest,
    PinInfo,
    Snapshot,
    Span,
)
from prefixcache.v1 import prefixcache_pb2 as pb

FATES: Final = {
    "hit": pb.FATE_HIT,
    "partial": pb.FATE_PARTIAL,
    "joined": pb.FATE_JOINED,
    "cold": pb.FATE_COLD,
    "evicted": pb.FATE_EVICTED,
    "granularity": pb.FATE_GRANULARITY,
    "resumed": pb.FATE_RESUMED,
}
_FATE_NAMES = {number: name for name, number in FATES.items()}

_PAUSE_EVERY: Final = 200
"""Rows that are written in one go."""

_WHOLE_COUNTS: Final = tuple([name for name in COUNTS if name not in ("ledger", "eviction_age_s")])
"""Those that the message has under the same names, as numbers that are always there."""


def write_lookup(answer: Lookup, message: pb.LookupResponse) -> None:
    """Fill `message`."""
    message.num_tokens = answer.num_tokens
    message.num_hit = answer.num_hit
    message.num_partial = answer.num_partial
    message.num_pending = answer.num_pending


def read_lookup(message: pb.LookupResponse) -> Lookup:
    """Read what `write_lookup` wrote."""
    return Lookup(message.num_tokens, message.num_hit, message.num_partial, message.num_pending)


def write_explain(answer: Explanation, message: pb.ExplainResponse) -> None:
    """Fill `message`."""
    for span in answer.spans:
        message.spans.add(start=span.start, end=span.end, fate=FATES[span.fate])
    write_ledger(answer.ledger, message.ledger)
    if answer.parted_at is not None:
        message.parted_at = answer.parted_at
    message.stored_next = answer.stored_next
    message.num_parted = answer.num_parted
    if answer.resumes_at is not None:
        message.resumes_at = answer.resumes_at
        message.num_same = answer.num_same
    if answer.extra_blocks is not None:
        message.extra_blocks = answer.extra_blocks
    message.num_pending = answer.num_pending
    for namespace, num_tokens in answer.elsewhere:
        show_namespace(namespace, message.elsewhere.add(num_tokens=num_tokens).namespace)
    if answer.past is not None:
        _write_past(answer.past, message.past)


def _write_past(word: PastRequest, message: pb.PastRequest) -> None:
    message.request_id = word.request_id
    message.worker = word.worker
    message.lease = word.lease
    show_namespace(word.namespace, message.namespace)
    message.age_s = word.age_s
    message.num_tokens = word.num_tokens
    message.tokens = word.tokens


def read_explain(message: pb.ExplainResponse) -> Explanation:
    """Read what `write_explain` wrote."""
    return Explanation(
        tuple([Span(m.start, m.end, _FATE_NAMES.get(m.fate, "unknown")) for m in message.spans]),
        read_ledger(message.ledger),
        message.parted_at if message.HasField("parted_at") else None,
        message.stored_next,
        message.num_parted,
        message.resumes_at if message.HasField("resumes_at") else None,
        message.num_same,
        message.extra_blocks if message.HasField("extra_blocks") else None,
        message.num_pending,
        tuple([(read_namespace(m.namespace), m.num_tokens) for m in message.elsewhere]),
        _read_past(message.past) if message.HasField("past") else None,
    )


def _read_past(message: pb.PastRequest) -> PastRequest:
    return PastRequest(
        message.request_id,
        message.worker,
        LeaseId(message.lease),
        read_namespace(message.namespace),
        message.age_s,
        message.num_tokens,
        message.tokens,
    )


def write_snapshot(answer: Snapshot, message: pb.SnapshotResponse) -> Generator[None, None, None]:
    """Fill `message`, all but `service`, pausing after some hundred rows.  O(rows)."""
    for name in _WHOLE_COUNTS:
        setattr(message, name, getattr(answer, name))
    if answer.eviction_age_s is not None:
        message.eviction_age_s = answer.eviction_age_s
    write_ledger(answer.ledger, message.ledger)
    for extra_blocks, tokens in answer.shortage:
        message.shortage.add(extra_blocks=extra_blocks, tokens=tokens)
    for number, info in enumerate(answer.leases, 1):
        lease = message.leases.add(
            lease=info.lease,
            worker=info.worker,
            num_tokens=info.num_tokens,
            num_committed=info.num_committed,
            num_blocks=info.num_blocks,
            expires_in_s=info.expires_in_s,
        )
        show_namespace(info.namespace, lease.namespace)
        if number % _PAUSE_EVERY == 0:
            yield
    yield
    for number, (namespace, ledger) in enumerate(answer.namespaces.items(), 1):
        entry = message.namespaces.add()
        show_namespace(namespace, entry.namespace)
        write_ledger(ledger, entry.ledger)
        if number % _PAUSE_EVERY == 0:
            yield
    yield
    for number, pin in enumerate(answer.pins, 1):
        told = message.pins.add(
            num_tokens=pin.num_tokens, num_blocks=pin.num_blocks, expires_in_s=pin.expires_in_s
        )
        show_namespace(pin.namespace, told.namespace)
        if number % _PAUSE_EVERY == 0:
            yield
    yield
    for number, quota in enumerate(answer.quotas, 1):
        write_quota_info(quota, message.quotas.add())
        if number % _PAUSE_EVERY == 0:
            yield


def read_snapshot(message: pb.SnapshotResponse) -> Snapshot:
    """Read what `write_snapshot` wrote."""
    counts: dict[str, Any] = {name: getattr(message, name) for name in _WHOLE_COUNTS}
    counts["num_leases"] = message.num_leases or len(message.leases)
    counts["num_flights"] = message.num_flights or len(message.flights)
    counts["num_namespaces"] = message.num_namespaces or len(message.namespaces)
    if message.HasField("eviction_age_s"):
        counts["eviction_age_s"] = message.eviction_age_s
    return Snapshot(
        **counts,
        leases=tuple([_read_lease(info) for info in message.leases]),
        ledger=read_ledger(message.ledger),
        namespaces={read_namespace(m.namespace): read_ledger(m.ledger) for m in message.namespaces},
        pins=tuple(
            [
                PinInfo(read_namespace(m.namespace), m.num_tokens, m.num_blocks, m.expires_in_s)
                for m in message.pins
            ]
        ),
        quotas=tuple([read_quota_info(quota) for quota in message.quotas]),
        shortage=tuple([(m.extra_blocks, m.tokens) for m in message.shortage]),
    )


def _read_lease(message: pb.LeaseInfo) -> LeaseInfo:
    return LeaseInfo(
        LeaseId(message.lease),
        message.worker,
        read_namespace(message.namespace),
        message.num_tokens,
        message.num_committed,
        message.num_blocks,
        message.expires_in_s,
    )
