"""What the same tokens at other places are worth: computed with exact reuse alone, and with them.

```
prompt   |  exact  |        the rest: computed today         |last
                     └ moved: whole blocks, at any offset ┘       RollingIndex
                     └ ideal: every run of a block's length, to the token, at any offset
```
Every request is served by the very `PrefixCache`, with infinite memory and `tails`, and looked up
in a `RollingIndex` before anything of it is stored.  Block-hash traces cannot be asked: they name
a block by all tokens before it, so one that moved has another name.

    python -m prefixcache_bench.experiments.elsewhere [--traces FOLDER] [--publish]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prefixcache.core.cache import PrefixCache
from prefixcache.core.rolling_index import RollingIndex
from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, WorkerId
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.experiments.progress import Progress
from prefixcache_bench.experiments.readers.load import load
from prefixcache_bench.experiments.replay import BEYOND
from prefixcache_bench.experiments.traces import Request, Trace
from prefixcache_bench.reports.figures import publish

DOCUMENT: Final = Path("docs/segments.md")
BLOCK_SIZE: Final = 16
AGAIN: Final = 0.71
"""What the demo model's certificate has computed again of what is moved."""
_WORKER: Final = WorkerId(1)
_SECRET: Final = b"no secret: this is an experiment"


@dataclass(frozen=True, slots=True)
class Worth:
    """Sums over a trace, in tokens of prompts."""

    prompt: int
    exact: int
    """Reused as they are."""
    moved: int
    """Of the others, in stored blocks at any offset."""
    ideal: int
    """Of the others, in stored runs of a block's length and more."""

    def row(self, name: str) -> str:
        """Write it for people: what is computed."""
        computed = self.prompt - self.exact

        def share(spared: float) -> str:
            return f"{(computed - spared) / computed:>11.1%}" if computed else f"{'-':>11}"

        return (
            f"{name:<28}{self.prompt:>12,}{computed:>14,}{share(self.moved)}"
            f"{share(self.moved * (1 - AGAIN))}{share(self.ideal)}"
        )


def worth(trace: Trace, block_size: int = BLOCK_SIZE, progress: Progress | None = None) -> Worth:
    """Serve a trace, one request at a time; give what is moved of each.  About 1 ms a request.

    Raises:
        InvalidRequest: it has hashes of blocks, not tokens.
    """
    if trace.is_hashed:
        raise InvalidRequest(f"{trace.name} has hashes of blocks: what moved has another one")
    most = trace.most_blocks(block_size) + 1
    cache = PrefixCache(
        most, block_size, partial=Partial.TAILS, num_ghosts=0, ttl_s=1e9, history_bytes=0
    )
    index = RollingIndex(most, block_size, _SECRET)
    cache.observe(index)
    width = block_size * TOKEN_BYTES
    known: dict[Namespace, set[bytes]] = {}
    prompt = exact = moved = ideal = 0
    for request in trace.requests:
        if request.namespace not in known:
            cache.attach(_WORKER, request.namespace, now=0.0)
            known[request.namespace] = set()
        tokens = request.tokens
        grant = cache.acquire(_WORKER, request.namespace, tokens + BEYOND, now=0.0)
        assert isinstance(grant, Grant)
        end = request.prompt - 1
        reused = min(end, grant.num_cached)
        found = index.search(request.namespace, tokens[: end * TOKEN_BYTES], reused)
        windows = known[request.namespace]
        prompt, exact = prompt + request.prompt, exact + reused
        moved += block_size * sum(len(donor.blocks) for donor in found)
        ideal += _covered(tokens, reused, end, width, windows)
        first = max(0, grant.num_cached * TOKEN_BYTES - width)
        windows.update(
            tokens[at : at + width] for at in range(first, len(tokens) - width + 1, TOKEN_BYTES)
        )
        cache.commit(_WORKER, grant.lease, len(tokens) // TOKEN_BYTES, now=0.0)
        cache.release(_WORKER, grant.lease, now=0.0)
        cache.next_deadline()  # forgets the leases that ended
        if progress is not None:
            progress.advance()
    return Worth(prompt, exact, moved, ideal)


def _covered(tokens: bytes, start: int, end: int, width: int, known: set[bytes]) -> int:
    """Count the tokens from `start` to `end` that are in some window that is known."""
    num, upto = 0, start * TOKEN_BYTES
    for at in range(upto, end * TOKEN_BYTES - width + 1, TOKEN_BYTES):
        if tokens[at : at + width] in known:
            num += at + width - max(at, upto)
            upto = at + width
    return num // TOKEN_BYTES


def dated(trace: Trace, every: int = 20, length: int = 8) -> Trace:
    """Put a date before each prompt: other tokens after some requests, the same for all of a day.

    What follows it is the same text, 8 tokens later, behind other ones.
    """

    def stamped(at: int, request: Request) -> Request:
        date = ((1 << 30) + at // every).to_bytes(TOKEN_BYTES, "little") * length
        return request._replace(
            tokens=date + request.tokens,
            prompt=request.prompt + length,
            length=request.length + length,
        )

    return Trace(f"{trace.name}, dated", [stamped(*pair) for pair in enumerate(trace.requests)])


def workloads(folder: Path | None, shape: Shape) -> Iterator[tuple[str, Trace]]:
    """Give what is asked, one after the other."""
    if folder is not None:
        tau = load(str(folder), name="tau-airline")
        yield "tau-airline", tau
        yield "tau-airline, dated", dated(tau)
    yield "questions over documents", generate(Kind.RAG, shape)
    yield "chats, dated", dated(generate(Kind.CHATS, shape))


def main(argv: list[str] | None = None) -> int:
    """Serve all workloads, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.experiments.elsewhere", description=__doc__
    )
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="with tau-airline in it")
    parser.add_argument("--quick", action="store_true", help="few requests")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args(argv)
    shape = Shape(count=10 if options.quick else 400)
    lines = [
        f"{'':<28}{'prompts':>12}{'computed':>14}{'with moved':>11}"
        f"{f'{AGAIN:.0%} again':>11}{'ideal':>11}"
    ]
    for name, trace in workloads(options.traces, shape):
        with Progress(name, len(trace.requests)) as progress:
            lines.append(worth(trace, progress=progress).row(name))
    text = "\n".join(lines)
    print(text)
    if options.publish:
        command = "$ python -m prefixcache_bench.experiments.elsewhere --traces traces"
        publish(DOCUMENT, "elsewhere", f"{command}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
