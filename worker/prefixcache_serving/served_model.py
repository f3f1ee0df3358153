"""The model as the front knows it: its tokenizer, its template, its limits.  No torch.

What only the workers know (how long a sequence may be, which tokens end an answer) they say when
they are ready.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from prefixcache.cli.decoder import Decoder
from prefixcache.errors import InvalidRequest
from prefixcache.model_folders import places
from prefixcache_serving.call_form import PROBE_ARGUMENTS, PROBE_NAME, CallForm, form_of
from prefixcache_worker import smollm2


def folder_of(model: str) -> Path:
    """Give the folder of a model's files on this machine; the demo model is made if need be.

    Raises:
        NotFound: the demo model's package is not installed.
        InvalidRequest: it is not on this machine.
    """
    if model == smollm2.NAME:
        return smollm2.folder()
    if (folder := Path(model)).is_dir():
        return folder
    for found in places(model):
        if (found / "tokenizer.json").is_file():
            return found
    raise InvalidRequest(
        f"the tokenizer of {model!r} is on no known place of this machine: give the model's folder"
    )


class ServedModel:
    """What is served, under one name.

    Args:
        name: what requests call it.
        folder: of its files.
        about: what a worker said when it was ready.

    Raises:
        InvalidRequest: the tokenizer cannot be read.
    """

    def __init__(self, name: str, folder: Path, about: Mapping[str, Any]) -> None:
        self.name = name
        self.decoder = Decoder(folder)
        self.tokenizer: Any = self.decoder.tokenizer
        self.max_tokens = int(about["max_tokens"])
        """Tokens of prompt and answer together; 0: the model has no limit of its own."""
        self.vocab_size = int(about["vocab_size"])
        self.most_beams = int(about["max_batch"])
        """Sequences that a worker computes at a time."""
        self.stop_ids = frozenset(int(one) for one in about["stop_ids"])
        self.fingerprint = f"{about['model']}/{about['layout']['dtype']}"
        """The same for the same weights and arithmetic."""
        self.created = int(time.time())
        self._texts: dict[int, str] = {}

    def text_of(self, token: int) -> str:
        """Give the text of one token; what was asked once is known."""
        if token not in self._texts:
            self._texts[token] = self.decoder.decode([token])
        return self._texts[token]

    @cached_property
    def call_form(self) -> CallForm | None:
        """How its template writes calls of tools; None: in no way that is known, or not at all."""
        return form_of(self.decoder.written_call(PROBE_NAME, PROBE_ARGUMENTS))

    @cached_property
    def trigger_token(self) -> int | None:
        """The token that its calls are known by; None: they are known by text."""
        trigger = "" if self.call_form is None else self.call_form.trigger
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            if added.special and added.content == trigger:
                return int(token)
        return None

    def room(self, num_prompt: int) -> int:
        """How long the answer to a prompt of so many tokens may become."""
        return self.max_tokens - num_prompt if self.max_tokens else 2**31 - 1

    @property
    def most_body_bytes(self) -> int:
        """How long a request's body may be: room for the longest prompts in any writing."""
        return (1 << 20) + 64 * min(self.max_tokens or 1 << 17, 1 << 20)
