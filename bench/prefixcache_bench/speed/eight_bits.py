"""What eight bits cost in quality: perplexity on the demo's texts, and agreement of answers.

```
texts       the demo's system prompts, and what its users say: how likely each token is found, and
            whether the most likely one is the same as in float32
answers     the demo's chats, one turn each, answered greedily: how many are the same token by
            token, and for how long the others are
```
bfloat16, which nobody calls a loss, stands beside it: both are compared with float32.

    python -m prefixcache_bench.speed.eight_bits [--quick] [--json FILE] [--publish]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_kernels import SharedPool
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.demo import chats
from prefixcache_worker.model import Model

DOCUMENT: Final = Path("docs/worker.md")
BLOCK: Final = 16
CHUNK: Final = 128
SUBJECTS: Final = (("float32", "packed"), ("bfloat16", "packed"), ("bfloat16", "int8"))
"""The first one is what the others are compared with."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model made of the texts and the chats."""

    log_likelihood: float
    best: Tensor
    """Of each token of the texts but the first ones, the most likely one in its place."""
    answers: list[list[int]]


def texts(model: Model, num: int) -> list[list[int]]:
    """Give the first assistants' texts: what each is told, and what its users say."""
    workload = chats.load()
    found = []
    for assistant in list(workload.assistants.values())[:num]:
        turns = [
            turn for chat in workload.chats if chat.assistant == assistant for turn in chat.turns
        ]
        found.append(model.encode("\n\n".join([assistant.system, *turns])))
    return found


def first_turns(model: Model, num: int) -> list[list[int]]:
    """Give the first chats' prompts."""
    return [
        model.chat(
            [
                {"role": "system", "content": chat.assistant.system},
                {"role": "user", "content": chat.turns[0]},
            ]
        )
        for chat in chats.load().chats[:num]
    ]


def rows_of(model: Model, tokens: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Run a text through a model in chunks: give logits, and the tokens that came next."""
    width = -(-len(tokens) // BLOCK)
    pool = SharedPool.private(model.layout, 1 + width, BLOCK)
    table = list(range(1, 1 + width))
    for at in range(0, len(tokens) - 1, CHUNK):
        part = tokens[at : min(at + CHUNK, len(tokens) - 1)]
        batch = Batch.pack([Piece(part, at, table)], BLOCK, all_rows=True)
        yield model.forward(batch, pool), tokens[at + 1 : at + 1 + len(part)]


def num_common(one: list[int], other: list[int]) -> int:
    """Count the first tokens that two prompts share, but for the last one.

    >>> num_common([1, 2, 3], [1, 2, 3]), num_common([1, 2, 3], [1, 7])
    (2, 1)
    """
    pairs = zip(one[:-1], other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def greedy(model: Model, prompts: list[list[int]], num: int) -> list[list[int]]:
    """Answer prompts with `num` tokens each, side by side.

    What a prompt begins with is computed once, as far as it is that of another one.
    """
    width = -(-(max(map(len, prompts)) + num) // BLOCK)
    pool = SharedPool.private(model.layout, 1 + width * len(prompts), BLOCK)
    tables: list[list[int]] = []
    last = []
    for place, prompt in enumerate(prompts):
        table = list(range(1 + width * place, 1 + width * (place + 1)))
        num_same, other = max(
            ((num_common(prompt, prompts[at]) // BLOCK, at) for at in range(place)), default=(0, 0)
        )
        if num_same:
            table[:num_same] = tables[other][:num_same]
        tables.append(table)
        piece = Piece(prompt[num_same * BLOCK :], num_same * BLOCK, table)
        logits = model.forward(Batch.pack([piece], BLOCK), pool)
        last.append(int(logits[-1].argmax()))
    made = [[token] for token in last]
    for step in range(num - 1):
        pieces = [
            Piece([one[-1]], len(prompt) + step, table)
            for one, prompt, table in zip(made, prompts, tables, strict=True)
        ]
        best = model.forward(Batch.pack(pieces, BLOCK), pool).argmax(-1).tolist()
        for one, token in zip(made, best, strict=True):
            one.append(token)
    return made


def look(model: Model, options: argparse.Namespace) -> Seen:
    """Run all texts and chats through a model."""
    total = 0.0
    best: list[Tensor] = []
    for tokens in texts(model, options.texts):
        for logits, after in rows_of(model, tokens):
            likely = logits.log_softmax(-1)
            total += float(likely.gather(1, torch.tensor(after)[:, None]).double().sum())
            best.append(logits.argmax(-1))
    made = greedy(model, first_turns(model, options.chats), options.tokens)
    return Seen(total, torch.cat(best), made)


def compare(seen: Seen, reference: Seen) -> dict[str, Any]:
    """Give the figures of a row."""
    num = len(seen.best)
    pairs = list(zip(seen.answers, reference.answers, strict=True))
    same = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in pairs
    ]
    return {
        "perplexity": math.exp(-seen.log_likelihood / num),
        "same_best_percent": 100 * float((seen.best == reference.best).float().mean()),
        "same_answers": sum(one == other for one, other in pairs),
        "same_tokens": sum(same) / len(same),
    }


def main(argv: list[str] | None = None) -> int:
    """Compare, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.eight_bits", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one text, two chats, few tokens")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args(argv)
    options.texts, options.chats, options.tokens = (1, 2, 8) if options.quick else (6, 24, 48)
    rows: list[dict[str, Any]] = []
    reference: Seen | None = None
    for dtype, weights in SUBJECTS:
        model = Model.load(options.model, dtype=dtype, threads=options.threads, weights=weights)
        seen = look(model, options)
        reference = reference or seen
        rows.append({"dtype": dtype, "weights": weights, **compare(seen, reference)})
    assert reference is not None
    num_answers = len(reference.answers)
    words = (
        f"{options.model}: {len(reference.best):,} tokens of text; {num_answers} answers of "
        f"{options.tokens} tokens, greedy"
    )
    lines = [
        words,
        "",
        f"{'type, weights':<18}{'perplexity':>12}{'same best token':>18}"
        f"{'same answers':>15}{'same tokens at first':>23}",
        *(
            f"{row['dtype'] + ', ' + row['weights']:<18}{row['perplexity']:>12.3f}"
            f"{row['same_best_percent']:>16.2f} %{row['same_answers']:>9} of {num_answers}"
            f"{row['same_tokens']:>20.1f}"
            for row in rows
        ),
    ]
    print("\n".join(lines))
    if options.json:
        fields = {**provenance(), "model": options.model, "rows": rows}
        options.json.write_text(json_text(fields, indent=1), encoding="utf-8")
    if options.publish:
        publish(DOCUMENT, "eight bits", "\n".join(lines))
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
