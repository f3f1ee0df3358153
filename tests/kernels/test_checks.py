"""Whatever is passed: our error or the right answer, never a signal, on both ways that a CPU has.

Each ill-formed call is made in a process of its own, so that a crash is seen for what it is.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.native_cases import TOLERANCE, gap, groups_of
from kernels.strange_tensors import NOT_PLAIN, let_go, made, of_inference, read_only
from prefixcache.errors import InvalidRequest
from prefixcache.types import Layout
from prefixcache_kernels import (
    GroupedPlan,
    GroupPlan,
    Plan,
    Rotary,
    SharedPool,
    copy_blocks,
    paged_attention,
    rotate_keys,
    shared_prefix_attention,
    store_kv,
)
from prefixcache_kernels.fence import Fence
from prefixcache_kernels.oracle import oracle_attention

PATHS = pytest.mark.usefixtures("path")
NAN, INF = float("nan"), float("inf")


def step(num: int = 2) -> dict[str, Any]:
    """Some sequences that decode behind 8 keys each, in blocks of 4."""
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(num, 4, 16, generator=generator),
        "key_cache": torch.randn(8, 4, 2, 16, generator=generator),
        "value_cache": torch.randn(8, 4, 2, 16, generator=generator),
        "block_tables": torch.arange(2 * num, dtype=torch.int32).view(num, 2),
        "query_start": torch.arange(num + 1, dtype=torch.int32),
        "context_lens": torch.full((num,), 8, dtype=torch.int32),
        "scale": 0.25,
    }


LARGE = torch.tensor([8.0, 8.0])
ILL_FORMED: list[dict[str, Any]] = [
    *({"window": w} for w in (8.0, INF, NAN, True, "8", 0, -1, 2**31, 2**70, 10**5000)),
    *({"scale": s} for s in (None, "1", NAN, INF, -INF, 1e38, True, 10**400, 10**5000)),
    *({"softcap": c} for c in (0, 0.0, -1.0, NAN, INF, 1e31, 1e-31, "30", True)),
    *({name: LARGE} for name in ("context_lens", "query_start")),
    {"query_start": torch.tensor([0.0, 1.0, 2.0])},
    *({"block_tables": torch.zeros(2, 2).to(t)} for t in (torch.float32, torch.bool)),
    {"block_tables": [[0, 1], [2, 3]]},
    {"context_lens": torch.full((2, 1), 8)},
    {"context_lens": torch.tensor([8, 9])},
    {"context_lens": torch.tensor([8, 2**62])},
    {"query_start": torch.tensor([0, 2, 1])},
    {"query_start": torch.tensor([1, 1, 2])},
    {"block_tables": torch.tensor([[0, 1], [2, 8]])},
    {"block_tables": torch.tensor([[0, -1], [2, 3]])},
    {"block_tables": torch.tensor([[0, 2**40], [2, 3]])},
    {"query": torch.zeros(2, 0, 16)},
    {"query": torch.zeros(2, 4, 16).to_sparse()},
    {"query": torch.zeros(2, 4, 16, device="meta")},
    {"query": torch.zeros(2, 4, 16, dtype=torch.int32)},
    {"query": None},
    {"key_cache": torch.zeros(8, 4, 0, 16), "value_cache": torch.zeros(8, 4, 0, 16)},
    {"key_cache": torch.zeros(8, 0, 2, 16), "value_cache": torch.zeros(8, 0, 2, 16)},
    {"sinks": torch.zeros(4, dtype=torch.int64)},
    {"sinks": torch.zeros(4, device="meta")},
    {"lse": torch.zeros(1).expand(2, 4)},
    {"plan": 3},
]


def refused(name: str, call: str) -> None:
    """Make one call in a process of its own; it must end by itself, with our error."""
    code = (
        "import sys; from kernels import test_checks as t; from prefixcache.errors import *\n"
        f"try: {call}\nexcept InvalidRequest as e: sys.exit(0 if str(e) else 3)\nsys.exit(4)"
    )
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}:{root / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True)
    assert done.returncode == 0, (name, done.returncode, done.stderr.decode()[-1500:])


def call_all() -> None:
    """Every ill-formed call, plain and grouped; the first that is not refused is raised."""
    for i, changes in enumerate(ILL_FORMED):
        arguments = step() | changes
        for run in (paged_attention, shared_prefix_attention):
            extra = {} if run is paged_attention else {"groups": GroupPlan.alone(2)}
            try:
                run(**arguments, **extra)
            except InvalidRequest:
                continue
            raise AssertionError(f"taken: {i} {changes} by {run.__name__}")
    raise InvalidRequest("all were refused")


@pytest.mark.parametrize("native", ["0", "1"], ids=["torch", "native"])
def test_what_cannot_be_attended_is_refused(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats as lengths once reached C as bits."""
    monkeypatch.setenv("PREFIXCACHE_NATIVE", native)
    refused("attention", "t.call_all()")


@PATHS
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_a_plan_does_not_stand_for_the_layer_that_is_passed_with_it(name: str) -> None:
    """Each layer's caches are its own: other heads than the queries', a plan or none."""
    arguments = step()
    batch = [arguments[part] for part in ("block_tables", "query_start", "context_lens")]
    plan = Plan.build(*batch, 4)
    paged_attention(**arguments, plan=plan)
    arguments[name] = arguments[name].transpose(2, 3)
    with pytest.raises(InvalidRequest, match="does not fit caches"):
        paged_attention(**arguments, plan=plan)


@PATHS
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3)], ids=["within blocks", "outermost"])
def test_what_is_shared_lies_side_by_side_in_a_pool_with_heads_first(
    order: tuple[int, ...],
) -> None:
    """Such blocks are read in place, but not as one run of slots."""
    arguments = step()
    arguments["block_tables"] = torch.tensor([[0, 1, 4], [0, 1, 5]], dtype=torch.int32)
    arguments["context_lens"] = torch.tensor([9, 10], dtype=torch.int32)
    back = [order.index(dim) for dim in range(4)]
    for name in ("key_cache", "value_cache"):
        arguments[name] = arguments[name].permute(order).contiguous().permute(back)
    groups = GroupPlan.build(arguments["block_tables"], [2, 2])
    got = shared_prefix_attention(**arguments, groups=groups)
    assert gap(got, oracle_attention(**arguments)) <= 1e-5


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "grouped"])
def test_queries_and_caches_whose_elements_lie_apart(
    batch: Any, dtype: torch.dtype, shared: bool
) -> None:
    """PyTorch multiplies such operands with scores rounded to 16 bits."""
    b = batch([(1, 94), (1, 150), (3, 90)], dim=80, dtype=dtype, shared=((1, 0, 3),), poison=0.0)
    arguments = dict(zip(step(), b.args, strict=False)) | {"scale": 1.0}
    want = oracle_attention(**arguments)
    for name in ("query", "key_cache", "value_cache"):
        arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    if shared:
        got = shared_prefix_attention(**arguments, groups=groups_of(b))
    else:
        got = paged_attention(**arguments)
    assert gap(got, want) <= TOLERANCE[dtype]


def test_groups_of_lengths_that_lie_nowhere_are_refused() -> None:
    for name in ("query_start", "context_lens"):
        arguments = step()
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(InvalidRequest, match="lies nowhere"):
            shared_prefix_attention(**arguments, groups=GroupPlan.alone(2))
    none = torch.zeros(0, 3, dtype=torch.int64)
    for nowhere in (none.to("meta"), torch._to_functional_tensor(none)):
        with pytest.raises(InvalidRequest, match=r"lies nowhere|has not the memory"):
            copy_blocks(torch.zeros(1, 2, 1, 4, 1, 8), nowhere)


@PATHS
def test_a_well_formed_call_beside_them_is_answered() -> None:
    """Integers of any width, in any stride; numbers as NumPy has them."""
    arguments = step()
    want = oracle_attention(**arguments)
    wide = torch.stack([arguments["context_lens"]] * 3, 1)
    arguments["context_lens"] = wide[:, 1]
    arguments["scale"] = torch.tensor(0.25).numpy()[()]
    assert gap(paged_attention(**arguments), want) <= 1e-5


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", [(1, 1, 1), (0, 16, 1), (16, 8, 1), (16, 0, 1)], ids=str)
def test_queries_that_lie_in_each_other_are_answered_each_for_itself(
    dtype: torch.dtype, strides: tuple[int, int, int]
) -> None:
    """They are read only; PyTorch gave the answer their strides, and wrote it over itself."""
    arguments = step()
    for name in ("query", "key_cache", "value_cache"):
        arguments[name] = arguments[name].to(dtype)
    arguments["query"] = arguments["query"].as_strided((2, 4, 16), strides)
    want = oracle_attention(**arguments)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert gap(paged_attention(**arguments), want) <= near
    groups = GroupPlan.alone(2)
    assert gap(shared_prefix_attention(**arguments, groups=groups), want) <= near


@PATHS
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("rare", ["lse", "value_dim", "double", "eight"])
def test_what_a_sequence_without_queries_names_is_not_read(asked: int, rare: str) -> None:
    """Its row may be left from another step, also where every sequence has none."""
    arguments = step()
    arguments["query"] = arguments["query"][:asked]
    arguments["query_start"] = torch.tensor([0, asked, asked])
    arguments["block_tables"][asked:] = torch.tensor([2**31 - 1, -1])
    options: dict[str, Any] = {}
    if rare == "lse":
        options["lse"] = torch.zeros(asked, 4)
    elif rare == "value_dim":
        arguments["value_cache"] = arguments["value_cache"][..., :8]
    elif rare == "double":
        for name in ("query", "key_cache", "value_cache"):
            arguments[name] = arguments[name].double()
    else:
        options = {"key_scale": torch.ones(2), "value_scale": torch.ones(2)}
        for name in ("key_cache", "value_cache"):
            arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    alone = arguments | {
        name: arguments[name][: asked + (name == "query_start")]
        for name in ("block_tables", "query_start", "context_lens")
    }
    want = oracle_attention(**alone, **options | {"lse": None})
    assert gap(paged_attention(**arguments, **options), want) <= 1e-5
    groups = GroupPlan.alone(2)
    assert gap(shared_prefix_attention(**arguments, groups=groups, **options), want) <= 1e-5


@PATHS
@pytest.mark.parametrize("cap", [1e-6, 0.5, 30.0, 1e3, 1e5, 1e7, 1e30])
def test_a_cap_is_as_exact_far_above_the_scores_as_near_them(cap: float) -> None:
    """What a cap leaves of scores of about 10."""
    arguments = step() | {"scale": 2.5}
    want = oracle_attention(**arguments, softcap=cap)
    assert gap(paged_attention(**arguments, softcap=cap), want) <= 1e-5


@PATHS
@pytest.mark.parametrize("scale", [-0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_scale_that_is_not_positive(batch: Any, scale: float, dtype: torch.dtype) -> None:
    """Also where PyTorch's own causal mask would be multiplied by it."""
    b = batch([(150, 200)], dtype=dtype)
    got = paged_attention(*b.args, scale=scale)
    assert gap(got, oracle_attention(*b.args, scale=scale)) <= 1e-2


@pytest.mark.parametrize("sink", [None, 3e38, -3e38])
def test_scores_and_sinks_at_the_ends_of_float32(sink: float | None) -> None:
    """Scores below -1e30 were taken for none."""
    arguments = step(1)
    arguments["query"] = torch.full((1, 4, 16), -1e18)
    arguments["key_cache"] = torch.full((8, 4, 2, 16), 1e18)
    options = {} if sink is None else {"sinks": torch.full((4,), sink)}
    got = paged_attention(**arguments, **options)
    want = oracle_attention(**arguments, **options)
    assert got.isfinite().all()
    assert gap(got, want) <= 1e-5


@pytest.mark.parametrize("heads", [(65_536, 65_536, 1), (192, 1, 256)], ids=str)
def test_a_small_stack_is_enough(heads: tuple[int, int, int]) -> None:
    """Many heads of one number, and the widest group, in a thread with 256 KiB."""
    call = f"t.on_a_small_stack(*{heads})"
    refused("stack", call)


def on_a_small_stack(heads: int, kv_heads: int, dim: int) -> None:
    """Attend in such a thread; says so by our error."""
    import threading

    arguments = step(1)
    arguments["query"] = torch.randn(1, heads, dim)
    for name in ("key_cache", "value_cache"):
        arguments[name] = torch.randn(8, 4, kv_heads, dim)
    want = oracle_attention(**arguments) if heads < 1000 else None
    paged_attention(**step())  # compiles
    answers: list[torch.Tensor] = []
    torch.set_num_threads(1)
    threading.stack_size(256 << 10)
    thread = threading.Thread(target=lambda: answers.append(paged_attention(**arguments)))
    thread.start()
    thread.join()
    assert answers
    assert answers[0].isfinite().all()
    assert want is None or gap(answers[0], want) <= 1e-5
    raise InvalidRequest("answered")


def test_only_the_slots_that_are_named_are_written_or_none() -> None:
    """Slots in a column, heads before slots, and a wrong slot behind good ones."""
    key = torch.randn(3, 2, 16)
    slots = torch.tensor([[1, 20], [5, 21], [9, 22]])[:, 0]
    for turned in (False, True):
        caches = [torch.zeros(8, 4, 2, 16) for _ in range(2)]
        if turned:
            caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
        with pytest.raises(InvalidRequest, match="outside the pool"):
            store_kv(key, key, *caches, torch.tensor([1, 5, 32]))
        assert not any(cache.any() for cache in caches)
        store_kv(key.requires_grad_(), key, *caches, slots)
        for cache in caches:
            assert not cache.requires_grad
            assert cache.reshape(32, -1).any(1).nonzero().flatten().tolist() == [1, 5, 9]
    with pytest.raises(InvalidRequest, match="expanded"):
        store_kv(key, key, *[torch.zeros(1, 4, 2, 16).expand(8, 4, 2, 16)] * 2, slots)


def test_copies_and_turns_take_their_own_types_only() -> None:
    """Copies of 32 bits overflowed; of 8 bits they were a mask; integers were turned."""
    blocks = torch.zeros(1, 2, 4, 4, 2, 16)
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        with pytest.raises(InvalidRequest, match=r"torch\.int64 rows"):
            copy_blocks(blocks, torch.tensor([[0, 1, 1]]).to(dtype))
    angles = Rotary((1.0,))
    slot = torch.tensor([0])
    for wrong in (blocks.int(), blocks.bool()):
        with pytest.raises(InvalidRequest):
            rotate_keys(wrong, slot, 1, angles)
    for delta in (1.5, 2**31, None, 10**5000):
        with pytest.raises(InvalidRequest, match="delta"):
            rotate_keys(blocks, slot, delta, angles)  # type: ignore[arg-type]
    for config in (
        {"rope_theta": None},
        {"rope_theta": NAN},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": "x"},
    ):
        with pytest.raises(InvalidRequest):
            Rotary.from_config(config, 16)
    for head_dim in (0, 1.5, 10**5000):
        with pytest.raises(InvalidRequest):
            Rotary.from_config({}, head_dim)  # type: ignore[arg-type]
    for frequency in (NAN, 10**5000):
        with pytest.raises(InvalidRequest):
            Rotary((frequency,))


@PATHS
def test_a_plan_serves_its_own_batch_alone() -> None:
    """Equal tables are the same batch; other lengths are not."""
    arguments = step()
    batch = [arguments[name] for name in ("block_tables", "query_start", "context_lens")]
    plan = Plan.build(*batch, 4)
    other = arguments | {"context_lens": torch.tensor([8, 7], dtype=torch.int32)}
    same = arguments | {"context_lens": arguments["context_lens"].clone()}
    assert torch.equal(paged_attention(**same, plan=plan), paged_attention(**arguments))
    with pytest.raises(InvalidRequest, match="another batch"):
        paged_attention(**other, plan=plan)


def test_groups_that_are_no_forest_of_these_tables_are_refused() -> None:
    """Rows, stretches and levels by hand: C would follow them anywhere."""
    arguments = step()
    arguments["block_tables"] = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    batch = [arguments[name] for name in ("block_tables", "query_start", "context_lens")]
    good = GroupPlan.build(arguments["block_tables"], [1, 1])
    (run,) = good.runs
    GroupedPlan.build(*batch, 4, good)
    for change in ("row", "first", "blocks", "start", "end", "level"):
        for value in (-1_000_000, -1, 2, 3, 10**9):
            bad = replace(good, runs=(run._replace(**{change: value}),))
            if bad.runs == good.runs:
                continue
            with pytest.raises(InvalidRequest, match="groups whose"):
                GroupedPlan.build(*batch, 4, bad)
    for bad in (
        replace(good, own=(0, 0)),
        replace(good, own=(1, 2)),
        replace(good, positions=(0, 0)),
        replace(good, positions=(0, -1)),
    ):
        with pytest.raises(InvalidRequest, match="groups whose"):
            GroupedPlan.build(*batch, 4, bad)
    batch[0] = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    with pytest.raises(InvalidRequest, match="do not share"):
        GroupedPlan.build(*batch, 4, good)


def test_groups_with_fields_of_other_kinds_are_refused() -> None:
    """A list could change after it was looked at; a number that is none reaches C or NumPy."""
    arguments = step()
    arguments["block_tables"] = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    batch = [arguments[name] for name in ("block_tables", "query_start", "context_lens")]
    good = GroupPlan.build(arguments["block_tables"], [1, 1])
    plan = GroupedPlan.build(*batch, 4, good)
    (run,) = good.runs
    packed = good.packed
    changes: list[dict[str, Any]] = [
        *({name: value} for name in ("runs", "positions", "own") for value in (None, 3, "01")),
        *({name: [*getattr(good, name)]} for name in ("runs", "positions", "own")),
        *({"runs": (value,)} for value in (None, 3, (0, 0, 1, 0, 2, 0), packed)),
        *({"runs": (run._replace(blocks=v),)} for v in (1.0, True, None, "1", packed[0])),
        *({"positions": (0, value)} for value in (1.0, True, None, "1", packed)),
        *({"own": (1, value)} for value in (1.0, True, None, "1")),
        *({"packed": value} for value in (None, 3, packed.tolist(), packed.long(), packed[1:])),
        *({"packed": value} for value in (packed.view(2, 5), packed.flip(0), packed + 1)),
        *({"packed": NOT_PLAIN[kind](packed)} for kind in ("meta", "traced", "let go", "derived")),
    ]
    for change in changes:
        bad = replace(good, **change)
        with pytest.raises(InvalidRequest, match=r"groups (whose|of)|other groups"):
            GroupedPlan.build(*batch, 4, bad)
        with pytest.raises(InvalidRequest, match=r"groups (whose|of)|other groups"):
            shared_prefix_attention(**arguments, groups=bad)
        if "packed" not in change and "own" not in change:
            with pytest.raises(InvalidRequest, match=r"groups (whose|of)|other groups"):
                shared_prefix_attention(**arguments, groups=bad, plan=plan)


def test_scores_of_many_queries_in_bfloat16_are_not_rounded_before_they_are_weighed(
    batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of about 16: PyTorch's way is within the bound that all ways have."""
    from prefixcache_kernels.cpu import attend

    monkeypatch.setattr(attend, "library", lambda: None)
    b = batch([(40, 90)], dtype=torch.bfloat16)
    got = paged_attention(*b.args, scale=4.0)
    assert gap(got, oracle_attention(*b.args, scale=4.0)) <= 5e-3


def call_with_strange_tensors(name: str) -> None:
    """One kind of tensor in the place of each; a plan of a well-formed batch, or none."""
    slots, new = torch.tensor([1, 5]), torch.randn(2, 2, 16)
    whole = step()
    parts = ("block_tables", "query_start", "context_lens")
    options = ("scale", "window", "softcap")
    plan = Plan.build(*[whole[part] for part in parts], 4)
    grouped = GroupedPlan.build(*[whole[part] for part in parts], 4, GroupPlan.alone(2))
    paged_attention(**whole, plan=plan)
    stores = {"key": new, "value": new.clone(), "slot_mapping": slots}
    stores |= {name: whole[name].clone() for name in ("key_cache", "value_cache")}
    rare = {"sinks": torch.zeros(4), "lse": torch.zeros(2, 4)}
    scales = {"key_scale": torch.ones(2), "value_scale": torch.ones(2)}
    eight = {part: whole[part].to(torch.float8_e4m3fn) for part in ("key_cache", "value_cache")}
    blocks, turn = torch.zeros(1, 2, 4, 4, 2, 16), Rotary((1.0,))
    copies = torch.tensor([[0, 1, 2]])
    calls: list[tuple[Any, dict[str, Any]]] = []
    for part, given in (whole | rare | scales).items():
        if isinstance(given, torch.Tensor):
            arguments = (
                whole | (eight | scales if part in scales else {}) | {part: made(name, given)}
            )
            calls += [(paged_attention, arguments), (paged_attention, arguments | {"plan": plan})]
            arguments = arguments | {"groups": GroupPlan.alone(2)}
            calls += [
                (shared_prefix_attention, a) for a in (arguments, arguments | {"plan": grouped})
            ]
    calls += [(store_kv, stores | {part: made(name, given)}) for part, given in stores.items()]
    for part in scales:
        both = stores | eight | scales
        calls.append((store_kv, both | {part: made(name, scales[part])}))
    calls += [
        (copy_blocks, {"blocks": made(name, blocks), "copies": copies}),
        (copy_blocks, {"blocks": blocks, "copies": made(name, copies)}),
        (rotate_keys, {"blocks": made(name, blocks), "slots": slots, "delta": 1, "angles": turn}),
        (rotate_keys, {"blocks": blocks, "slots": made(name, slots), "delta": 1, "angles": turn}),
    ]
    if name not in ("a list", "an array"):  # which these may be
        table = whole["block_tables"]
        calls += [
            (GroupPlan.build, {"tables": made(name, table), "limits": [1, 1]}),
            (GroupPlan.build, {"tables": table, "limits": made(name, slots)}),
            (Rotary, {"frequencies": made(name, torch.ones(1))}),
        ]
    number = None  # where one number is expected: to write such a tensor ends the process, too
    with contextlib.suppress(RuntimeError, IndexError, TypeError):
        number = NOT_PLAIN[name](torch.ones(()))
    if isinstance(number, torch.Tensor):
        turning = {"blocks": blocks, "slots": slots, "delta": number, "angles": turn}
        batch = {part: whole[part] for part in parts} | {"block_size": number}
        calls += [(paged_attention, whole | {part: number}) for part in options]
        calls += [(rotate_keys, turning), (Plan.build, batch)]
    for run, arguments in calls:
        if any(value is None for value in arguments.values()):
            continue  # there is no such tensor of this shape or type
        try:
            run(**arguments)
        except InvalidRequest:
            continue
        strange = [part for part, given in arguments.items() if not isinstance(given, Plan)]
        raise AssertionError(f"taken: {name} by {run.__name__} of {strange}")


def call_with_all_strange_tensors() -> None:
    """Every kind; says which one it is at, for it may be the last thing said."""
    for name in NOT_PLAIN:
        sys.stderr.write(f"{name}\n")
        call_with_strange_tensors(name)
    raise InvalidRequest("all were refused")


@pytest.mark.parametrize("native", ["0", "1"], ids=["torch", "native"])
def test_a_tensor_without_plain_memory_is_refused_in_every_place(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch gives null for the address of most of them: C read there, and died."""
    monkeypatch.setenv("PREFIXCACHE_NATIVE", native)
    refused("strange tensors", "t.call_with_all_strange_tensors()")


def write_to_what_is_read_only() -> None:
    """A pool, or sums, in a file that is mapped to be read."""
    new, slots = torch.randn(2, 2, 16), torch.tensor([1, 5])
    free, fixed = torch.zeros(8, 4, 2, 16), read_only(torch.zeros(8, 4, 2, 16))
    blocks = read_only(torch.zeros(1, 2, 4, 4, 2, 16))
    for call in (
        lambda: store_kv(new, new, fixed, free, slots),
        lambda: store_kv(new, new, free, fixed, slots),
        lambda: paged_attention(**step(), lse=read_only(torch.zeros(2, 4))),
        lambda: copy_blocks(blocks, torch.tensor([[0, 1, 2]])),
        lambda: rotate_keys(blocks, slots, 1, Rotary((1.0,))),
    ):
        with pytest.raises(InvalidRequest, match="cannot be written"):
            call()
    assert not free.any()
    arguments = step()
    want = oracle_attention(**arguments)
    for name in ("query", "key_cache", "value_cache", "block_tables"):
        arguments[name] = read_only(arguments[name])
    assert gap(paged_attention(**arguments), want) <= 1e-5
    raise InvalidRequest("refused, and read")


@pytest.mark.parametrize("native", ["0", "1"], ids=["torch", "native"])
def test_memory_that_is_mapped_to_be_read_is_read_alone(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is asked before anything is written; a write would be a signal."""
    monkeypatch.setenv("PREFIXCACHE_NATIVE", native)
    refused("read only", "t.write_to_what_is_read_only()")


def test_slots_that_lie_in_each_other_are_not_written() -> None:
    """A slot's numbers belong to it alone, and to keys or values alone."""
    new, slots = torch.randn(2, 2, 16), torch.tensor([1, 5])
    free, memory = torch.zeros(8, 4, 2, 16), torch.zeros(4096)
    for strides in ((128, 16, 16, 1), (127, 32, 16, 1), (0, 32, 16, 1)):
        tangled = memory.as_strided((8, 4, 2, 16), strides)
        with pytest.raises(InvalidRequest, match="overlaps itself"):
            store_kv(new, new, tangled, free, slots)
    side_by_side = torch.zeros(8, 4, 2, 32)
    halves = side_by_side[..., :16], side_by_side[..., 16:]
    for keys, values in ((free, free), (halves[0], side_by_side[..., 8:24])):
        with pytest.raises(InvalidRequest, match="in common"):
            store_kv(new, new, keys, values, slots)
    for name in ("key", "value"):
        given = {"key": new, "value": new} | {name: free[0, :2]}
        with pytest.raises(InvalidRequest, match=f"{name} lies in the memory"):
            store_kv(**given, key_cache=free, value_cache=free.clone(), slot_mapping=slots)
    assert not free.any()
    assert not memory.any()
    store_kv(new, new + 1, *halves, slots)
    assert torch.equal(halves[0].flatten(0, 1)[slots], new)
    assert torch.equal(halves[1].flatten(0, 1)[slots], new + 1)
    arguments = step()
    for part in ("query", "key_cache"):
        inside = arguments[part].flatten()[:8].view(2, 4)
        with pytest.raises(InvalidRequest, match=f"{part} lies in the memory of lse"):
            paged_attention(**arguments, lse=inside)


@PATHS
def test_what_was_made_in_inference_mode_or_has_gradients_is_written_all_the_same() -> None:
    """A pool has no part in either."""
    new, slots = torch.randn(2, 2, 16), torch.tensor([1, 5])
    for change in (of_inference, lambda t: t.requires_grad_()):
        caches = [change(torch.zeros(8, 4, 2, 16)) for _ in range(2)]
        lse, blocks = change(torch.zeros(2, 4)), change(torch.randn(1, 2, 4, 4, 2, 16))
        store_kv(new, new, *caches, slots)
        copy_blocks(blocks, torch.tensor([[0, 1, 4]]))
        rotate_keys(blocks, torch.tensor([9]), 1, Rotary((1.0,)))
        paged_attention(**step(), lse=lse)
        assert all(torch.equal(cache.flatten(0, 1)[slots], new) for cache in caches)
        assert torch.equal(blocks[:, :, 0], blocks[:, :, 1])
        assert lse.all()


def test_caches_that_were_seen_are_looked_at_anew_when_they_have_changed() -> None:
    """What was found of a tensor holds for its memory, shape and strides."""
    new, slots = torch.randn(2, 2, 16), torch.tensor([1, 5])
    keys, values = torch.zeros(8, 4, 2, 16), torch.zeros(8, 4, 2, 16)
    store_kv(new, new, keys, values, slots)
    other = torch.zeros(8, 4, 2, 16)
    keys.set_(other.untyped_storage(), 0, other.shape, other.stride())
    store_kv(new, new, keys, values, slots)
    assert torch.equal(other.flatten(0, 1)[slots], new)
    keys.transpose_(0, 1)
    with pytest.raises(InvalidRequest, match="do not fit"):
        store_kv(new, new, keys, values, slots)
    keys.transpose_(0, 1)
    values.untyped_storage().resize_(0)
    with pytest.raises(InvalidRequest, match="let go"):
        store_kv(new, new, keys, values, slots)


def test_what_was_seen_of_caches_is_forgotten_with_them() -> None:
    """Nothing holds a pool's memory after its tensors."""
    import gc
    import weakref

    from prefixcache_kernels.checks import _WRITTEN

    gc.collect()
    before = len(_WRITTEN)
    new, slots = torch.randn(2, 2, 16), torch.tensor([1, 5])
    array = torch.zeros(2, 8, 4, 2, 16).numpy()
    alive = weakref.ref(array)
    caches = torch.from_numpy(array)
    keys, values = caches
    store_kv(new, new, keys, values, slots)
    assert len(_WRITTEN) == before + 1
    del array, caches, keys, values
    gc.collect()
    assert len(_WRITTEN) == before
    assert alive() is None


def test_a_plan_whose_tables_lose_their_memory_is_refused_with_them() -> None:
    arguments = step()
    batch = [arguments[name] for name in ("block_tables", "query_start", "context_lens")]
    plan = Plan.build(*batch, 4)
    for name in ("block_tables", "query_start", "context_lens"):
        with pytest.raises(InvalidRequest, match="let go"):
            paged_attention(**arguments | {name: let_go(arguments[name])}, plan=plan)


@PATHS
def test_values_as_large_as_a_sum_of_them_allows(batch: Any) -> None:
    """Weights grow to 2**8 before a sum is scaled anew; 1,000 keys of 1e33 are within float32."""
    b = batch([(1, 1000), (3, 200)], poison=0.0)
    b.value_cache.sign_().mul_(1e33)
    got = paged_attention(*b.args, scale=3.0)
    assert got.isfinite().all()
    assert gap(got / 1e33, oracle_attention(*b.args, scale=3.0) / 1e33) <= 1e-5


def test_a_fence_takes_streams_alone() -> None:
    """A wrong one would be found at the first push, after the kernels were queued."""
    blocks = torch.zeros(1)
    for wrong in (3, None, {1: 2}, iter([])):
        with pytest.raises(InvalidRequest, match="not a sequence"):
            Fence.of(blocks, wrong)  # type: ignore[arg-type]
    for wrong in (3, None, "s", torch.device("cpu"), blocks):
        with pytest.raises(InvalidRequest, match=r"not a torch\.cuda\.Stream"):
            Fence.of(blocks, [wrong])  # type: ignore[list-item]


def test_a_pool_is_not_pickled() -> None:
    """It is the mapping of one process."""
    import copy
    import pickle

    with SharedPool.private(Layout(1, 1, 8, "float32"), 2, 4) as pool:
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(InvalidRequest, match="cannot be pickled"):
                way(pool)
