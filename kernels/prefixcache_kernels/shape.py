"""How a launch of the attention kernels is cut: rows, tiles, splits, warps.

Decided on the host from sizes alone, never from a length that lies on the device.  The same for a
launch and for compiling ahead, so that what is compiled is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from prefixcache_kernels.launch import INTERPRETED

PROGRAMS: Final = 264
"""Programs that keep a large GPU busy: two for each of 132 processors, so that one computes while
the other waits for memory.  Decides how often keys are split."""

MAX_SPLITS: Final = 32

FIXED_KEYS: Final = 1024
"""Keys of a split where a query's bits are to depend on nothing but itself and its keys; a multiple
of every tile."""


def next_power_of_2(number: int) -> int:
    """Give the smallest power of two that is not below `number`.

    >>> next_power_of_2(80), next_power_of_2(64)
    (128, 64)
    """
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Shape:
    """One launch of `attend_kernel` or `shared_kernel`."""

    groups: int
    """Query heads that share a key head."""
    rows: int
    """Of a query tile; rows beyond `block_q * groups` are padding."""
    block_q: int
    """Queries of a tile."""
    dims: int
    value_dims: int
    """Padded to powers of two."""
    tile: int
    """Keys of a tile."""
    splits: int
    num_warps: int
    num_stages: int
    split_keys: int = 0
    """Keys of a split; 0: each has its share of a tile's keys."""

    @classmethod
    def choose(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        element_bytes: int,
        *,
        num_queries: int,
        num_seqs: int,
        max_context: int,
        fixed: bool = False,
        amd: bool = torch.version.hip is not None,
    ) -> Shape:
        """Cut so that the tensor cores are fed, nothing spills, and all processors have work.

        What spills was found by compiling (`ahead`): long tiles hold more in registers.

        Args:
            heads: Query heads of the model.
            kv_heads: Key heads of the model.
            head_dim: Size of a key.
            value_dim: Size of a value.
            element_bytes: Of a query's element.
            num_queries: Of the batch.
            num_seqs: Of the batch; one query each means decoding.
            max_context: Keys of the longest sequence there could be.
            fixed: Cut all batches alike: a query's sums go over the same keys in the same order,
                whatever else is in the batch, and whether it decodes or prefills.
            amd: For a GPU with half the registers per lane and waves of 64.
        """
        groups = heads // kv_heads
        dims = max(16, next_power_of_2(max(head_dim, value_dim)))
        decode = num_queries <= num_seqs and not fixed
        exact = element_bytes == 4  # no tensor core multiplies in full float32
        rows = max(16 if decode or exact or dims > 128 else 64, next_power_of_2(groups))
        tile = 32 if amd or dims > (128 if decode else 64) else 64
        if exact or (decode and dims > 128):
            tile = 16
        num_stages = (2 if decode else 1) if amd else 3 if decode and not exact else 2
        tiles = num_queries // (rows // groups) + num_seqs
        splits = next_power_of_2(-(-max_context // FIXED_KEYS))
        return cls(
            groups,
            rows,
            rows // groups,
            max(16, next_power_of_2(head_dim)),
            max(16, next_power_of_2(value_dim)),
            tile,
            splits if fixed else _splits(tiles * kv_heads, tile, max_context),
            4,
            num_stages,
            FIXED_KEYS if fixed else 0,
        )

    @classmethod
    def choose_shared(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        element_bytes: int,
        *,
        num_queries: int,
        num_runs: int,
        max_context: int,
        bits: bool = False,
        amd: bool = torch.version.hip is not None,
    ) -> Shape:
        """Cut the pass over shared runs: as many rows as a group has, up to what registers hold.

        Args:
            heads: As `choose`.
            kv_heads: As `choose`.
            head_dim: As `choose`.
            value_dim: As `choose`.
            element_bytes: As `choose`.
            amd: As `choose`.
            bits: Whether an eight-bit cache is widened bit by bit, which takes registers.
            num_queries: Of the batch: a group has at most as many.
            num_runs: Shared runs.
            max_context: Keys of the longest run there could be.
        """
        groups = heads // kv_heads
        dims = max(16, next_power_of_2(max(head_dim, value_dim)))
        exact = element_bytes == 4
        most = 16 if exact else 32 if dims > 128 else 64 if amd else 128
        rows = max(16, min(most, next_power_of_2(num_queries * groups)), next_power_of_2(groups))
        tile = 16 if exact or bits or dims > 128 else 32 if amd or dims > 64 else 64
        tiles = num_queries // (rows // groups) + num_runs
        return cls(
            groups,
            rows,
            rows // groups,
            max(16, next_power_of_2(head_dim)),
            max(16, next_power_of_2(value_dim)),
            tile,
            _splits(tiles * kv_heads, tile, max_context),
            8 if rows >= 128 else 4,
            1 if amd else 3 if exact else 2,
        )

    def tiles(self, num_queries: int, num_seqs: int) -> int:
        """Give the tiles that `num_queries` of `num_seqs` sequences need at most."""
        return num_queries // self.block_q + num_seqs

    def constants(
        self, heads: int, head_dim: int, value_dim: int, block_size: int, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Give what both attention kernels are compiled for."""
        return {
            "HEADS": heads,
            "GROUPS": self.groups,
            "ROWS": self.rows,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "DIMS": self.dims,
            "VALUE_DIMS": self.value_dims,
            "BLOCK_SIZE": block_size,
            "TILE": self.tile,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            # The interpreter multiplies bf16 as if it were integers; a GPU wants it as it is.
            "UPCAST": INTERPRETED,
        }


def _splits(programs: int, tile: int, max_context: int) -> int:
    """A power of two, so that few variants are compiled; at least 4 tiles for each split."""
    wanted = -(-PROGRAMS // max(1, programs))
    worth = -(-max_context // (4 * tile))
    return next_power_of_2(max(1, min(wanted, worth, MAX_SPLITS)))
