"""Answers of the verbs that look: lookup, explain, snapshot, tree."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields
from typing import Any, Final

from prefixcache.client.codec.admin import read_quota_info, write_quota_info
from prefixcache.client.codec.words import (
    read_ledger,
    read_shown_namespace,
    show_namespace,
    write_ledger,
)
from prefixcache.outline import Branch, Extent, NamespaceOutline, Order, Outline
from prefixcache.types import (
    COUNTS,
    Explanation,
    HoldingInfo,
    LeaseId,
    LeaseInfo,
    PastRequest,
    PinInfo,
    Snapshot,
    Span,
    TierSpan,
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
    "approximate": pb.FATE_APPROXIMATE,
    "restored": pb.FATE_RESTORED,
}
_FATE_NAMES = {number: name for name, number in FATES.items()}

_PAUSE_EVERY: Final = 16
"""Rows that are written in one go."""
_BRANCHES_IN_ONE_GO: Final = 8

ORDERS: Final = {
    Order.TOKENS: pb.TREE_ORDER_TOKENS,
    Order.HEAT: pb.TREE_ORDER_HEAT,
}
_ORDERS: Final[dict[int, Order]] = {int(number): order for order, number in ORDERS.items()}

_BRANCH_NUMBERS: Final = (
    "depth",
    "start",
    "num_tokens",
    "num_blocks",
    "tokens",
    "num_more",
    "num_locks",
    "is_ghost",
    "is_pinned",
    "heat",
    "num_parted",
)
_BRANCH_OPTIONAL: Final = ("idle_s", "num_uses", "parted_at")

_HOLDING: Final = tuple([one.name for one in fields(HoldingInfo)])

_WHOLE_COUNTS: Final = tuple([name for name in COUNTS if name not in ("ledger", "eviction_age_s")])
"""Those that the message has under the same names, as numbers that are always there."""


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
    message.num_below, message.below_s = answer.num_below, answer.below_s
    for part in answer.below:
        message.below.add(
            tier=part.tier,
            start=part.start,
            end=part.end,
            fetch_s=part.fetch_s,
            compute_s=part.compute_s,
            is_worth=part.is_worth,
        )
    if answer.holding is not None:
        _write_holding(answer.holding, message.holding)


def _write_holding(word: HoldingInfo, message: pb.HoldingInfo) -> None:
    for name in _HOLDING:
        setattr(message, name, getattr(word, name))


def _read_holding(message: pb.HoldingInfo) -> HoldingInfo:
    return HoldingInfo(**{name: getattr(message, name) for name in _HOLDING})


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
        tuple([(read_shown_namespace(m.namespace), m.num_tokens) for m in message.elsewhere]),
        _read_past(message.past) if message.HasField("past") else None,
        message.num_below,
        message.below_s,
        tuple([_read_tier_span(span) for span in message.below]),
        _read_holding(message.holding) if message.HasField("holding") else None,
    )


def _read_tier_span(message: pb.TierSpan) -> TierSpan:
    return TierSpan(
        message.tier,
        message.start,
        message.end,
        message.fetch_s,
        message.compute_s if message.HasField("compute_s") else None,
        message.is_worth,
    )


def _read_past(message: pb.PastRequest) -> PastRequest:
    return PastRequest(
        message.request_id,
        message.worker,
        LeaseId(message.lease),
        read_shown_namespace(message.namespace),
        message.age_s,
        message.num_tokens,
        message.tokens,
    )


def write_snapshot(answer: Snapshot, message: pb.SnapshotResponse) -> Generator[None, None, None]:
    """Fill `message`, all but `service`, pausing after some dozen rows.  O(rows)."""
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
    yield
    for number, holding in enumerate(answer.holdings, 1):
        _write_holding(holding, message.holdings.add())
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
        namespaces={
            read_shown_namespace(m.namespace): read_ledger(m.ledger) for m in message.namespaces
        },
        pins=tuple(
            [
                PinInfo(
                    read_shown_namespace(m.namespace), m.num_tokens, m.num_blocks, m.expires_in_s
                )
                for m in message.pins
            ]
        ),
        quotas=tuple([read_quota_info(quota) for quota in message.quotas]),
        holdings=tuple([_read_holding(one) for one in message.holdings]),
        shortage=tuple([(m.extra_blocks, m.tokens) for m in message.shortage]),
    )


def _read_lease(message: pb.LeaseInfo) -> LeaseInfo:
    return LeaseInfo(
        LeaseId(message.lease),
        message.worker,
        read_shown_namespace(message.namespace),
        message.num_tokens,
        message.num_committed,
        message.num_blocks,
        message.expires_in_s,
    )


def read_order(number: Any) -> Order:
    """Read an order; by tokens, if none that is known here is named."""
    return _ORDERS.get(int(number), Order.TOKENS)


def write_outline(answer: Outline, message: pb.TreeResponse) -> Generator[None, None, None]:
    """Fill `message`, pausing after some branches.  O(branches)."""
    steps = 0
    message.block_size = answer.block_size
    message.num_moved = answer.num_moved
    message.num_more = answer.num_more
    _write_extent(answer.more, message.more)
    for outline in answer.namespaces:
        tree = message.namespaces.add()
        show_namespace(outline.namespace, tree.namespace)
        for branch in outline.branches:
            _write_branch(branch, tree.branches.add())
            steps += 1
            if steps % _BRANCHES_IN_ONE_GO == 0:
                yield


def read_outline(message: pb.TreeResponse) -> Outline:
    """Read what `write_outline` wrote."""
    return Outline(
        message.block_size,
        tuple(
            NamespaceOutline(
                read_shown_namespace(tree.namespace), tuple(map(_read_branch, tree.branches))
            )
            for tree in message.namespaces
        ),
        message.num_moved,
        message.num_more,
        _read_extent(message.more),
    )


def _write_branch(word: Branch, message: pb.Branch) -> None:
    for name in _BRANCH_NUMBERS:
        setattr(message, name, getattr(word, name))
    for name in _BRANCH_OPTIONAL:
        if (value := getattr(word, name)) is not None:
            setattr(message, name, value)
    _write_extent(word.below, message.below)
    _write_extent(word.more, message.more)


def _read_branch(message: pb.Branch) -> Branch:
    return Branch(
        below=_read_extent(message.below),
        more=_read_extent(message.more),
        **{name: getattr(message, name) for name in _BRANCH_NUMBERS},
        **{
            name: getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]
            for name in _BRANCH_OPTIONAL
        },
    )


def _write_extent(word: Extent, message: pb.Extent) -> None:
    message.runs = word.runs
    message.blocks = word.blocks
    message.tokens = word.tokens
    message.ghost_tokens = word.ghost_tokens


def _read_extent(message: pb.Extent) -> Extent:
    return Extent(message.runs, message.blocks, message.tokens, message.ghost_tokens)
