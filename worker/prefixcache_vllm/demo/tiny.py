"""A tiny Llama with random weights and the demo model's tokenizer: for the short demo."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from prefixcache_worker.demo.chats import Workload
from prefixcache_worker.demo.scenario import CRASH

TIMES: Final = 3
LAYERS, WIDTH = 6, 512
"""A smaller one would have computed a prompt before anybody could be killed in the midst of it."""
TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json")


def chats(workload: Workload) -> Workload:
    """Give the short workload, with a longer system prompt for the crash.

    So small a model would have computed the real one before anybody waits for it.
    """
    short = workload.quick()
    known = short.assistants[CRASH]
    longer = replace(known, system="\n".join([known.system] * TIMES))
    return Workload(
        {**short.assistants, CRASH: longer},
        tuple(
            replace(chat, assistant=longer) if chat.assistant == known else chat
            for chat in short.chats
        ),
    )


def write(folder: Path, tokenizer_of: Path) -> Path:
    """Write the model as a Hugging Face folder.  About a second; the same weights every time.

    Its answers are no words, and depend on every token before them.
    """
    from transformers import AutoTokenizer

    folder.mkdir()
    for name in TOKENIZER:
        shutil.copy(tokenizer_of / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    write_weights(
        folder,
        len(tokenizer),
        layers=LAYERS,
        width=WIDTH,
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
    )
    return folder


def write_weights(
    folder: Path,
    vocabulary: int,
    *,
    layers: int = 2,
    width: int = 128,
    begin: int | None = 1,
    end: int | None = 2,
) -> None:
    """Write a Llama with random weights, float32, without a tokenizer.  The same every time.

    Args:
        folder: for it.
        vocabulary: how many tokens there are.
        layers: how many.
        width: of what goes from layer to layer; a multiple of 64, the width of a head.
        begin: the token that prompts begin with.
        end: the one that answers end with.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=begin,
        eos_token_id=end,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
