"""How likely a prompt is: by transformers' own logits, computed whole, on nobody else's blocks."""

from __future__ import annotations

import pytest
import torch

from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache.types import pack
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Event, Finished, Request, Scored, Started, to_json
from prefixcache_worker.request_line import read_request
from prefixcache_worker.sampling import Logprobs
from worker.zoo import Service, answers, build, engine_at, random_tokens

PROMPT = random_tokens(70)
NEW = 5


@pytest.fixture(scope="module")
def want() -> torch.Tensor:
    """Log-probabilities after each token of the prompt, in float64."""
    with torch.inference_mode():
        logits = build("llama")(torch.tensor([PROMPT])).logits[0]
    return logits.double().log_softmax(-1)


def scores(events: list[Event], name: str) -> list[Logprobs]:
    """All that was told of a prompt; nothing twice, nothing left out."""
    told: list[Logprobs] = []
    for event in events:
        if isinstance(event, Scored) and event.id == name:
            assert event.start == len(told) + 1
            told += event.logprobs
    return told


def check(told: list[Logprobs], want: torch.Tensor, num_top: int) -> None:
    assert [one.logprob for one in told] == pytest.approx(
        [float(want[at, token]) for at, token in enumerate(PROMPT[1:])], abs=2e-5
    )
    for at, one in enumerate(told):
        best = want[at].topk(num_top)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=2e-5)


@pytest.mark.parametrize("chunk", [4, 7, 256])
def test_a_prompt_s_tokens_are_as_likely_as_transformers_says(
    tiny: Model, want: torch.Tensor, chunk: int
) -> None:
    engine = Engine(tiny, None, None, chunk=chunk, max_batch=3, drafts=2)
    plain = answers(engine, Request("plain", PROMPT, NEW))["plain"]
    engine.submit(Request("a", PROMPT, NEW, prompt_logprobs=3, logprobs=0))
    engine.submit(Request("none", PROMPT, 0, prompt_logprobs=0))
    engine.submit(Request("beside", PROMPT, NEW))
    engine.submit(Request("short", PROMPT[:1], 0, prompt_logprobs=0))
    events = list(engine.run())
    check(scores(events, "a"), want, 3)
    check(scores(events, "none"), want, 0)
    assert scores(events, "short") == []
    done = {event.id: event for event in events if isinstance(event, Finished)}
    assert done["a"].tokens == done["beside"].tokens == plain.tokens
    assert (done["none"].tokens, done["none"].reason) == ((), "length")
    assert done["none"].num_computed == len(PROMPT)


def test_all_of_it_is_computed_on_blocks_of_its_own(
    tiny: Model, want: torch.Tensor, client: Client
) -> None:
    engine = engine_at(client, tiny)
    answers(engine, Request("stored", PROMPT, NEW))
    shared = engine.membership.shared
    assert shared is not None
    with shared.session.acquire(pack(PROMPT)) as lease:
        stored = torch.tensor(lease.block_table[: len(PROMPT) // shared.pool.block_size])
    before = shared.pool.blocks[:, :, stored].clone()
    for number, name in enumerate(("first", "again")):
        engine.submit(Request(name, PROMPT, 0, prompt_logprobs=1))
        events = list(engine.run())
        check(scores(events, name), want, 1)
        [begun] = [event for event in events if isinstance(event, Started)]
        assert begun.num_cached == begun.ledger.hit == begun.ledger.partial == 0
        assert begun.ledger.granularity == len(PROMPT), number  # it was there, and is not used
    assert torch.equal(shared.pool.blocks[:, :, stored], before)
    assert answers(engine, Request("later", PROMPT, 1))["later"].num_computed == 1
    engine.close()
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())


def test_what_was_told_is_not_told_again_when_the_service_is_lost(
    tiny: Model, want: torch.Tensor, client: Client, service: Service
) -> None:
    engine = engine_at(client, tiny, chunk=16)
    engine.submit(Request("a", PROMPT, NEW, prompt_logprobs=0))
    events = engine.step()
    while not any(isinstance(event, Scored) for event in events):
        engine.wait(1.0)
        events += engine.step()
    client.close()  # its session ends, the service lives: the blocks are not safe any more
    events += list(engine.run())
    check(scores(events, "a"), want, 0)
    [done] = [event for event in events if isinstance(event, Finished)]
    assert done.num_restarts == 1
    assert len(done.tokens) == NEW
    engine.close()


def test_a_line_asks_for_it_and_events_tell_it(tiny: Model) -> None:
    line = {"tokens": [5, 6], "max_new_tokens": 0, "prompt_logprobs": 2}
    assert read_request(line, tiny).prompt_logprobs == 2
    told = to_json(Scored("a", 1, (Logprobs(-0.5, ((7, -0.25), (5, -0.5))),)))
    assert told == {
        "event": "scored",
        "id": "a",
        "start": 1,
        "logprobs": [-0.5],
        "top_logprobs": [[[7, -0.25], [5, -0.5]]],
    }
    for wrong in ({"prompt_logprobs": 21}, {"prompt_logprobs": True}):
        with pytest.raises(InvalidRequest, match="prompt_logprobs is"):
            read_request({"tokens": [5, 6], **wrong}, tiny)
    with pytest.raises(InvalidRequest, match="max_new_tokens is 0; it takes one from 1"):
        read_request({"tokens": [5, 6], "max_new_tokens": 0}, tiny)
