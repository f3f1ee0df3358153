"""Drafts are looked up, and make an answer no other: only sooner."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefixcache
from prefixcache.client import Client
from prefixcache_worker.drafts import Drafts
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Event, Request, Token
from prefixcache_worker.sampling import Sampling
from worker.zoo import Service, answers, engine_at, finished, random_tokens

NEW = 60
KINDS = {
    "greedy": Sampling(),
    "cool": Sampling(0.3, seed=3),
    "drawn": Sampling(1.0, top_p=0.9, top_k=20, seed=4),
    "biased": Sampling(logit_bias=((7, 100.0),)),
    "penalised": Sampling(frequency_penalty=0.4),
}


def looked_up(tokens: list[int], most: int) -> list[int]:
    """Search from the end for the last three tokens."""
    if len(tokens) < 4:
        return []
    for at in range(len(tokens) - 1, 2, -1):
        if tokens[at - 3 : at] == tokens[-3:]:
            return (tokens[at:] * most)[:most]
    return []


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 9))
@settings(max_examples=300)
def test_a_draft_is_what_came_after_the_last_three_tokens(tokens: list[int], most: int) -> None:
    assert Drafts(tokens).propose(tokens, most) == looked_up(tokens, most)


def requests(**options: object) -> list[Request]:
    prompts = [random_tokens(30, seed=n) * 2 for n in range(len(KINDS))]
    return [
        Request(kind, prompt, NEW, how, stop_ids=(), **options)  # type: ignore[arg-type]
        for (kind, how), prompt in zip(KINDS.items(), prompts, strict=True)
    ]


def stepped(engine: Engine, *asked: Request) -> tuple[list[Event], int]:
    """Serve requests; what was told, and the steps that told a token."""
    for request in asked:
        engine.submit(request)
    events: list[Event] = []
    steps = 0
    while not engine.idle:
        told = engine.step()
        steps += any(isinstance(event, Token) for event in told)
        events += told
        if engine.stalled:
            engine.wait(0.1)
    return events, steps


@pytest.mark.parametrize("drafts", [1, 2, 7, 15])
@pytest.mark.parametrize("chunk", [8, 256])
def test_answers_with_drafts_are_those_without(
    tiny: Model, client: Client, drafts: int, chunk: int
) -> None:
    plain = Engine(tiny, None, None)
    want = {key: (one.tokens, one.reason) for key, one in answers(plain, *requests()).items()}
    engine = engine_at(client, tiny, chunk=chunk, max_batch=4, drafts=drafts)
    events, _ = stepped(engine, *requests())
    assert {k: (one.tokens, one.reason) for k, one in finished(events).items()} == want
    for key, (tokens, _) in want.items():
        told = [e.token for e in events if isinstance(e, Token) and e.id == key]
        assert tuple(told) == tokens
    # What is stored was computed from the right tokens: all of it is found, and goes on alike.
    again = [
        Request(key, [*request.tokens, *want[key][0], 5], 8, stop_ids=())
        for key, request in zip(want, requests(), strict=True)
    ]
    later = {key: one.tokens for key, one in answers(plain, *again).items()}
    other = engine_at(client, tiny)
    found = answers(other, *again)
    assert {key: one.tokens for key, one in found.items()} == later
    # But the last token of an answer had never run through the model.
    assert {one.num_computed for one in found.values()} == {2 + 7}
    engine.close()
    other.close()
    assert not client.snapshot().leases


def test_an_answer_that_repeats_itself_needs_fewer_steps(tiny: Model) -> None:
    request = requests()[3]  # says one token, again and again
    assert request.id == "biased"
    _, without = stepped(Engine(tiny, None, None), request)
    events, steps = stepped(Engine(tiny, None, None, drafts=7), request)
    assert without == NEW
    assert steps <= 3 + -(-NEW // 8) + 1
    # Drafts that were wrong count as computed, too; here there was none.
    assert finished(events)["biased"].num_computed <= 60 + NEW + 8


@pytest.mark.parametrize("at", range(1, 12))
def test_what_ends_an_answer_ends_it_within_a_draft(tiny: Model, at: int) -> None:
    [plain, drafting] = Engine(tiny, None, None), Engine(tiny, None, None, drafts=7)
    short = Request("short", requests()[3].tokens, at, KINDS["biased"], stop_ids=())
    for engine in (plain, drafting):
        done = answers(engine, short)["short"]
        assert (done.tokens, done.reason) == ((7,) * at, "length")
    whole = answers(plain, requests()[1])["cool"].tokens
    stop = whole[at]
    cut = whole[: whole.index(stop) + 1]
    ended = Request("end", requests()[1].tokens, NEW, KINDS["cool"], stop_ids=(stop,))
    done = answers(drafting, ended)["end"]
    assert (done.tokens, done.reason) == (cut, "stop")


def test_what_drafts_have_filled_is_there_for_who_takes_over(
    tiny: Model, service: Service, client: Client
) -> None:
    for count in (17, 30, 44):
        request = replace(requests()[3], tokens=random_tokens(37, seed=count))
        with prefixcache.connect(service.target) as own:
            engine = engine_at(own, tiny, drafts=4)
            engine.submit(request)
            told: list[int] = []
            while len(told) < count:
                told += [event.token for event in engine.step() if isinstance(event, Token)]
                engine.wait(0.001)
            assert engine.membership.shared is not None
            engine.membership.shared.session._call.cancel()  # as if it were killed
            other = engine_at(client, tiny)
            done = answers(other, replace(request, generated=told))["biased"]
            assert done.tokens == (7,) * NEW
            assert done.num_computed <= NEW - len(told) + 16
            other.close()
            engine.close()
