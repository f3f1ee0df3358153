from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace
from prefixcache_kernels import copy_blocks
from prefixcache_kernels.groups import FREE
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.device_batch import DeviceBatch
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.process import joiner
from prefixcache_worker.request import (
    Alone,
    Event,
    Failed,
    Finished,
    Joined,
    Request,
    Started,
    Token,
)
from prefixcache_worker.sampling import Sampling
from service.service_process import eventually
from worker.zoo import Service, answers, build, engine_at, finished, random_tokens

PREFIX = random_tokens(70)
PROMPTS = [PREFIX + random_tokens(n, seed=n) for n in (3, 9, 14, 30)]
NEW = 12


def requests(tag: str = "", **options: Any) -> list[Request]:
    return [Request(f"{tag}{i}", p, NEW, **options) for i, p in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    """What transformers itself generates."""
    module = build("llama")
    module.set_attn_implementation("eager")
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        full = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        out.append(full[0, len(prompt) :].tolist())
    return out


def played(engine: Engine, *requests: Request) -> list[Event]:
    """Submit requests, run until idle, give all that was told."""
    for request in requests:
        engine.submit(request)
    return list(engine.run())


def tokens(done: dict[str, Finished]) -> list[list[int]]:
    return [list(done[key].tokens) for key in sorted(done)]


@pytest.mark.parametrize("chunk", [4, 7, 256])
def test_alone_it_generates_what_transformers_generates(
    tiny: Model, want: list[list[int]], chunk: int
) -> None:
    engine = Engine(tiny, None, None, chunk=chunk, max_batch=3)
    done = answers(engine, *requests())
    assert tokens(done) == want
    assert [done[str(i)].num_computed for i in range(4)] == [len(p) + NEW - 1 for p in PROMPTS]
    assert engine.idle
    assert engine.membership.private is not None
    assert engine.membership.private.num_free == engine.membership.private.num_blocks


@pytest.mark.parametrize("chunk", [16, 256])
def test_shared_prefixes_are_computed_once_and_change_no_answer(
    tiny: Model, want: list[list[int]], client: Client, chunk: int
) -> None:
    engine = engine_at(client, tiny, chunk=chunk)
    done = answers(engine, *requests())
    assert tokens(done) == want
    ideal = len(PREFIX) + sum(len(p) - len(PREFIX) for p in PROMPTS) + 4 * (NEW - 1)
    assert sum(d.num_computed for d in done.values()) == engine.num_computed == ideal
    again = answers(engine, *requests("again"))
    assert tokens(again) == want
    # Of a prompt that is stored in full, one token is computed, for its logits.
    assert {d.num_computed for d in again.values()} == {NEW}
    engine.close()
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())


def test_decoding_reads_a_shared_prefix_once_and_changes_no_answer(
    tiny: Model, want: list[list[int]], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_at(client, tiny)
    plain = answers(engine, *requests("plain"))
    assert {d.kv_read_bytes / d.kv_alone_bytes for d in plain.values()} == {1.0}  # too few to pay
    monkeypatch.setattr(Model, "sharing_cost", lambda model, block_size: FREE)
    engine = engine_at(client, tiny)
    done = answers(engine, *requests("grouped"))
    assert tokens(plain) == tokens(done) == want
    token = tiny.layout.token_bytes
    for i, prompt in enumerate(PROMPTS):
        # All are stored: each decodes its last token and all but the last of its answer.
        keys = sum(range(len(prompt), len(prompt) + NEW))
        assert done[f"grouped{i}"].kv_alone_bytes == keys * token
    # Of 4 x 70 shared tokens, 64 are whole blocks, and a step of four reads them once.
    saved = sum(d.kv_alone_bytes - d.kv_read_bytes for d in done.values())
    assert saved >= 3 * 64 * (NEW - 3) * token


def test_samples_of_one_prompt_share_it_by_their_tables(tiny: Model, client: Client) -> None:
    """Parallel sampling: children of a fork name the parent's blocks, and the plan finds them."""
    session, pool = joiner(client, tiny, "")()
    prompt = random_tokens(60)
    with session.acquire(prompt, reserve=20) as lease:
        parent = Piece(prompt, 0, lease.block_table)
        tiny.forward(Batch.pack([parent], pool.block_size), pool)
        lease.commit(60)
        children = lease.fork(3)
        for child in children:
            update = child.extend(80)
            copy_blocks(
                pool.blocks, torch.tensor([[c.src, c.dst, c.num_tokens] for c in update.copies])
            )
        tables = [child.block_table for child in children]
        assert len({tuple(table[:3]) for table in tables}) == 1
        assert len({table[3] for table in tables}) == 3
        batch = DeviceBatch(4, 8, pool.block_size, FREE)
        pieces = [Piece([5 + i], 60, table) for i, table in enumerate(tables)]
        packed, order = batch.pack([0, 1, 2], pieces)
        [run] = packed.groups.runs
        assert (run.blocks, run.end - run.start) == (3, 3)
        got = tiny.forward(packed, pool)
        alone = [tiny.forward(Batch.pack([pieces[at]], pool.block_size), pool) for at in order]
        torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)
        for child in children:
            child.release()
    session.close()
    pool.close()


def test_requests_of_many_salts_run_in_one_batch(
    tiny: Model, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share nothing but the pool, which is what a batch is over."""
    engine = engine_at(client, tiny)
    asked = [Request(f"{salt}", PROMPTS[0], NEW, salt=salt) for salt in ("a", "b", "c")]
    sizes: list[int] = []
    forward = type(tiny).forward

    def counted(model: Model, batch: Batch, pool: Any) -> torch.Tensor:
        sizes.append(len(batch.context_lens))
        return forward(model, batch, pool)

    monkeypatch.setattr(type(tiny), "forward", counted)
    done = answers(engine, *asked)
    assert sizes.count(3) >= NEW - 2
    assert len({one.tokens for one in done.values()}) == 1
    assert {one.num_computed for one in done.values()} == {len(PROMPTS[0]) + NEW - 1}
    engine.close()


def test_more_answers_to_one_prompt_compute_its_last_token_and_no_more(
    tiny: Model, client: Client
) -> None:
    engine = engine_at(client, tiny)
    prompt = random_tokens(67, seed=5)
    asked = [
        Request(str(n), prompt, NEW, Sampling(1.0, seed=3, sample=n), stop_ids=()) for n in range(4)
    ]
    done = answers(engine, *asked)
    assert sorted(one.num_computed for one in done.values()) == [NEW, NEW, NEW, 67 + NEW - 1]
    assert len({one.tokens for one in done.values()}) == 4
    engine.close()


def test_an_answer_is_part_of_the_next_turns_prefix(tiny: Model, client: Client) -> None:
    engine = engine_at(client, tiny)
    first = answers(engine, Request("1", PROMPTS[0], NEW))["1"]
    turn = [*PROMPTS[0], *first.tokens, 5, 6, 7]
    second = answers(engine, Request("2", turn, NEW))["2"]
    # All but the last generated token had been fed to the model.
    assert second.num_computed == 1 + 3 + NEW - 1
    assert second.tokens == answers(Engine(tiny, None, None), Request("2", turn, NEW))["2"].tokens


def test_two_workers_read_each_others_prefixes(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    one, two = engine_at(client, tiny), engine_at(client, tiny)
    answers(one, requests()[0])
    two.submit(requests()[3])
    events = list(two.run())
    started = next(e for e in events if isinstance(e, Started))
    assert started.shared
    assert started.num_cached == started.ledger.reused == len(PREFIX)
    assert tokens(finished(events)) == [want[3]]


def test_waiting_for_another_workers_prefix_does_not_stop_decoding(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    slow, quick = engine_at(client, tiny, chunk=16), engine_at(client, tiny)
    answers(quick, Request("warm", [1, 2, 3], 2))
    slow.submit(requests()[3])
    while not slow._running:
        slow.step()  # its first chunk is computed, the rest of the prefix is not
    quick.submit(Request("decoding", [8, 9], 40))
    quick.submit(requests()[2])
    events: list[Event] = []
    while sum(isinstance(e, Token) for e in events) < 20:
        events += quick.step()
        quick.wait(0.001)
    assert not [e for e in events if isinstance(e, Started) and e.id == "2"]
    theirs = finished(list(slow.run()))
    events += quick.run()
    assert tokens(theirs) == [want[3]]
    assert tokens({"2": finished(events)["2"]}) == [want[2]]
    started = next(e for e in events if isinstance(e, Started) and e.id == "2")
    assert started.ledger.joined > 0


def test_a_nearly_cached_prompt_does_not_wait_behind_a_long_ones_chunk(tiny: Model) -> None:
    engine = Engine(tiny, None, None, chunk=16)
    engine.submit(Request("long", random_tokens(150), 1))
    engine.step()
    engine.submit(Request("quick", random_tokens(5, seed=1), 3))
    before = engine.num_computed
    first = [event for event in engine.step() if isinstance(event, Token)]
    assert [event.id for event in first] == ["quick"]
    assert engine.num_computed - before == 5
    engine.step()
    assert engine.num_computed - before == 5 + 16, "every other step serves the long one"


def test_a_pool_that_is_full_makes_requests_wait_not_fail(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    engine = engine_at(client, tiny)
    # Eight that reserve 16 of the pool's 85 blocks each, and stop at their first token.
    wide = [
        Request(f"wide{i}", random_tokens(100, seed=i + 50), 150, stop_ids=tuple(range(97)))
        for i in range(8)
    ]
    done = answers(engine, *wide, *requests())
    assert len(done) == 12
    assert tokens({k: v for k, v in done.items() if k in "0123"}) == want


def test_a_request_that_can_never_fit_fails_with_the_arithmetic(
    tiny: Model, client: Client
) -> None:
    engine = engine_at(client, tiny)
    engine.submit(Request("long", random_tokens(256), 8))
    engine.submit(Request("foreign", [5, 97], 8))
    failed = {e.id: e.message for e in engine.run() if isinstance(e, Failed)}
    assert "leaves no room" in failed["long"]
    assert "between 0 and 96" in failed["foreign"]
    alone = Engine(tiny, None, None, private_tokens=64)
    alone.submit(Request("wide", random_tokens(60), 30))
    [event] = alone.run()
    assert isinstance(event, Failed)
    assert "6 blocks of 16 tokens; the pool has 4" in event.message
    with pytest.raises(InvalidRequest):
        Request("empty", [], 1)


def test_the_private_pool_makes_requests_wait_too(tiny: Model, want: list[list[int]]) -> None:
    engine = Engine(tiny, None, None, private_tokens=200)
    assert tokens(answers(engine, *requests())) == want


def test_a_cancelled_request_ends_and_gives_its_blocks_back(tiny: Model, client: Client) -> None:
    engine = engine_at(client, tiny, max_batch=2)
    for i in range(3):
        engine.submit(Request(str(i), PROMPTS[i], 100))
    while len(engine._running) < 2:
        engine.step()
    engine.cancel("0")
    engine.cancel("2")
    done = finished(list(engine.run()))
    assert [done[k].reason for k in "012"] == ["cancelled", "length", "cancelled"]
    assert not client.snapshot().leases


def test_stop_tokens_end_an_answer(tiny: Model, want: list[list[int]]) -> None:
    engine = Engine(tiny, None, None)
    stop = want[0][4]
    cut = want[0][: want[0].index(stop) + 1]
    done = answers(engine, Request("a", PROMPTS[0], NEW, stop_ids=(stop,)))["a"]
    assert (list(done.tokens), done.reason) == (cut, "stop")


def test_sampled_answers_repeat_with_their_seed_whoever_else_is_served(
    tiny: Model, client: Client
) -> None:
    def ask(engine: Engine, *others: Request) -> tuple[int, ...]:
        sampled = Request("s", PROMPTS[1], NEW, Sampling(0.9, top_p=0.9, seed=11))
        return answers(engine, sampled, *others)["s"].tokens

    first = ask(Engine(tiny, None, None))
    assert first == ask(Engine(tiny, None, None), *requests())
    assert first == ask(engine_at(client, tiny), *requests())


def test_the_two_best_logits_of_each_step_are_told(tiny: Model, want: list[list[int]]) -> None:
    engine = Engine(tiny, None, None)
    engine.submit(Request("a", PROMPTS[0], NEW, log_logits=True))
    told = [e for e in engine.run() if isinstance(e, Token)]
    assert [e.top.tokens[0] for e in told if e.top] == want[0]
    assert all(e.top and e.top.logits[0] >= e.top.logits[1] for e in told)


def test_each_token_is_told_with_its_logprob_by_the_model_itself(
    tiny: Model, want: list[list[int]]
) -> None:
    engine = Engine(tiny, None, None)
    biased = Sampling(logit_bias=((5, 100.0),))
    engine.submit(Request("plain", PROMPTS[0], NEW, logprobs=3))
    engine.submit(Request("biased", PROMPTS[0], NEW, biased, logprobs=0))
    engine.submit(Request("silent", PROMPTS[0], NEW))
    told = [e for e in engine.run() if isinstance(e, Token)]
    for event in (e for e in told if e.id == "plain"):
        assert event.logprobs is not None
        assert event.logprobs.top[0] == (event.token, event.logprobs.logprob)
        assert len(event.logprobs.top) == 3
    first = next(e.logprobs for e in told if e.id == "biased")
    assert first is not None
    assert first.logprob < -1  # the model would not have said so
    assert first.top == ()
    assert not any(e.logprobs for e in told if e.id == "silent")


def test_nothing_ends_an_answer_before_it_has_min_tokens(
    tiny: Model, want: list[list[int]]
) -> None:
    engine = Engine(tiny, None, None)
    stop = want[0][0]
    ended = answers(engine, Request("a", PROMPTS[0], NEW, stop_ids=(stop,)))["a"]
    assert len(ended.tokens) == 1
    how = Sampling(min_tokens=7)
    later = answers(engine, Request("a", PROMPTS[0], NEW, how, stop_ids=(stop, 10**6)))["a"]
    assert stop not in later.tokens[:7]
    with pytest.raises(InvalidRequest, match="every token ends the answer"):
        engine.submit(Request("b", PROMPTS[0], NEW, how, stop_ids=tuple(range(97))))


def test_what_prompt_and_answer_have_said_is_penalised(tiny: Model) -> None:
    prompt = random_tokens(30)
    how = Sampling(repetition_penalty=100.0)
    said = answers(Engine(tiny, None, None), Request("a", prompt, NEW, how))["a"].tokens
    assert len(set(said)) == NEW
    assert not set(said) & set(prompt)


def test_a_bias_for_a_token_that_is_none_is_refused(tiny: Model) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias must lie between 0 and 96"):
        Engine(tiny, None, None).submit(Request("a", [1], 1, Sampling(logit_bias=((97, 1.0),))))


# ------------------------------------------------------------------------------ room for an answer


LONG = 120


def long_requests(tag: str, count: int) -> list[Request]:
    return [
        Request(f"{tag}{i}", random_tokens(40, seed=100 + i), LONG, stop_ids=())
        for i in range(count)
    ]


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache_worker.engine.RESERVE", 32)
    monkeypatch.setattr("prefixcache_worker.engine.AHEAD", 16)
    monkeypatch.setattr("prefixcache_worker.engine.GROW_S", 0.1)


@pytest.mark.usefixtures("short_steps")
def test_room_for_an_answer_is_asked_for_in_steps_and_ahead(tiny: Model, client: Client) -> None:
    [request] = long_requests("a", 1)
    want = answers(Engine(tiny, None, None), request)["a0"].tokens
    engine = engine_at(client, tiny)
    engine.submit(request)
    waited, held = 0, set()
    while not engine.idle:
        told = engine.step()
        [claim] = [job.claim for job in engine._running] or [None]
        held.add(len(claim.block_table) if claim else 0)
        waited += bool(claim) and not any(isinstance(event, Token) for event in told)
        time.sleep(0.005)  # as long as a model takes, so that the answer is there
    assert sorted(held - {0})[:2] == [5, 8]  # of 16 tokens: for 40 + 32, for 65 + 16 + 32
    assert max(held) == 10
    assert waited <= 1, "it never stood still for room"
    engine.submit(request)
    assert finished(list(engine.run()))["a0"].tokens == want


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("shared", [True, False])
def test_answers_that_grow_in_a_full_pool_wait_and_none_is_lost(
    tiny: Model, client: Client, shared: bool
) -> None:
    """Fourteen of 10 blocks each, in 85: they begin with 5 each, and cannot all go on."""
    requests = long_requests("a", 14)
    plain = Engine(tiny, None, None)
    want = {key: done.tokens for key, done in answers(plain, *requests).items()}
    engine = engine_at(client, tiny) if shared else Engine(tiny, None, None, private_tokens=85 * 16)
    done = answers(engine, *requests)
    assert {key: one.tokens for key, one in done.items()} == want
    restarts = [done[f"a{i}"].num_restarts for i in range(14)]
    # Who gives way is the youngest, by when it was granted, and gets room for all of its answer.
    assert (restarts[0], max(restarts)) == (0, 1)
    assert shared or restarts == sorted(restarts)
    engine.close()
    eventually(lambda: holds_nothing(client))


@pytest.mark.usefixtures("short_steps")
def test_of_several_answers_to_a_prompt_that_do_not_fit_the_youngest_gives_way(
    tiny: Model,
) -> None:
    """Four of 10 blocks each, in 34: those that began first go on to their ends."""
    [alone] = long_requests("a", 1)
    request = replace(alone, sampling=Sampling(1.0, seed=3), n=4)
    told = [
        {one.sample: one for one in engine_events if isinstance(one, Finished)}
        for engine_events in (
            played(Engine(tiny, None, None), request),
            played(Engine(tiny, None, None, private_tokens=34 * 16), request),
        )
    ]
    want, done = told
    assert {n: one.tokens for n, one in done.items()} == {n: one.tokens for n, one in want.items()}
    restarts = [done[sample].num_restarts for sample in range(4)]
    assert restarts[:2] == [0, 0]
    assert restarts == sorted(restarts)


# ---------------------------------------------------------------------------- what is no number


ILL = 5


def is_end(event: Event) -> bool:
    return isinstance(event, Finished | Failed)


@pytest.fixture
def ill() -> Model:
    """A model that has caught a NaN for one of its tokens since it was probed."""
    module = build("llama")
    made = Model.of(module, name="ill", lean=False)
    with torch.no_grad():
        module.get_input_embeddings().weight[ILL] = float("nan")
    return made


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampling": Sampling(1.0, top_p=0.5, top_k=5, seed=1)},
        {"sampling": Sampling(1.0, seed=1), "n": 3},
        {"beams": BeamSearch(3), "n": 2},
        {"prompt_logprobs": 2},
        {"logprobs": 3},
    ],
    ids=["greedy", "drawn", "three", "beams", "scored", "logprobs"],
)
def test_who_is_given_no_numbers_fails_and_nobody_else_does(
    ill: Model, client: Client, how: dict[str, Any]
) -> None:
    well = [token if token != ILL else 6 for token in PROMPTS[1]]
    other = Request("well", well, NEW)
    want = answers(Engine(ill, None, None), other)["well"]
    engine = engine_at(client, ill, chunk=64)
    sick = [*well[:60], ILL, *well[60:70]]
    events = played(engine, Request("ill", sick, NEW, **how), other)
    failed = [event for event in events if isinstance(event, Failed)]
    assert {(one.id, one.error) for one in failed} == {("ill", "CacheError")}
    assert len(failed) == (3 if how.get("n") == 3 else 1)
    assert "NaN or infinity" in failed[0].message
    done = [event.tokens for event in events if isinstance(event, Finished)]
    assert done == [want.tokens]
    # What the model made of it is not left for others.
    begun = [event for event in events if isinstance(event, Started) and event.id == "well"]
    assert begun[0].num_cached == 0
    [told] = [event for event in played(engine, replace(other, id="again")) if is_end(event)]
    assert isinstance(told, Finished)
    assert engine.idle
    engine.close()
    eventually(lambda: holds_nothing(client))


@pytest.mark.usefixtures("short_steps")
def test_workers_that_fill_a_pool_together_all_get_on(tiny: Model, client: Client) -> None:
    engines = [engine_at(client, tiny) for _ in range(3)]
    parts = [long_requests(f"{n}.", 6) for n in range(3)]
    want = answers(Engine(tiny, None, None), *parts[0])
    found: list[dict[str, Finished]] = [{}, {}, {}]

    def serve(n: int) -> None:
        found[n] = answers(engines[n], *parts[n])

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for n in range(3):
        got = [found[n][f"{n}.{i}"].tokens for i in range(6)]
        assert got == [want[f"0.{i}"].tokens for i in range(6)]
        engines[n].close()
    eventually(lambda: holds_nothing(client))


def test_whom_a_quota_has_no_room_for_waits_in_nobody_s_way_or_fails_if_it_never_has(
    tiny: Model, client: Client
) -> None:
    engine = engine_at(client, tiny, max_batch=1)
    scope = Namespace(tiny.name, salt="s")
    client.set_quota(scope, max_held=6)
    session, pool = joiner(client, tiny, "")()
    other = Request("other", random_tokens(64, seed=1), 4)
    told: list[Event] = []
    with session.acquire(random_tokens(64, seed=2), reserve=16, salt="s"):
        engine.submit(Request("full", random_tokens(64, seed=3), 4, salt="s", wait_s=0))
        engine.submit(Request("never", random_tokens(128, seed=4), 4, salt="s"))
        engine.submit(other)
        while not {"never", "other"} <= {e.id for e in told if isinstance(e, Finished | Failed)}:
            told += engine.step()
            engine.wait(0.05)
        assert "full" not in {e.id for e in told if isinstance(e, Finished | Failed)}
    [failed] = [e for e in told if isinstance(e, Failed)]
    assert (failed.error, failed.retry_after_s) == ("QuotaExceeded", None)
    assert "may hold at most 6" in failed.message
    told += engine.run()
    assert {e.id for e in told if isinstance(e, Finished)} == {"full", "other"}
    client.set_quota(scope, max_held=None)
    engine.close()
    session.close()
    pool.close()


@pytest.mark.usefixtures("short_steps")
def test_while_all_wait_for_room_no_processor_time_is_spent(tiny: Model, client: Client) -> None:
    engine = engine_at(client, tiny)
    [request] = long_requests("a", 1)
    session, pool = joiner(client, tiny, "")()
    engine.submit(request)
    while not engine._running:
        engine.step()
        engine.wait(0.1)
    with session.acquire(random_tokens(16 * 60, seed=9), reserve=16 * 20):
        while not engine.stalled:
            engine.step()
        assert [job.starved for job in engine._running] == [True]
        started, steps = time.monotonic(), 0
        while time.monotonic() - started < 0.4:
            engine.step()
            engine.wait(0.2)
            steps += 1
        assert steps < 12
    done = finished(list(engine.run()))
    assert done["a0"].tokens == answers(Engine(tiny, None, None), request)["a0"].tokens
    engine.close()
    session.close()
    pool.close()


@pytest.mark.usefixtures("short_steps")
def test_who_is_cancelled_while_it_waits_for_room_leaves_nothing(
    tiny: Model, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache_worker.engine.GROW_S", 60.0)
    engine = engine_at(client, tiny)
    session, pool = joiner(client, tiny, "")()
    [request] = long_requests("a", 1)
    engine.submit(request)
    while not engine._running:
        engine.step()
        engine.wait(0.1)
    with session.acquire(random_tokens(16 * 60, seed=9), reserve=16 * 20):
        while not engine.stalled:
            engine.step()
        engine.cancel("a0")
        assert finished(list(engine.run()))["a0"].reason == "cancelled"
        eventually(lambda: len(client.snapshot().leases) == 1)
    engine.close()
    session.close()
    pool.close()
    eventually(lambda: holds_nothing(client))


# ------------------------------------------------------------------------------ losing the service


def step_until_tokens(engine: Engine, count: int) -> list[Event]:
    events: list[Event] = []
    while sum(isinstance(e, Token) for e in events) < count:
        events += engine.step()
        if engine.stalled:
            engine.wait(0.1)
    return events


def test_a_killed_service_costs_no_answer_and_sharing_comes_back(
    tiny: Model, want: list[list[int]], service: Service, client: Client
) -> None:
    engine = engine_at(client, tiny)
    for request in requests("flying"):
        engine.submit(request)
    events = step_until_tokens(engine, 8)
    service.kill()
    time.sleep(0.1)  # until the session has noticed
    for request in requests("alone"):
        engine.submit(request)
    events += engine.run()
    done = finished(events)
    assert tokens({k: v for k, v in done.items() if k.startswith("flying")}) == want
    assert tokens({k: v for k, v in done.items() if k.startswith("alone")}) == want
    # In flight they went on where they were; only new requests computed everything.
    assert all(v.num_restarts == 0 for v in done.values())
    started = {e.id: e.shared for e in events if isinstance(e, Started)}
    assert all(shared == key.startswith("flying") for key, shared in started.items())
    assert [type(e) for e in events if isinstance(e, Alone | Joined)] == [Alone]
    assert not engine.sharing

    service.start()
    deadline = time.monotonic() + PATIENCE_S
    while not engine.sharing and time.monotonic() < deadline:
        events += engine.step()
        engine.wait(0.1)
    assert isinstance(events[-1], Joined)
    back = answers(engine, *requests("back"))
    assert tokens(back) == want
    again = answers(engine, *requests("again"))
    assert {d.num_computed for d in again.values()} == {NEW}
    assert not engine.membership.old
    engine.close()


def test_a_pool_that_a_new_service_takes_over_is_left_at_once(
    tiny: Model, want: list[list[int]], folder: Path
) -> None:
    service = Service(folder, "1MiB", "--state", str(folder / "state"))
    service.start()
    with prefixcache.connect(service.target) as client:
        engine = engine_at(client, tiny)
        for request in requests():
            engine.submit(request)
        events = step_until_tokens(engine, 8)
        service.kill()
        time.sleep(0.1)
        events += step_until_tokens(engine, 4)  # in the pool of the dead
        service.start()  # which takes the pool over
        events += engine.run()
        done = finished(events)
        assert tokens(done) == want
        assert all(v.num_restarts == 1 for v in done.values())
        deadline = time.monotonic() + PATIENCE_S
        while not engine.sharing and time.monotonic() < deadline:
            engine.step()
            engine.wait(0.1)
        # What had been committed before the service died is found again under the new epoch.
        back = answers(engine, *requests("back"))
        assert tokens(back) == want
        assert sum(v.num_computed for v in back.values()) < sum(map(len, PROMPTS))
        engine.close()
        eventually_unmapped = time.monotonic() + PATIENCE_S
        while client.snapshot().quarantined and time.monotonic() < eventually_unmapped:
            time.sleep(0.05)
        assert not client.snapshot().quarantined
    service.stop()


def test_a_broken_session_restarts_what_its_leases_protected(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    engine = engine_at(client, tiny)
    for request in requests():
        engine.submit(request)
    events = step_until_tokens(engine, 8)
    running = {job.request.id for job in engine._running}
    assert engine.membership.shared is not None
    engine.membership.shared.session._call.cancel()  # the service lives, but ends our leases
    deadline = time.monotonic() + PATIENCE_S
    while engine.sharing and time.monotonic() < deadline:
        time.sleep(0.01)
    events += engine.run()
    done = finished(events)
    assert tokens(done) == want
    assert all(done[name].num_restarts == 1 for name in running)
    engine.close()


def test_a_lease_past_its_deadline_is_not_used_any_more(
    tiny: Model, want: list[list[int]], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_at(client, tiny)
    for request in requests():
        engine.submit(request)
    events = step_until_tokens(engine, 8)
    running = {job.request.id for job in engine._running}
    late = time.monotonic() + 1000
    with monkeypatch.context() as patch:
        patch.setattr("prefixcache_worker.engine.time.monotonic", lambda: late)
        patch.setattr("prefixcache_worker.engine.copy_blocks", _never)
        engine._watch(events)
    assert {job.request.id for job in engine._queue} == running
    events += engine.run()
    done = finished(events)
    assert tokens(done) == want
    assert {name for name, v in done.items() if v.num_restarts} == running
    # What they had committed was found again.
    assert sum(v.num_computed for v in done.values()) < 2 * sum(map(len, PROMPTS))
    engine.close()
    assert not client.snapshot().leases


def test_what_was_computed_while_its_lease_ended_is_not_told(
    tiny: Model, want: list[list[int]], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_at(client, tiny)
    for request in requests():
        engine.submit(request)
    events = step_until_tokens(engine, 8)
    forward, late = tiny.forward, [0.0]

    def stopped_meanwhile(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        late[0] = 1000.0  # as if the process had been stopped for that long
        return torch.zeros_like(logits)  # read from blocks that are another's by now

    real = time.monotonic
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny), "forward", lambda self, *args: stopped_meanwhile(*args))
        patch.setattr("prefixcache_worker.engine.time.monotonic", lambda: real() + late[0])
        told = engine.step()
    assert not [event for event in told if isinstance(event, Token)]
    events += told
    events += engine.run()
    assert tokens(finished(events)) == want
    engine.close()


def _never(*args: object) -> None:
    raise AssertionError("nothing may be copied")


def holds_nothing(client: Client) -> bool:
    left = client.snapshot()
    return (left.private, left.quarantined, left.leases) == (0, 0, ())


def test_a_closed_engine_holds_nothing(tiny: Model, client: Client) -> None:
    engine = engine_at(client, tiny)
    for request in requests():
        engine.submit(request)
    step_until_tokens(engine, 3)
    engine.close()
    engine.close()
    eventually(lambda: holds_nothing(client))  # an answer may cross its cancellation


def test_a_request_that_is_cancelled_when_its_blocks_have_just_been_granted_gives_them_back(
    tiny: Model, client: Client
) -> None:
    engine = engine_at(client, tiny)
    request = requests()[0]
    engine.submit(request)
    engine.step()  # asks, and takes nothing yet
    eventually(lambda: client.snapshot().leases)
    engine.wait(1.0)  # until the answer is here
    engine.cancel(request.id)
    assert [type(event).__name__ for event in engine.step()] == ["Finished"]
    eventually(lambda: holds_nothing(client))
    engine.close()


def test_requests_may_come_from_any_thread(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    engine = engine_at(client, tiny)
    threads = [threading.Thread(target=engine.submit, args=(r,)) for r in requests()]
    for thread in threads:
        thread.start()
    events: list[Event] = []
    while len(finished(events)) < 4:
        events += engine.step()
        if engine.stalled:
            engine.wait(1.0)
    assert tokens(finished(events)) == want


def test_a_model_of_another_shape_is_told_so(tiny: Model, client: Client) -> None:
    engine_at(client, tiny)
    with pytest.raises(prefixcache.LayoutMismatch):
        engine_at(client, Model.of(build("llama", num_hidden_layers=2)))


def test_while_all_seats_wait_for_another_worker_no_processor_time_is_spent(
    tiny: Model, want: list[list[int]], client: Client
) -> None:
    slow, quick = engine_at(client, tiny, chunk=16), engine_at(client, tiny, max_batch=2)
    slow.submit(requests()[3])
    while not slow._running:
        slow.step()
    for request in requests():
        quick.submit(request)
    quick.step()
    quick.wait(0.0)
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < 0.3:
        assert quick.stalled
        quick.step()
        quick.wait(0.1)
        steps += 1
    assert steps < 10
    list(slow.run())
    assert tokens(finished(list(quick.run()))) == want
