"""Whole layers in C: what reaches them was looked at, in the first layer and in all others."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.strange_tensors import NOT_PLAIN, made, read_only
from prefixcache.errors import InvalidRequest
from prefixcache_kernels import GroupedPlan, GroupPlan, Plan, paged_attention
from prefixcache_kernels.checks import is_plain
from prefixcache_kernels.cpu.layers import Layers, LayerWeights, Rotation, Sizes
from prefixcache_kernels.cpu.library import library
from prefixcache_kernels.cpu.linear import Matrix, pack

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH = 24, 4, 2, 8, 40
SIZES = Sizes(HIDDEN, WIDTH, HEADS, KV_HEADS, DIM, 1e-5, 0.3)
BLOCKS, BLOCK = 6, 4
WINDOWS = (None, 3, None, 3)

BATCH = (
    torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32),
    torch.tensor([0, 1, 2, 7], dtype=torch.int32),
    torch.tensor([8, 8, 5], dtype=torch.int32),
)


def weight(outputs: int, inputs: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=draw) * inputs**-0.5


WEIGHTS = [
    {
        "qkv": weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 10 * i),
        "out": weight(HIDDEN, HEADS * DIM, 10 * i + 1),
        "gate_up": weight(2 * WIDTH, HIDDEN, 10 * i + 2),
        "down": weight(HIDDEN, WIDTH, 10 * i + 3),
    }
    for i in range(len(WINDOWS))
]


def packed(given: dict[str, Tensor], window: int | None) -> LayerWeights:
    parts: dict[str, Any] = {
        name: Matrix(
            pack(one, gated=name == "gate_up"),
            one.shape[1],
            one.shape[0] // (2 if name == "gate_up" else 1),
            name == "gate_up",
        )
        for name, one in given.items()
    }
    parts |= {name: torch.ones(HIDDEN) for name in ("input_norm", "post_norm")}
    return LayerWeights(**parts, window=window)


def network() -> Layers:
    return Layers([packed(*both) for both in zip(WEIGHTS, WINDOWS, strict=True)], SIZES)


def step() -> dict[str, Any]:
    """Three sequences: two that decode behind 7 keys, one that brings 5."""
    draw = torch.Generator().manual_seed(1)
    pool = torch.randn(len(WINDOWS), 2, BLOCKS, BLOCK, KV_HEADS, DIM, generator=draw)
    return {
        "x": torch.randn(7, HIDDEN, generator=draw),
        "rotation": Rotation.of(
            torch.tensor([7, 7, 0, 1, 2, 3, 4]), torch.rand(DIM // 2, generator=draw), 1.0
        ),
        "slots": torch.tensor([7, 15, 16, 17, 18, 19, 20]),
        "keys": [layer[0] for layer in pool],
        "values": [layer[1] for layer in pool],
        "plan": GroupedPlan.build(*BATCH, BLOCK, GroupPlan.alone(3)),
        "rows": torch.tensor([0, 1, 6]),
    }


def by_hand(given: dict[str, Any]) -> Tensor:
    """The same with PyTorch's operators and plain attention."""
    x: Tensor = given["x"].clone()
    cos, sin = given["rotation"]
    cos, sin = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]
    for index, (weights, window) in enumerate(zip(WEIGHTS, WINDOWS, strict=True)):
        h = torch.rms_norm(x, (HIDDEN,), None, SIZES.eps)
        a = (h @ weights["qkv"].T).view(len(x), -1, DIM)
        qk = a[:, : HEADS + KV_HEADS]
        qk = qk * cos + qk.roll(DIM // 2, -1) * sin
        keys, values = given["keys"][index], given["values"][index]
        keys.view(-1, KV_HEADS, DIM)[given["slots"]] = qk[:, HEADS:]
        values.view(-1, KV_HEADS, DIM)[given["slots"]] = a[:, HEADS + KV_HEADS :]
        attended = paged_attention(
            qk[:, :HEADS].contiguous(),
            keys,
            values,
            *BATCH,
            scale=SIZES.scale,
            window=window,
        )
        x = x + attended.flatten(1) @ weights["out"].T
        gate, up = (torch.rms_norm(x, (HIDDEN,), None, SIZES.eps) @ weights["gate_up"].T).chunk(
            2, 1
        )
        x = x + (torch.nn.functional.silu(gate) * up) @ weights["down"].T
    return x[given["rows"]]


def test_layers_with_windows_by_turns_are_those_of_pytorch() -> None:
    want_pool, got_pool = step(), step()
    want, run = by_hand(want_pool), network()
    torch.testing.assert_close(run(**got_pool), want, atol=1e-4, rtol=1e-4)
    for name in ("keys", "values"):
        for got, wanted in zip(got_pool[name], want_pool[name], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    again = step()  # of the same plan and pool, as the next step's layers are
    again |= {name: got_pool[name] for name in ("keys", "values", "plan")}
    torch.testing.assert_close(run(**again), want, atol=1e-4, rtol=1e-4)


def in_layer(name: str, layer: int, cache: Any) -> dict[str, Any]:
    """A step, one of whose layers has other caches; the pool was seen in a step before."""
    arguments = step()
    network()(**step() | {name: list(arguments[name]) for name in ("keys", "values")})
    caches = list(arguments[name])
    caches[layer] = cache(caches[layer])
    return arguments | {name: caches}


def refused(arguments: dict[str, Any]) -> None:
    """No byte of what can be written may change."""
    written = [arguments["x"], *arguments["keys"], *arguments["values"]]
    kept = [one.clone() if is_plain(one) else None for one in written]
    with pytest.raises(InvalidRequest):
        network()(**arguments)
    for one, before in zip(written, kept, strict=True):
        assert before is None or torch.equal(one, before)


OTHER: dict[str, Any] = {
    "fewer blocks": lambda t: t[:-1],
    "more blocks": lambda t: torch.cat([t, t]),
    "another block size": lambda t: t.view(-1, BLOCK // 2, KV_HEADS, DIM),
    "another type": lambda t: t.double(),
    "half as wide": lambda t: t.bfloat16(),
    "apart": lambda t: torch.cat([t, t], 3)[..., :DIM],
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "one slot": lambda t: t[:1, :1].expand(BLOCKS, BLOCK, KV_HEADS, DIM),
    "read only": read_only,
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("other", OTHER)
def test_no_layer_has_other_caches_than_the_first(other: str, name: str, layer: int) -> None:
    refused(in_layer(name, layer, OTHER[other]))


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_caches_are_plain_tensors_in_every_layer(kind: str, name: str) -> None:
    for layer in (0, 2):
        refused(in_layer(name, layer, lambda cache: made(kind, cache)))


def test_caches_that_have_changed_since_they_were_seen_are_looked_at_again() -> None:
    arguments = step() | {"keys": [torch.randn(BLOCKS, BLOCK, KV_HEADS, DIM) for _ in WINDOWS]}
    run = network()
    run(**arguments)
    arguments |= {name: step()[name] for name in ("x", "plan")}
    arguments["keys"][2].resize_(BLOCKS - 1, BLOCK, KV_HEADS, DIM)
    refused(arguments)
    arguments["keys"][2].untyped_storage().resize_(0)
    refused(arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("slots", s) for s in (24, -2, 2**62)),
        *(("rows", r) for r in (7, -1, -(2**62))),
    ],
)
def test_slots_and_rows_lie_within(name: str, change: int) -> None:
    arguments = step()
    arguments[name][1] = change
    refused(arguments)


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", ["x", "slots", "rows"])
def test_what_a_step_brings_is_plain(name: str, kind: str) -> None:
    arguments = step()
    strange = made(kind, arguments[name])
    if strange is not None:
        refused(arguments | {name: strange})


def test_what_a_step_brings_lies_apart_from_what_is_written() -> None:
    for layer in (0, 3):
        arguments = step()
        cache = arguments["values"][layer].view(-1)
        half = (DIM // 2) * 7
        inside = {
            "x": cache[: 7 * HIDDEN].view(7, HIDDEN),
            "slots": cache.view(torch.int64)[:7].zero_(),
            "rows": cache.view(torch.int64)[:3].zero_(),
            "rotation": Rotation(arguments["rotation"].cos, cache[:half].view(7, DIM // 2)),
        }
        for name, given in inside.items():
            refused(arguments | {name: given})
    arguments = step()
    refused(arguments | {"x": read_only(arguments["x"])})
    refused(arguments | {"rows": arguments["rows"].float()})
    refused(arguments | {"keys": arguments["keys"][:-1]})
    refused(arguments | {"keys": [], "values": []})
    with pytest.raises(InvalidRequest, match="no layers"):
        Layers([], SIZES)


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        *((f, odd) for f in Sizes._fields[:5] for odd in (0, -1, 1.5, 2**70)),
        *((f, odd) for f in Sizes._fields for odd in (math.nan, math.inf, True, "8", None, [8])),
        ("eps", -1e-9),
    ],
)
def test_sizes_are_numbers_that_there_can_be(field: str, odd: Any) -> None:
    layers = [packed(*both) for both in zip(WEIGHTS, WINDOWS, strict=True)]
    with pytest.raises(InvalidRequest):
        Layers(layers, SIZES._replace(**{field: odd}))


@pytest.mark.parametrize("odd", [0, -1, 2**31, 1.5, math.nan, True, "3", [3]])
def test_windows_are_numbers_of_tokens(odd: Any) -> None:
    with pytest.raises(InvalidRequest, match="window"):
        Layers([packed(WEIGHTS[0], odd)], SIZES)


@pytest.mark.parametrize("odd", [None, 5, "layers", (1, 2), np.ones(3)])
def test_what_is_of_another_kind_is_refused_by_name(odd: Any) -> None:
    for layers in (odd, [odd], []):
        with pytest.raises(InvalidRequest, match="layer"):
            Layers(layers, SIZES)
    with pytest.raises(InvalidRequest, match="sizes"):
        Layers([packed(WEIGHTS[0], None)], odd)
    for name in ("qkv", "out", "gate_up", "down"):
        with pytest.raises(InvalidRequest, match=name):
            Layers([replace(packed(WEIGHTS[0], None), **{name: odd})], SIZES)
    for name in ("rotation", "plan"):
        with pytest.raises(InvalidRequest, match=name):
            network()(**step() | {name: odd})
    for name in ("keys", "values"):
        refused_name = step() | {name: odd}
        with pytest.raises(InvalidRequest):
            network()(**refused_name)
    for positions, frequencies, scale in (
        (odd, torch.rand(4), 1.0),
        (torch.arange(3), odd, 1.0),
        (torch.arange(3), torch.rand(4), "x"),
        (torch.arange(3), torch.rand(4), math.nan),
    ):
        with pytest.raises(InvalidRequest):
            Rotation.of(positions, frequencies, scale)


@pytest.mark.parametrize("block", [BLOCKS, -1, 2**31 - 1])
@pytest.mark.parametrize("windows", [(None, None), (3, None), (3, 3)])
def test_a_batch_that_names_a_block_outside_the_pool_writes_nothing(
    block: int, windows: tuple[int | None, ...]
) -> None:
    """Of a window that is narrow enough no layer reads it: where one does, none has stored."""
    tables, starts, contexts = (part.clone() for part in BATCH)
    tables[0][0 if windows != (3, 3) else 1] = block
    plan = Plan.build(tables, starts, contexts, BLOCK)
    arguments = step()
    arguments |= {name: arguments[name][:2] for name in ("keys", "values")} | {"plan": plan}
    written = [arguments["x"], *arguments["keys"], *arguments["values"]]
    before = [one.clone() for one in written]
    run = Layers([packed(*both) for both in zip(WEIGHTS[:2], windows, strict=True)], SIZES)
    with pytest.raises(InvalidRequest, match="block tables name blocks"):
        run(**arguments)
    assert all(map(torch.equal, written, before))


def test_weights_are_read_where_they_lay_when_they_were_checked() -> None:
    layers = [packed(*both) for both in zip(WEIGHTS, WINDOWS, strict=True)]
    run = Layers(layers, SIZES)
    want = run(**step())
    for layer in layers:
        for tensor in (layer.input_norm, layer.post_norm, layer.qkv.data, layer.down.data):
            tensor.data = torch.full_like(tensor, math.nan)
    gc.collect()
    others = [torch.full_like(layer.input_norm, math.nan) for layer in layers * 200]
    assert torch.equal(run(**step()), want)
    del others
    run._memory[3].untyped_storage().resize_(0)
    with pytest.raises(InvalidRequest, match="have let go of their memory"):
        run(**step())
