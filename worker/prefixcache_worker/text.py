"""Text as it is generated: whole characters only, and never a part of a stop string.

```
tokens    41 1052 17 | 228 | 103 | 99        228 alone is half a character: nothing is shown yet
text      "the end"  |     | "…" | "#"       "#" may become the stop string "###": held back
shown     "the end"  | ""  | "…" | ""
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_UNFINISHED: Final = "\ufffd"
"""What a tokenizer puts for bytes that are not a whole character."""

_MOST_BYTES: Final = 8
"""Tokens after which an unfinished character is shown as it is: it will never be whole."""


class TextStream:
    """Turns one answer's tokens into text, piece by piece.  O(1) tokens are decoded per token.

    Args:
        tokenizer: of the model; None gives no text at all.
        stop_strings: the answer ends before the first of these; what is shown never contains one.
        min_tokens: in the text of so many tokens they are not looked for.
        shows_special: show special tokens, too.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        shows_special: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = not shows_special
        self._stops = tuple(stop_strings)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._before = 0  # tokens[before:read] are decoded again: spaces depend on neighbours
        self._read = 0
        self._held = ""
        self.text = ""
        """All that was shown."""
        self.stopped = False
        """Whether a stop string was found."""

    def push(self, token: int) -> str:
        """Take the next token; give the text that can be shown now, perhaps none."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        return self._show(self._decode(final=False))

    def skip(self, token: int) -> str:
        """Take a token that is not shown, and ends what came before; give what was held back."""
        shown = self.finish()
        self._tokens.append(token)
        self._before, self._read = len(self._tokens) - 1, len(self._tokens)
        return shown

    def finish(self) -> str:
        """Take the end of the answer; give what was held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        shown = self._show(self._decode(final=True))
        if self.stopped:
            return shown
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _decode(self, *, final: bool) -> str:
        skips = self._skips_special
        known = self._tokenizer.decode(
            self._tokens[self._before : self._read], skip_special_tokens=skips
        )
        now = self._tokenizer.decode(self._tokens[self._before :], skip_special_tokens=skips)
        waiting = len(self._tokens) - self._read
        if now.endswith(_UNFINISHED) and not final and waiting < _MOST_BYTES:
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return str(now[len(known) :])

    def _show(self, fresh: str) -> str:
        text = self._held + fresh
        if len(self._tokens) <= self._min_tokens:
            self.text += text
            return text
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0:
                self.stopped, text = True, text[:at]
        held = 0 if self.stopped else self._maybe_stop(text)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += shown
        return shown

    def _maybe_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
