"""A network on mapped weights: found and tried, or kept for those who come later.

```
none there            the library's model is loaded and probed, packed, written, mapped    once
one is there          mapped; its logits are compared with those that its maker saw        each start
damaged, or another   said, and made anew
```

Nothing of the library's model is needed where a file is there, nor transformers at all, so a worker
that replaces another one is ready as soon as a few short prompts have run.
"""  # noqa: E501 - a table

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor

from prefixcache.errors import CacheError, Unsupported
from prefixcache.types import Layout
from prefixcache_kernels.cpu.library import library
from prefixcache_worker.lean import FAMILY
from prefixcache_worker.native import Facts, NativeNetwork
from prefixcache_worker.probe import TOLERANCE, distance, paged_logits, random_prompts
from prefixcache_worker.weights import Damaged, making, open_packed, path_of, write

_EACH: Final = 5
"""Of the probe's rows one in so many is kept to compare with."""

REFERENCE: Final = "reference"
"""Name of the tensor of logits that the maker saw: float32 `[rows, vocab]`."""

_BESIDE: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files of a folder that the facts below come from, beside the weights."""


@dataclass(frozen=True, slots=True)
class About:
    """What a worker knows of a model beside its network."""

    gap: float
    """Between its logits and plain attention's, as its maker saw it."""
    max_tokens: int
    stop_ids: tuple[int, ...]
    light: bool
    """Whether the folder's tokenizer does without transformers."""


class Place:
    """Where a model's packed weights are, or will be.

    Args:
        name: of the model, with the digest of its weights.
        source: its folder, or its id at the hub.
        dtype: of its weights, keys and values.
        eight_bits: whether its matrices are kept in eight bits.
    """

    def __init__(self, name: str, source: str, dtype: str, *, eight_bits: bool = False) -> None:
        self.path = path_of(name, f"{dtype}.int8" if eight_bits else dtype)
        self.dtype = dtype
        self._tolerance = TOLERANCE["bfloat16" if eight_bits else dtype]
        self._beside = _digest(Path(source))

    def find(self) -> tuple[NativeNetwork, About] | None:
        """Map the network and try it; None if there is none that can be used, which is said."""
        try:
            found = open_packed(self.path)
            if found is None:
                return None
            facts = found.facts
            if facts["beside"] != self._beside:
                raise Damaged("the files beside the weights have changed")
            network = NativeNetwork(Facts.of(facts["network"]), found.tensors)
            about = About(
                float(facts["gap"]),
                int(facts["max_tokens"]),
                tuple(map(int, facts["stop_ids"])),
                bool(facts["light"]),
            )
            seen = _some_logits(network, self.dtype, about.max_tokens)
            apart = distance([seen], [found.tensors[REFERENCE]])
            if apart > self._tolerance:
                raise Damaged(f"its logits are {apart:.1e} from those that its maker saw")
        except (Damaged, CacheError, KeyError, TypeError, ValueError, RuntimeError) as fault:
            say(f"{self.path} is made anew: {fault}")
            return None
        return network, about

    def keep(self, network: NativeNetwork, about: About) -> None:
        """Write a network's weights, with logits to compare with, for whoever comes next.

        Raises:
            Unsupported: they cannot be written there.
        """
        facts = {
            "network": network.facts.fields(),
            "gap": about.gap,
            "max_tokens": about.max_tokens,
            "stop_ids": list(about.stop_ids),
            "light": about.light,
            "beside": self._beside,
        }
        seen = _some_logits(network, self.dtype, about.max_tokens)
        write(self.path, facts, {**network.weights, REFERENCE: seen})

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait for who makes the file; tell whether it can be kept at all, and say why not."""
        with ExitStack() as held:
            try:
                held.enter_context(making(self.path))
                kept = True
            except Unsupported as fault:
                say(f"weights are not shared with other workers: {fault}")
                kept = False
            yield kept


def may_pack(source: str) -> bool:
    """Tell whether a folder's model is of a family that is packed, and the C library there."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] in FAMILY and library() is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def say(text: str) -> None:
    """Tell who started this worker, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def _digest(folder: Path) -> str:
    digest = blake2b(digest_size=16, person=b"pfxcache-beside")
    for name in _BESIDE:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}:{path.is_file()}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _some_logits(network: NativeNetwork, dtype: str, limit: int) -> Tensor:
    facts = network.facts
    layout = Layout(facts.num_layers, facts.num_kv_heads, facts.head_dim, dtype)
    prompts = [prompt[: limit or None] for prompt in random_prompts(facts.vocab)]
    return torch.cat([rows[::_EACH] for rows in paged_logits(network, layout, prompts)])
