"""A pool of eight-bit keys and values of our own format, from `serve` to attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prefixcache
from prefixcache.errors import LayoutMismatch
from prefixcache.types import Layout
from prefixcache_kernels import SharedPool, copy_blocks, paged_attention, store_kv
from prefixcache_kernels.reference import oracle_attention
from service.service_process import running

LAYOUT = Layout(2, 2, 16, "fp8")
SIZE = 4
PROMPT = list(range(100, 110))  # two whole blocks and a half
OTHER = [*PROMPT[:9], 7, 8, 9]  # parts within the third block: its first token is copied
SCALES = torch.tensor([0.01, 0.02]), torch.tensor([0.03, 0.005])
"""Of each head; they are the model's, not the pool's."""


def drawn(tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of these tokens: what a model would compute."""
    generator = torch.Generator().manual_seed(layer)
    table = torch.randn(2, 200, 2, 16, generator=generator)
    return table[0, tokens], table[1, tokens]


def test_an_eight_bit_pool_is_served_shared_and_attended(tmp_path: Path) -> None:
    memory = str(96 * LAYOUT.block_bytes(SIZE))
    flags = ("--memory", memory, "--block-size", str(SIZE), "--layout", "2x2x16:float8_e4m3fn")
    with (
        running(f"unix:{tmp_path}/eight.sock", *flags) as service,
        prefixcache.connect(service.target) as client,
    ):
        assert service.lines[0].startswith("0.1 KB per token (2 layers")
        assert "float8_e4m3fn" in service.lines[0]
        with pytest.raises(LayoutMismatch, match=r"2x2x16:float8_e4m3fn, you sent 2x2x16:float16"):
            client.attach("m", Layout(2, 2, 16, "float16"))
        writer, reader = client.attach("m", LAYOUT), client.attach("m", LAYOUT)
        assert writer.pool.num_blocks == 96
        tables = []
        for session, tokens, cached in ((writer, PROMPT, 0), (reader, OTHER, 9)):
            pool = SharedPool.map(session.pool)
            assert pool.blocks.dtype == torch.float8_e4m3fn
            lease = session.acquire(tokens)
            assert lease.num_cached == cached
            if lease.copies:
                rows = [(copy.src, copy.dst, copy.num_tokens) for copy in lease.copies]
                copy_blocks(pool.blocks, torch.tensor(rows))
            blocks = torch.tensor(list(lease.block_table))
            new = torch.arange(cached, len(tokens))
            for layer in range(2):
                keys, values = drawn(tokens[cached:], layer)
                slots = blocks[new // SIZE] * SIZE + new % SIZE
                store_kv(keys, values, pool.keys(layer), pool.values(layer), slots, *SCALES)
            lease.commit(len(tokens))
            tables.append((pool, blocks))
        pool, blocks = tables[1]
        for layer in range(2):
            keys, values = drawn(OTHER, layer)
            query = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(9))
            out = paged_attention(
                query,
                pool.keys(layer),
                pool.values(layer),
                blocks[None].int(),
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([len(OTHER)], dtype=torch.int32),
                scale=0.25,
                key_scale=SCALES[0],
                value_scale=SCALES[1],
            )
            # What a pool of float32 would give, of numbers that were rounded to eight bits once.
            rounded = [
                (one / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
                * scale[:, None]
                for one, scale in zip((keys, values), SCALES, strict=True)
            ]
            want = oracle_attention(
                query,
                rounded[0].view(3, SIZE, 2, 16),
                rounded[1].view(3, SIZE, 2, 16),
                torch.arange(3, dtype=torch.int32)[None],
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([len(OTHER)], dtype=torch.int32),
                scale=0.25,
            )
            assert torch.allclose(out, want.float(), atol=1e-5)
