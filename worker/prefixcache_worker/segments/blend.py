"""One prompt computed in full, and put together from what is stored of it.

```
pool   [ stored 0 | stored 1 | … | the prompt in full | the prompt, blended ]
                └─ copied, keys turned by delta in float32 ────────▲
                    what is not moved, or computed again ──────────┘   pieces, each at its place
```
The pieces of a blended prompt are sequences of one batch that have the same block table.  In each
layer all of them store their keys and values before any of them attends, so a piece sees what those
before it have just computed, and between them what was moved: explicit positions, on the very
networks that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels import SharedPool, rotate_keys
from prefixcache_kernels.rotary import Rotary
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.model import Model
from prefixcache_worker.segments.moved import DEVIATION_LAYER, Found, deviation

BLOCK_SIZE: Final = 16
CHUNK: Final = 256
"""Tokens of a step: what happens between two is how soon Ctrl-C is heard."""
_PROBE_TOKENS: Final = 256
_PROBE_TOLERANCE: Final = 1e-3
"""Keys turned by 128 positions lie 1e-6 from those that a model makes there, in float32."""


def angles_of(config: Any, model: Model) -> tuple[Rotary, ...]:
    """Give the rotary embedding of each layer, and hold the model to it.

    A sequence of one token over and over: all values of a layer are equal, so whatever attention
    weighs, its answer is, and every position computes the same.  Only where keys are turned are
    they apart, and by nothing but their distance.

    Args:
        config: as transformers loaded it.
        model: in float32.

    Raises:
        Unsupported: its keys cannot be moved; the message names the reason.
    """
    config = config.get_text_config()
    name, head_dim = config.model_type, model.layout.head_dim
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise Unsupported(
            f"architecture {name!r} has no rotary embedding: where a token stands is part of its "
            "keys and values in another way, so they cannot be moved"
        )
    by_kind = {kind: part for kind, part in rope.items() if isinstance(part, Mapping)}
    num_layers = model.layout.num_layers
    kinds = getattr(config, "layer_types", None) or [None] * num_layers
    whole = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", None) or 1.0}
    found = []
    for kind in kinds:
        part = by_kind.get(kind) if by_kind else rope
        if part is None:
            raise Unsupported(f"architecture {name!r} says no rotary embedding of layers {kind!r}")
        found.append(Rotary.from_config(whole | dict(part), head_dim))
    angles = tuple(found)
    if (apart := _probe(model, angles)) > _PROBE_TOLERANCE:
        raise Unsupported(
            f"architecture {name!r} turns its keys in another way than its config says: moved "
            f"ones are {apart:.1e} of their size from those at the other place"
        )
    return angles


def _probe(model: Model, angles: Sequence[Rotary]) -> float:
    """Give how far moved keys are from those that a model makes there: the worst layer's."""
    num = min(_PROBE_TOKENS, model.max_tokens or _PROBE_TOKENS)
    width = -(-num // BLOCK_SIZE)
    pool = SharedPool.private(model.layout, width, BLOCK_SIZE)
    tokens = [model.vocab_size // 2] * num
    model.forward(Batch.pack([Piece(tokens, 0, range(width))], BLOCK_SIZE), pool)
    half = num // 2
    slots = pool.blocks.flatten(2, 3)
    late = slots[:, 0, half : 2 * half].clone()
    turn(pool, torch.arange(half), half, angles)
    apart = (slots[:, 0, :half] - late).flatten(1).norm(dim=1)
    return float((apart / late.flatten(1).norm(dim=1).clamp(min=1e-6)).max())


def turn(pool: SharedPool, slots: Tensor, delta: int, angles: Sequence[Rotary]) -> None:
    """Turn the keys of some slots, in each layer by its own angles.

    Args:
        pool: where they are.
        slots: `[n]` int64.
        delta: positions to move by.
        angles: of each layer.
    """
    at = 0
    for same, run in groupby(angles):
        num = len(list(run))
        rotate_keys(pool.blocks[at : at + num], slots, delta, same)
        at += num


class Blend:
    """A prompt beside what is stored; the stored prompts and the prompt are computed when made.

    Args:
        model: what computes, in float32 where quality is measured.
        angles: of each layer.
        stored: prompts that were computed before, each in full.
        prompt: what is asked.
        found: what is stored of it.
        num_answer: tokens of its answer, greedy; fewer where a stop token comes first.
        between: called between steps.

    Raises:
        InvalidRequest: a prompt is empty, or longer with its answer than the model's limit.
    """

    def __init__(
        self,
        model: Model,
        angles: Sequence[Rotary],
        stored: Sequence[Sequence[int]],
        prompt: Sequence[int],
        found: Found,
        num_answer: int,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        whole = len(prompt) + num_answer
        longest = max(whole, *map(len, stored))
        if not all([prompt, *stored]) or 0 < model.max_tokens < longest:
            raise InvalidRequest(
                f"a text of {longest} tokens with its answer: between 1 and {model.max_tokens}"
            )
        self._model, self._angles, self._found = model, angles, found
        self._between = between
        self._tables: list[range] = []
        num_blocks = 0
        for length in (*map(len, stored), whole, whole):
            width = -(-length // BLOCK_SIZE)
            self._tables.append(range(num_blocks, num_blocks + width))
            num_blocks += width
        self._pool = SharedPool.private(model.layout, num_blocks, BLOCK_SIZE)
        for tokens, table in zip(stored, self._tables, strict=False):
            self._prefill(tokens, table)
        self.prompt = list(prompt)
        self.answer: list[int] = []
        """Of the full prefill."""
        self.logits = self._full(num_answer)
        """float32 `[answer tokens, vocab]`: after the prompt, and after each but the last."""

    def blended(self, again: Sequence[int]) -> Tensor:
        """Put the prompt together, and read the full prefill's answer over it.

        Args:
            again: positions of moved tokens that are computed after all.

        Returns:
            Logits as `logits`.
        """
        self._move()
        kept = set(self._found.positions) - set(again)
        sequence = self.prompt + self.answer[:-1]
        todo = [at for at in range(self._found.num_exact, len(sequence)) if at not in kept]
        pieces = []
        for _, run in groupby(enumerate(todo), key=lambda pair: pair[1] - pair[0]):
            places = [at for _, at in run]
            tokens = sequence[places[0] : places[-1] + 1]
            is_last = places[-1] == len(sequence) - 1
            rows = len(self.answer)
            pieces.append(Piece(tokens, places[0], self._tables[-1], logits=is_last, num_rows=rows))
        self._between()
        return self._model.forward(Batch.pack(pieces, BLOCK_SIZE), self._pool)

    @cached_property
    def deviation(self) -> Tensor:
        """How far each moved token's keys and values are from fresh ones, at `DEVIATION_LAYER`."""
        self._move()
        layer = self._pool.blocks[DEVIATION_LAYER].flatten(1, 2)
        blended, full = (
            self._slots(table, self._found.positions) for table in self._tables[:-3:-1]
        )
        return deviation(layer[:, blended], layer[:, full])

    def _move(self) -> None:
        """Put what is stored of the prompt at its places, keys turned from the donors' own."""
        slots = self._pool.blocks.flatten(2, 3)
        exact = range(self._found.num_exact)
        mine = self._tables[-1]
        source = self._slots(self._tables[self._found.donor], exact)
        slots[:, :, self._slots(mine, exact)] = slots[:, :, source]
        for run in self._found.moved:
            where = self._slots(mine, run.positions)
            stored = self._slots(
                self._tables[run.donor], range(run.source, run.source + run.length)
            )
            slots[:, :, where] = slots[:, :, stored]
            turn(self._pool, where, run.delta, self._angles)

    def _slots(self, table: range, positions: Sequence[int]) -> Tensor:
        return torch.tensor(list(positions), dtype=torch.int64) + table[0] * BLOCK_SIZE

    def _prefill(self, tokens: Sequence[int], table: range) -> Tensor:
        """Compute a prompt in full; gives the logits after it."""
        logits = torch.empty(0)
        for at in range(0, len(tokens), CHUNK):
            self._between()
            piece = Piece(tokens[at : at + CHUNK], at, table)
            logits = self._model.forward(Batch.pack([piece], BLOCK_SIZE), self._pool)
        return logits[-1]

    def _full(self, num_answer: int) -> Tensor:
        table = self._tables[-2]
        rows = [self._prefill(self.prompt, table)]
        while True:
            self.answer.append(int(rows[-1].argmax()))
            if len(self.answer) == num_answer or self.answer[-1] in self._model.stop_ids:
                return torch.stack(rows)
            at = len(self.prompt) + len(self.answer) - 1
            piece = Piece(self.answer[-1:], at, table)
            rows.append(self._model.forward(Batch.pack([piece], BLOCK_SIZE), self._pool)[-1])
