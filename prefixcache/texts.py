"""Texts that others chose: which are taken at the door, and how any text is shown.

A name that a client sends ends up in logs, errors and tables on somebody else's terminal.  There an
escape sequence moves the cursor or fills the clipboard, a newline begins a line that nobody wrote,
a bidi control turns what follows round, and what has no width makes two names look like one.
"""

from __future__ import annotations

import re
from typing import Any, Final

from prefixcache.errors import InvalidRequest

MAX_TEXT: Final = 1024
"""Characters of any text on the wire."""

_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
"""What Unicode calls printable, and shows nothing."""


def is_plain(text: str) -> bool:
    r"""Whether every character shows itself, and nothing else.

    >>> [is_plain(text) for text in ("mistral-7b@ü", "a\x1b[2J", "a\u202eb", "a\u200bb", "a\nb")]
    [True, False, False, False, False]
    """
    return text.isprintable() and (text.isascii() or _INVISIBLE.search(text) is None)


def check_text(text: str, field: str = "a text") -> None:
    """Refuse a text that cannot be kept or shown.

    Args:
        text: what a client sent.
        field: what the message calls it.

    Raises:
        InvalidRequest: it is too long, or has a character that does not show itself; the message
            says where, without repeating it.
    """
    if len(text) > MAX_TEXT:
        raise InvalidRequest(
            f"{field} has {len(text):,} characters; the limit is {MAX_TEXT:,} for any text"
        )
    if not is_plain(text):
        at, char = next((at, char) for at, char in enumerate(text) if not is_plain(char))
        raise InvalidRequest(
            f"{field} has the character U+{ord(char):04X} at {at}: texts are made of printable "
            "characters only"
        )


def escape(text: str) -> str:
    r"""Write a text so that it can be shown anywhere, in one line.

    >>> print(escape("a\x1b[2J\n\u202eb"))
    a\x1b[2J\n\u202eb
    """
    if is_plain(text):
        return text
    return "".join(
        char if is_plain(char) else char.encode("unicode_escape").decode() for char in text
    )


def many(number: int, noun: str, verb: str = "") -> str:
    """Write how many there are, and what they do: the plural of the verb is given.

    >>> many(1, "block"), many(2048, "block", "are"), many(1, "run", "take")
    ('1 block', '2,048 blocks are', '1 run takes')
    """
    if number != 1:
        return f"{number:,} {noun}s {verb}".rstrip()
    one = {"": "", "are": "is", "were": "was", "have": "has"}.get(verb, f"{verb}s")
    return f"1 {noun} {one}".rstrip()


def escape_all(value: Any) -> Any:
    """Escape every text in something that is about to be shown; numbers stay what they are."""
    if isinstance(value, str):
        return escape(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {escape_all(key): escape_all(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [escape_all(one) for one in value]
    return escape(str(value))
