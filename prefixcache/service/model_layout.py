"""The layout of a model, read from its config.json.  No torch, no model code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixcache.errors import InvalidRequest
from prefixcache.types import DTYPE_BYTES, Layout

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def read_layout(folder: Path, dtype: str | None = None) -> Layout:
    """Read the layout of the model in `folder`.

    Args:
        folder: Holds config.json.
        dtype: Element type of the pool, if it is not the one that config.json names.

    Raises:
        InvalidRequest: there is no such file, or it does not tell; the message names the field.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {path}: {error.strerror}; give --layout instead"
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path} is not the configuration of a model")
    outer = config
    config = config.get("text_config", config)
    layers = _number(config, _LAYERS, path)
    heads = _number(config, _HEADS, path)
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or _number(config, _WIDTH, path) // heads
    named = dtype or _dtype(config) or _dtype(outer) or "float32"
    if named not in DTYPE_BYTES:
        raise InvalidRequest(
            f"{path} names the type {named!r}; a pool holds {', '.join(DTYPE_BYTES)}: give --dtype"
        )
    return Layout(layers, int(kv_heads), int(head_dim), named)


def _dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _number(config: dict[str, Any], names: tuple[str, ...], path: Path) -> int:
    for name in names:
        if isinstance(value := config.get(name), int) and value > 0:
            return value
    raise InvalidRequest(f"{path} has none of {', '.join(names)}; give --layout instead")
