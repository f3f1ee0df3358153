"""What reusing tokens at other places costs in quality: the demo model's certificate, drawn.

    python -m prefixcache_bench.speed.segments [--quick] [--certificate FILE] [--publish]
    python -m prefixcache_bench.speed.segments --first-token [--publish]

`prefixcache verify-segments` says what is measured, and how.  `--first-token` measures how long the
first token takes instead: what is computed after exact reuse alone, and what is when the rest is
copied, turned and computed, in turns on the same pools; with the divergence of that text's answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from prefixcache.certificates import FORMAT
from prefixcache.types import unpack
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.pictures import draw_segments
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_worker.segments import certificate, texts
from prefixcache_worker.segments.blend import Blend
from prefixcache_worker.segments.moved import Policy, find
from prefixcache_worker.segments.texts import Text

DOCUMENT: Final = Path("docs/segments.md")
PICTURE: Final = Path("docs/segments/quality.svg")
TITLE: Final = "Tokens at other places: quality against what is computed again"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Make the certificate, or read the one that is named."""
    if options.certificate:
        found: dict[str, Any] = json.loads(options.certificate.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise SystemExit(f"{options.certificate} is no certificate: {FORMAT!r}")
        return found
    chosen = texts.load()
    if options.quick:
        chosen = texts.Texts(chosen.digest, chosen.all[:1])
    model, angles = certificate.load(options.model, options.threads)
    num_answer = 4 if options.quick else 24
    return certificate.certify(model, angles, chosen, num_answer=num_answer)


TIMED: Final = (Policy("none"), Policy("first", 16), Policy("first", 32))
"""Those that know what they compute before anything is: to see deviations takes a step of its own,
which no network here makes yet."""


def timed_texts(ours: texts.Texts) -> list[Text]:
    """Give an edited history, made as long as a thousand tokens, and documents in another order."""
    by_name = {text.name: text for text in ours.all}
    edited, documents = (
        by_name["a fact edited, and asked for"],
        by_name["one prompt, turned around"],
    )
    more = (documents.stored[0].messages[-1], {"role": "assistant", "content": "I see."})

    def longer(request: Any) -> Any:
        return replace(request, messages=(*request.messages[:-1], *more, request.messages[-1]))

    return [
        replace(edited, stored=tuple(map(longer, edited.stored)), asked=longer(edited.asked)),
        by_name["each from a prompt of its own"],
    ]


def first_tokens(options: argparse.Namespace) -> list[str]:
    """Measure the time to the first token; give the table."""
    model, angles = certificate.load(options.model, options.threads)
    rounds, num_answer = (1, 2) if options.quick else (7, 24)
    lines = [f"{'':<28}{'computed':>10}{'ms':>8}{'of exact alone':>16}{'KL mean':>10}"]
    for text in timed_texts(texts.load()):
        stored = [unpack(model.prompt(one).tokens).tolist() for one in text.stored]
        prompt = unpack(model.prompt(text.asked).tokens).tolist()
        found = find(prompt, stored, certificate.LEAST)
        alone = Blend(model, angles, stored, prompt, replace(found, moved=()), 1)
        moved = Blend(model, angles, stored, prompt, found, 1)
        read = Blend(model, angles, stored, prompt, found, num_answer)
        again = {policy: policy.again(found, read.deviation) for policy in TIMED}
        took: dict[Policy | None, list[float]] = {None: [], **{policy: [] for policy in TIMED}}
        for _ in range(rounds):
            for policy, seen in took.items():
                began = perf_counter()
                (alone if policy is None else moved).blended(
                    [] if policy is None else again[policy]
                )
                seen.append(1e3 * (perf_counter() - began))
        rest = len(prompt) - found.num_exact
        base = median(took[None])
        lines += ["", f"{text.kind}: {len(prompt)} tokens, {found.num_exact} of them exact"]
        lines.append(f"{'exact reuse alone':<28}{rest:>10}{base:>8.0f}")
        want = read.logits.double().log_softmax(-1)
        for policy in TIMED:
            got = read.blended(again[policy]).double().log_softmax(-1)
            kl = float(certificate.divergence(want, got)[0].mean())
            computed = rest - len(found.positions) + len(again[policy])
            ms = median(took[policy])
            lines.append(f"{policy!s:<28}{computed:>10}{ms:>8.0f}{ms / base:>15.2f}x{kl:>10.4f}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure or read, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.segments", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one text, few tokens")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="that verify-segments has written"
    )
    parser.add_argument(
        "--publish", action="store_true", help=f"put the tables into {DOCUMENT}, and draw {PICTURE}"
    )
    parser.add_argument("--first-token", action="store_true", help="how long it takes")
    options = parser.parse_args(argv)
    if options.first_token:
        text = "\n".join(first_tokens(options))
        print(text)
        if options.publish:
            command = "$ python -m prefixcache_bench.speed.segments --first-token"
            publish(DOCUMENT, "first token", f"{command}\n{text}")
        return 0
    made = measured(options)
    text = "\n".join(certificate.lines_of(made))
    print(text)
    if options.publish:
        publish(DOCUMENT, "certificate", f"$ prefixcache verify-segments {options.model}\n{text}")
        draw_segments(PICTURE, TITLE, made)
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
