"""How much memory: `65536`, `64k`, `2GiB`, `25%` of the working set, `10000b` blocks, or `inf`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefixcache.config import parse_size
from prefixcache.errors import InvalidRequest

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_MOST = 2.0**60
_BYTES = re.compile(r"\d+(?:\.\d+)?\s*[kmgt]i?b", re.IGNORECASE)
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)\s*([b%]?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Capacity:
    """An amount of memory, as it was asked for.

    >>> parse_capacity("64k").blocks(16, working_set=0)
    4096
    >>> parse_capacity("25%").blocks(16, working_set=6400), parse_capacity("10000b").blocks(512, 0)
    (100, 10000)
    >>> parse_capacity("inf").blocks(16, 0) is None
    True
    """

    text: str
    kind: str
    """`"tokens"`, `"blocks"`, `"bytes"`, `"percent"` or `"inf"`."""
    amount: float = 0.0

    def measured(self, token_bytes: int | None) -> Capacity:
        """Give it in tokens, if it is in bytes.

        >>> parse_capacity("2GiB").measured(131072).amount
        16384

        Raises:
            InvalidRequest: it is in bytes, and nobody says how many a token has.
        """
        if self.kind != "bytes":
            return self
        if token_bytes is None:
            raise InvalidRequest(
                f"the capacity {self.text} is in bytes; say with --layout of which model"
            )
        return Capacity(self.text, "tokens", self.amount // token_bytes)

    def blocks(self, block_size: int, working_set: int) -> int | None:
        """Give whole blocks; None if there is no limit.

        Args:
            block_size: Tokens per block.
            working_set: Distinct tokens of the trace, which percentages are of.

        Raises:
            InvalidRequest: not one block fits.
        """
        if self.kind == "inf":
            return None
        tokens = self.tokens(block_size, working_set)
        if tokens is None or tokens < block_size:
            raise InvalidRequest(f"capacity {self.text} does not hold one block of {block_size}")
        return tokens // block_size

    def tokens(self, block_size: int, working_set: int) -> int | None:
        """Give the capacity in tokens; None if there is no limit."""
        match self.kind:
            case "inf":
                return None
            case "blocks":
                return int(self.amount) * block_size
            case "percent":
                return int(working_set * self.amount / 100)
            case _:
                return int(self.amount)


def parse_capacity(text: str) -> Capacity:
    """Read a capacity.  `k`, `m`, `g` are powers of 1024.

    Raises:
        InvalidRequest: it is not one.
    """
    clean = text.strip().lower()
    if clean in {"inf", "infinite"}:
        return Capacity("inf", "inf")
    if _BYTES.fullmatch(clean):
        return _some(text, Capacity(text.strip(), "bytes", parse_size(clean)))
    found = _FORM.fullmatch(clean)
    if found is None or (found[3] and found[2]):
        raise InvalidRequest(
            f"cannot read the capacity {text!r}; write tokens (65536, 64k, 1m), bytes (2GiB), "
            "a share of the working set (25%), blocks (10000b), or inf"
        )
    kind = {"": "tokens", "b": "blocks", "%": "percent"}[found[3]]
    amount = float(found[1]) * _UNITS[found[2]]
    return _some(text, Capacity(clean, kind, amount))


def _some(text: str, found: Capacity) -> Capacity:
    if not found.amount:
        raise InvalidRequest(f"a capacity of {text!r} holds nothing; inf is infinite memory")
    if found.amount > _MOST:
        raise InvalidRequest(f"a capacity of {text!r} is no memory; inf is infinite memory")
    return found


def parse_capacities(text: str) -> list[Capacity]:
    """Read capacities separated by commas.

    Raises:
        InvalidRequest: one is none, or there is none.
    """
    found = [parse_capacity(part) for part in text.split(",") if part.strip()]
    if not found:
        raise InvalidRequest(f"{text!r} names no capacity; write for example 64k,25%,inf")
    return found


def format_tokens(tokens: int | None) -> str:
    """Write a number of tokens shortly.

    >>> format_tokens(65536), format_tokens(1000), format_tokens(None)
    ('64k', '1000', 'inf')
    """
    if tokens is None:
        return "inf"
    for letter, size in (("g", 2**30), ("m", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
