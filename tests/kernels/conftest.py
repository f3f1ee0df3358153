"""Random packed batches over a paged pool, with garbage wherever nobody may look."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from prefixcache_kernels.cpu import attend
from prefixcache_kernels.cpu.library import describe, library


@dataclass
class Batch:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.query_start,
            self.context_lens,
        )


def _batch(
    lens: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    poison: float = float("nan"),
    value_dim: int | None = None,
    shared: tuple[tuple[int, int, int], ...] = (),
) -> Batch:
    """`lens` are (queries, keys) of each sequence.  Tables are permuted, with foreign blocks
    between; every slot that belongs to no sequence holds `poison`, and so do unused table entries
    (as ids of poisoned blocks, or out of the pool).  `shared` has (sequence, source, blocks): the
    first blocks of a sequence are those of an earlier one."""
    rng = torch.Generator().manual_seed(seed)
    need = [-(-keys // size) for _, keys in lens]
    num_blocks = 2 * sum(need) + 3
    ids = torch.randperm(num_blocks, generator=rng).tolist()
    width = max(need, default=0) + 2
    tables = torch.full((len(lens), width), -7, dtype=torch.int32)
    shape = (num_blocks, size, kv_heads)
    caches = [torch.full((*shape, d), poison, dtype=dtype) for d in (dim, value_dim or dim)]
    for s, (_, keys) in enumerate(lens):
        source, common = next(((a, n) for b, a, n in shared if b == s), (0, 0))
        tables[s, :common] = tables[source, :common]
        for j in range(common, need[s]):
            tables[s, j] = ids.pop()
            fill = min(size, keys - j * size)
            for cache in caches:
                new = torch.randn(fill, *cache.shape[2:], generator=rng)
                cache[tables[s, j], :fill] = new.to(dtype)
    starts = torch.tensor([0, *(num for num, _ in lens)]).cumsum(0).to(torch.int32)
    query = torch.randn(int(starts[-1]), heads, dim, generator=rng).to(dtype)
    contexts = torch.tensor([keys for _, keys in lens], dtype=torch.int32)
    return Batch(query, *caches, tables, starts, contexts)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors begin as NaN: an answer, or a partial one, that nobody writes shows."""
    if torch.cuda.is_available():  # where other calls would be refused in this mode
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a CPU attends: the C library, and plain PyTorch where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(attend, "library", lambda: None)
    elif library() is None:
        pytest.skip(describe())
    return str(request.param)


@pytest.fixture(params=["matrices", "vectors"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the processor's matrices (AMX), and as if there were none, not for PyTorch either."""
    loaded = library()
    if loaded is None:
        pytest.skip(describe())
    if request.param == "matrices" and not loaded.matrices:
        pytest.skip("no AMX, or not compiled in")
    allowed = ctypes.c_int64.in_dll(loaded.handle, "prefixcache_amx")
    before = allowed.value
    allowed.value = request.param == "matrices"
    monkeypatch.setattr(attend, "multiplies_matrices", lambda: allowed.value)
    yield request.param
    allowed.value = before


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return _batch
