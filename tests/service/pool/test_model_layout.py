"""config.json as models have them: one uniform layout is read, all else refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.types import Layout

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
FALCON = {"model_type": "falcon", "num_attention_heads": 71, "hidden_size": 4544}


def read(folder: Path, config: object) -> Layout:
    (folder / "config.json").write_text(json.dumps(config))
    return read_layout(folder)


@pytest.mark.parametrize(
    ("change", "heads", "width"),
    [
        ({}, 8, 128),
        ({"num_key_value_heads": None}, 32, 128),
        ({"head_dim": 256}, 8, 256),
        ({"head_dim": None}, 8, 128),
        ({"num_key_value_heads": [8] * 32}, 8, 128),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16},
            8,
            128,
        ),
        ({"v_head_dim": 128}, 8, 128),
        (
            {
                "multi_query_attention": True,
                "multi_query_group_num": 2,
                "num_key_value_heads": None,
            },
            2,
            128,
        ),
        ({"multi_query": True, "num_key_value_heads": None}, 1, 128),
        ({**FALCON, "multi_query": True, "num_key_value_heads": None}, 1, 64),
        ({**FALCON, "num_kv_heads": 71, "num_key_value_heads": None}, 1, 64),
        ({**FALCON, "multi_query": False, "num_key_value_heads": None}, 71, 64),
        ({"kv_channels": 64}, 8, 64),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 4}}, 4, 128),
    ],
)
def test_heads_of_every_grouping(
    tmp_path: Path, change: dict[str, Any], heads: int, width: int
) -> None:
    layout = read(tmp_path, {**LLAMA, **change})
    assert layout == Layout(32, heads, width, "bfloat16")


def test_groups_of_queries_are_heads_of_keys(tmp_path: Path) -> None:
    config = {**LLAMA, "num_key_value_heads": None, "num_query_groups": 4}
    assert read(tmp_path, config).num_kv_heads == 4


def test_layers_that_share_the_keys_of_earlier_ones_are_not_counted(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "num_kv_shared_layers": 15}).num_layers == 17


@pytest.mark.parametrize("name", ["text_config", "llm_config", "language_config"])
def test_the_text_model_of_a_multimodal_one(tmp_path: Path, name: str) -> None:
    vision = {"num_hidden_layers": 5, "num_attention_heads": 3, "hidden_size": 9}
    outer = {name: LLAMA, "vision_config": vision, "model_type": "internvl_chat"}
    assert read(tmp_path, outer) == Layout(32, 8, 128, "bfloat16")
    assert read(tmp_path, {"thinker_config": outer}).num_kv_heads == 8


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(LLAMA))
    assert read_layout(tmp_path).num_layers == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_encoder_decoder", True),
        ("model_type", "bert"),
        ("model_type", "xlm-roberta-xl"),
        ("model_type", "mamba2"),
        ("model_type", "rwkv"),
        ("kv_lora_rank", 512),
        ("use_mla", True),
        ("layer_types", ["linear_attention", "full_attention"]),
        ("layers_block_type", ["mamba", "attention"]),
        ("hybrid_override_pattern", "M-M*"),
        ("attn_type_list", [0, 1]),
        ("full_attention_interval", 4),
        ("full_attn_idxs", [1, 3]),
        ("attn_layer_period", 8),
        ("mb_per_layer", 2),
        ("use_retention", True),
        ("num_self_decoder_layers", 2),
        ("per_layer_config", {"0": {"num_key_value_heads": 4}}),
        ("encoder_layers", 4),
        ("num_encoder_layers", 4),
        ("num_attention_groups", 1),
        ("num_query_groups", 4),
        ("attention_other_setting", {"num_attention_groups": 4}),
        ("attn_settings_of_some", {"head_dim": 64}),
        ("model_type", "llada"),
        ("model_type", "xlnet"),
        ("model_type", "qwen3_next"),
        ("model_type", "nemotron_h"),
        ("model_type", "granitemoehybrid"),
        ("add_cross_attention", True),
        ("use_bidirectional_attention", "all"),
        ("is_causal", "false"),
        ("index_topk", 2048),
        ("model_type", "Dream"),
        ("llm_config", {"num_hidden_layers": 8}),
        ("mamba_d_state", 16),
        ("ssm_state_size", 16),
        ("conv_L_cache", 3),
        ("linear_attn_config", {"kda_layers": [1]}),
        ("block_configs", [{"attention": {"n_heads_in_group": 8}}]),
        ("cross_attention_layers", [3, 8]),
        ("use_bidirectional_attention", True),
        ("is_causal", False),
        ("v_head_dim", 64),
        ("global_head_dim", 512),
        ("swa_head_dim", 192),
        ("swa_num_key_value_heads", 4),
        ("index_head_dim", 64),
        ("num_key_value_heads", [8, 4] * 16),
        ("num_key_value_heads_per_layer", [8, 4] * 16),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", True),
        ("num_key_value_heads", "8"),
        ("num_key_value_heads", 8.0),
        ("num_key_value_heads", -8),
        ("num_key_value_heads", 7),
        ("num_key_value_heads", []),
        ("num_hidden_layers", "32"),
        ("num_hidden_layers", 2**40),
        ("num_hidden_layers", None),
        ("n_layer", 31),
        ("head_dim", 0),
        ("hidden_size", 4097),
        ("multi_query", "yes"),
        ("num_kv_shared_layers", 32),
        ("dtype", 16),
        ("dtype", "float8_e4m3fn"),
        ("text_config", {}),
        ("text_config", [1]),
    ],
)
def test_what_is_no_uniform_layout_is_refused_by_the_field_that_says_so(
    tmp_path: Path, field: str, value: object
) -> None:
    config = {**LLAMA, field: value}
    if field in ("multi_query", "num_key_value_heads_per_layer"):
        del config["num_key_value_heads"]
    if field == "llm_config":
        config["text_config"] = LLAMA
    what = {"num_key_value_heads": "heads", "hidden_size": "width", "dtype": "type"}
    with pytest.raises(InvalidRequest, match=f"config.json.*{what.get(field, field)}") as refused:
        read(tmp_path, config)
    assert "give --" in str(refused.value)


def test_a_model_of_mixed_layers_is_read_only_if_it_says_that_all_are_attention(
    tmp_path: Path,
) -> None:
    every = {**LLAMA, "model_type": "qwen3_next", "layer_types": ["full_attention"] * 32}
    assert read(tmp_path, every).num_layers == 32


def test_what_kind_of_model_it_is_may_be_said_outside_the_text_model(tmp_path: Path) -> None:
    inner = {name: value for name, value in LLAMA.items() if name != "model_type"}
    with pytest.raises(InvalidRequest, match='model_type is "clip": an encoder'):
        read(tmp_path, {"model_type": "clip", "text_config": inner})
    assert read(tmp_path, {"model_type": "clip", "text_config": LLAMA}).num_layers == 32


def test_a_flag_that_is_a_text_makes_no_decoder_of_an_encoder(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "model_type": "bert", "is_decoder": True}).num_layers == 32
    with pytest.raises(InvalidRequest, match=r"is_decoder is .*: true or false is expected"):
        read(tmp_path, {**LLAMA, "model_type": "bert", "is_decoder": "false"})


@pytest.mark.parametrize("data", [b"", b"[1]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_what_is_no_configuration_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        read_layout(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_layout(tmp_path)


DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}


def test_latent_attention_is_one_plane_a_layer_of_whole_pages(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    layout = read_layout(tmp_path, block_size=32)
    assert str(layout) == f"pages:27x{32 * 576 * 2}:latent/512+64/bfloat16"
    assert read_layout(tmp_path, "fp8", 16).page_bytes == 16 * 576


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qk_rope_head_dim": None}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank is .512.*whole number"),
        ({"index_head_dim": 128}, "index_head_dim is 128: its layers keep an index"),
        ({"kv_lora_rank": None, "use_mla": True}, "use_mla is true"),
    ],
)
def test_latent_attention_that_does_not_tell_is_refused(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DEEPSEEK, **change}))
    with pytest.raises(InvalidRequest, match=told):
        read_layout(tmp_path, block_size=16)


def test_weights_of_eight_bits_do_not_make_keys_and_values_so(tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": "float8_e4m3fn"}
    with pytest.raises(InvalidRequest, match=r"weights of eight bits.*give --dtype"):
        read(tmp_path, config)
    assert read_layout(tmp_path, "fp8") == Layout(32, 8, 128, "float8_e4m3fn")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_key_value_heads": [8] * 4}, "4 numbers, for 32 layers"),
        ({"num_key_value_heads": [8] * 40}, "40 numbers, for 32 layers"),
        ({"layer_types": ["full_attention"] * 4}, "4 kinds, for 32 layers"),
        ({"layer_types": "full"}, "the kind of each layer is expected"),
        ({"hybrid_override_pattern": 5}, "the kind of each layer is expected"),
        ({"dtype": "float16"}, 'dtype="float16" and torch_dtype="bfloat16"; give --dtype'),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
            "another type than bfloat16; give --dtype",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(told)):
        read(tmp_path, LLAMA | change)
    if told.endswith("--dtype"):
        assert read_layout(tmp_path, dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "gemma"},
        {"model_type": "qwen3"},
        {"model_type": "deepseek_v2"},
        {"model_type": "longcat_flash", "kv_lora_rank": 512},
        {"model_type": "hubert"},
        {"model_type": "nomic_bert"},
        {"model_type": "beit"},
        {"model_type": "bidir_mistral"},
        {"_class_name": "UNet2DConditionModel"},
        {"position_encoding_2d": True},
        {"bidirectional": True},
        {"causal": False},
        {"use_causal_mask": False},
        {"attn_type": "bidirectional"},
        {"cross_layer_interval": 4},
        {"n_shared_head": 8},
        {"num_swa_attention_heads": 20},
        {"conv_window": 2},
        {"deltanet_num_heads": 4},
        {"head_dims": [128, 64] * 16},
        {"layer_kinds": ["mamba", "attention"] * 16},
        {"mixer_types": ["ssm"] * 32},
        {"attn_layers": [1, 3]},
        {"no_attention_layers": [3]},
        {"attention_types": [[["global", "mamba"], 16]]},
        {"attention_layers": [[1], [3]]},
        {"kv_cache_dtype": "fp8"},
        {"compression_config": {"kv_cache_scheme": {"num_bits": 8}}},
        {"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}},
    ],
)
def test_by_whatever_name_a_model_says_that_it_is_no_uniform_layout(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    told = next(reversed(changed)) if "model_type" not in changed else "model_type"
    told = "kv_cache" if "config" in told else told
    with pytest.raises(InvalidRequest, match=f"{told}.*; give --"):
        read(tmp_path, LLAMA | changed)


@pytest.mark.parametrize(
    ("changed", "kv_heads"),
    [
        ({"mlp_layer_types": ["sparse"] * 32}, 8),
        ({"attention_layers": ["global", "local"] * 16}, 8),
        ({"attention_types": [[["global", "local"], 16]]}, 8),
        ({"attn_layers": list(range(32))}, 8),
        ({"kv_cache_dtype": "auto"}, 8),
        ({"model_type": "gemma", "head_dim": 128}, 8),
        ({"model_type": "RefinedWeb", "n_head_kv": 8, "multi_query": True}, 8),
        ({"model_type": "falcon", "new_decoder_architecture": True}, 8),
        (
            {
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "num_key_value_heads": None,
                "multi_query": True,
            },
            32,
        ),
    ],
)
def test_what_only_looks_like_it_is_read(
    tmp_path: Path, changed: dict[str, Any], kv_heads: int
) -> None:
    assert read(tmp_path, LLAMA | changed) == Layout(32, kv_heads, 128, "bfloat16")


def test_the_width_of_heads_is_not_derived_from_those_of_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="none of head_dim, num_attention_heads"):
        read(tmp_path, {**LLAMA, "num_attention_heads": None})
    assert read(tmp_path, {**LLAMA, "num_attention_heads": None, "head_dim": 64}).head_dim == 64


def test_the_type_of_keys_and_values_may_be_said_of_the_text_model(tmp_path: Path) -> None:
    inner = {**LLAMA, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    with pytest.raises(InvalidRequest, match=r"kv_cache_scheme is .* give --dtype"):
        read(tmp_path, {"text_config": inner})


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32, "num_hidden_layers": 4}')
    with pytest.raises(InvalidRequest, match="the field 'num_hidden_layers' is there twice"):
        read_layout(tmp_path)
