"""A tiny Llama with random weights and the demo model's tokenizer: for the short demo."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from prefixcache_worker.demo.chats import Workload
from prefixcache_worker.demo.scenario import CRASH

TIMES: Final = 3
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
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    for name in TOKENIZER:
        shutil.copy(tokenizer_of / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
