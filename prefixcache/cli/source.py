"""Which prompt is meant: `explain`, `lookup`, `pin`, `unpin`, `encode` take it in the same forms.

```
1 2 3 · "[1, 2, 3]"       token ids
FILE · -                  a file, or stdin, in any form that `prompt.py` reads; -- text with --text
REQUEST_ID · w2#81        a request of a moment ago, whose prompt the service still has
"any words" with --text   the words themselves
```
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import prompt, view
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.texts import check_text
from prefixcache.types import TOKEN_BYTES, Explanation, Namespace

if TYPE_CHECKING:
    from prefixcache.client import Client

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|REQUEST_ID|-|TOKEN...]",
        help="A file or stdin (-) with text, token ids or a chat in JSON; the id of a request of "
        "a moment ago, or worker#lease; or token ids. Default: stdin.",
        show_default=False,
    ),
]
File = Annotated[
    str | None,
    typer.Option("--file", "-f", metavar="PATH", help="The same as FILE.", show_default=False),
]
AsText = Annotated[
    bool,
    typer.Option(
        "--text",
        help="Take it as text, whatever it looks like; words that name no file are the text.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the arguments say of a prompt, as far as that can be known without a service."""

    place: str | None
    """Where to read it; None: the arguments are it, or name it."""
    words: list[str]
    as_text: bool
    tokenizer: Path | None
    spaces: view.Chosen

    @property
    def is_request(self) -> bool:
        """Whether it is named by the id of a request."""
        return self.place is None and not self.as_text and not _are_ids(self.words)


def ask(
    what: list[str] | None,
    file: str | None,
    as_text: bool,
    tokenizer: Path | None,
    spaces: view.Chosen,
) -> Asked:
    """Take the arguments.

    Raises:
        InvalidRequest: they name no prompt.
    """
    place, words = _place(what or [], file)
    if place is None and not as_text and (len(words) > 1 or _are_ids(words)):
        prompt.read_ids(" ".join(words), "the arguments")
    return Asked(place, words, as_text, tokenizer, spaces)


@dataclass(frozen=True, slots=True)
class Found:
    """The prompt that is meant."""

    tokens: bytes
    namespace: Namespace
    told: Explanation | None = None
    """What became of it, if it is a request of a moment ago."""


def find(client: Client, asked: Asked) -> Found:
    """Read the prompt, or ask the service for that of a request.

    Raises:
        InvalidRequest: it cannot be read, or no namespace is named and there is not exactly one.
        NotFound: it is no file, and the service knows no such request.
    """
    if asked.is_request:
        name = asked.words[0]
        try:
            check_text(name)
            told = client.recount(name, asked.spaces.named())
        except (NotFound, InvalidRequest) as error:
            raise NotFound(
                f"{_short(name)} is no file, and {error}. To take it as text, add --text."
            ) from None
        assert told.past is not None
        return Found(told.past.tokens, told.past.namespace, told)
    spaces, folder = asked.spaces, None
    if spaces.model and _is_folder(spaces.model):
        folder = Path(spaces.model)
        spaces = spaces.of_folder(folder, client.snapshot())
    namespace = spaces.named() or spaces.choose(client.snapshot())
    return Found(_read(asked, asked.tokenizer or folder, namespace), namespace)


def whole(found: Found) -> bytes:
    """Give all tokens of a prompt.

    Raises:
        NotFound: it is that of a request, of which the service has kept only the beginning.
    """
    past = None if found.told is None else found.told.past
    if past is not None and len(found.tokens) < TOKEN_BYTES * past.num_tokens:
        raise NotFound(
            f"of the {past.num_tokens:,} tokens of that request the service has "
            f"{len(found.tokens) // TOKEN_BYTES:,}: give the prompt itself"
        )
    return found.tokens


def encode(asked: Asked) -> bytes:
    """Read the prompt without a service: the model, if any, names the tokenizer.

    Raises:
        InvalidRequest: it cannot be read, or there is no tokenizer for it.
    """
    if asked.is_request:
        raise InvalidRequest(f"{_short(asked.words[0])} is no file; to take it as text, add --text")
    model = asked.spaces.model or ""
    folder = Path(model) if model and _is_folder(model) else None
    return _read(asked, asked.tokenizer or folder, Namespace(model))


def _place(what: list[str], file: str | None) -> tuple[str | None, list[str]]:
    """Say where to read, or give the words that are the prompt, or its name, themselves."""
    if file is not None:
        if what:
            raise InvalidRequest("give a prompt as an argument or with --file, not both")
        if file != "-" and not _is_there(file):
            raise InvalidRequest(f"there is no file {file}")
        return file, []
    if what == ["-"]:
        return "-", []
    if not what:
        if sys.stdin.isatty():
            raise InvalidRequest(
                "no prompt: give token ids, a file, the id of a request, or text with --text; "
                "- reads what you type"
            )
        return "-", []
    if len(what) == 1 and _is_there(what[0]):
        if _are_ids(what):
            raise InvalidRequest(
                f"{_short(what[0])} is a token id, and there is a file of that name: write "
                f"--file {what[0]} for the file, and pipe the token id to - for the token"
            )
        return what[0], []
    return None, what


def _read(asked: Asked, folder: Path | None, namespace: Namespace) -> bytes:
    if asked.place is not None:
        data, name = prompt.read_source(asked.place)
    elif asked.as_text:
        data, name = " ".join(asked.words).encode(errors="surrogateescape"), "the argument"
    else:
        return prompt.read_ids(" ".join(asked.words), "the arguments")
    return prompt.read_prompt(
        data, name, lambda: decoding.open_decoder(folder, namespace), as_text=asked.as_text
    )


def _are_ids(words: list[str]) -> bool:
    return prompt.looks_like_ids(" ".join(words))


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}…")


def _is_there(path: str) -> bool:
    """Whether it can be read: a file, or a pipe that the shell has a name for."""
    try:
        return Path(path).exists() and not Path(path).is_dir()
    except (OSError, ValueError):  # too long for a name, a NUL in it
        return False


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False
