"""Tiny random models of many architectures, and a real service in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.errors import ServiceUnavailable
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.process import joiner
from prefixcache_worker.request import Event, Failed, Finished, Request

VOCAB = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {
        **_GROUPED,
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 1,
    },
    "qwen3": _HEADS,
    "mistral": {**_HEADS, "sliding_window": 13},
    "gemma2": {**_HEADS, "sliding_window": 13, "query_pre_attn_scalar": 16},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt_oss": {
        **_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 13,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""Grouped queries, windows, soft caps, learnt positions, sinks."""


def build(architecture: str, **changes: Any) -> Any:
    """Make a tiny model with weights large enough for attention to matter.  Always the same."""
    config = transformers.AutoConfig.for_model(
        architecture, **{**CONFIGS.get(architecture, _COMMON), **changes}
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in module.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.2)
    module.generation_config.eos_token_id = None
    return module.eval()


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}"
    "{{ message['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save(path: Path, architecture: str = "llama", **changes: Any) -> None:
    """Leave a tiny model in a folder, with a tokenizer of as many words and a chat template."""
    build(architecture, **changes).save_pretrained(path)
    words = {"user": 0, "assistant": 1} | {f"w{number}": number for number in range(2, VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=TEMPLATE
    ).save_pretrained(path)


SPECIAL = ("<|end|>", "<|user|>", "[TOOL_CALLS]")


def spelling() -> Any:
    """A tokenizer of bytes, and of pieces of JSON, some of which cut across its words.

    It ends with the special tokens, of which the first one ends an answer.
    """
    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [('"', ":"), ('":', "Ġ"), ("{", '"'), (",", "Ġ"), (",Ġ", '"'), ("e", "n"), ("1", "2")]
    merges += [
        ("t", "r"),
        ("tr", "u"),
        ("tru", "e"),
        ("}", "}"),
        ('"', "}"),
        ("a", '"'),
        ("Ġ", "{"),
    ]
    words = [*signs, *("".join(pair) for pair in merges)]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: at for at, word in enumerate(words)}, merges)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL[0])


def _talking() -> tuple[Any, Any]:
    tokenizer = spelling()
    module = build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    module.generation_config.eos_token_id = tokenizer.eos_token_id
    return module, tokenizer


def talker() -> Model:
    """A tiny random model that writes bytes."""
    module, tokenizer = _talking()
    return Model.of(module, name="talker", tokenizer=tokenizer)


def save_talker(path: Path, template: str) -> None:
    """Leave it in a folder, with a chat template."""
    module, tokenizer = _talking()
    tokenizer.chat_template = template
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (count,), generator=generator).tolist()


class Service:
    """`prefixcache serve` in a process of its own; can be killed and started again."""

    def __init__(self, folder: Path, memory: str = "1MiB", *options: str) -> None:
        self.target = f"unix:{folder}/s.sock"
        self._arguments = ["serve", "--listen", self.target, "--memory", memory, *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prefixcache.cli", *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                prefixcache.connect(self.target).close()
                return
            except ServiceUnavailable:
                assert time.monotonic() < deadline, "the service did not start"
                time.sleep(0.02)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE_S)


def engine_at(client: Client, model: Model, **options: Any) -> Engine:
    """Make an engine that shares, and that joins again when it is lost."""
    join = joiner(client, model, "")
    session, pool = join()
    return Engine(model, pool, session, join=join, **options)


def answers(engine: Engine, *requests: Request) -> dict[str, Finished]:
    """Submit requests, run until idle, give what was finished; none may fail."""
    for request in requests:
        engine.submit(request)
    return finished(list(engine.run()))


def finished(events: list[Event]) -> dict[str, Finished]:
    assert not [event for event in events if isinstance(event, Failed)]
    return {event.id: event for event in events if isinstance(event, Finished)}
