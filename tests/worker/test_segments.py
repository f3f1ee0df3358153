"""Moved segments: what is found, what is computed again, and that all of it is a full prefill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.rotary import Rotary
from prefixcache_worker.model import Model
from prefixcache_worker.segments import certificate, texts
from prefixcache_worker.segments.blend import Blend, angles_of
from prefixcache_worker.segments.moved import POLICIES, Found, Moved, Policy, deviation, find
from worker.zoo import VOCAB, build, save

NO_DEVIATION = torch.zeros(0)


def tokens(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, VOCAB) for _ in range(count)]


A, B, C = tokens(1, 40), tokens(2, 37), tokens(3, 33)


def made(architecture: str = "llama", **changes: Any) -> tuple[Model, tuple[Rotary, ...]]:
    module = build(architecture, **changes)
    model = Model.of(module, name=architecture)
    return model, angles_of(module.config, model)


@pytest.fixture(scope="module")
def llama() -> tuple[Model, tuple[Rotary, ...]]:
    return made()


def test_runs_are_found_wherever_they_are() -> None:
    found = find([*A, 5, *C, *B, 7], [[*A, *B], [9, 9, *C]], least=31)
    assert found == Found(40, 0, (Moved(41, 33, 1, 2), Moved(74, 37, 0, 40)))
    assert [run.delta for run in found.moved] == [39, 34]


def test_the_last_token_is_computed_and_short_runs_are() -> None:
    assert find(A, [A], least=31) == Found(39, 0, ())
    assert find([1, *B], [B], least=31).moved == (Moved(1, 36, 0, 0),)
    assert find([1, *A[:30], 1], [A], least=31).moved == ()
    assert find([1, *A[:31], 1], [A], least=31).moved == (Moved(1, 31, 0, 0),)


def test_the_longest_of_several_runs_is_moved() -> None:
    assert find([1, *A, 2], [[3, *A[:32]], [3, 4, *A]], least=31).moved == (Moved(1, 40, 1, 2),)


def test_each_policy_computes_what_it_says() -> None:
    found = Found(4, 0, (Moved(10, 6, 0, 0), Moved(20, 2, 0, 30)))
    far = torch.tensor([0.0, 5.0, 0.0, 1.0, 0.0, 0.0, 9.0, 2.0])
    assert Policy("none").again(found, NO_DEVIATION) == []
    assert Policy("first", 3).again(found, NO_DEVIATION) == [10, 11, 12, 20, 21]
    assert Policy("deviation", 0.25).again(found, far) == [11, 20]
    assert Policy("deviation", 1.0).again(found, far) == found.positions
    assert Policy("all").again(found, NO_DEVIATION) == [*range(10, 16), 20, 21]


def test_what_is_computed_again_has_a_price() -> None:
    assert Policy("none").share(0, 8, 30) == 0.0
    assert Policy("all").share(8, 8, 30) == 1.0
    assert Policy("deviation", 0.5).share(4, 8, 2) == 0.75  # one of two layers, to look


@pytest.mark.parametrize(
    ("kind", "amount"), [("none", 1), ("first", 0), ("first", 1.5), ("deviation", 1.1), ("all", 2)]
)
def test_an_amount_that_means_nothing_is_refused(kind: Any, amount: float) -> None:
    with pytest.raises(InvalidRequest, match=kind):
        Policy(kind, amount)


def test_deviation_weighs_keys_and_values_alike() -> None:
    fresh = torch.ones(2, 3, 1, 4)
    fresh[1] *= 100
    stored = fresh.clone()
    stored[0, 0] += 1
    stored[1, 1] += 100
    torch.testing.assert_close(deviation(stored, fresh), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi"]
)
def test_all_computed_again_is_a_full_prefill(architecture: str) -> None:
    """Of windows, soft caps, bases by layer and partly turned heads, too."""
    model, angles = made(architecture, **CHANGES.get(architecture, {}))
    prompt = [*A, 5, *C, *B, 7]
    stored = [[*A, *B], [9, 9, *C]]
    found = find(prompt, stored, least=31)
    blend = Blend(model, angles, stored, prompt, found, num_answer=6)
    full = blend.logits
    torch.testing.assert_close(blend.blended(found.positions), full, rtol=1e-3, atol=1e-3)
    apart = float((blend.blended([]) - full).norm() / full.norm())
    assert apart > 1e-3  # else nothing of what came before is in keys and values, and nothing shown


CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 50},  # else the answer sees nothing of what was moved
    "gemma2": {"sliding_window": 50},
    "gemma3_text": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
}


def test_nothing_computed_again_in_the_same_place_is_the_exact_cache(
    llama: tuple[Model, tuple[Rotary, ...]],
) -> None:
    """Same tokens before, no way to move: what is filled in is what a full prefill leaves."""
    model, angles = llama
    prompt, stored = [*A, *B, 7], [*A, *B, 5]
    same = Found(10, 0, (Moved(10, 60, 0, 10),))
    blend = Blend(model, angles, [stored], prompt, same, num_answer=4)
    torch.testing.assert_close(blend.blended([]), blend.logits, rtol=1e-4, atol=1e-4)
    assert float(blend.deviation.max()) < 1e-8


def test_a_moved_run_that_sees_nothing_else_is_exact() -> None:
    """One layer: keys and values are the tokens' own, and turning them is all that it takes."""
    model, angles = made(num_hidden_layers=1)
    prompt = [5, 6, 7, *A, *B, 8]
    found = find(prompt, [[*A, 3], [4, *B]], least=31)
    assert [run.delta for run in found.moved] == [3, 42]
    blend = Blend(model, angles, [[*A, 3], [4, *B]], prompt, found, num_answer=4)
    torch.testing.assert_close(blend.blended([]), blend.logits, rtol=1e-3, atol=1e-3)


def test_more_computed_again_is_nearer(llama: tuple[Model, tuple[Rotary, ...]]) -> None:
    model, angles = llama
    prompt = [1, *B, *A, *C, 7]
    stored = [[*A, *B, *C]]
    found = find(prompt, stored, least=31)
    blend = Blend(model, angles, stored, prompt, found, num_answer=6)
    want = blend.logits.double().log_softmax(-1)

    def apart(policy: Policy) -> float:
        logits = blend.blended(policy.again(found, blend.deviation))
        return float(certificate.divergence(want, logits.double().log_softmax(-1))[0].mean())

    shares = [apart(Policy("none")), apart(Policy("deviation", 0.9)), apart(Policy("all"))]
    assert shares == sorted(shares, reverse=True)


def test_learnt_positions_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'gpt2' has no rotary embedding"):
        made("gpt2")


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_other_angles_are_refused_by_name(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 128}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(Unsupported, match=f"rope_type '{kind}' cannot be moved"):
        made(rope_parameters=rope)


def test_a_model_that_turns_keys_in_another_way_than_it_says_is_refused() -> None:
    """Some of its layers turn none."""
    with pytest.raises(Unsupported, match="'smollm3' turns its keys in another way"):
        made("smollm3", num_key_value_heads=2, no_rope_layers=[1, 0, 1])


def test_divergence_is_in_nats() -> None:
    want = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    got = torch.tensor([[0.25, 0.75], [0.25, 0.75]], dtype=torch.float64).log()
    kl, same = certificate.divergence(want, got)
    torch.testing.assert_close(kl, torch.tensor([0.1438410362258904, 0.0], dtype=torch.float64))
    assert same.tolist() == [False, True]


def test_our_texts_have_every_kind_and_much_to_move() -> None:
    ours = texts.load()
    kinds = [text.kind for text in ours.all]
    assert set(kinds) == {
        "edited history",
        "documents in another order",
        "moved tools",
        "order matters",
    }
    assert min(map(kinds.count, kinds)) >= 3
    assert not [
        text for text in ours.all if "{" in str(text.asked.messages) and "}" not in str(text)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "at least one"),
        ('{"texts": [{"kind": "a"}]}', 'text 0 is .*without "kind"'),
        ('{"texts": [{"kind": "a", "stored": [], "asked": {}}]}', "no list of requests"),
        ('{"texts": [{"kind": "a", "stored": [{}], "asked": {}}]}', "text 0: "),
    ],
)
def test_texts_that_are_none_are_refused_with_the_place(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "texts.json"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=message):
        texts.load(file)


def words(ids: list[int]) -> str:
    return " ".join(f"w{one}" for one in ids)


def some_texts(path: Path, *, moved: bool = True) -> Path:
    asked = "{c} {a} {b}" if moved else "w2 w3"
    body = {
        "parts": {"a": words(A), "b": words(B), "c": words(C)},
        "texts": [
            {
                "kind": kind,
                "name": "turned",
                "stored": [{"messages": [{"role": "user", "content": "{a} {b} {c}"}]}],
                "asked": {"messages": [{"role": "user", "content": asked}]},
            }
            for kind in ("one", "other")
        ],
    }
    path.write_text(json.dumps(body))
    return path


def test_a_certificate_says_what_reaches_the_threshold(
    tmp_path: Path, llama: tuple[Model, tuple[Rotary, ...]]
) -> None:
    save(tmp_path / "model")
    model, angles = certificate.load(str(tmp_path / "model"))
    chosen = texts.load(some_texts(tmp_path / "texts.json"))
    steps: list[str] = []
    strict = certificate.certify(
        model, angles, chosen, num_answer=5, on_step=lambda text, policy: steps.append(text.kind)
    )
    assert steps.count("one") == steps.count("other") == len(POLICIES)
    by_name = {one["policy"]: one for one in strict["policies"]}
    assert by_name["all"]["reaches"]
    assert by_name["all"]["kl_max"] <= 1e-6
    assert by_name["all"]["same_answers"] == by_name["all"]["num_answers"] == 2
    assert by_name["none"]["kl_mean"] > 0.01
    assert by_name["none"]["kl_mean"] <= by_name["none"]["kl_p95"] <= by_name["none"]["kl_max"]
    assert by_name["none"]["kinds"]["one"]["kl_mean"] == pytest.approx(by_name["none"]["kl_mean"])
    assert "none" not in strict["reached_by"]
    assert "all" not in strict["reached_by"]
    lax = certificate.certify(model, angles, chosen, threshold=100.0, num_answer=5)
    assert lax["reached_by"][0] == "none"
    assert strict["model"] == lax["model"] == model.name
    assert any("KL of at most 100" in line for line in certificate.lines_of(lax))
    assert json.loads(certificate.keep(strict, tmp_path / "c.json").read_text()) == strict


def test_a_policy_counts_where_it_spares_work_with_every_kind_of_text() -> None:
    def row(name: str, *shares: float, reaches: bool = True) -> dict[str, Any]:
        kinds = {str(at): {"again_share": share} for at, share in enumerate(shares)}
        return {"policy": name, "reaches": reaches, "kinds": kinds}

    rows = [row("first 64", 0.1, 1.0), row("b", 0.7, 0.2), row("c", 0.3, 0.6), row("all", 1, 1)]
    assert certificate.reached_by([*rows, row("none", 0, 0, reaches=False)]) == ["c", "b"]


def test_texts_in_which_nothing_moves_are_refused(
    tmp_path: Path, llama: tuple[Model, tuple[Rotary, ...]]
) -> None:
    save(tmp_path / "model")
    model, angles = certificate.load(str(tmp_path / "model"))
    chosen = texts.load(some_texts(tmp_path / "texts.json", moved=False))
    with pytest.raises(InvalidRequest, match=r"'turned' \(one\) has no run of 31 tokens"):
        certificate.certify(model, angles, chosen)


COMMAND = (
    "import sys; from prefixcache.cli import plugins, main; from importlib.metadata import "
    "EntryPoint as E; plugins.OWN['verify-segments'] = E('verify-segments', "
    "'prefixcache_worker.segments.command:verify_segments', plugins.GROUP); main.main()"
)


def command(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", COMMAND, "verify-segments", str(tmp_path / "model"), *words]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_command_writes_a_certificate_and_says_by_its_exit_code_what_is_in_it(
    tmp_path: Path,
) -> None:
    save(tmp_path / "model")
    given = ["--texts", str(some_texts(tmp_path / "texts.json")), "--tokens", "4"]
    running = command(tmp_path, *given, "--threshold", "0", "--json")
    told, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 1, said
    found = json.loads(told)
    (kept,) = (tmp_path / "prefixcache" / "segments").iterdir()
    assert json.loads(kept.read_text()) == found
    assert found["model"].startswith("model@")
    assert "computing other: turned" in said
    running = command(tmp_path, *given, "--threshold", "100")
    told, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    assert "with every kind of text: none" in told
    running = command(tmp_path, "--texts", str(tmp_path / "nothing"))
    assert running.communicate(timeout=PATIENCE_S)[1].startswith("prefixcache: cannot read")
    assert running.returncode == 2


@pytest.mark.slow
def test_ctrl_c_ends_it_in_order_and_nothing_is_written(tmp_path: Path) -> None:
    save(tmp_path / "model")
    file = some_texts(tmp_path / "texts.json")
    body = json.loads(file.read_text())
    body["texts"] *= 500
    file.write_text(json.dumps(body))
    running = command(tmp_path, "--texts", str(file))
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("computing one"):
            break
    running.send_signal(signal.SIGINT)
    told, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert not told
    assert "Traceback" not in said
    assert not (tmp_path / "prefixcache" / "segments").exists()
