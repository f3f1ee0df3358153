"""Every bit of an answer is its own: alone or in a batch, cold or from the cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from prefixcache.errors import Unsupported
from prefixcache_bench.speed.invariant import Texts
from prefixcache_kernels import Plan, paged_attention
from prefixcache_kernels.cpu.library import library
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Request, Token
from worker.zoo import build, random_tokens

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def model(architecture: str, dtype: str) -> Model:
    return Model.of(build(architecture).to(getattr(torch, dtype)), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_random_batches_give_the_bits_of_each_alone(architecture: str, dtype: str) -> None:
    made = model(architecture, dtype).made_invariant()
    # Longer than the 1,024 keys after which keys are cut.
    compared, wrong = Texts(made, random.Random(1), 8, 1200, 16).play(100)
    assert compared > 50
    assert wrong == 0


def test_without_it_bits_depend_on_company() -> None:
    """So the test above can fail."""
    compared, wrong = Texts(model("llama", "float32"), random.Random(1), 8, 1200, 16).play(100)
    assert 0 < wrong <= compared


def test_threads_change_no_bit() -> None:
    made = model("llama", "bfloat16").made_invariant()
    texts = Texts(made, random.Random(2), 4, 300, 8)
    torch.set_num_threads(2)
    try:
        assert texts.play(20)[1] == 0
    finally:
        torch.set_num_threads(1)


def test_an_answer_has_its_bits_beside_others() -> None:
    made = model("llama", "bfloat16").made_invariant()
    asked = Request("mine", random_tokens(40), 12, log_logits=True)
    others = [Request(str(i), random_tokens(20 + 9 * i, seed=i), 9 + i) for i in range(5)]
    told: list[list[Any]] = []
    for company in ([], others):
        engine = Engine(made, None, None, chunk=64)
        for request in (*company[:2], asked, *company[2:]):
            engine.submit(request)
        told.append([e.top for e in engine.run() if isinstance(e, Token) and e.id == "mine"])
    assert len(told[0]) == 12
    assert told[0] == told[1]


def test_its_prefixes_are_others() -> None:
    plain = model("llama", "float32")
    assert plain.made_invariant().name == f"{plain.name}+invariant"
    assert not plain.invariant


@pytest.mark.parametrize("options", [{"native": False}, {"lean": False}])
def test_other_networks_are_refused(options: dict[str, bool]) -> None:
    with pytest.raises(Unsupported, match="only the network in C"):
        Model.of(build("llama"), **options).made_invariant()


def test_pytorch_is_not_asked_for_fixed_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache_kernels.cpu.attend.library", lambda: None)
    step = (torch.tensor([[0]]), torch.tensor([0, 1]), torch.tensor([3]))
    plan = Plan.build(*step, 4, fixed=True)
    cache = torch.zeros(1, 4, 1, 8)
    with pytest.raises(Unsupported, match="without the C library"):
        paged_attention(torch.zeros(1, 1, 8), cache, cache.clone(), *step, scale=1.0, plan=plan)
