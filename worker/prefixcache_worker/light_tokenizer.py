"""A model's tokenizer from its folder, without transformers, which takes ten times as long.

It is used where it was seen to do what transformers' does: see `alike`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_TEXTS: Final = (
    "Hello, world! It's 3.14159 and 2,024.",
    "  two spaces,\n\n\ttabs and lines \r\n and an end ",
    "naïve Ünïcödé, 漢字かな, العربية, 🙂👩‍👩‍👧, a\u0301",
    "def f(x):\n    return {'a': [1, 2]}  # <|im_start|> </s> <unk>",
    "",
)


class LightTokenizer:
    """What the worker asks of a tokenizer, by the names that transformers has for it.

    Args:
        folder: with a `tokenizer.json`.

    Raises:
        ValueError, OSError: there is none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        try:
            self.backend_tokenizer: Any = tokenizers.Tokenizer.from_file(
                str(folder / "tokenizer.json")
            )
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            raise ValueError(str(error)) from None
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self.special_tokens_map: dict[str, str] = {
            name: text
            for name, token in settings.items()
            if name.endswith("_token")
            and isinstance(text := token.get("content") if isinstance(token, dict) else token, str)
        }
        template = folder / "chat_template.jinja"
        self.chat_template: Any = (
            template.read_text() if template.exists() else settings.get("chat_template")
        )
        eos = self.special_tokens_map.get("eos_token")
        self.eos_token_id: int | None = (
            None if eos is None else self.backend_tokenizer.token_to_id(eos)
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Cut a text into token ids."""
        ids: list[int] = self.backend_tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        ).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Give the text of token ids."""
        text: str = self.backend_tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens
        )
        return text


def alike(light: LightTokenizer, other: Any) -> bool:
    """Tell whether another tokenizer has the same template and tokens, and does the same."""
    try:
        same = (
            light.chat_template == other.chat_template
            and light.special_tokens_map == dict(other.special_tokens_map)
            and light.eos_token_id == other.eos_token_id
        )
        for text in (*_TEXTS, "".join(light.special_tokens_map.values())):
            for special in (True, False):
                ids = light.encode(text, add_special_tokens=special)
                same = same and ids == other.encode(text, add_special_tokens=special)
                for skip in (True, False):
                    told = light.decode(ids, skip_special_tokens=skip)
                    same = same and told == other.decode(ids, skip_special_tokens=skip)
    except (AttributeError, TypeError, ValueError):
        return False
    return same
