"""Prompts with segments in them: what is computed is what the certificate measured."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcache
from certificate_file import certificate
from prefixcache.client import Client
from prefixcache.errors import Unsupported
from prefixcache.types import Again, Copy, Ledger, Segment
from prefixcache_kernels import SharedPool
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.model import Model
from prefixcache_worker.request import Failed, Finished, Request, Started
from prefixcache_worker.segments.blend import BLOCK_SIZE, Blend, angles_of
from prefixcache_worker.segments.moved import Found, Moved, Policy
from prefixcache_worker.segments.splice import Splice, Splicer
from worker.zoo import Service, answers, build, engine_at, random_tokens, save

S, T = random_tokens(64, seed=1), random_tokens(48, seed=2)
PROMPT = [*S[:16], 5, 6, 7, *T[16:48], 8, *S[32:64], 3, 4]
"""A block that is exact, two of T and two of S at other places, and what is new between them."""
FOUND = Found(16, 0, (Moved(19, 32, 1, 16), Moved(52, 32, 0, 32)))


@dataclass
class Claimed:
    """What a service would grant."""

    block_table: array[int]
    segments: tuple[Segment, ...]
    num_cached: int = 16
    copies: tuple[Copy, ...] = ()
    approximate: bool = True
    deadline: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)


def filled(model: Model) -> SharedPool:
    """A pool with S in its blocks 0 to 3 and T in 4 to 6."""
    pool = SharedPool.private(model.layout, 16, BLOCK_SIZE)
    for tokens, table in ((S, range(4)), (T, range(4, 7))):
        model.forward(Batch.pack([Piece(tokens, 0, table)], BLOCK_SIZE), pool)
    return pool


def spliced(model: Model, angles: Any, again: Again, chunk: int) -> tuple[torch.Tensor, int]:
    """Put the prompt together; give its logits, and how many tokens were computed for it."""
    pool = filled(model)
    claim = Claimed(
        array("i", range(7, 13)),
        (
            Segment(0, 0, array("i", [0])),
            Segment(19, 16, array("i", [5, 6]), again.first),
            Segment(52, 32, array("i", [2, 3]), again.first),
        ),
    )
    splicer = Splicer(model, angles, again)
    splicer.place(pool, claim)
    splice = Splice(splicer, pool, claim, PROMPT)
    count = 0
    while not splice.is_over:
        before = splice.num_valid
        count += splice.step(chunk)
        assert splice.is_finite
        assert before <= splice.num_valid <= splice.end == 84
    rest = Piece(PROMPT[splice.num_valid :], splice.num_valid, claim.block_table)
    logits = model.forward(Batch.pack([rest], BLOCK_SIZE), pool)
    stored = filled(model)
    assert torch.equal(pool.blocks[:, :, :7], stored.blocks[:, :, :7]), "a donor has changed"
    return logits, count + len(rest.tokens)


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize(
    ("again", "policy"),
    [
        (Again(), Policy("none")),
        (Again(first=5), Policy("first", 5)),
        (Again(share=0.5), Policy("deviation", 0.5)),
        (Again(share=1.0), Policy("deviation", 1.0)),
    ],
)
def test_a_spliced_prompt_is_the_one_that_the_certificate_measured(
    again: Again, policy: Policy, chunk: int
) -> None:
    module = build("llama")
    model = Model.of(module, name="llama")
    angles = angles_of(module.config, model)
    blend = Blend(model, angles, [S, T], PROMPT, FOUND, num_answer=1)
    computed_again = policy.again(FOUND, blend.deviation)
    want = blend.blended(computed_again)
    logits, count = spliced(model, angles, again, chunk)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert count == len(PROMPT) - 16 - 64 + len(computed_again)
    if again.share == 1.0:
        torch.testing.assert_close(logits, blend.logits, rtol=1e-3, atol=1e-3)


def test_a_lean_network_looks_at_a_layer_too() -> None:
    module = build("llama")
    model = Model.of(module, name="llama", native=False)
    assert model.kind == "lean"
    angles = angles_of(module.config, model)
    blend = Blend(model, angles, [S, T], PROMPT, FOUND, num_answer=1)
    want = blend.blended(Policy("deviation", 0.5).again(FOUND, blend.deviation))
    logits, _ = spliced(model, angles, Again(share=0.5), 256)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_a_network_that_has_no_end_in_between_is_refused_by_name() -> None:
    module = build("llama")
    model = Model.of(module, name="llama", lean=False)
    angles = angles_of(module.config, model)
    with pytest.raises(Unsupported, match="runs on 'transformers', which computes all layers"):
        Splicer(model, angles, Again(share=0.5))
    spliced(model, angles, Again(first=5), 256)


# ------------------------------------------------------------------------- in the engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m") / "model"
    save(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> Model:
    return Model.load(saved)


MEASURED = {"deviation 100%": ((0.0, 0.5), (0.0, 0.9)), "first 5": ((0.004, 0.1), (0.9, 0.2))}


@pytest.fixture
def client(folder: Path, model: Model) -> Iterator[Client]:
    file = folder / "certificate.json"
    file.write_text(json.dumps(certificate(model.name, measured=MEASURED)))
    service = Service(folder, "4MiB", "--segments", str(file))
    service.start()
    with prefixcache.connect(service.target) as client:
        yield client
    service.stop()


STORED = [*S[:16], *random_tokens(80, seed=3), 1]
ASKED = [*S[:16], 9, *STORED[20:90], 2, 3]


def test_a_request_with_segments_says_so_and_computes_what_the_certificate_asks_for(
    client: Client, model: Model
) -> None:
    """All of it is computed again by this one: so the answer is that of a full prefill."""
    engine = engine_at(client, model, chunk=16)
    engine.prepare_segments()
    answers(engine, Request("stored", STORED, 4))
    engine.submit(Request("moved", ASKED, 4, segments=True))
    told = list(engine.run())
    (begun,) = [event for event in told if isinstance(event, Started)]
    (done,) = [event for event in told if isinstance(event, Finished)]
    assert begun.approximate
    assert done.approximate
    assert begun.num_cached == 16
    assert begun.ledger.hit == 16
    engine.close()
    alone = answers(engine_at(client, model), Request("exact", ASKED, 4))["exact"]
    assert alone.approximate is None
    assert alone.num_computed == len(ASKED) - 16 + 3, "it found what is approximate"
    assert done.tokens == alone.tokens


def test_what_others_find_stays_exact_while_segments_are_moved(
    client: Client, model: Model
) -> None:
    """Exact requests answer, to the last bit, what they answer in a cache of their own."""
    plain = [Request(f"plain{i}", [*ASKED[:30], i, *STORED], 6, log_logits=True) for i in range(4)]
    engine = engine_at(client, model, chunk=16)
    answers(engine, Request("stored", STORED, 1))
    mixed = [
        request
        for i, one in enumerate(plain)
        for request in (Request(f"moved{i}", [i, *ASKED], 6, segments=True), one)
    ]
    done = answers(engine, *mixed)
    assert all(done[f"moved{i}"].approximate for i in range(4))
    again = answers(engine, *[Request(f"again{i}", one.tokens, 6) for i, one in enumerate(plain)])
    own = answers(engine_at_nowhere(model), *plain)
    for i in range(4):
        tokens = own[f"plain{i}"].tokens
        assert done[f"plain{i}"].tokens == again[f"again{i}"].tokens == tokens
        assert done[f"plain{i}"].approximate is None
    left = client.snapshot()
    assert left.ledger.approximate == 0  # all of it is computed again
    engine.close()


def engine_at_nowhere(model: Model) -> Any:
    from prefixcache_worker.engine import Engine

    return Engine(model, None, None, chunk=16)


def test_the_next_turn_goes_on_from_what_was_put_together(client: Client, model: Model) -> None:
    engine = engine_at(client, model)
    answers(engine, Request("stored", STORED, 1))
    first = answers(engine, Request("first", ASKED, 8, segments=True))["first"]
    turn = [*ASKED, *first.tokens, 7, 7]
    second = answers(engine, Request("second", turn, 4, segments=True))["second"]
    assert second.approximate
    assert second.num_computed < 8
    engine.close()


def test_answers_of_one_prompt_share_what_was_put_together(client: Client, model: Model) -> None:
    engine = engine_at(client, model)
    answers(engine, Request("stored", STORED, 1))
    engine.submit(Request("several", ASKED, 3, segments=True, n=3))
    told = [event for event in engine.run() if isinstance(event, Finished)]
    assert [event.approximate for event in told] == [True] * 3
    assert len({event.tokens for event in told}) == 1
    engine.close()


def test_without_a_service_it_is_served_exactly(model: Model) -> None:
    done = answers(engine_at_nowhere(model), Request("alone", ASKED, 3, segments=True))
    assert done["alone"].approximate is None


def test_segments_that_no_certificate_allows_fail_by_name(folder: Path, model: Model) -> None:
    service = Service(folder)
    service.start()
    with prefixcache.connect(service.target) as client:
        engine = engine_at(client, model)
        engine.prepare_segments()
        engine.submit(Request("refused", ASKED, 3, segments=True))
        (failed,) = [event for event in engine.run() if isinstance(event, Failed)]
        assert failed.error == "Unsupported"
        assert model.name in failed.message
        assert "no certificate there allows them" in failed.message
        assert answers(engine, Request("plain", ASKED, 3))["plain"].approximate is None
        engine.close()
    service.stop()


def test_a_model_whose_keys_cannot_be_moved_fails_by_name(
    folder: Path, client: Client, model: Model
) -> None:
    """Of one that was not loaded from anywhere, nothing says how its keys are turned."""
    bare = Model.of(build("llama"), name=model.name)
    engine = engine_at(client, bare)
    engine.prepare_segments()
    engine.submit(Request("refused", ASKED, 3, segments=True))
    (failed,) = [event for event in engine.run() if isinstance(event, Failed)]
    assert (failed.error, "nothing says how its keys are turned" in failed.message) == (
        "Unsupported",
        True,
    )
    engine.close()
