"""Beam search through forks: token for token what transformers finds, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcache
from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Finished, Request, Started, to_json
from prefixcache_worker.request_line import read_request
from prefixcache_worker.sampling import Sampling
from worker.zoo import Service, answers, build, engine_at, finished, random_tokens

PROMPTS = [random_tokens(n, seed=n) for n in (21, 32, 50)]
NEW = 20
STOPS = (3, 40, 77)
Search = tuple[int, float, "bool | str", tuple[int, ...]]
SEARCHES: dict[str, Search] = {
    "two": (2, 1.0, False, STOPS[:1]),
    "four": (4, 1.0, False, STOPS),
    "early": (4, 1.0, True, STOPS),
    "never": (4, 1.0, "never", STOPS),
    "long": (3, 2.5, "never", STOPS),
    "short": (5, -1.0, False, STOPS),
    "endless": (4, 0.0, False, ()),
    "one": (1, 1.0, False, STOPS),
}


def oracle(network: Any, prompt: list[int], search: Search) -> list[tuple[list[int], float]]:
    """Beam search in a few lines, in float64, the whole text computed at each step."""
    width, penalty, early, stops = search
    texts: list[tuple[list[int], float]] = [([], 0.0)]
    best: list[tuple[list[int], float]] = []
    for length in range(1, NEW + 1):
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + text for text, _ in texts])).logits[:, -1]
        shares = logits.double().log_softmax(-1).tolist()
        every = sorted(
            (
                ([*text, token], total + share)
                for (text, total), row in zip(texts, shares, strict=True)
                for token, share in enumerate(row)
            ),
            key=lambda one: -one[1],
        )
        ended = [one for one in every[:width] if one[0][-1] in stops or length == NEW]
        best += [(text, total / length**penalty) for text, total in ended]
        best = sorted(best, key=lambda one: -one[1])[:width]
        texts = [one for one in every if one[0][-1] not in stops][:width]
        hoped = NEW if early == "never" and penalty > 0 else length
        if len(best) == width and (early is True or texts[0][1] / hoped**penalty <= best[-1][1]):
            break
    return best


@pytest.fixture(scope="module")
def network() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def want(network: Any) -> dict[str, list[list[tuple[list[int], float]]]]:
    return {
        kind: [oracle(network, prompt, search) for prompt in PROMPTS]
        for kind, search in SEARCHES.items()
    }


def request(kind: str, number: int, **more: Any) -> Request:
    width, penalty, early, stops = SEARCHES[kind]
    how = BeamSearch(width, penalty, early)  # type: ignore[arg-type]
    name = f"{kind}.{number}"
    return Request(name, PROMPTS[number], NEW, stop_ids=stops, beams=how, n=width, **more)


def check(done: Finished, want: list[tuple[list[int], float]], stops: tuple[int, ...]) -> None:
    assert done.beams is not None
    assert [list(beam.tokens) for beam in done.beams] == [text for text, _ in want]
    assert [beam.score for beam in done.beams] == pytest.approx([s for _, s in want], rel=1e-5)
    reasons = ["stop" if text[-1] in stops else "length" for text, _ in want]
    assert [beam.reason for beam in done.beams] == reasons
    assert (done.tokens, done.reason) == (done.beams[0].tokens, done.beams[0].reason)


@pytest.mark.parametrize("kind", SEARCHES)
def test_it_is_what_transformers_finds(network: Any, want: Any, kind: str) -> None:
    """The oracle of these tests, held to the library's own search."""
    width, penalty, early, stops = SEARCHES[kind]
    ids = torch.tensor([PROMPTS[1]])
    found = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=early,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        max_new_tokens=NEW,
        do_sample=False,
    )
    ours = [text for text, _ in want[kind][1]]
    theirs = found[:, len(PROMPTS[1]) :].tolist()
    assert [text[: len(own)] for text, own in zip(theirs, ours, strict=True)] == ours


@pytest.mark.parametrize("shared", [False, True])
def test_searches_side_by_side_find_what_each_finds_alone(
    tiny: Model, want: Any, shared: bool, service: Service, client: Client
) -> None:
    engine = engine_at(client, tiny, max_batch=16) if shared else Engine(tiny, None, None)
    plain = Request("plain", PROMPTS[0], NEW, stop_ids=())
    asked = [request(kind, number) for kind in SEARCHES for number in range(len(PROMPTS))]
    done = answers(engine, plain, *asked)
    alone = answers(Engine(tiny, None, None), plain)
    assert done["plain"].tokens == alone["plain"].tokens
    for kind, search in SEARCHES.items():
        for number in range(len(PROMPTS)):
            check(done[f"{kind}.{number}"], want[kind][number], search[3])
    if not shared:
        private = engine.membership.private
        assert private is not None
        assert private.num_free == private.num_blocks
        assert not private._others
    engine.close()
    left = client.snapshot()
    assert (left.private, left.leases, left.quarantined) == (0, (), 0)


def steps_of(engine: Engine, *asked: Request) -> Iterator[Any]:
    for one in asked:
        engine.submit(one)
    while not engine.idle:
        yield engine.step()
        if engine.stalled and not engine.idle:
            engine.wait(1.0)


def test_a_step_takes_two_messages_and_the_trunk_is_computed_once(
    tiny: Model, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_at(client, tiny)
    shared = engine.membership.shared
    assert shared is not None
    sent: list[int] = []
    send = shared.session.send
    monkeypatch.setattr(
        shared.session, "send", lambda step: (sent.append(len(step.replies)), send(step))[1]
    )
    counts = []
    for _ in steps_of(engine, request("endless", 2)):
        counts.append(len(sent))
        sent.clear()
    assert max(counts[1:]) <= 2  # the first one leases
    # The prompt once, and each text that goes on a token a step.
    assert engine.num_computed == len(PROMPTS[2]) + 4 * (NEW - 1)
    again = answers(engine, request("endless", 2))["endless.2"]
    assert again.num_computed == 1 + 4 * (NEW - 1)
    engine.close()
    assert client.snapshot().leases == ()


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_search_that_is_cancelled_leaves_nothing(tiny: Model, client: Client, at: int) -> None:
    engine = engine_at(client, tiny)
    events = []
    for number, told in enumerate(steps_of(engine, request("four", 0), request("early", 1))):
        events += told
        if number == at:
            engine.cancel("four.0")
    done = finished(events)
    assert done["four.0"].reason == "cancelled"
    assert done["early.1"].reason == "stop"
    assert sum(isinstance(event, Finished) for event in events) == 2
    assert client.snapshot().leases == ()
    engine.close()
    left = client.snapshot()
    assert (left.private, left.quarantined) == (0, 0)


def test_a_search_whose_session_is_lost_begins_anew(tiny: Model, client: Client, want: Any) -> None:
    engine = engine_at(client, tiny)
    events = []
    for number, told in enumerate(steps_of(engine, request("four", 0))):
        events += told
        if number == 6:
            client.close()
    done = finished(events)["four.0"]
    assert done.num_restarts == 1
    assert sum(isinstance(event, Started) for event in events) == 1
    check(done, want["four"][0], STOPS)
    engine.close()


def test_searches_that_do_not_fit_give_way_to_one_another(
    tiny: Model, want: Any, folder: Path
) -> None:
    """Four blocks more than the widest of them needs: whoever finds none begins anew, later."""
    service = Service(folder, "72KiB", "--block-size", "4")
    service.start()
    try:
        with prefixcache.connect(service.target) as client:
            engine = engine_at(client, tiny)
            asked = [request("four", number) for number in range(3)]
            done = answers(engine, *asked)
            for number in range(3):
                check(done[f"four.{number}"], want["four"][number], STOPS)
            engine.close()
            left = client.snapshot()
            assert (left.private, left.leases) == (0, ())
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"sampling": Sampling(0.5)}, "sampling"),
        ({"sampling": Sampling(min_tokens=1)}, "sampling"),
        ({"stop_strings": ("x",)}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"log_logits": True}, "log_logits"),
        ({"generated": (5,), "n": 1}, "generated"),
        ({"n": 5}, "n is 5, and beams 4"),
    ],
)
def test_what_does_not_go_with_beams_is_refused_by_name(more: dict[str, Any], name: str) -> None:
    told = {"beams": BeamSearch(4)} | more
    with pytest.raises(InvalidRequest, match=name):
        Request("a", [5], NEW, **told)
    for wrong in ({"width": 0}, {"width": 65}, {"length_penalty": 11.0}, {"early_stopping": "no"}):
        with pytest.raises(InvalidRequest):
            BeamSearch(**({"width": 2} | wrong))  # type: ignore[arg-type]


def test_more_beams_than_a_worker_computes_at_a_time_are_refused(tiny: Model) -> None:
    engine = Engine(tiny, None, None, max_batch=3)
    with pytest.raises(InvalidRequest, match="beams is 4; this worker computes 3"):
        engine.submit(request("four", 0))
    assert engine.idle


def test_a_line_asks_for_beams_and_one_event_tells_them(tiny: Model) -> None:
    line = {"tokens": [5, 6], "beams": 4, "n": 2, "length_penalty": 0.5, "early_stopping": "never"}
    asked = read_request(line, tiny)
    assert (asked.beams, asked.n) == (BeamSearch(4, 0.5, "never"), 2)
    done = answers(Engine(tiny, None, None), request("two", 0))["two.0"]
    told = to_json(done)
    assert [list(one["tokens"]) for one in told["beams"]] == [
        list(beam.tokens) for beam in done.beams or ()
    ]
    assert set(told["beams"][0]) == {"tokens", "text", "reason", "score"}
    for wrong, why in (
        ({"beams": 65}, "beams is 65; it takes one from 1 to 64"),
        ({"beams": 2, "n": 3}, "n is 3, and beams 2"),
        ({"beams": 2, "early_stopping": 1}, "early_stopping is 1; it takes true or false"),
        ({"beams": 2, "length_penalty": 11}, "length_penalty is 11"),
        ({"beams": 2, "temperature": 1.0}, "sampling does not go with beams"),
        ({"length_penalty": 1}, "length_penalty goes with beams"),
        ({"early_stopping": True}, "early_stopping goes with beams"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            read_request({"tokens": [5, 6], **wrong}, tiny)
