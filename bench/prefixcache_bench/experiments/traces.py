"""A trace: requests in the order of service, as packed words.

```
tokens   0 ──────────── prompt ──────────── len(tokens)
         what the client sends │ generated: its keys and values exist after the request too
```

A *word* is one packed uint32.  In a token trace it is a token id, so that every block size can be
asked for.  In a block-hash trace it is the identity of a block of `unit` tokens; block sizes are
multiples of that, and the lengths in tokens come with the request.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Namespace

FILL = b"\xfe\xff\xff\xff"
"""No id of a block: fills up an incomplete group."""


class Request(NamedTuple):
    """One request of a trace."""

    t: float
    """Seconds since the start of the trace."""
    namespace: Namespace
    tokens: bytes
    """Packed words whose keys and values exist once the request is done; it begins with the
    prompt."""
    prompt: int
    """How many leading words are the prompt."""
    length: int
    """The prompt in tokens: equal to `prompt`, but in a block-hash trace."""


class BrokenLine(NamedTuple):
    """A line (or record) that could not be read; it is left out, and counted."""

    number: int
    """Counted from 1."""
    reason: str
    unit: str = "line"
    is_end: bool = False
    """Nothing behind it could be read either, and how much that is nobody knows."""

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


@dataclass(frozen=True)
class Trace:
    """All requests, in the order in which they are served."""

    name: str
    requests: list[Request]
    unit: int = 1
    """Tokens that one word stands for: 1, or the block size of a block-hash trace."""
    broken: list[BrokenLine] = field(default_factory=list)
    counts_last: bool = False
    """A block-hash trace whose last, partly filled block has an identity of its own."""
    num_lines: int = 0
    """Lines or records of the file; 0 if it was no file."""
    notes: list[str] = field(default_factory=list)
    """What was made up or may surprise: to be said beside every figure."""
    not_counted: list[str] = field(default_factory=list)
    """What of its requests is in no prompt, or only by a stand-in: a sentence for each kind."""
    answers: list[int] | None = None
    """Tokens of each request's answer where the tokens themselves are not known, as in a
    block-hash trace; None if nobody tells."""

    @property
    def is_hashed(self) -> bool:
        """Whether words are blocks, not tokens."""
        return self.unit > 1

    @property
    def left_out(self) -> float:
        """Share of the file's lines that could not be read."""
        return len(self.broken) / max(1, self.num_lines, len(self.broken))

    @property
    def breaks_off(self) -> bool:
        """Whether there may be any number of requests behind what could be read."""
        return any(line.is_end for line in self.broken)

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.length for request in self.requests)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of all requests: two traces with the same one give the same results."""
        crc = zlib.crc32(str(self.unit).encode())
        for request in self.requests:
            model, adapter, tenant, salt, *_ = request.namespace
            # As Python shows them, by name: rows of older versions have it.
            named = f"Namespace({model=!r}, {adapter=!r}, {tenant=!r}, {salt=!r})"
            head = f"{named} {request.prompt} {request.length}"
            crc = zlib.crc32(request.tokens, zlib.crc32(head.encode(), crc))
        return f"{crc:08x}"

    def words(self, block_size: int) -> int:
        """Give the words of a block of `block_size` tokens.

        Raises:
            InvalidRequest: it is not a power of two, or the trace does not go that far down.
        """
        words, rest = divmod(block_size, self.unit)
        if rest or words < 1 or words & (words - 1):
            multiple = f" times {self.unit}, the block size of this trace" if self.unit > 1 else ""
            raise InvalidRequest(f"block size {block_size} is not a power of two{multiple}")
        return words

    def grouped(self, words: int) -> list[Request]:
        """Give the requests for blocks of several words.

        Where the last block counts although it is partly filled, so does the last group: it is
        filled up, which makes it equal to the same ids in the same number only.
        """
        if words == 1 or not self.counts_last:
            return self.requests
        filled = []
        for request in self.requests:
            lacking = -(len(request.tokens) // TOKEN_BYTES) % words
            prompt = -(-request.prompt // words) * words
            filled.append(request._replace(tokens=request.tokens + FILL * lacking, prompt=prompt))
        return filled

    def most_blocks(self, block_size: int) -> int:
        """Give a number of blocks that the whole trace cannot exceed.  O(requests)."""
        width = self.words(block_size) * TOKEN_BYTES
        return sum(len(request.tokens) // width + 1 for request in self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)
