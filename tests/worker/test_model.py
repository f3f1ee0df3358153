from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixcache.errors import InvalidRequest, NotFound, Unsupported
from prefixcache_kernels import SharedPool
from prefixcache_kernels.cpu.layers import Rotation
from prefixcache_worker import lean, model, native
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.model import Model
from worker.zoo import build


@pytest.mark.parametrize("architecture", ["bloom", "gptj", "mpt"])
def test_an_architecture_that_ignores_the_attention_registry_is_refused_by_name(
    architecture: str,
) -> None:
    sizes = {
        "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
        "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
        "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    }
    with pytest.raises(Unsupported, match=architecture):
        Model.of(build(architecture, **sizes[architecture]))


def test_a_model_whose_paged_logits_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache_worker.hf.shared_prefix_attention", lambda q, *a, **k: q * 0.5)
    with pytest.raises(Unsupported, match="'gemma2' gives other logits"):
        Model.of(build("gemma2"))


def test_keys_that_depend_on_the_length_of_their_sequence_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(Unsupported, match="dynamic"):
        Model.of(build("llama", rope_parameters=rope))


def test_the_lean_network_is_dropped_where_it_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean.LeanNetwork, "_rotation", _no_rotation)
    assert _kind("llama", native=False) == "transformers"
    # In bfloat16 rounding could hide it; the twin in float32 cannot.
    monkeypatch.setitem(model.TOLERANCE, "bfloat16", 10.0)
    assert _kind("llama", "bfloat16", native=False) == "transformers"
    monkeypatch.undo()
    assert _kind("llama", "bfloat16", native=False) == "lean"


def test_the_network_in_c_is_dropped_where_it_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kind("llama") == _kind("llama", "bfloat16") == "native"
    monkeypatch.setattr(native.NativeNetwork, "_rotation", _not_rotated)
    assert _kind("llama") == "lean"
    monkeypatch.setitem(model.TOLERANCE, "bfloat16", 10.0)
    assert _kind("llama", "bfloat16") == "lean"


def test_slots_that_lie_apart_in_memory_are_those_that_are_named() -> None:
    made = Model.of(build("llama"))
    tokens = list(range(20))
    seen = []
    for apart in (False, True):
        pool = SharedPool.private(made.layout, 8, 16)
        batch = Batch.pack([Piece(tokens, 0, [3, 5])], 16)
        if apart:
            slots = torch.stack([batch.slot_mapping, torch.zeros_like(batch.slot_mapping)], 1)
            batch = replace(batch, slot_mapping=slots[:, 0])
        seen.append((made.forward(batch, pool), pool.blocks.clone()))
    assert all(map(torch.equal, *seen))


def test_without_the_c_library_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "library", lambda: None)
    assert _kind("llama") == "lean"


def _kind(architecture: str, dtype: str = "float32", *, native: bool = True) -> str:
    module = build(architecture).to(getattr(torch, dtype))
    return Model.of(module, dtype=dtype, native=native).kind


def _not_rotated(self: native.NativeNetwork, positions: torch.Tensor) -> Rotation:
    shape = (positions.shape[0], self.facts.head_dim // 2)
    return Rotation(torch.ones(shape), torch.zeros(shape))


def _no_rotation(
    self: lean.LeanNetwork, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (positions.shape[0], 1, self.head_dim)
    return torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def test_the_lean_network_leaves_configs_alone_that_it_does_not_know() -> None:
    assert lean.LeanNetwork.of(build("llama", hidden_act="gelu")) is None
    assert lean.LeanNetwork.of(build("gemma2")) is None


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_scaled_rotations_are_restated_exactly(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "llama3":
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    for in_c in (True, False):
        made = Model.of(build("llama", rope_parameters=rope), native=in_c)
        assert made.kind == ("native" if in_c else "lean")


def test_biases_are_restated_exactly() -> None:
    for in_c in (True, False):
        made = Model.of(build("llama", attention_bias=True, mlp_bias=True), native=in_c)
        assert made.kind == ("native" if in_c else "lean")


def test_weights_that_cannot_be_reordered_still_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_pack", lambda weight: None)
    assert _kind("llama", native=False) == "lean"


def test_nothing_to_load_says_so(folder: Path) -> None:
    with pytest.raises(NotFound, match=str(folder)):
        Model.load(folder)
    with pytest.raises(InvalidRequest, match="dtype 'int8': not one of float32, bfloat16"):
        Model.load(folder, dtype="int8")
    with pytest.raises(InvalidRequest, match="0 threads: give 1 or more"):
        Model.load(folder, threads=0)


def test_a_folder_is_loaded_and_named_by_its_weights(folder: Path, demo_folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder)
    names = []
    for change in (1.0, 1.001):
        module = build("llama")
        with torch.no_grad():
            module.model.layers[1].mlp.up_proj.weight *= change
        path = folder / str(change) / "mine"
        module.save_pretrained(path)
        tokenizer.save_pretrained(path)
        names.append(Model.load(path).name)
    assert all(name.startswith("mine@") for name in names)
    assert names[0] != names[1]
    assert Model.load(folder / "1.0" / "mine").name == names[0]


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_an_element_type_goes_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound, match="no model could be loaded"):
        Model.load(tmp_path, dtype=name)
