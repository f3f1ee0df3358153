"""Layouts by a model's name, so that capacities can be said in bytes."""

from __future__ import annotations

from pathlib import Path

from prefixcache.config import parse_layout
from prefixcache.errors import InvalidRequest
from prefixcache.types import Layout
from prefixcache.user_folders import is_file

LAYOUTS = {
    "smollm2-135m": Layout(30, 3, 64),
    "llama-3.2-1b": Layout(16, 8, 64),
    "llama-3.2-3b": Layout(28, 8, 128),
    "llama-3.1-8b": Layout(32, 8, 128),
    "llama-3.1-70b": Layout(80, 8, 128),
    "qwen3-8b": Layout(36, 8, 128),
    "qwen3-32b": Layout(64, 8, 128),
    "mistral-7b": Layout(32, 8, 128),
    "gemma-2-9b": Layout(42, 8, 256),
    "opt-13b": Layout(40, 40, 128, "float16"),
}
"""Keys and values in 16 bits, of models as published."""


def layout_named(text: str) -> Layout:
    """Give a layout by a model's name, by its shape (30x3x64:bfloat16), or from its folder.

    Raises:
        InvalidRequest: it is none of these; the message lists the names.
    """
    found = LAYOUTS.get(text.lower())
    if found is not None:
        return found
    if is_file(Path(text) / "config.json"):
        from prefixcache.service.pool.model_layout import read_layout

        return read_layout(Path(text))
    try:
        return parse_layout(text)
    except ValueError:
        raise InvalidRequest(
            f"no layout {text!r}; write LAYERSxKV_HEADSxHEAD_DIM:DTYPE, a model's folder, or one "
            f"of: {', '.join(LAYOUTS)}"
        ) from None
