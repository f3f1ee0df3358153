"""One sentence of advice about a prompt, where there is one.

The largest loss that somebody can do something about decides: memory for what was evicted, order
for what comes after a parting, settings for what is stored but not shared.
"""

from __future__ import annotations

import re
from typing import Final

from prefixcache.cli.decoder import Decoder
from prefixcache.cli.status import Status
from prefixcache.cli.view import show_namespace
from prefixcache.config import format_size
from prefixcache.texts import many
from prefixcache.types import Explanation, unpack

_AROUND: Final = 12
"""Tokens before and after a difference that are read with it."""
_MONTHS = "Jan(uary)?|Feb(ruary)?|Mar(ch)?|Apr(il)?|May|June?|July?|Aug(ust)?|Sep(tember)?|"
_MONTHS += "Oct(ober)?|Nov(ember)?|Dec(ember)?"
_DAYS = r"(Mon|Tues?|Wed(nes)?|Thu(rs)?|Fri|Sat(ur)?|Sun)(day)?"
KINDS: Final = (
    ("a date", rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}\.? ({_MONTHS})\b|"
               rf"\b({_MONTHS})\.? \d{{1,2}}|\b{_DAYS}\b"),
    ("a time", r"\d{1,2}:\d{2}(:\d{2})?"),
    ("an id", r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{5,}|\b(?=\w*\d)(?=\w*[a-z])[0-9a-f]{8,}\b"),
    ("a number", r"\d+"),
)  # fmt: skip
"""What often differs from request to request, and how it looks; the first that fits is told."""


def advise(told: Explanation, tokens: bytes, status: Status, decoder: Decoder | None) -> str:
    """Give the advice; empty if nothing can be done about what was missed."""
    ledger = told.ledger
    block_size = status.snapshot.block_size
    losses = [(ledger.evicted, _memory(told, status))]
    if told.parted_at is not None:
        moved = told.num_same or (told.num_parted > 1 and _kind(told, tokens, decoder) != "")
        losses.append((moved and (told.num_same or ledger.cold), _move(told, tokens, decoder)))
    if status.partial != "tails" and ledger.granularity > 1:
        losses.append((ledger.granularity, _share(ledger.granularity, ledger.total, status)))
    if told.num_pending and told.past is None:
        losses.append((told.num_pending, _wait(told.num_pending)))
    if told.elsewhere:
        namespace, there = told.elsewhere[0]
        losses.append((there - ledger.reused, _attach(show_namespace(namespace), there)))
    loss, advice = max(losses, key=lambda one: one[0])
    if loss:
        return advice
    if ledger.cold and ledger.total < block_size and status.partial != "tails":
        return _share(ledger.cold, ledger.total, status)
    return ""


def _memory(told: Explanation, status: Status) -> str:
    count = told.ledger.evicted
    evicted = (
        "One token was stored, and was evicted before it came back."
        if count == 1
        else f"{many(count, 'token', 'were')} stored, and were evicted before they came back."
    )
    if told.extra_blocks is None:
        return f"{evicted} How much memory would have kept them is not remembered any more."
    policy = status.info.policy
    sure = "" if policy == "lru" else f" (an estimate: it is LRU's order, not that of {policy})"
    if not status.block_bytes:
        return f"{evicted} {many(told.extra_blocks, 'block')} more would have kept them{sure}."
    more = format_size(told.extra_blocks * status.block_bytes)
    total = status.snapshot.num_blocks + told.extra_blocks
    return (
        f"{evicted} {many(told.extra_blocks, 'block')} more ({more}) would have kept them{sure}: "
        f"serve with --memory {round_up(status.memory_of(total))}."
    )


def _move(told: Explanation, tokens: bytes, decoder: Decoder | None) -> str:
    what = _kind(told, tokens, decoder)
    several = told.num_parted > 1
    who = (
        f"{many(told.num_parted, 'request', 'part')}"
        if several
        else "It parts from the stored prompts"
    )
    text = f"{who} at token {told.parted_at:,}" + (f": {what}" if what else "") + "."
    if told.resumes_at is None or told.parted_at is None:
        return f"{text} Move it after what can be shared."
    differ = told.resumes_at - told.parted_at
    words = f"these {many(differ, 'token')}" if differ > 1 else "that token"
    if not differ:
        words = "what is missing there"
    return f"{text} Move {words} behind the {told.num_same:,} after it, which are the same again."


def _kind(told: Explanation, tokens: bytes, decoder: Decoder | None) -> str:
    """Say what differs at the parting, if it looks like something that is always different."""
    at = told.parted_at
    if decoder is None or at is None:
        return ""
    ids = unpack(tokens).tolist()
    end = told.resumes_at if told.resumes_at is not None else at + _AROUND
    before = decoder.decode(ids[max(0, at - _AROUND) : at])
    differs = decoder.decode(ids[at : max(end, at + 1)])
    after = decoder.decode(ids[max(end, at + 1) : end + _AROUND])
    text = before + differs + after
    begin, stop = len(before), len(before) + len(differs.rstrip() or differs)
    for name, pattern in KINDS:
        for found in re.finditer(pattern, text):
            if found.start() <= begin < found.end() or begin <= found.start() < min(
                stop, begin + 2
            ):
                return name
    return ""


def _share(lost: int, total: int, status: Status) -> str:
    size = status.snapshot.block_size
    if total < size and status.partial == "off":
        return (
            f"The prompt's {many(total, 'token', 'are')} less than one block of {size:,}, and "
            f"only whole "
            "blocks are shared: serve with --partial tails, or a smaller --block-size."
        )
    return (
        f"{many(lost, 'token', 'are')} stored, but only "
        + ("whole blocks are" if status.partial == "off" else "parts of full blocks are")
        + " shared: serve with --partial tails, and they are reused."
    )


def _wait(pending: int) -> str:
    return (
        f"{pending:,} of these tokens are being computed by another request right now: "
        "acquire with wait_s, and they are joined instead of computed twice."
    )


def _attach(name: str, there: int) -> str:
    return (
        f"{name} has {many(there, 'token')} of it: if the keys and values are the same, attach to "
        f"that "
        "namespace (same model, adapter and salt)."
    )


def round_up(num_bytes: int) -> str:
    """Write a size for `--memory`: no smaller than it is, with at most three digits.

    >>> round_up(2_252_341_248)
    '2.1GiB'
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            tenths = -(-num_bytes * 10 // size)
            whole, rest = divmod(tenths, 10)
            return (
                f"{whole}.{rest}{unit}" if rest and whole < 100 else f"{whole + bool(rest)}{unit}"
            )
    return str(num_bytes)
