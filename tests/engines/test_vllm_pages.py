"""Which of vLLM's KV caches have a layout in the pool, and which are refused."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prefixcache.errors import Unsupported
from prefixcache_vllm import pages


class FullAttentionSpec(SimpleNamespace):
    """The fields of vLLM's that are looked at."""


def spec(**changes: Any) -> Any:
    known = {
        "sliding_window": None,
        "attention_chunk_size": None,
        "non_causal": False,
        "page_size_padded": None,
        "tokens_per_state": 1,
        "kv_quant_mode": SimpleNamespace(name="NONE"),
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_size": 64,
        "head_size_v": 64,
        "block_size": 32,
        "dtype": torch.bfloat16,
        "page_size_bytes": 3 * 32 * 128 * 2,
    }
    return FullAttentionSpec(**known | changes)


def cache(*specs: Any, order: str = "LBHNC", layers: int = 30) -> Any:
    names = [f"layer.{i}" for i in range(layers)]
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=s, layer_names=names) for s in specs],
        kv_cache_layout=order,
    )


def settings(**known: Any) -> Any:
    return SimpleNamespace(to_dict=lambda: {"_name_or_path": object(), **known})


def engine(**changes: Any) -> Any:
    model = {
        "model": "tiny",
        "revision": None,
        "quantization": None,
        "dtype": torch.bfloat16,
        "is_encoder_decoder": False,
        "is_multimodal_model": False,
        "runner_type": "generate",
        "enable_prompt_embeds": False,
        "enable_sleep_mode": False,
        "hf_config": settings(rope_theta=1e4),
    }
    whole: dict[str, Any] = {
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "attention_config": SimpleNamespace(backend=SimpleNamespace(name="FLASH_ATTN")),
    }
    given = {k: v for k, v in changes.items() if k in model}
    rest = {k: v for k, v in changes.items() if k not in model}
    return SimpleNamespace(**whole | rest, model_config=SimpleNamespace(**model | given))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of vLLM is imported to name the format; on a CPU the tests with a real vLLM do so."""
    platforms, version = ModuleType("vllm.platforms"), ModuleType("vllm.version")
    platforms.current_platform = SimpleNamespace(  # type: ignore[attr-defined]
        is_cpu=lambda: False, device_name="cuda"
    )
    version.__version__ = "0.32.1+cu130"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setitem(sys.modules, "vllm.version", version)


@pytest.mark.parametrize(
    ("order", "planes"),
    [("LBHNC", 30), ("LBNHC", 30), ("LHBNC", 90), ("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 1)],
)
def test_every_order_of_vllm_is_planes_of_pages(order: str, planes: int) -> None:
    layout = pages.layout_of(engine(), cache(spec(), order=order))
    assert (layout.planes, layout.planes * layout.page_bytes) == (planes, 30 * 24576)
    assert layout.format == f"vllm-0.32/{order}/cuda-FLASH_ATTN/3x64+64/bfloat16"


def test_an_order_that_is_not_known_is_refused() -> None:
    for order in ("LBHN", "None", "NLBHC", "CLBHN"):
        with pytest.raises(Unsupported, match=f"order of KV is {order}"):
            pages.layout_of(engine(), cache(spec(), order=order))


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([], "KV is nothing"),
        ([spec(), spec()], "FullAttentionSpec, FullAttentionSpec: only one group"),
        ([SimpleNamespace()], "KV is SimpleNamespace"),
        ([spec(sliding_window=512)], r"a sliding window \(512\)"),
        ([spec(attention_chunk_size=64)], "attention in chunks"),
        ([spec(non_causal=True)], "not causal"),
        ([spec(page_size_padded=32768)], "padded"),
        ([spec(tokens_per_state=4)], "several tokens"),
        ([spec(kv_quant_mode=SimpleNamespace(name="FP8_PER_TENSOR"))], "FP8_PER_TENSOR"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kv_that_no_tree_of_tokens_describes_is_refused_by_name(
    groups: list[Any], told: str
) -> None:
    with pytest.raises(Unsupported, match=told):
        pages.only_spec(cache(*groups))


def test_settings_that_cannot_go_with_a_shared_pool_are_all_told_at_once() -> None:
    pages.check(engine(), in_place=True)
    for in_place in (True, False):
        pages.check(engine(lora_config=1, is_multimodal_model=True), in_place=in_place)
    bad = engine(
        speculative_config=1,
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        kv_transfer_config=1,
    )
    with pytest.raises(Unsupported) as caught:
        pages.check(bad, in_place=True)
    for part in ("speculative", "--tensor-parallel-size 2", "beside"):
        assert part in str(caught.value)


def test_a_model_is_named_by_its_weights_and_all_that_computes_with_them() -> None:
    plain = pages.model_of(engine())
    assert plain.startswith("tiny@bfloat16#")
    assert plain == pages.model_of(engine(hf_config=settings(rope_theta=1e4)))
    others = {
        pages.model_of(engine(), weights="step-5"),
        pages.model_of(engine(revision="main")),
        pages.model_of(engine(quantization="awq")),
        pages.model_of(engine(dtype=torch.float32)),
        pages.model_of(engine(hf_config=settings(rope_theta=1e6))),
    }
    assert len(others | {plain}) == 6
