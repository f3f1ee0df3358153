"""Moving cached keys: the angles of real models, and the plain path on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcache_kernels
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.rotary import Rotary, oracle_rotate, rotate_keys

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    LLAMA3,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["rope_type"])
def test_frequencies_are_those_of_the_models_themselves(config: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters=config,
    )
    want = LlamaRotaryEmbedding(llama).inv_freq
    got = torch.tensor(Rotary.from_config(config, 64).frequencies)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["rope_type"])
@pytest.mark.parametrize("delta", [1, -700, 90_000])
def test_a_moved_key_is_the_key_that_the_new_position_would_have_had(
    config: dict[str, Any], delta: int
) -> None:
    torch.manual_seed(0)
    angles = Rotary.from_config(config, 32)
    raw = torch.randn(2, 2, 3, 4, 2, 32, dtype=torch.float64)
    slots = torch.tensor([5, 0, 11])
    early, late = (oracle_rotate(raw, slots, p, angles) for p in (1000, 1000 + delta))
    got = early.float()
    prefixcache_kernels.rotate_keys(got, slots, delta, angles)
    keys = (got[:, 0].double() - late[:, 0]).norm() / late[:, 0].norm()
    assert keys <= 1e-5
    assert torch.equal(got[:, 1], raw[:, 1].float())
    untouched = [slot for slot in range(12) if slot not in slots]
    assert torch.equal(
        got[:, 0].flatten(1, 2)[:, untouched], raw[:, 0].float().flatten(1, 2)[:, untouched]
    )


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_other_kinds_of_angles_are_refused_by_name(kind: str) -> None:
    with pytest.raises(Unsupported, match=f"'{kind}' cannot be moved"):
        Rotary.from_config({"rope_type": kind, "factor": 2.0}, 64)


def test_missing_fields_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="needs the field 'factor'"):
        Rotary.from_config({"type": "linear"}, 64)
    with pytest.raises(InvalidRequest, match="not above 0"):
        Rotary.from_config({"rope_theta": 0.0}, 64)
    angles = Rotary.from_config({}, 8)
    blocks, one = torch.zeros(1, 2, 2, 4, 1, 8), torch.tensor([0])
    with pytest.raises(InvalidRequest, match="outside the pool's 8"):
        rotate_keys(blocks, torch.tensor([8]), 1, angles)
    with pytest.raises(InvalidRequest, match=r"not torch\.int64"):
        rotate_keys(blocks, one.int(), 1, angles)
    with pytest.raises(InvalidRequest, match="rounded twice"):
        rotate_keys(blocks.to(torch.float8_e4m3fn), one, 1, angles)
    with pytest.raises(InvalidRequest, match="in memory"):
        rotate_keys(blocks[0], one, 1, angles)
    assert not torch.count_nonzero(blocks)
