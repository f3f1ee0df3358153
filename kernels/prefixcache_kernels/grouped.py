"""Shared prefixes in PyTorch: each run of shared blocks is attended once for its group.

```
per sequence      │ P P P P a │ P P P P b │ P P P P c │      12 + 3 blocks gathered and read
grouped           │ P P P P │ a │ b │ c │                     4 + 3
                    │         └─ one call over the own parts, side by side
                    └─ one call: the queries of all three as rows of one product
merged            out = out_own + share * (out_run - out_own),  share = sigmoid(lse_run - lse_own)
```

Every call gives its log-sum-exp, so its answer can be weighed against the others; the sums are
float32, whatever the type of keys and values.  A decode step is bound by the bytes it reads, and by
how few rows its products have: a run helps with both.

`GroupedPlan` holds what all layers of a step share.  Layers with a sliding window use the runs
whose sequences all lie within the window, and the plain path for the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.checks import (
    check_attention,
    check_ids,
    check_scalars,
    check_step,
    check_tensors,
)
from prefixcache_kernels.cpu.tasks import Tasks
from prefixcache_kernels.groups import GroupPlan, Run
from prefixcache_kernels.plan import Plan, Work, gather, narrow, scratch, side_by_side
from prefixcache_kernels.reference import detached, paged_attention, whole_heads

_flash: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(slots=True)
class Shared:
    """A run, ready to be attended by all queries of its group in one call."""

    rows: slice | Tensor
    """Of the packed queries: those of its sequences."""
    num_queries: int
    index: Tensor
    """`[blocks]` int64."""
    begin: int | None
    """The first block if they lie side by side in the pool, and need no gathering; else None."""


Gathered: TypeAlias = "list[tuple[Shared, Tensor, Tensor]]"
"""Runs with their parts of the scratch, `[blocks, block_size, kv_heads, head_dim]` each."""


class GroupedPlan:
    """A packed batch and what its sequences share, prepared for attention on a CPU.

    Make one per step with `build`; use it from one thread at a time.
    """

    def __init__(
        self,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_size: int,
        groups: GroupPlan,
    ) -> None:
        self.groups = groups
        self._args = (block_tables, query_start, context_lens, block_size)
        self._starts: list[int] = query_start.tolist()
        self._contexts: list[int] = context_lens.tolist()
        self._parts: dict[int | None, tuple[list[Shared], Plan]] = {}
        self._work: dict[tuple[object, ...], tuple[Gathered, Work]] = {}
        self.calls: dict[tuple[object, ...], Any] = {}
        """As of `Plan`."""

    @classmethod
    def build(
        cls,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_size: int,
        groups: GroupPlan,
    ) -> GroupedPlan:
        """Prepare a packed batch.  Changes nothing.  O(blocks of the batch), once per step.

        Args:
            block_tables: As of `Plan.build`, and so are the next three.
            query_start: `[S + 1]` ints.
            context_lens: `[S]` ints.
            block_size: Tokens of a block.
            groups: What these tables share.

        Raises:
            InvalidRequest: As `Plan.build`; or `groups` is of another batch.
        """
        check_tensors(block_tables=block_tables, query_start=query_start, context_lens=context_lens)
        check_step(block_tables, query_start, context_lens)
        if not isinstance(groups, GroupPlan):
            raise InvalidRequest(f"groups is a {type(groups).__name__}, not a GroupPlan")
        for given in (block_tables, query_start, context_lens):
            if not given.is_cpu:
                raise InvalidRequest(f"a plan for a CPU of tables or lengths on {given.device}")
        groups.check(narrow(block_tables))
        made = cls(block_tables, query_start, context_lens, block_size, groups)
        made.whole  # noqa: B018 - refuses what is no batch
        return made

    @cached_property
    def whole(self) -> Plan:
        """The batch without any sharing; made when a layer cannot share."""
        return Plan.build(*self._args)

    def verify(
        self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor, groups: GroupPlan
    ) -> None:
        """Refuse a call with another batch, or other groups.  O(1) for the same objects.

        Raises:
            InvalidRequest: As said.
        """
        self.whole.verify(block_tables, query_start, context_lens)
        if groups is not self.groups:
            known = (self.groups.positions, self.groups.runs)
            if not isinstance(groups, GroupPlan):
                raise InvalidRequest(f"groups is a {type(groups).__name__}, not a GroupPlan")
            groups.check_kinds()
            if (groups.positions, groups.runs) != known:
                raise InvalidRequest("the plan is of other groups: build one for each step")

    def check(self, query: Tensor, cache: Tensor) -> None:
        """Refuse a layer of another batch.

        Raises:
            InvalidRequest: As `Plan.check`.
        """
        self.whole.check(query, cache)

    def tasks(self, window: int | None, group: int) -> Tasks:
        """The batch as the C library takes it; as of `Plan`, with what it shares.

        Raises:
            InvalidRequest: The groups share what is not before all queries.
        """
        groups = self._restricted(window)
        return self._own(groups).tasks(window, group, groups.runs, groups.positions)

    def prepare(
        self, layer: tuple[object, ...], query: Tensor, cache: Tensor, window: int | None
    ) -> tuple[Gathered, Work] | None:
        """Give what layers of this kind do; made at the first call, None if nothing is shared.

        Args:
            layer: Names the kind: shapes, dtypes and window.
            query: Of such a layer, `[T, heads, head_dim]`.
            cache: Its keys, `[num_blocks, block_size, kv_heads, head_dim]`.
            window: Keys that a query attends at most; None: all before it.
        """
        known = self._work.get((threading.get_ident(), *layer))
        if known is not None:
            return known
        shared, own = self._within(window)
        if not shared:
            return None
        tail = cache.shape[1:]
        size = max(run.index.numel() for run in shared) * tail.numel()
        keys, values = scratch(2 * size, cache.dtype).view(2, size)
        gathered: Gathered = []
        check_attention(query, cache, cache)
        for run in shared:
            if run.begin is not None:  # read in place, where nothing else would look
                check_ids(run.index, cache.shape[0])
            used = run.index.numel()
            places = (flat[: used * tail.numel()].view(used, *tail) for flat in (keys, values))
            gathered.append((run, *places))
        made = gathered, own.prepare(layer, query, cache, window)
        self._work[threading.get_ident(), *layer] = made
        return made

    def _within(self, window: int | None) -> tuple[list[Shared], Plan]:
        """Give the runs that a layer with this window can use, and the plan of the own parts."""
        window = None if window is None or window >= max(self._contexts, default=0) else window
        if window not in self._parts:
            groups = self._restricted(window)
            shared = [self._shared(groups, run) for run in groups.runs if run.blocks]
            self._parts[window] = shared, self._own(groups)
        return self._parts[window]

    def _restricted(self, window: int | None) -> GroupPlan:
        """Give what sequences share that lie wholly within a window."""
        if window is None or window >= max(self._contexts, default=0):
            return self.groups
        return self.groups.restrict(
            [self._contexts[row] <= window for row in self.groups.positions]
        )

    def _own(self, groups: GroupPlan) -> Plan:
        """Give the plan of what sequences do not share."""
        if not groups.runs:
            return self.whole
        own_from = [0] * groups.num_seqs
        for row, first in zip(groups.positions, groups.own, strict=True):
            own_from[row] = first
        return Plan.build(*self._args, own_from)

    def _shared(self, groups: GroupPlan, run: Run) -> Shared:
        rows = groups.positions[run.start : run.end]
        index = self._args[0][run.row, run.first : run.first + run.blocks].long()
        return Shared(*self._queries(rows), index, side_by_side(index))

    def _queries(self, rows: Sequence[int]) -> tuple[slice | Tensor, int]:
        """Find the packed queries of some batch rows, and how many they are."""
        spans = [range(self._starts[row], self._starts[row + 1]) for row in rows]
        queries = [query for span in spans for query in span]
        num = len(queries)
        if all(b == a + 1 for a, b in pairwise(queries)):
            return slice(queries[0], queries[0] + num) if num else slice(0), num
        return torch.tensor(queries), num


def shared_prefix_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    groups: GroupPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: GroupedPlan | None = None,
) -> Tensor:
    """Attend as `paged_attention` does, reading what sequences share once.  Changes nothing.

    Args:
        query: As of `reference.paged_attention`, and so are all but the last two.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`.
        value_cache: Like `key_cache`.
        block_tables: `[S, max_blocks]` ints.
        query_start: `[S + 1]` ints.
        context_lens: `[S]` ints.
        groups: What the tables share: `GroupPlan.build`.  Without runs this is `paged_attention`.
        scale: Factor of the scores.
        window: Keys that a query attends at most.
        softcap: Bound of the scores.
        sinks: `[heads]`.
        plan: `GroupedPlan.build` of the same batch; made here if None.  Pass one for all layers.

    Returns:
        `[T, heads, head_dim]`.

    Raises:
        InvalidRequest: As `paged_attention`; or the groups share what is not before all queries.
    """
    scale, window, softcap = check_scalars(scale, window, softcap)
    if plan is None or sinks is not None:
        check_attention(query, key_cache, value_cache, sinks=sinks)
    if plan is None:
        size = key_cache.shape[1]
        plan = GroupedPlan.build(block_tables, query_start, context_lens, size, groups)
    shapes = (query.shape, key_cache.shape, value_cache.shape)
    layer = (*shapes, query.dtype, key_cache.dtype, value_cache.dtype, window)
    work = plan.prepare(layer, query, key_cache, window) if groups.runs else None
    if work is None:
        return paged_attention(
            query,
            key_cache,
            value_cache,
            block_tables,
            query_start,
            context_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            plan=plan.whole,
        )
    query, key_cache, value_cache = detached(query, key_cache, value_cache)
    query = whole_heads(query)
    in_place = key_cache.stride(3) == value_cache.stride(3) == 1
    gathered, own = work
    out, total = _own(query, key_cache, value_cache, own, scale, softcap)
    again = plan.groups.num_levels > 1 or sinks is not None
    for run, keys, values in gathered:
        if not run.num_queries:
            continue
        if run.begin is None or not in_place:
            gather(key_cache, run.index, keys)
            gather(value_cache, run.index, values)
        else:
            keys = key_cache[run.begin : run.begin + run.index.numel()]
            values = value_cache[run.begin : run.begin + run.index.numel()]
        part, lse = _run(query[run.rows], keys, values, scale, softcap)
        _merge(out, total, run.rows, part, lse, again=again)
    if sinks is not None:
        out *= torch.sigmoid(total - sinks.float()).unsqueeze(-1)
    return out.to(query.dtype)


def _own(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    work: Work,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend every sequence to its own part; give answers and log-sum-exps in float32."""
    heads, dim = query.shape[1:]
    kv_heads = key_cache.shape[2]
    split = (kv_heads, heads // kv_heads)
    out = total = None
    for piece, place, mask in work:
        keys, values = piece.dense(place, key_cache, value_cache)
        num, each = piece.num_seqs, piece.num_queries
        packed = query if piece.rows is None else query[piece.rows]
        if each == 1:
            packed = packed.view(num, *split, dim)
        else:
            packed = packed.view(num, each, *split, dim).permute(0, 2, 3, 1, 4)
            packed = packed.reshape(num, kv_heads, -1, dim)
        part, lse = _attend(packed, keys, values, mask, scale, softcap)
        if each > 1:
            part = part.reshape(num, *split, each, dim).permute(0, 3, 1, 2, 4)
            lse = lse.reshape(num, *split, each).permute(0, 3, 1, 2)
        part, lse = part.reshape(num * each, heads, dim), lse.reshape(num * each, heads)
        if piece.rows is None:
            return part.float(), lse
        if out is None or total is None:
            out = torch.empty(query.shape, dtype=torch.float32)
            total = torch.empty(query.shape[:2], dtype=torch.float32)
        out[piece.rows] = part.float()
        total[piece.rows] = lse
    assert out is not None  # what is shared is shared by sequences with queries
    assert total is not None
    return out, total


def _run(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attend all queries of a group to a run; `[n, heads, dim]` and `[n, heads]`."""
    num, heads, dim = query.shape
    kv_heads = keys.shape[2]
    split = (num, kv_heads, heads // kv_heads)
    packed = query.view(*split, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    keys, values = (
        blocks.reshape(1, -1, kv_heads, dim).transpose(1, 2) for blocks in (keys, values)
    )
    part, lse = _attend(packed, keys, values, None, scale, softcap)
    part = part.view(kv_heads, num, -1, dim).transpose(0, 1).reshape(num, heads, dim)
    return part, lse.view(kv_heads, num, -1).transpose(0, 1).reshape(num, heads)


def _merge(
    out: Tensor, total: Tensor, rows: slice | Tensor, part: Tensor, lse: Tensor, *, again: bool
) -> None:
    """Add a run's answer to the answers of its rows, in place; to be merged `again`, or done."""
    before, sofar = out[rows], total[rows]
    share = torch.sigmoid(lse - sofar).unsqueeze(-1)
    if isinstance(rows, slice):
        before.lerp_(part.float(), share)
        if again:
            torch.logaddexp(sofar, lse, out=sofar)
    else:
        out[rows] = torch.lerp(before, part.float(), share)
        if again:
            total[rows] = torch.logaddexp(sofar, lse)


def _attend(
    packed: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp (float32), `[seqs, kv_heads, rows, head_dim]`."""
    if softcap is None:
        out, lse = _flash(packed, keys, values, attn_mask=mask, scale=scale)
        return out, lse
    scores = torch.matmul(packed.float(), keys.float().transpose(2, 3)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores += mask
    out = torch.matmul(torch.softmax(scores, -1), values.float())
    return out, torch.logsumexp(scores, -1)
