r"""How a model writes the calls of tools, and the reader that takes them out of its text again.

```
hermes, qwen    <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>\n<tool_call>\n...
mistral         [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
mistral, newer  [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]...
llama           {"name": "f", "parameters": {...}}
```
Which one it is, the model's template says: it is given a call, and what it writes is looked at.
A model whose template shows no tools, or writes calls in a way that is not known, is told in the
system's words how to call, in the first of these forms: see `told_messages`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from prefixcache.plain_json import json_text

PROBE_NAME: Final = "zwischenruf"
PROBE_ARGUMENTS: Final = {"ort": "hier"}
_ARGUMENTS: Final = '{"ort": "hier"}'
_NAME: Final = "[A-Za-z0-9_-]{1,64}"
_SIGN: Final = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True, slots=True)
class CallForm:
    """One way of writing calls: `trigger open (begin name middle arguments end, between) close`."""

    name: str
    trigger: str
    """What calls are known by; empty: by what a call begins with."""
    open: str
    begin: str
    middle: str
    end: str
    between: str | None
    """None: there is never more than one call."""
    close: str
    short_ids: bool = False
    """Whether the template takes ids of nine letters and digits only."""

    def grammar(self, tools: Iterable[tuple[str, Mapping[str, Any], bool]], several: bool) -> Any:
        """Give what workers hold calls to.

        Args:
            tools: names, schemas of arguments, and whether a schema is taken leniently.
            several: whether there may be more than one call.
        """
        each = [
            {"begin": f"{self.begin}{name}{self.middle}", "schema": schema, "lenient": lenient}
            | ({"end": self.end} if self.end else {})
            for name, schema, lenient in tools
        ]
        more = {"between": f"{self.between}"} if several and self.between is not None else {}
        return {
            "trigger": self.trigger,
            "open": self.open,
            "close": self.close,
            "each": each,
        } | more

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Write calls as the model would: names, and arguments as JSON or as their text."""
        written = [
            self.begin
            + name
            + self.middle
            + (
                arguments
                if isinstance(arguments, str)
                else json_text(arguments, ensure_ascii=False)
            )
            + self.end
            for name, arguments in calls
        ]
        return f"{self.trigger}{self.open}{(self.between or '').join(written)}{self.close}"


HERMES: Final = CallForm(
    name="hermes",
    trigger="<tool_call>",
    open="\n",
    begin='{"name": "',
    middle='", "arguments": ',
    end="}",
    between="\n</tool_call>\n<tool_call>\n",
    close="\n</tool_call>",
)
_LLAMA: Final = CallForm("llama", "", "", '{"name": "', '", "parameters": ', "}", None, "")
_MISTRAL: Final = CallForm(
    "mistral", "[TOOL_CALLS]", "[", '{"name": "', '", "arguments": ', "}", ", ", "]", True
)
_MISTRAL_SPACED: Final = CallForm(
    "mistral", "[TOOL_CALLS]", " [", '{"name": "', '", "arguments": ', "}", ", ", "]", True
)
_MISTRAL_ARGS: Final = CallForm(
    "mistral", "[TOOL_CALLS]", "", "", "[ARGS]", "", "[TOOL_CALLS]", "", True
)
FORMS: Final = (HERMES, _LLAMA, _MISTRAL, _MISTRAL_SPACED, _MISTRAL_ARGS)


def form_of(written: str) -> CallForm | None:
    """Tell in which form a template has written the probe's call; None: in none that is known.

    >>> form_of('{"name": "zwischenruf", "parameters": {"ort": "hier"}}').name
    'llama'
    """
    for form in FORMS:
        # A list of calls may have more in each, such as its id.
        call = form.write([(PROBE_NAME, _ARGUMENTS)]).removesuffix(form.end + form.close)
        if call in written and (form.trigger or f"{call}{form.end}" in written):
            return form
    return None


_HOW: Final = """\
You can call functions. These are there, each with the JSON schema of its arguments:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON, in this form and nothing else:
{example}
What it gives comes back in <tool_response></tool_response>."""


def told_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write a chat for a template that shows neither tools nor calls: all of it as text.

    Args:
        messages: as `read_logged` gives them.
        tools: the same.
    """
    made: list[dict[str, Any]] = []
    for are_results, group in groupby(messages, _is_result):
        if are_results:
            results = (_plain(one.get("content")) for one in group)
            told = "\n".join(f"<tool_response>\n{one}\n</tool_response>" for one in results)
            made.append({"role": "user", "content": told})
        else:
            made += map(_told, group)
    if not tools:
        return made
    how = _HOW.format(
        tools="\n".join(json_text(one.get("function", one)) for one in tools),
        example=HERMES.write([("NAME", "{...}")]),
    )
    if made and made[0].get("role") == "system":
        said = _plain(made[0].get("content"))
        made[0] = made[0] | {"content": f"{said}\n\n{how}" if said else how}
    else:
        made.insert(0, {"role": "system", "content": how})
    return made


def _is_result(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("tool", "function")


def _told(message: Mapping[str, Any]) -> dict[str, Any]:
    """Write a message with its calls as text."""
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    if calls := message.get("tool_calls"):
        written = HERMES.write([_named(one) for one in calls])
        said = _plain(kept.get("content"))
        kept["content"] = f"{said}\n{written}" if said else written
    return kept


def _named(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call["function"]
    return str(function["name"]), function.get("arguments") or "{}"


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


# -------------------------------------------------------------------------------------- the reader


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a call: its name, or more of its arguments."""

    index: int
    name: str | None
    """Of the tool, with the first piece of a call."""
    arguments: str


@dataclass(slots=True)
class CallReader:
    """Takes an answer's text apart as it comes.  O(characters) in all."""

    form: CallForm
    only_calls: bool = False
    """Whether nothing else is said, so that what may become a trigger is never shown."""
    by_token: bool = False
    """Whether the trigger is a token of its own: then its text is a text like any other, and who
    reads the tokens says with `open` where calls begin."""
    num_calls: int = 0
    _held: str = ""
    _state: str = "text"
    _depth: int = 0
    _in_text: bool = False
    """Whether the arguments are inside of a text."""
    _is_escaped: bool = False
    _is_fresh: bool = True
    """Whether nothing was read yet."""

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more text; give what of it is said, and what is called."""
        self._held += text
        said = ""
        pieces: list[CallPiece] = []
        while True:
            state = self._state
            if state == "text":
                said += self._read_text()
            elif state == "head":
                self._read_head(pieces)
            elif state == "arguments":
                self._read_arguments(pieces)
            else:
                self._read_end()
            if self._state == state:
                return said, _joined(pieces)

    @property
    def is_text(self) -> bool:
        """Whether no call has begun."""
        return self._state == "text"

    def open(self) -> None:
        """Take the trigger, where it is a token."""
        self._state = "head"

    def finish(self) -> str:
        """Take the end of the answer; give what was held back of what is said."""
        held, self._held = self._held, ""
        return held if self._state == "text" and not self.only_calls else ""

    def _read_text(self) -> str:
        form = self.form
        if self.by_token:
            said, self._held = self._held, ""
            return said
        if not form.trigger:
            return self._read_beginning()
        at = self._held.find(form.trigger)
        if at >= 0:
            said, self._held = self._held[:at], self._held[at + len(form.trigger) :]
            self._state = "head"
            return said
        kept = _begun(self._held, form.trigger)
        said, self._held = (
            self._held[: len(self._held) - kept],
            self._held[len(self._held) - kept :],
        )
        return said

    def _read_beginning(self) -> str:
        """Without a trigger it is a call, or it is none, by how it begins."""
        form = self.form
        if self._is_fresh and self._held:
            if self._held.startswith(form.begin):
                self._state = "head"
                return ""
            if form.begin.startswith(self._held):
                return ""
        self._is_fresh = not self._held and self._is_fresh
        said, self._held = self._held, ""
        return said

    def _read_head(self, pieces: list[CallPiece]) -> None:
        form = self.form
        opened = "" if self.num_calls else re.escape(form.open)
        pattern = f"{opened}{re.escape(form.begin)}({_NAME}){re.escape(form.middle)}"
        if (found := re.match(pattern, self._held)) is None:
            return
        self._held = self._held[found.end() :]
        pieces.append(CallPiece(self.num_calls, found[1], ""))
        self.num_calls += 1
        self._depth, self._in_text, self._is_escaped = 0, False, False
        self._state = "arguments"

    def _read_arguments(self, pieces: list[CallPiece]) -> None:
        end = self._end_of_arguments()
        part = self._held[:end]
        self._held = self._held[len(part) :]
        if part:
            pieces.append(CallPiece(self.num_calls - 1, None, part))
        if end is not None:
            self._state = "end"

    def _end_of_arguments(self) -> int | None:
        """Find where the object of arguments ends; None: not yet."""
        at = 0
        while True:
            if self._is_escaped:
                if at >= len(self._held):
                    return None
                at, self._is_escaped = at + 1, False
            found = _SIGN.search(self._held, at)
            if found is None:
                return None
            at = found.end()
            sign = found[0]
            if sign == "\\":
                self._is_escaped = self._in_text
            elif sign == '"':
                self._in_text = not self._in_text
            elif not self._in_text:
                self._depth += 1 if sign in "{[" else -1
                if not self._depth:
                    return at

    def _read_end(self) -> None:
        form = self.form
        more = f"{form.end}{form.between}"
        if form.between is not None and self._held.startswith(more):
            self._held = self._held[len(more) :]
            self._state = "head"


def _begun(text: str, whole: str) -> int:
    """Length of the longest end of a text that `whole` begins with."""
    for length in range(min(len(whole) - 1, len(text)), 0, -1):
        if text.endswith(whole[:length]):
            return length
    return 0


def _joined(pieces: list[CallPiece]) -> list[CallPiece]:
    """Make one piece of all that are of one call."""
    return list(_of_each(pieces))


def _of_each(pieces: Iterable[CallPiece]) -> Iterator[CallPiece]:
    last: CallPiece | None = None
    for piece in pieces:
        if last is not None and piece.index == last.index:
            last = CallPiece(last.index, last.name, last.arguments + piece.arguments)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
