"""How far a token sees, and how long a sequence may grow: as a config says it."""

from __future__ import annotations

from typing import Any

from prefixcache.errors import Unsupported


def windows(config: Any) -> list[int | None]:
    """Read from a config how many tokens each layer sees; None is all of them."""
    size = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        size = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [size] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else None for kind in kinds]


def max_context(config: Any) -> int:
    """Tell how many tokens a sequence may have so that its keys do not depend on its length.

    Raises:
        Unsupported: keys depend on the length of the whole sequence, or attention on chunks.
    """
    name = config.model_type
    limit = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0))
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    for part in kinds:
        kind = part.get("rope_type", "default")
        if kind == "dynamic":
            raise Unsupported(
                f"architecture {name!r} with 'dynamic' rotary embeddings: a key depends on the "
                f"length of its whole sequence, so it cannot be shared"
            )
        if kind == "longrope":
            # Beyond the original length all keys would be rotated differently.
            original: Any = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
            limit = min(limit, int(original))
    if getattr(config, "attention_chunk_size", None):
        raise Unsupported(f"architecture {name!r} attends in chunks, which is not built")
    return limit
