"""What a tiny model answers without any service: what every worker of a storm must answer, too.

Arguments: folder for the model, file for the answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from chaos.clerk import NUM_HONEST, honest
from chaos.universe import LAYOUT
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request_line import read_request
from worker.zoo import answers, save


def main(folder: str, file: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    save(
        Path(folder),
        num_hidden_layers=LAYOUT.num_layers,
        num_attention_heads=2 * LAYOUT.num_kv_heads,
        num_key_value_heads=LAYOUT.num_kv_heads,
        head_dim=LAYOUT.head_dim,
        hidden_size=2 * LAYOUT.num_kv_heads * LAYOUT.head_dim,
    )
    model = Model.load(folder)
    requests = [
        read_request({"id": str(number)} | honest(number), model) for number in range(NUM_HONEST)
    ]
    done = answers(Engine(model, None, None), *requests)
    Path(file).write_text(json.dumps([done[str(n)].tokens for n in range(NUM_HONEST)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
