"""The cases of the kernel benchmark: what is run, how many bytes it moves, how it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache_bench.speed import kernel_peers
from prefixcache_bench.speed.kernel_batch import Batch, Heads
from prefixcache_kernels.attention import paged_attention
from prefixcache_kernels.groups import FREE, GroupPlan, SharingCost
from prefixcache_kernels.launch import INTERPRETED
from prefixcache_kernels.rotary import Rotary
from prefixcache_kernels.rotate import rotate_keys
from prefixcache_kernels.shared import shared_prefix_attention
from prefixcache_kernels.transfer import copy_blocks, store_kv

MODELS: Final = {"8B": Heads(32, 8, 128), "70B": Heads(64, 8, 128)}
"""Head shapes of Llama-3."""

TINY: Final = {"tiny": Heads(4, 2, 16)}

WRONG: Final = 1e-2
"""Relative norm of a difference from which on two bfloat16 answers are not equal."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    section: str
    case: str
    us: float
    """Median microseconds of one call."""
    gb_s: float | None = None
    """Bytes counted / time."""
    of_ceiling: float | None = None
    tflop_s: float | None = None
    against: str | None = None
    """Whom it is compared with."""
    times: float | None = None
    """Time of that one / time of this one: above 1 this one is faster."""
    equal: bool = True
    """Whether the answer was right."""
    peer: bool = False
    """Whether this is another library's time."""


class Bench:
    """All cases on one device.

    Args:
        tiny: Small sizes.
        deadline: Monotonic seconds after which no case begins.
    """

    def __init__(self, *, tiny: bool, deadline: float) -> None:
        self.tiny, self.deadline = tiny, deadline
        self.interpreted = INTERPRETED
        self.device = torch.device("cpu" if INTERPRETED else "cuda")
        self.device_name = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
        self.dtype = torch.float32 if INTERPRETED else torch.bfloat16
        self.models = TINY if tiny else MODELS
        self.absent: dict[str, str] = {}
        self.skipped = 0
        torch.manual_seed(0)

    def describe(self) -> str:
        """Say what is measured, and against which ceilings."""
        ceilings = ", ".join(f"{name} {value:,.0f} GB/s" for name, value in self.ceilings.items())
        note = " (the times mean nothing)" if self.interpreted else ""
        return f"{self.device_name}, {self.dtype}; ceilings: {ceilings}{note}"

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """What the device reads and copies at most, in 10**9 bytes per second, measured once."""
        count = 1 << (12 if self.tiny else 30)
        one = torch.ones(count, dtype=torch.float32, device=self.device)
        two = torch.empty_like(one)
        read = 4 * count / self.time(one.sum) / 1e3
        copy = 8 * count / self.time(partial(two.copy_, one)) / 1e3
        return {"read": read, "copy": copy}

    def run(self, section: str) -> Iterator[Row]:
        """Give the rows of a section, as they are measured."""
        yield from {
            "decode": self._decode,
            "prefill": self._prefill,
            "shared": self._shared,
            "moves": self._moves,
        }[section]()

    def time(self, call: Callable[[], Any]) -> float:
        """Give the median microseconds of a call, from a captured graph that is replayed."""
        if self.interpreted:
            began = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - began)
        for _ in range(3):  # compiles, and fills the allocator's pools
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self._repeat(graph.replay)

    def time_eager(self, call: Callable[[], Any]) -> float:
        """As `time`, for calls of others that may not be captured."""
        if self.interpreted:
            return self.time(call)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        return self._repeat(call)

    def _repeat(self, call: Callable[[], Any]) -> float:
        flush = torch.empty(64 << 20, dtype=torch.int32, device=self.device)
        samples: list[float] = []
        began = time.monotonic()
        while len(samples) < 5 or (time.monotonic() - began < 0.15 and len(samples) < 50):
            flush.zero_()  # nothing of the last call is left in the L2 cache
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(1e3 * float(start.elapsed_time(end)))
        return statistics.median(samples)

    def _late(self) -> bool:
        late = time.monotonic() > self.deadline
        self.skipped += late
        return late

    def _fits(self, num_bytes: int) -> bool:
        if self.interpreted:
            return True
        return num_bytes < 0.8 * torch.cuda.mem_get_info()[0]

    @staticmethod
    def _equal(got: Tensor, want: Tensor) -> bool:
        norm = want.double().norm()
        return bool((got.double() - want.double()).norm() <= WRONG * norm)

    # ── decode ────────────────────────────────────────────────────────────────────────────────

    def _decode(self) -> Iterator[Row]:
        batches = (1, 2) if self.tiny else (1, 8, 32, 64, 128, 256)
        contexts = (24,) if self.tiny else (512, 2048, 4096, 8192, 32768)
        sizes = (4, 16) if self.tiny else (16, 32, 64, 128)
        for model, heads in self.models.items():
            for num_seqs in batches:
                for context in contexts:
                    for size in sizes:
                        # The grid is full at 16 tokens a block; the others show what size costs.
                        if size != sizes[0] and not self.tiny and num_seqs not in (1, 64):
                            continue
                        if self._late():
                            continue
                        num_bytes = num_seqs * context * heads.token_bytes(self.dtype)
                        if not self._fits(3 * num_bytes):
                            continue
                        yield from self._one_decode(model, heads, num_seqs, context, size)

    def _one_decode(
        self, model: str, heads: Heads, num_seqs: int, context: int, size: int
    ) -> Iterator[Row]:
        batch = Batch.random(
            heads, [context] * num_seqs, size, dtype=self.dtype, device=self.device
        )
        run = partial(paged_attention, *batch.args, scale=heads.scale)
        got = run()
        us = self.time(run)
        gb_s = batch.bytes_read / us / 1e3
        case = f"{model} batch {num_seqs}, context {context}, block {size}"
        right = self._equal(got[-1], batch.plain(num_seqs - 1))
        yield Row("decode", case, us, gb_s, gb_s / self.ceilings["read"], equal=right)
        if size == 16 and num_seqs in (1, 32, 256) and not self.interpreted:
            yield from self._peers(batch, case, us, got)

    def _peers(self, batch: Batch, case: str, us: float, want: Tensor) -> Iterator[Row]:
        for name, prepare in kernel_peers.DECODE.items():
            if name in self.absent:
                continue
            if name == "flex_attention" and (len(batch.contexts), batch.contexts[0]) != (32, 4096):
                continue  # it is compiled anew for every shape
            label = name
            try:
                call = prepare(batch)
                same = self._equal(call().view(want.shape), want)
                try:
                    took = self.time(call)
                except RuntimeError:  # something in it cannot be captured
                    took, label = self.time_eager(call), f"{name}, eager"
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way; say how
                self.absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            gb_s = batch.bytes_read / took / 1e3
            share = gb_s / self.ceilings["read"]
            yield Row(
                *("decode", f"{case}: {label}", took, gb_s, share, None, "ours", us / took),
                *(same, True),
            )

    # ── prefill ───────────────────────────────────────────────────────────────────────────────

    def _prefill(self) -> Iterator[Row]:
        lengths = (20,) if self.tiny else (1024, 4096, 8192, 16384)
        for model, heads in self.models.items():
            for length in lengths:
                if self._late():
                    continue
                batch = Batch.random(
                    heads, [length], 16, queries=length, dtype=self.dtype, device=self.device
                )
                run = partial(paged_attention, *batch.args, scale=heads.scale)
                key, value = (x[None].transpose(1, 2).contiguous() for x in batch.dense(0))
                query = batch.query[None].transpose(1, 2).contiguous()
                dense = partial(
                    torch.nn.functional.scaled_dot_product_attention,
                    *(query, key, value),
                    is_causal=True,
                    enable_gqa=True,
                )
                right = self._equal(run(), dense()[0].transpose(0, 1))
                us, other = self.time(run), self.time(dense)
                # Two products over half of the square of scores.
                flop = 2 * length * length * heads.query * heads.dim
                case = f"{model} prompt {length}, block 16"
                yield Row(
                    *("prefill", case, us, None, None, flop / us / 1e6, "torch SDPA", other / us),
                    right,
                )

    # ── shared prefixes ───────────────────────────────────────────────────────────────────────

    def _shared(self) -> Iterator[Row]:
        prefixes = (32,) if self.tiny else (1024, 4096, 8192, 32768)
        batches = (3,) if self.tiny else (8, 32, 64, 128, 256)
        own = 5 if self.tiny else 128
        size = 4 if self.tiny else 16
        for model, heads in self.models.items():
            cost = SharingCost.gpu(
                block_size=size,
                heads=heads.query,
                kv_heads=heads.key,
                head_dim=heads.dim,
                itemsize=self.dtype.itemsize,
            )
            for prefix in prefixes:
                for num_seqs in batches:
                    if self._late():
                        continue
                    batch = Batch.random(
                        *(heads, [prefix + own] * num_seqs, size),
                        shared=prefix // size,
                        dtype=self.dtype,
                        device=self.device,
                    )
                    limits = [prefix // size] * num_seqs
                    tables = batch.block_tables.cpu()
                    plan = GroupPlan.build(tables, limits, FREE if self.tiny else cost)
                    plan = plan.to(self.device)
                    alone = partial(paged_attention, *batch.args, scale=heads.scale)
                    run = partial(shared_prefix_attention, *batch.args, plan, scale=heads.scale)
                    right = self._equal(run(), alone())
                    us, other = self.time(run), self.time(alone)
                    saved = plan.saved_blocks * size * heads.token_bytes(self.dtype)
                    gb_s = (batch.bytes_read - saved) / us / 1e3
                    share = gb_s / self.ceilings["read"]
                    case = f"{model} prefix {prefix} x {num_seqs}, own {own}"
                    yield Row("shared", case, us, gb_s, share, None, "unshared", other / us, right)

    # ── moves ─────────────────────────────────────────────────────────────────────────────────

    def _moves(self) -> Iterator[Row]:
        heads = next(iter(self.models.values()))
        layers, size = (2, 4) if self.tiny else (32, 16)
        num_blocks = 24 if self.tiny else 4096
        shape = (layers, 2, num_blocks, size, heads.key, heads.dim)
        blocks = torch.randn(shape, dtype=self.dtype, device=self.device)
        token = heads.token_bytes(self.dtype)
        for tokens in (5,) if self.tiny else (256, 2048, 16384):
            new = torch.randn(tokens, 2, heads.key, heads.dim, dtype=self.dtype, device=self.device)
            slots = torch.randperm(num_blocks * size, device=self.device)[:tokens]
            run = partial(store_kv, new[:, 0], new[:, 1], blocks[0, 0], blocks[0, 1], slots)
            run()
            stored = blocks[0].flatten(1, 2)[:, slots]
            right = torch.equal(stored.transpose(0, 1), new)
            yield self._move(f"store {tokens} tokens", run, 2 * tokens * token, right)
        for count in (3,) if self.tiny else (16, 64, 512):
            ids = torch.randperm(num_blocks)[: 2 * count].view(2, count)
            copies = torch.stack([ids[0], ids[1], torch.full((count,), size - 1)], 1)
            copy_blocks(blocks, copies)
            moved = blocks[:, :, ids[1], : size - 1]
            right = torch.equal(moved, blocks[:, :, ids[0], : size - 1])
            num_bytes = 2 * layers * count * (size - 1) * token
            run_copy = partial(copy_blocks, blocks, copies)
            # The list of copies travels from the host: that is part of the call, and not captured.
            yield self._move(
                f"copy {count} blocks of {layers} layers", run_copy, num_bytes, right, eager=True
            )
        rotary = Rotary.from_config({"rope_theta": 500000.0}, heads.dim)
        for count in (5,) if self.tiny else (256, 4096):
            slots = torch.randperm(num_blocks * size, device=self.device)[:count]
            before = blocks[:, 0].flatten(1, 2)[:, slots].clone()
            rotate_keys(blocks, slots, 1000, rotary)
            rotate_keys(blocks, slots, -1000, rotary)
            right = self._equal(blocks[:, 0].flatten(1, 2)[:, slots], before)
            run_turn = partial(rotate_keys, blocks, slots, 1000, rotary)
            num_bytes = layers * count * token  # keys alone, read and written
            yield self._move(
                f"rotate {count} tokens of {layers} layers", run_turn, num_bytes, right, eager=True
            )

    def _move(
        self,
        case: str,
        run: Callable[[], None],
        num_bytes: int,
        right: bool,
        *,
        eager: bool = False,
    ) -> Row:
        us = (self.time_eager if eager else self.time)(run)
        gb_s = num_bytes / us / 1e3
        return Row("moves", case, us, gb_s, gb_s / self.ceilings["copy"], equal=right)
