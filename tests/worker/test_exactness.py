"""Logits with reuse are the logits without, wherever the prompt is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcache_kernels import SharedPool, copy_blocks
from prefixcache_kernels.groups import FREE
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.device_batch import DeviceBatch
from prefixcache_worker.hf import HuggingFaceNetwork
from prefixcache_worker.model import Model
from prefixcache_worker.probe import plain_logits
from worker.zoo import CONFIGS, build, random_tokens

BLOCK = 8
PROMPT = random_tokens(37)


class Case:
    """One architecture on one network, with the logits of plain attention to compare with."""

    def __init__(self, architecture: str, kind: str) -> None:
        module: Any = build(architecture)
        self.want = plain_logits(module, [PROMPT])[0]
        self.model = Model.of(module, lean=kind != "transformers", native=kind == "native")
        self.pool = SharedPool.private(self.model.layout, 64, BLOCK)
        self.pool.blocks.fill_(float("nan"))  # whatever is read without having been written shows

    def run(self, *pieces: Piece) -> Tensor:
        network = self.model.network
        return network(Batch.pack(pieces, BLOCK, all_rows=True), self.pool, None)

    def check(self, got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.fixture(
    scope="module",
    params=[
        *((name, "transformers") for name in CONFIGS),
        *itertools.product(("llama", "qwen3", "mistral", "qwen2"), ("native", "lean")),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest) -> Case:
    architecture, kind = request.param
    case = Case(architecture, kind)
    assert case.model.kind == kind
    return case


def test_reuse_at_every_split_point_gives_the_logits_of_no_reuse(case: Case) -> None:
    owner = [9, 3, 17, 5, 30]
    case.check(case.run(Piece(PROMPT, 0, owner)), case.want)
    spare = list(range(32, 60))
    for split in range(1, len(PROMPT)):
        whole, part = divmod(split, BLOCK)
        table = owner[:whole] + spare[: 5 - whole]
        case.pool.blocks[:, :, spare] = float("nan")
        if part:  # the block that is shared only in part is copied before it is written
            copies = torch.tensor([[owner[whole], table[whole], part]])
            copy_blocks(case.pool.blocks, copies)
        got = case.run(Piece(PROMPT[split:], split, table))
        case.check(got, case.want[split:])
    case.check(case.run(Piece(PROMPT[-1:], 36, owner)), case.want[-1:])


def test_decoding_side_by_side_gives_the_logits_of_each_alone(case: Case) -> None:
    ends = [37, 20, 9]
    tables = [[1, 2, 4, 6, 8], [10, 12, 14], [11, 13]]
    done = [30, 12, 5]
    case.run(*(Piece(PROMPT[:n], 0, t) for n, t in zip(done, tables, strict=True)))
    while done != ends:
        # Of unlike lengths, and one chunk of a prompt among single tokens.
        counts = [
            min(1 if i else 3, end - at) for i, (at, end) in enumerate(zip(done, ends, strict=True))
        ]
        rows = [
            (at, at + count, table)
            for at, count, table in zip(done, counts, tables, strict=True)
            if count
        ]
        got = case.run(*(Piece(PROMPT[a:b], a, table) for a, b, table in rows))
        case.check(got, torch.cat([case.want[a:b] for a, b, _ in rows]))
        done = [at + count for at, count in zip(done, counts, strict=True)]


def test_reading_a_shared_prefix_once_gives_the_logits_of_each_alone(case: Case) -> None:
    owner, split = [9, 3, 17, 5, 30], 24
    case.run(Piece(PROMPT, 0, owner))
    tables = [owner, [9, 3, 17, 40, 41], [9, 3, 42, 43, 44], [9, 3, 17, 45, 46]]
    starts = [36, split, 16, split + 1]
    case.run(Piece(PROMPT[split : split + 1], split, tables[3]))
    batch = DeviceBatch(4, 5, BLOCK, FREE)
    for step in range(5):
        pieces = [
            Piece(PROMPT[at + step : at + step + 1], at + step, table)
            for at, table in zip(starts, tables, strict=True)
            if at + step < len(PROMPT)
        ]
        names = [owner for owner, at in enumerate(starts) if at + step < len(PROMPT)]
        batch.keep(names)
        packed, order = batch.pack(names, pieces)
        assert packed.groups.num_levels == 2
        want = torch.stack([case.want[pieces[at].start] for at in order])
        case.check(case.model.forward(packed, case.pool), want)


def test_a_fork_that_writes_leaves_its_parent_unchanged(case: Case) -> None:
    parent = [20, 21, 22, 23, 24]
    case.run(Piece(PROMPT[:20], 0, parent))
    child = [20, 21, 40, 41, 42]
    copy_blocks(case.pool.blocks, torch.tensor([[22, 40, 20 - 2 * BLOCK]]))
    other = random_tokens(17, seed=5)
    module_free = case.run(Piece(PROMPT[:20] + other, 0, [50, 51, 52, 53, 54]))
    case.check(case.run(Piece(other, 20, child)), module_free[20:])
    case.check(case.run(Piece(PROMPT[20:], 20, parent)), case.want[20:])


def test_only_the_logits_that_are_asked_for_are_computed(case: Case) -> None:
    pieces = [
        Piece(PROMPT[:9], 0, [1, 2], logits=False),
        Piece(PROMPT[:20], 0, [3, 4, 5]),
        Piece(PROMPT[:7], 0, [6]),
    ]
    batch = Batch.pack(pieces, BLOCK)
    assert batch.rows.tolist() == [28, 35]
    case.check(case.model.forward(batch, case.pool), case.want[[19, 6]])
    none = Batch.pack([Piece(PROMPT[:9], 0, [1, 2], logits=False)], BLOCK)
    assert case.model.forward(none, case.pool).shape[0] == 0
    # What was written without logits is as good.
    case.check(case.run(Piece(PROMPT[9:], 9, [1, 2, 7, 8, 9])), case.want[9:])


def test_a_network_is_made_from_what_its_attention_stores() -> None:
    network = HuggingFaceNetwork(build("deepseek_v3", num_key_value_heads=4, **_LATENT))
    layout = network.learn_layout("float32")
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (3, 4, 24)


_LATENT = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
