"""The data plane, fuzzed: drawn batches, stores, copies, turns, leases, views, against an oracle.

PYTHONPATH=tests:kernels python -m fuzz.plane [--seconds 60] [--seed 0] [--only native/attend]

What is well formed must be answered as the definition says; whatever else must be our error or, if
it is taken, still be what the definition says.  No memory but what a call names may change.  Each
way works in a process of its own, which says on which seed it is: a crash is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz.views import view
from kernels.strange_tensors import NOT_PLAIN, let_go, of_inference, read_only
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, PoolExhausted, Unsupported
from prefixcache.types import Namespace, Partial, WorkerId, pack, shown
from prefixcache_kernels import (
    GroupedPlan,
    GroupPlan,
    Plan,
    Rotary,
    copy_blocks,
    paged_attention,
    rotate_keys,
    shared_prefix_attention,
    store_kv,
)
from prefixcache_kernels.cpu.library import library

ROOT = Path(__file__).resolve().parents[2]
FP8 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")

UNIT = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6.5, torch.float16: 2.0**-9.5}
"""What an answer may be off by, of the largest value that its query sees."""

EXACT = 2.0**-20
"""What a score may be off by, of the sum of its products' sizes: float32, some roundings."""

ROUNDED = 2.0**-8 + 1e-5
"""What a log-sum-exp may be off by where weights of bfloat16 are added up."""

LARGE = 2.0**128 / 2**8
"""What values times keys come to at most: a sum in float32, of weights up to 2**8."""

WAYS: dict[str, tuple[dict[str, str], tuple[str, ...], float]] = {
    "native": ({}, ("attend", "refuse", "move", "lease", "view"), 0.42),
    "torch": ({"PREFIXCACHE_NATIVE": "0"}, ("attend", "refuse", "lease"), 0.28),
    "narrow": ({"PREFIXCACHE_CFLAGS": "-march=x86-64-v3"}, ("attend",), 0.08),
    "narrowest": ({"PREFIXCACHE_CFLAGS": "-march=x86-64"}, ("attend",), 0.08),
    "triton": ({"TRITON_INTERPRET": "1"}, ("attend", "refuse", "move"), 0.14),
}
"""The environment of each way, what is tried on it, and its share of the time."""


class Ill(Exception):
    """The definition has no answer: the arguments are no batch."""


@dataclass
class Batch:
    """The arguments of one call, and what they are cut from."""

    arguments: dict[str, Any]
    options: dict[str, Any]
    groups: GroupPlan | None
    owners: list[Tensor] = field(default_factory=list)
    """All memory of the pool, what lies between its slots included."""


# ── the definition, in double precision ───────────────────────────────────────────────────────────


def numbers(given: Any, dims: int) -> np.ndarray[Any, Any]:
    """Integers of a tensor."""
    if not isinstance(given, Tensor) or given.layout is not torch.strided or given.is_meta:
        raise Ill("no tensor in memory")
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise Ill("no integers")
    if given.dim() != dims:
        raise Ill("dimensions")
    return given.resolve_neg().numpy().astype(np.int64)


def reals(given: Any, dims: int) -> np.ndarray[Any, Any]:
    """Real numbers of a tensor, exactly."""
    if not isinstance(given, Tensor) or given.layout is not torch.strided or given.is_meta:
        raise Ill("no tensor in memory")
    if not given.dtype.is_floating_point or given.dim() != dims:
        raise Ill("no real numbers, or dimensions")
    return given.detach().resolve_neg().double().numpy()


def define(
    arguments: dict[str, Any], options: dict[str, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give answers, log-sum-exps, and how far an answer may be off (a bound, in `UNIT`s of 1)."""
    query = reals(arguments["query"], 3)
    tables = numbers(arguments["block_tables"], 2)
    starts = numbers(arguments["query_start"], 1)
    contexts = numbers(arguments["context_lens"], 1)
    caches = [reals(arguments[name], 4) for name in ("key_cache", "value_cache")]
    dtypes = {arguments["key_cache"].dtype, arguments["value_cache"].dtype}
    num_blocks, size, kv_heads, dim = caches[0].shape
    total, heads, _ = query.shape
    if len(dtypes) > 1 or not dtypes <= {arguments["query"].dtype, FP8}:
        raise Ill("types")
    if caches[1].shape[:3] != caches[0].shape[:3] or query.shape[2] != dim or not dim * kv_heads:
        raise Ill("shapes")
    if not caches[1].shape[3] * size * heads or heads % kv_heads:
        raise Ill("shapes")
    scales = [options.get(name) for name in ("key_scale", "value_scale")]
    if (dtypes == {FP8}) != (scales[0] is not None) or (scales[0] is None) != (scales[1] is None):
        raise Ill("scales")
    for at, scale in enumerate(scales):
        if scale is not None:
            factor = reals(scale, 1)
            if factor.shape != (kv_heads,):
                raise Ill("scales")
            caches[at] = caches[at] * factor[:, None]
    sinks = None if options.get("sinks") is None else reals(options["sinks"], 1)
    if sinks is not None and sinks.shape != (heads,):
        raise Ill("sinks")
    if not len(starts) == len(contexts) + 1 == len(tables) + 1:
        raise Ill("sequences")
    if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
        raise Ill("queries")
    scale, cap, window = options["scale"], options.get("softcap"), options.get("window")
    if not math.isfinite(scale) or (cap is not None and not 0 < cap < INF):
        raise Ill("scale")
    if window is not None and (window != int(window) or window < 1):
        raise Ill("window")
    out = np.zeros((total, heads, caches[1].shape[3]))
    sums, off = np.zeros((total, heads)), np.zeros((total, heads))
    largest = np.zeros((total, heads))
    for s in range(len(contexts)):
        many, context = int(starts[s + 1] - starts[s]), int(contexts[s])
        if context < many or context > tables.shape[1] * size:
            raise Ill("lengths")
        for j in range(many):
            last = context - many + j
            first = 0 if window is None else max(0, last + 1 - int(window))
            at = np.arange(first, last + 1)
            blocks = tables[s, at // size]
            if (blocks < 0).any() or (blocks >= num_blocks).any():
                raise Ill("blocks")
            keys, values = (cache[blocks, at % size] for cache in caches)
            for head in range(heads):
                of, q = head // (heads // kv_heads), query[starts[s] + j, head]
                score = scale * (keys[:, of] @ q)
                size_of = abs(scale) * (np.abs(keys[:, of]) @ np.abs(q)).max()
                if cap is not None:
                    score = cap * np.tanh(score / cap)
                every = score if sinks is None else np.append(score, sinks[head])
                top = every.max()
                weights = np.exp(score - top)
                whole = np.exp(every - top).sum()
                row = int(starts[s]) + j
                out[row, head] = weights @ values[:, of] / whole
                sums[row, head] = top + np.log(whole)
                off[row, head] = size_of + np.abs(every).max()
                largest[row, head] = np.abs(values[:, of]).max()
    least = EXACT * off
    unit = UNIT.get(arguments["query"].dtype, 1e-9)
    floor = 2.0**-24 if arguments["query"].dtype == torch.float16 else 1e-40  # subnormal
    bound = largest * (unit + 2 * least) + floor
    bound[largest * max(1, contexts.max(initial=0)) > LARGE] = INF  # may be beyond float32
    loaded = library()
    rounds = loaded is not None and (loaded.matrices or loaded.pairs) and dtypes == {torch.bfloat16}
    return out, sums, np.stack([bound, (ROUNDED if rounds else 1e-5) + 2 * least])


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, r: Random) -> tuple[Tensor, Tensor]:
    """Memory, and a view of it of some shape in which heads are whole: how pools may lie."""
    blocks, size, heads, dim = shape
    match r.randrange(5):
        case 0:  # heads first
            owner = torch.zeros(heads, blocks, size, dim, dtype=dtype)
            return owner, owner.permute(1, 2, 0, 3)
        case 1:  # heads first within a block
            owner = torch.zeros(blocks, heads, size, dim, dtype=dtype)
            return owner, owner.transpose(1, 2)
        case 2:  # keys and values of a token side by side, with something between
            owner = torch.zeros(blocks, size, heads, 2 * dim + 3, dtype=dtype)
            return owner, owner[..., 1 : 1 + dim]
        case 3:  # every other block of a larger pool
            owner = torch.zeros(2 * blocks, size, heads, dim, dtype=dtype)
            return owner, owner[1::2]
        case _:
            owner = torch.zeros(shape, dtype=dtype)
            return owner, owner


def spread(given: Tensor, r: Random) -> Tensor:
    """The same numbers in other memory: strided in some dimension, or as they are."""
    if not given.dim() or r.random() < 0.6:
        return given
    dim = r.randrange(given.dim())
    shape = list(given.shape)
    if not shape[dim]:
        return given
    shape[dim] = 2 * shape[dim] + 1
    wide = torch.full(shape, 1 if given.dtype in (torch.int32, torch.int64) else 0).to(given.dtype)
    view = wide.narrow(dim, 1, shape[dim] - 1)
    view = view[(slice(None),) * dim + (slice(None, None, 2),)]
    view.copy_(given)
    return view


def draw(r: Random, *, small: bool = False) -> Batch:
    """Draw a well-formed batch: shapes, types, tables with holes, what is unwritten poisoned."""
    noise = torch.Generator().manual_seed(r.getrandbits(32))
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    stored = FP8 if r.random() < 0.2 else dtype
    kv_heads, group = r.choice([1, 1, 2, 3, 4]), r.choice([1, 1, 2, 3, 4, 7, 8, 16])
    dim = r.choice([16, 32, 64] if small else [1, 3, 8, 16, 17, 24, 32, 64, 64, 80, 128, 256])
    value_dim = r.choice([dim] * 5 + [16, 32] + ([] if small else [1, 40]))
    size = r.choice([4, 8, 16] if small else [1, 2, 3, 4, 8, 16, 16, 32, 64])
    num = r.randrange(1, 4 if small else 10)
    if small:
        group = min(group, 4)
    lens = []
    for _ in range(num):
        kind = r.random()
        if kind < 0.5:
            many = 1
        elif kind < 0.6:
            many = 0
        elif kind < 0.9 or small:
            many = r.randrange(1, 6 if small else 24)
        else:
            many = r.randrange(24, 150)
        before = r.choice([0, 1, size, r.randrange(30), r.randrange(60 if small else 500)])
        lens.append((many, many + before))
    if num < 3 and not small and r.random() < 0.1:
        lens[0] = (r.choice([1, 1, 3]), r.randrange(1000, 2600))
    need = [-(-keys // size) for _, keys in lens]
    num_blocks = sum(need) + r.randrange(1, 6)
    ids = r.sample(range(num_blocks), num_blocks)
    if r.random() < 0.3:
        ids = list(range(num_blocks))[::-1]  # neighbours in the pool
    width = max(need) + r.randrange(3)
    tables = torch.zeros(num, width, dtype=torch.int64)
    for s in range(num):
        for j in range(width):
            tables[s, j] = r.choice([-1, -7, 2**31 - 1, -(2**31), 0, num_blocks, num_blocks - 1])
    caches, owners = [], []
    poison = r.choice([NAN, NAN, INF, 1.0])
    for d in (dim, value_dim):
        owner, cache = laid_out((num_blocks, size, kv_heads, d), torch.float32, r)
        owner.fill_(NAN if stored == FP8 else poison)
        caches.append(cache)
        owners.append(owner)
    loud = r.choice([1.0] * 6 + [8.0, 0.0, 1e-3])  # keys: scores far apart, all equal
    high = r.choice([1.0] * 6 + [100.0, 1e-4])
    if dtype == torch.float32 and stored != FP8 and r.random() < 0.1:
        high = r.choice([1e30, 1e34, 1e-37])
    for s, (_, keys) in enumerate(lens):
        source = r.randrange(s) if s and r.random() < 0.6 else None
        common = 0
        if source is not None:  # whole blocks before all queries of both
            whole = min((lens[o][1] - lens[o][0]) // size for o in (s, source))
            common = r.choice([whole, r.randrange(whole + 1)])
            tables[s, :common] = tables[source, :common]
        for j in range(common, need[s]):
            block = ids.pop()
            tables[s, j] = block
            fill = min(size, keys - j * size)
            for cache, factor in zip(caches, (loud, high), strict=True):
                new = torch.randn(fill, kv_heads, cache.shape[3], generator=noise) * factor
                limit = 448.0 if stored == FP8 else torch.finfo(dtype).max / 2
                cache[block, :fill] = new.clamp(-limit, limit)
    typed = []
    for at, owner in enumerate(owners):
        view = caches[at]
        owners[at] = owner.to(stored)
        typed.append(owners[at].as_strided(view.shape, view.stride(), view.storage_offset()))
    starts = torch.tensor([0, *(many for many, _ in lens)]).cumsum(0)
    heads = kv_heads * group
    query = torch.randn(int(starts[-1]), heads, dim, generator=noise).to(dtype)
    options: dict[str, Any] = {"scale": r.choice([dim**-0.5] * 6 + [1.0, -0.5, 0.0, 3.0])}
    if r.random() < 0.3:
        options["window"] = r.choice([1, 2, size, 33, 100, 1000, 2**31 - 1])
    if r.random() < 0.25:
        options["softcap"] = r.choice([0.5, 1.0, 30.0, 50.0, 1e4, 1e6])
    if r.random() < 0.25:
        sinks = torch.randn(heads, generator=noise) * r.choice([1.0, 10.0, 1e3])
        options["sinks"] = spread(sinks.to(r.choice([torch.float32, dtype])), r)
    if stored == FP8:
        for name in ("key_scale", "value_scale"):
            options[name] = torch.rand(kv_heads, generator=noise) * r.choice([0.1, 1, 2]) + 1e-3
    if r.random() < 0.25:
        options["lse"] = torch.full((query.shape[0], heads), NAN)
    integers = torch.int32 if small else r.choice([torch.int32, torch.int64])
    arguments = {
        "query": spread(query, r),
        "key_cache": typed[0],
        "value_cache": typed[1],
        "block_tables": spread(tables.to(integers), r),
        "query_start": spread(starts.to(integers), r),
        "context_lens": spread(torch.tensor([k for _, k in lens]).to(integers), r),
    }
    groups = None
    if r.random() < 0.5:
        limits = [(keys - many) // size for many, keys in lens]
        groups = GroupPlan.build(tables.to(torch.int32), limits)
    return Batch(arguments, options, groups, owners)


def call(batch: Batch, r: Random) -> Tensor:
    """Attend on the way of this process, as a step does: with a plan for its layers, or without."""
    arguments, options = batch.arguments, batch.options
    if os.environ.get("TRITON_INTERPRET"):
        from prefixcache_kernels import attention, shared

        if batch.groups is None:
            return attention.paged_attention(**arguments, **options)
        return shared.shared_prefix_attention(**arguments, groups=batch.groups, **options)
    step = [arguments[name] for name in ("block_tables", "query_start", "context_lens")]
    cache = arguments["key_cache"]
    planned = r.random() < 0.4 and isinstance(cache, Tensor) and cache.dim() == 4
    if batch.groups is None:
        if planned:
            plan = Plan.build(*step, arguments["key_cache"].shape[1])
            paged_attention(**arguments, **options, plan=plan)
            return paged_attention(**arguments, **options, plan=plan)
        return paged_attention(**arguments, **options)
    if planned:
        whole = GroupedPlan.build(*step, arguments["key_cache"].shape[1], batch.groups)
        shared_prefix_attention(**arguments, groups=batch.groups, **options, plan=whole)
        return shared_prefix_attention(**arguments, groups=batch.groups, **options, plan=whole)
    return shared_prefix_attention(**arguments, groups=batch.groups, **options)


def compare(batch: Batch, got: Tensor) -> None:
    """Hold an answer to the definition; the distance may be as large as rounding explains."""
    want, sums, bounds = define(batch.arguments, batch.options)
    near(got, want, bounds[0][..., None], "answer")
    if batch.options.get("lse") is not None:
        near(batch.options["lse"], sums, bounds[1], "lse")


def near(got: Tensor, want: np.ndarray[Any, Any], bound: Any, what: str) -> None:
    assert tuple(got.shape) == want.shape, (what, got.shape, want.shape)
    with np.errstate(invalid="ignore"):
        far = np.abs(got.detach().double().numpy() - want) > bound
    far |= ~np.isfinite(got.detach().double().numpy()) & np.isfinite(bound)
    if far.any():
        at = tuple(int(i[0]) for i in np.nonzero(far))
        raise AssertionError(
            f"{what} {at}: {float(got[at]):.9g}, not {want[at]:.9g}; may be off by "
            f"{np.broadcast_to(bound, want.shape)[at]:.3g}; {far.sum()} of {far.size} are far"
        )


def unchanged(before: list[Tensor], batch: Batch) -> None:
    for old, new in zip(before, batch.owners, strict=True):
        assert torch.equal(bits(old), bits(new)), "a reader wrote to the pool"


def bits(given: Tensor) -> Tensor:
    return given.contiguous().view(torch.uint8)


# ── what is tried ─────────────────────────────────────────────────────────────────────────────────


def attend(r: Random) -> None:
    """A well-formed batch is answered, and changes nothing."""
    batch = draw(r, small=bool(os.environ.get("TRITON_INTERPRET")))
    before = [owner.clone() for owner in batch.owners]
    compare(batch, call(batch, r))
    unchanged(before, batch)


STRANGE: list[Callable[[Any], Any]] = [
    lambda _: None,
    lambda _: 0,
    lambda _: -1,
    lambda _: 3.5,
    lambda _: NAN,
    lambda _: INF,
    lambda _: 2**70,
    lambda _: 10**5000,
    lambda _: let_go(torch.ones(())),
    lambda _: True,
    lambda _: "8",
    lambda _: object(),
    lambda t: t.tolist(),
    lambda t: t.numpy(),
    lambda t: t.float(),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.int16),
    lambda t: t.to(torch.int32),
    lambda t: t.long(),
    lambda t: t.to(FP8),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch._neg_view(t),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t[0],
    lambda t: t[:0],
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[..., :0],
    lambda t: t.flip(0),
    lambda t: torch.cat([t, t]),
    lambda t: t.transpose(0, 1),
    lambda t: t.transpose(-1, -2),
    lambda t: t[:1].expand(t.shape),
    lambda t: t + 1,
    lambda t: t - 1,
    lambda t: -t,
    lambda t: t * 1000,
    lambda t: torch.full_like(t, torch.iinfo(t.dtype).max),
    lambda t: torch.full_like(t, torch.iinfo(t.dtype).min),
    lambda t: t.reshape(-1),
    lambda t: t.clone().requires_grad_(),
    lambda t: t.as_strided(t.shape, [1] * t.dim()),
    read_only,
    of_inference,
    *NOT_PLAIN.values(),
]
"""What stands in an argument's place; those that cannot be made of it are left out."""


def strange(given: Any, r: Random) -> Any:
    for make in r.sample(STRANGE, len(STRANGE)):
        with contextlib.suppress(Exception):  # not to be made of this
            return make(given)
    return None


def refuse(r: Random) -> None:
    """What is no batch is our error, or its answer is what the definition says; nothing changes."""
    batch = draw(r, small=True)
    before = [owner.clone() for owner in batch.owners]
    place = r.choice([batch.arguments, batch.arguments, batch.options])
    extra = ["window", "softcap", "sinks", "lse"] if place is batch.options else []
    # Each once: to change what is strange already is to have PyTorch read memory that is not there.
    names = list(dict.fromkeys([*place, *extra]))
    for name in r.sample(names, r.choice([1, 1, 1, 2]) if len(names) > 1 else 1):
        place[name] = strange(place.get(name), r)
    groups = r.random()
    if batch.groups is not None and groups < 0.4:
        batch.groups = ill_groups(batch.groups, r)
    told = {k: describe(v) for k, v in (batch.arguments | batch.options).items()}
    try:
        with warnings.catch_warnings():
            # A strange view of the keys reads what lies in unused slots: infinities, of which the
            # interpreter's numpy warns.
            warnings.simplefilter("ignore", RuntimeWarning)
            got = call(batch, r)
    except CacheError:
        unchanged(before, batch)
        return
    except Exception as error:
        raise AssertionError(f"not our error: {error!r:.300} of {told}") from error
    unchanged(before, batch)
    try:
        with np.errstate(all="ignore"):
            want, *_ = define(batch.arguments, batch.options)
    except Exception as error:
        raise AssertionError(f"taken, but is {error!r:.200}: {told}") from error
    if np.isfinite(want).all():  # else a length reaches what nobody wrote
        try:
            compare(batch, got)
        except AssertionError as error:
            raise AssertionError(f"{error} of {told}") from error


def describe(given: Any) -> str:
    if not isinstance(given, Tensor):
        return shown(given)
    if given.is_nested:
        return "nested"
    strides = given.stride() if given.layout is torch.strided else given.layout
    return f"{given.dtype} {list(given.shape)} {strides}"


def ill_groups(groups: GroupPlan, r: Random) -> Any:
    """A plan that nobody built."""
    odd = r.choice([-1, 10**9, -(10**6), 2**62, 1, 0])
    runs, own, positions = list(groups.runs), list(groups.own), list(groups.positions)
    match r.randrange(5):
        case 0 if runs:
            at = r.randrange(len(runs))
            name = r.choice(["row", "first", "blocks", "start", "end", "level"])
            runs[at] = runs[at]._replace(**{name: odd})
        case 1:
            own[r.randrange(len(own))] = odd
        case 2:
            positions[r.randrange(len(positions))] = odd
        case 3:
            return r.choice([None, 3, "groups", groups.runs])
        case _:
            runs = runs[1:]
    return replace(groups, runs=tuple(runs), own=tuple(own), positions=tuple(positions))


def move(r: Random) -> None:
    """Stores, copies and turns write what they name, and nothing else, whatever is passed."""
    r.choice([store, store, copies, turn])(r)


def operation(name: str) -> Callable[..., None]:
    if os.environ.get("TRITON_INTERPRET"):
        from prefixcache_kernels import rotate, transfer

        found: Any = rotate.rotate_keys if name == "rotate_keys" else getattr(transfer, name)
        return found  # type: ignore[no-any-return]
    return {"store_kv": store_kv, "copy_blocks": copy_blocks, "rotate_keys": rotate_keys}[name]


def attempt(r: Random, run: Callable[..., None], arguments: dict[str, Any], odd: bool) -> bool:
    """Call, perhaps with something strange; tell whether it was taken."""
    if odd:
        for name in r.sample([*arguments], r.choice([1, 1, 2])):
            arguments[name] = strange(arguments[name], r)
    told = {k: describe(v) for k, v in arguments.items()}
    try:
        run(*arguments.values())
    except CacheError as error:
        if not odd:
            raise AssertionError(f"refused: {told}") from error
        return False
    except Exception as error:
        raise AssertionError(f"not our error: {error!r:.300} of {told}") from error
    return True


def store(r: Random) -> None:
    noise = torch.Generator().manual_seed(r.getrandbits(32))
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16])
    stored = FP8 if r.random() < 0.25 else dtype
    blocks, size, heads = r.randrange(1, 9), r.choice([1, 2, 4, 16]), r.choice([1, 2, 3])
    owners, caches = [], []
    dims = [r.choice([1, 8, 16, 20])] * 2
    if r.random() < 0.3:
        dims[1] = r.choice([1, 8, 16, 20])
    for dim in dims:
        owner, view = laid_out((blocks, size, heads, dim), torch.float32, r)
        owner.copy_(torch.randn(owner.shape, generator=noise))
        owners.append(owner.to(stored))
        caches.append(owners[-1].as_strided(view.shape, view.stride(), view.storage_offset()))
    many = r.choice([0, 1, r.randrange(blocks * size + 1), blocks * size])
    slots = torch.tensor(r.sample(range(blocks * size), many), dtype=torch.int64)
    slots[torch.rand(many, generator=noise) < r.choice([0.0, 0.0, 0.2])] = -1
    loud = r.choice([1.0, 1.0, 200.0])
    news = [(torch.randn(many, heads, dim, generator=noise) * loud).to(dtype) for dim in dims]
    scales: list[Tensor | None] = [None, None]
    if stored == FP8:
        scales = [torch.rand(heads, generator=noise) + 0.3 for _ in dims]
    names = ("key", "value", "key_cache", "value_cache", "slot_mapping", "key_scale", "value_scale")
    given = (*(spread(n, r) for n in news), *caches, spread(slots, r), *scales)
    arguments = dict(zip(names, given, strict=True))
    before = [owner.clone() for owner in owners]
    odd = r.random() < 0.5
    changed = dict(arguments)
    taken = attempt(r, operation("store_kv"), changed, odd)
    if odd and taken and any(changed[name] is not arguments[name] for name in names):
        # What was taken is well formed; then its slots alone were written.
        slots = changed["slot_mapping"]
        assert isinstance(slots, Tensor)
        for old, new in zip(before, owners, strict=True):
            named = int((slots >= 0).sum()) * heads * max(dims)
            differ = int((bits(old) != bits(new)).sum()) / old.element_size()
            assert differ <= named, "more was written than was named"
        return
    if taken:
        for old, new, scale, cache in zip(before, news, scales, caches, strict=True):
            view = old.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    row = new[token]
                    if scale is not None:
                        row = (row.float() / scale[:, None]).clamp(-448, 448).to(FP8)
                    view[slot // size, slot % size] = row
    for old, now in zip(before, owners, strict=True):
        if stored == FP8 and taken:  # a tie of a quotient may be rounded to either side
            step = (old.float() - now.float()).abs() > 0.126 * old.float().abs() + 2**-9
            assert not step.any(), "stored another number"
        else:
            assert torch.equal(bits(old), bits(now)), "stored another number, or elsewhere"


def pool_of(r: Random) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(r.getrandbits(32))
    shape = (r.randrange(1, 4), 2, r.randrange(1, 9), r.choice([1, 2, 4, 16]), r.randrange(1, 4))
    dim = r.choice([2, 8, 16, 20])
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16])
    blocks = torch.randn(*shape, dim, generator=noise).to(dtype)
    return blocks, blocks.clone()


def copies(r: Random) -> None:
    blocks, want = pool_of(r)
    num, size = blocks.shape[2:4]
    order = r.sample(range(num), num)
    rows = []
    while len(order) >= 2 and r.random() < 0.8:
        rows.append((order.pop(), order.pop(), r.choice([0, size, r.randrange(size + 1)])))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    arguments = {"blocks": blocks, "copies": spread(table, r)}
    changed = dict(arguments)
    taken = attempt(r, operation("copy_blocks"), changed, r.random() < 0.5)
    if taken and changed["blocks"] is not blocks:
        return  # perhaps another view of it, into which was copied
    if taken:
        for src, dst, many in changed["copies"].tolist():
            want[:, :, dst, :many] = want[:, :, src, :many]
    assert torch.equal(bits(blocks), bits(want)), "copied elsewhere"


def turn(r: Random) -> None:
    blocks, before = pool_of(r)
    num, size, _, dim = blocks.shape[2:]
    slots = torch.tensor(r.sample(range(num * size), r.randrange(num * size + 1)))
    slots = slots.to(torch.int64)
    if len(slots) and r.random() < 0.3:
        slots[0] = -1
    frequencies = tuple(10000.0 ** (-i / (dim // 2)) for i in range(r.randrange(1, dim // 2 + 1)))
    delta = r.choice([0, 1, -5, 1000, -70000, 2**31 - 1])
    names = ("blocks", "slots", "delta", "angles")
    given = (blocks, spread(slots, r), delta, Rotary(frequencies))
    arguments = dict(zip(names, given, strict=True))
    changed = dict(arguments)
    if not attempt(r, operation("rotate_keys"), changed, r.random() < 0.5):
        assert torch.equal(bits(blocks), bits(before)), "refused, and yet turned"
        return
    if any(changed[name] is not arguments[name] for name in arguments):
        return
    want, half = before.double(), len(frequencies)
    angle = np.fmod(delta * np.array(frequencies), 2 * np.pi)
    cos, sin = (torch.from_numpy(f(angle)) for f in (np.cos, np.sin))
    for slot in slots.tolist():
        if slot >= 0:
            key = want[:, 0, slot // size, slot % size]
            x, y = key[..., :half].clone(), key[..., half : 2 * half].clone()
            key[..., :half], key[..., half : 2 * half] = x * cos - y * sin, y * cos + x * sin
    named = slots[slots >= 0]
    rows, had = (t.flatten(2, 3) for t in (blocks, before))
    rest = torch.ones(num * size, dtype=torch.bool)
    rest[named] = False
    assert torch.equal(bits(rows[:, :, rest]), bits(had[:, :, rest])), "turned another slot"
    assert torch.equal(bits(rows[:, 1]), bits(had[:, 1])), "turned values"
    bound = UNIT[blocks.dtype] * 8 * before.double().abs().max() + 1e-9
    assert bool(((blocks.double() - want).abs() <= bound).all()), "turned by another angle"


def _interpreted() -> bool:
    return bool(os.environ.get("TRITON_INTERPRET"))


# ── leases ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Held:
    lease: Any
    table: list[int]
    tokens: list[int]
    committed: int


class Worker:
    """What a worker does with grants, on a pool of its own; a token's KV is drawn from its path."""

    HEADS, DIM = 2, 16

    def __init__(self, r: Random) -> None:
        self.r, self.now = r, 0.0
        self.size = r.choice([1, 2, 4, 8, 16])
        partial = r.choice(list(Partial))
        self.cache = PrefixCache(r.choice([12, 40, 100]), self.size, partial=partial)
        self.pool = torch.full((1, 2, self.cache.num_blocks, self.size, self.HEADS, self.DIM), NAN)
        self.me, self.space = WorkerId(1), Namespace("m")
        self.cache.attach(self.me, self.space, now=0.0)
        self.held: list[Held] = []
        self.stems = [[r.randrange(50) for _ in range(r.randrange(1, 60))] for _ in range(3)]

    def kv(self, tokens: list[int], start: int) -> np.ndarray[Any, Any]:
        """`[2, tokens, heads, dim]` from `start` on: of each token and all before it."""
        made, path = [], 0
        for at, token in enumerate(tokens):
            path = (path * 1_000_003 + token + 1) % (2**61 - 1)
            if at >= start:
                rng = np.random.default_rng(path)
                made.append(rng.standard_normal((2, self.HEADS, self.DIM), np.float32))
        shape = (0, 2, self.HEADS, self.DIM)
        return np.stack(made, 1) if made else np.zeros(shape, np.float32).swapaxes(0, 1)

    def copy(self, made: Any) -> None:
        rows = [(c.src, c.dst, c.num_tokens) for c in made]
        copy_blocks(self.pool, torch.tensor(rows, dtype=torch.int64).view(-1, 3))

    def write(self, one: Held, start: int) -> None:
        news = torch.from_numpy(self.kv(one.tokens, start))
        at = np.arange(start, len(one.tokens))
        slots = np.array(one.table)[at // self.size] * self.size + at % self.size
        store_kv(news[0], news[1], self.pool[0, 0], self.pool[0, 1], torch.from_numpy(slots))

    def step(self) -> None:
        self.now += 0.1
        doing = self.r.choice(["begin", "begin", "grow", "grow", "fork", "cut", "end"])
        try:
            getattr(self, doing)()
        except PoolExhausted:
            if self.held:
                self.end()

    def begin(self) -> None:
        tokens = list(self.r.choice(self.stems))
        tokens = tokens[: self.r.randrange(1, len(tokens) + 1)]
        tokens += [self.r.randrange(50) for _ in range(self.r.randrange(6))]
        tokens = tokens[: self.cache.num_blocks * self.size]
        grant: Any = self.cache.acquire(self.me, self.space, pack(tokens), now=self.now)
        self.copy(grant.copies)
        one = Held(grant.lease, list(grant.block_table), tokens, len(tokens))
        self.held.append(one)
        self.write(one, grant.num_cached)
        self.cache.commit(self.me, one.lease, len(tokens), now=self.now)
        if self.r.random() < 0.5:
            self.stems[self.r.randrange(3)] = tokens

    def pick(self) -> Held | None:
        return self.r.choice(self.held) if self.held else None

    def grow(self) -> None:
        if (one := self.pick()) is None:
            return
        news = [self.r.randrange(50) for _ in range(self.r.randrange(1, 5))]
        room = len(one.tokens) + len(news)
        if room > self.cache.num_blocks * self.size:
            return
        update: Any = self.cache.extend(self.me, one.lease, room, now=self.now)
        self.copy(update.copies)
        one.table = one.table[: update.keep] + list(update.blocks)
        start = len(one.tokens)
        one.tokens = one.tokens + news
        self.write(one, start)
        self.cache.commit(self.me, one.lease, room, pack(news), now=self.now)

    def fork(self) -> None:
        if (one := self.pick()) is None or len(self.held) > 12 or not one.tokens:
            return
        for child in self.cache.fork(self.me, one.lease, self.r.randrange(1, 4), now=self.now):
            tokens = list(one.tokens)
            self.held.append(Held(child.lease, list(child.block_table), tokens, len(tokens)))

    def cut(self) -> None:
        if (one := self.pick()) is None:
            return
        keep = self.r.randrange(len(one.tokens) + 1)
        update = self.cache.truncate(self.me, one.lease, keep, now=self.now)
        self.copy(update.copies)
        one.table = one.table[: update.keep] + list(update.blocks)
        one.tokens = one.tokens[:keep]

    def end(self) -> None:
        one = self.held.pop(self.r.randrange(len(self.held))) if self.held else None
        if one is not None:
            self.cache.release(self.me, one.lease, now=self.now)

    def look(self) -> None:
        """Read all leases back, slot by slot, and by attention over all of them at once."""
        held = [one for one in self.held if one.tokens]
        for one in held:
            at = np.arange(len(one.tokens))
            blocks = np.array(one.table)[at // self.size]
            found = self.pool[0][:, blocks, at % self.size].numpy()
            assert np.array_equal(found, self.kv(one.tokens, 0)), f"lease {one.lease} reads others"
        if not held:
            return
        width = max(len(one.table) for one in held)
        tables = torch.zeros(len(held), width, dtype=torch.int32)
        for s, one in enumerate(held):
            tables[s, : len(one.table)] = torch.tensor(one.table)
        contexts = torch.tensor([len(one.tokens) for one in held], dtype=torch.int32)
        noise = torch.Generator().manual_seed(self.r.getrandbits(32))
        arguments = {
            "query": torch.randn(len(held), 4, self.DIM, generator=noise),
            "key_cache": self.pool[0, 0],
            "value_cache": self.pool[0, 1],
            "block_tables": tables,
            "query_start": torch.arange(len(held) + 1, dtype=torch.int32),
            "context_lens": contexts,
        }
        limits = ((contexts - 1) // self.size).tolist()
        groups = GroupPlan.build(tables, limits) if self.r.random() < 0.5 else None
        batch = Batch(arguments, {"scale": 0.25}, groups, [])
        compare(batch, call(batch, self.r))


def lease(r: Random) -> None:
    """Leases of a real cache: what was computed for a path is what its lease reads."""
    worker = Worker(r)
    for _ in range(r.randrange(5, 40)):
        worker.step()
        if r.random() < 0.3:
            worker.look()
    worker.look()
    worker.cache.check()


PARTS: dict[str, Callable[[Random], None]] = {
    "attend": attend,
    "refuse": refuse,
    "move": move,
    "lease": lease,
    "view": view,
}


# ── running ───────────────────────────────────────────────────────────────────────────────────────


def work(part: str, seconds: float, seed: int, most: int) -> int:
    """Try seeds until the time is over; each is told before it is tried.  The child's side."""
    torch.set_num_threads(1)
    count, due = 0, time.monotonic() + seconds
    while count < most and (not count or time.monotonic() < due):
        os.write(1, f"{seed + count}\n".encode())
        try:
            PARTS[part](Random(f"{part} {seed + count}"))
        except Unsupported:
            if not _interpreted():
                raise
        count += 1
    return 0


def arguments_of(way: str, part: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "fuzz.plane", "--child", f"{way}/{part}"]


def ways(only: str = "") -> Iterator[tuple[str, str, float]]:
    """Each way and part, with its share."""
    for way, (_, parts, share) in WAYS.items():
        if way.startswith("narrow") and platform.machine() != "x86_64":
            continue
        for part in parts:
            if f"{way}/{part}".startswith(only):
                yield way, part, share / len(parts)


def plane(
    seconds: float, seed: int = 0, only: str = "", most: int = 10**9
) -> dict[str, tuple[int, str]]:
    """Fuzz the data plane; give inputs and findings by way and part."""
    found = {}
    chosen = list(ways(only))
    whole = sum(share for *_, share in chosen)
    for way, part, share in chosen:
        path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
        span = f"{seconds * share / whole:.2f}"
        done = subprocess.run(
            [*arguments_of(way, part), "--seconds", span, "--seed", str(seed), "--most", str(most)],
            capture_output=True,
            text=True,
            env=os.environ | WAYS[way][0] | {"PYTHONPATH": path},
            check=False,
        )
        tried = done.stdout.split()
        finding = ""
        if done.returncode:
            last = tried[-1] if tried else "none"
            finding = (
                f"{way}/{part}, seed {last}, exit {done.returncode}; again with: "
                f"python -m fuzz.plane --only {way}/{part} --seconds 0 --seed {last}\n"
                f"{done.stderr[-2500:]}"
            )
        found[f"{way}/{part}"] = (len(tried), finding)
    return found


def campaign(seconds: float) -> tuple[int, str]:
    """All ways and parts as one target of `make fuzz`."""
    found = plane(seconds, seed=int(time.time()) * 1000).values()
    return sum(count for count, _ in found), "\n".join(finding for _, finding in found if finding)


def main() -> int:
    """Fuzz within a time box; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.plane", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a way, or way/part: native/attend")
    parser.add_argument("--most", type=int, default=10**9, help="inputs of each")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return work(options.child.split("/")[1], options.seconds, options.seed, options.most)
    found = plane(options.seconds, options.seed, options.only)
    for name, (count, finding) in found.items():
        sys.stdout.write(f"{name:<18} {count:>9,}  {1 if finding else 0}\n{finding}")
    return 1 if any(finding for _, finding in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
