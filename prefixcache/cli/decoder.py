"""Tokens to text and back, through the tokenizer of the model, where that is at hand.

Needs `tokenizers` (and `jinja2` for chats), which are imported when a tokenizer is opened; without
one, views show token ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest
from prefixcache.extras import how_to_install
from prefixcache.model_folders import places
from prefixcache.prompts.chat_template import ChatTemplate, Prompt, prompt_of
from prefixcache.prompts.logged_request import LoggedRequest, read_logged
from prefixcache.texts import is_plain
from prefixcache.types import Namespace, unpack
from prefixcache.user_folders import is_file

TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="Folder of the model, or its tokenizer.json, to show text. Default: "
        "$PREFIXCACHE_TOKENIZER, else the model's if it is in a cache of this machine.",
        show_default=False,
    ),
]

_FILE = "tokenizer.json"
_LONGEST = 64 << 20
"""Bytes of a model's template, or of the configuration that it is in."""


def _absent() -> str:
    return f"which is not installed: {how_to_install('text')}"


class Decoder:
    """One model's tokenizer.

    Args:
        folder: Where its `tokenizer.json` is.

    Raises:
        InvalidRequest: there is none, it cannot be read, or the library is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.parent if folder.name == _FILE else folder
        path = self.folder / _FILE
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise InvalidRequest(f"reading a tokenizer needs tokenizers, {_absent()}") from None
        if not is_file(path):
            raise InvalidRequest(f"there is no {_FILE} in {self.folder}; give the model's folder")
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            raise InvalidRequest(f"{path} is no tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Cut a prompt's text into token ids, with the special tokens the model begins with."""
        return self._ids(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Give the text of token ids, special ones included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def prompt(self, request: LoggedRequest) -> Prompt:
        """Turn a logged request into tokens; a chat through the model's own template.

        Raises:
            InvalidRequest: the model has no template, or it refuses this request.
        """
        return prompt_of(request, lambda: self._template, self._ids)

    def written_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Write a chat in which a tool is called, through the model's template, to see how.

        Gives '' if there is no template, or it shows no tools or no calls.
        """
        try:
            return self._template.written_call(name, arguments)
        except InvalidRequest:
            return ""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Cut a chat into token ids, through the model's own template, up to the answer.

        Raises:
            InvalidRequest: the model has no template, or it refuses these messages.
        """
        (request,) = read_logged({"messages": list(messages)})
        return unpack(self.prompt(request).tokens).tolist()

    def _ids(self, text: str, special: bool = True) -> list[int]:
        if any("\ud800" <= char <= "\udfff" for char in text):  # JSON can escape such a half
            raise InvalidRequest("the prompt holds half a character (U+D800 to U+DFFF): no text")
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    @cached_property
    def _template(self) -> ChatTemplate:
        told = _text(self.folder / "tokenizer_config.json")
        try:
            config = {} if told is None else json.loads(told)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{self.folder}/tokenizer_config.json is no JSON: {error}"
            ) from None
        try:
            return ChatTemplate.of_config(
                config if isinstance(config, dict) else {},
                _text(self.folder / "chat_template.jinja"),
            )
        except ModuleNotFoundError:
            raise InvalidRequest(f"a chat's template needs jinja2, {_absent()}") from None
        except InvalidRequest as error:
            raise InvalidRequest(f"{self.folder}: {error}") from None


def _text(path: Path) -> str | None:
    """Give the text of a model's file, which is UTF-8 whatever the locale; None if it is not there.

    Raises:
        InvalidRequest: it cannot be read.
    """
    if not is_file(path):
        return None
    try:
        return read_file(path, _LONGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error.reason}") from None


def open_decoder(path: Path | None, namespace: Namespace | None = None) -> Decoder | None:
    """Open the tokenizer that is named, else that of the namespace's model if it is at hand.

    Raises:
        InvalidRequest: one is named and cannot be opened.
    """
    if path is None and (named := os.environ.get("PREFIXCACHE_TOKENIZER")):
        path = Path(named)
    if path is not None:
        return Decoder(path)
    if namespace is None:
        return None
    try:
        for folder in places(namespace.model):
            if (folder / _FILE).is_file():
                return Decoder(folder)
    except (InvalidRequest, OSError, ValueError):
        return None  # whatever is wrong with a cache: then token ids are shown
    return None


def preview(decoder: Decoder | None, tokens: bytes, width: int) -> str:
    """Show what tokens begin with on one line of up to `width` characters: text, else the ids.

    >>> preview(None, bytes([7, 0, 0, 0, 9, 0, 0, 0]), 20)
    '7 9'
    """
    from rich.cells import cell_len, set_cell_size  # here, so that help does not wait for it

    ids = unpack(tokens).tolist()
    if decoder is None:
        text = " ".join(map(str, ids))
    else:
        text = "".join(
            char if is_plain(char) else "⏎" if char == "\n" else "·" for char in decoder.decode(ids)
        )
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…"


def preview_end(decoder: Decoder | None, tokens: bytes, width: int) -> str:
    """Show what tokens end with on one line of up to `width` characters."""
    from rich.cells import cell_len

    text = preview(decoder, tokens, 1 << 20)
    return text if cell_len(text) <= width else "…" + text[len(text) - max(0, width - 1) :]
