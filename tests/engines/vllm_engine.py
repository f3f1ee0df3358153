"""One vLLM engine in one process, for tests: a line of JSON in, a line out.

    python vllm_engine.py MODEL_FOLDER MODE[+lora] [SERVICE]
    python vllm_engine.py MODEL_FOLDER write | write-hearing

Run by the Python of an environment with vLLM.  It knows nothing of the tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
VOCABULARY = 512
ADAPTERS = ("tone", "voice")
"""Beside the model; those of an engine are numbered from 1."""
SOUND = 3
"""The token in whose place the model hears."""


def write_model(folder: Path) -> None:
    """Write a tiny Llama with random weights: its answers depend on every token before them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ADAPTERS:
        write_adapter(folder.with_name(name), config)


def write_hearing_model(folder: Path) -> None:
    """Write a tiny Qwen2-Audio with random weights, as its makers' files lie."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    special = {0: "<unk>", 1: "<s>", 2: "</s>", SOUND: "<|AUDIO|>"}
    words = {special.get(at, f"w{at}"): at for at in range(VOCABULARY)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|AUDIO|>"],
    )
    torch.manual_seed(7)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            d_model=64,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
            num_mel_bins=16,
        ),
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
        },
        audio_token_index=SOUND,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "multi_modal_projector" in name:
                weights.mul_(30)  # what is heard weighs as much as what is read
    model.to(torch.float32).save_pretrained(folder)
    file = folder / "model.safetensors"
    doubled, once = "language_model.model.model.", "language_model.model."
    renamed = {name.replace(doubled, once): one for name, one in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    features = WhisperFeatureExtractor(feature_size=16)
    Qwen2AudioProcessor(features, tokenizer).save_pretrained(folder)


def sound(number: int) -> Any:
    """Give a second of a tone of its own."""
    import numpy as np

    return np.sin(np.arange(16000) * 0.05 * number**2).astype(np.float32), 16000


def write_adapter(folder: Path, config: Any) -> None:
    """Write a LoRA adapter that changes keys and values, in the form that PEFT writes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets}
    more = {"bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | more))
    size = config.hidden_size
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{part}.weight": (
            0.3 * torch.randn((8, size) if part == "A" else (size, 8))
        )
        for layer in range(config.num_hidden_layers)
        for target in targets
        for part in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def options_for(mode: str, service: str) -> dict[str, Any]:
    """Give what an engine of a mode is started with."""
    if mode == "connector":
        return {
            "kv_transfer_config": {
                "kv_connector": "PrefixcacheConnector",
                "kv_connector_module_path": "prefixcache_vllm.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"connect": service},
            }
        }
    if mode == "in-place":
        return {
            "scheduler_cls": "prefixcache_vllm.scheduler.LeaseScheduler",
            "worker_cls": "prefixcache_vllm.worker.CPUWorker",
            "enable_prefix_caching": False,
            "additional_config": {"prefixcache": {"connect": service, "spare_blocks": 16}},
        }
    return {}


def main() -> None:
    """Start the engine, and answer."""
    folder, mode, *rest = sys.argv[1:]
    mode, with_adapters = mode.removesuffix("+lora"), mode.endswith("+lora")
    if mode.startswith("write"):
        write = write_hearing_model if mode == "write-hearing" else write_model
        write(Path(folder))
        return
    hears = Path(folder, "processor_config.json").exists()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=not hears,
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        enable_lora=with_adapters,
        **options_for(mode, rest[0] if rest else ""),
    )
    if mode == "in-place":
        signal.signal(signal.SIGUSR1, lambda *_: cut_off(engine))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        core = engine.llm_engine.engine_core.engine_core
        if "counts" in ask:
            told = counts(core)
        elif "reset" in ask:
            told = {"reset": engine.reset_prefix_cache(reset_connector=True)}
        else:
            told = generate(engine, SamplingParams, ask, Path(folder))
        print(json.dumps(told), file=out, flush=True)
    engine.llm_engine.engine_core.shutdown()


def cut_off(engine: Any) -> None:
    """End the stream of the scheduler's session, as a broken connection does."""
    engine.llm_engine.engine_core.engine_core.scheduler.leases.session._call.cancel()


def generate(engine: Any, params: Any, ask: dict[str, Any], model: Path) -> dict[str, Any]:
    """Answer prompts."""
    sampling = params(
        temperature=0, max_tokens=ask["max_tokens"], detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in ask["prompts"]]
    for prompt in prompts:
        if ask.get("salt"):
            prompt["cache_salt"] = ask["salt"]
        if ask.get("sounds"):
            prompt["multi_modal_data"] = {"audio": [sound(number) for number in ask["sounds"]]}
    adapter = None
    if name := ask.get("adapter"):
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(name, 1 + ADAPTERS.index(name), str(model.with_name(name)))
    answers = engine.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": [answer.num_cached_tokens for answer in answers],
    }


def counts(core: Any) -> dict[str, Any]:
    """Tell what the scheduler's side has done."""
    scheduler = core.scheduler
    connector = getattr(scheduler, "connector", None)
    side = getattr(connector, "_scheduler", None)
    leases = scheduler.leases if side is None else side.leases
    told: dict[str, Any] = {"shares": leases is not None and leases.session.alive}
    if leases is not None:
        told |= {name: getattr(leases.counts, name) for name in leases.counts.__slots__}
        told["held"] = len(leases.held)
    if side is not None:
        told |= {"loaded": side.num_loaded, "saved": side.num_saved}
    return told


if __name__ == "__main__":
    main()
