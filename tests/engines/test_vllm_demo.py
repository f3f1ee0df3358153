"""The demo of vLLM on one pool: what it plans, reads and says; and all of it where vLLM is."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from prefixcache.types import LeaseId, LeaseInfo, Ledger, Namespace, Snapshot
from prefixcache_vllm.demo import environments, ladder, stream, tiny, verdict
from prefixcache_vllm.demo.outage import Outage
from prefixcache_vllm.demo.runner import Outcome, Rest
from prefixcache_vllm.demo.servers import SHARED, Model, Server, environment, members, shared_by
from prefixcache_worker.demo import chats
from prefixcache_worker.demo.compare import Difference, Verdict
from prefixcache_worker.demo.record import Death, Request, Run
from prefixcache_worker.demo.scenario import CRASH
from service.service_process import ROOT

PYTHON = os.environ.get("PREFIXCACHE_VLLM_PYTHON", "")
EVENTS = (
    {"choices": [{"token_ids": [7], "logprobs": {"top_logprobs": [{"token_id:7": -0.5}]}}]},
    {"choices": [{"token_ids": [8, 9], "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 3}}},
)


# --------------------------------------------------------------------------------------- the stream


@contextmanager
def server_that_says(*lines: str, status: int = 200) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A server on loopback that streams these lines; gives its port, and what it is asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"id": self.headers["X-Request-Id"]})
            self.send_response(status)
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode() + b"\n\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


def test_tokens_are_heard_as_they_come_and_what_was_reused_at_the_end() -> None:
    lines = [f"data: {json.dumps(event)}" for event in EVENTS]
    with server_that_says(*lines, "data: [DONE]") as (port, asked):
        assert stream.is_healthy(port)
        pieces = list(stream.ask(port, stream.completion([1, 2, 3], 8), "chat-1"))
    assert [piece.tokens for piece in pieces] == [(7,), (8, 9), ()]
    assert pieces[0].tops == (((7, -0.5),),)
    assert (pieces[1].end, pieces[2].cached) == ("length", 3)
    assert asked[0]["prompt"] == [1, 2, 3]
    assert asked[0]["temperature"] == 0
    assert asked[0]["id"] == "chat-1"
    assert not stream.is_healthy(port)


@pytest.mark.parametrize(
    "line", ['data: {"error": {"message": "no"}}', "data: {", "data: []", 'data: {"choices": 5}']
)
def test_what_is_no_answer_is_refused(line: str) -> None:
    with server_that_says(line) as (port, _), pytest.raises(stream.Refused):
        list(stream.ask(port, stream.completion([1], 1), "a"))


def test_an_answer_that_ends_before_its_end_is_no_answer() -> None:
    lines = [f"data: {json.dumps(event)}" for event in EVENTS[:1]]
    with server_that_says(*lines) as (port, _), pytest.raises(ConnectionError, match="breaks off"):
        list(stream.ask(port, stream.completion([1], 1), "a"))


def test_a_server_that_says_no_is_quoted() -> None:
    with (
        server_that_says("too long", status=400) as (port, _),
        pytest.raises(stream.Refused, match="400: too long"),
    ):
        list(stream.ask(port, stream.completion([1], 1), "a"))


def test_of_equally_probable_tokens_the_chosen_one_is_the_best() -> None:
    tops = {"token_id:3": -1.0, "token_id:5": -1.0, "token_id:9": -4.0}
    event = {"choices": [{"token_ids": [5], "logprobs": {"top_logprobs": [tops]}}]}
    piece = stream.read_event(b"data: " + json.dumps(event).encode())
    assert piece is not None
    assert [token for token, _ in piece.tops[0]] == [5, 3, 9]


# ---------------------------------------------------------------------------------------- an engine


class Heard:
    """A dispatcher that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def tell(self, server: Server, event: dict[str, Any], now: float) -> None:
        del server, now
        self.events.append(event)


def test_an_engine_tells_a_request_as_a_worker_does(tmp_path: Path) -> None:
    heard = Heard()
    known = Ledger(hit=2, joined=1, cold=1)
    names: list[str] = []

    def ledger(name: str) -> Ledger:
        names.append(name)
        return known

    async def main(port: int) -> None:
        server = Server("e1", [], tmp_path, clock=lambda: 1.0, tell=heard.tell, ledger=ledger)
        server.port, server._loop = port, asyncio.get_running_loop()
        server.send({"id": "c/1", "tokens": [1, 2, 3, 4], "max_new_tokens": 8, "log_logits": False})
        while not heard.events or heard.events[-1]["event"] != "finished":
            await asyncio.sleep(0.01)

    lines = [f"data: {json.dumps(event)}" for event in EVENTS]
    with server_that_says(*lines, "data: [DONE]") as (port, asked):
        asyncio.run(main(port))
    assert [event["event"] for event in heard.events] == [*["token"] * 3, "started", "finished"]
    assert heard.events[3]["ledger"] == known._asdict()
    assert heard.events[4]["tokens"] == [7, 8, 9]
    assert heard.events[4]["num_computed"] == 1 + 2  # of the prompt, and what was fed of the answer
    assert names == [f"cmpl-{asked[0]['id']}-0"]


def test_an_engine_that_breaks_off_fails_its_request_unless_it_was_killed(tmp_path: Path) -> None:
    async def main(*, killed: bool) -> list[dict[str, Any]]:
        heard = Heard()
        server = Server("e1", [], tmp_path, clock=lambda: 1.0, tell=heard.tell)
        server._loop, server.killed = asyncio.get_running_loop(), killed
        ask = {"id": "c/1", "tokens": [1], "max_new_tokens": 1, "log_logits": False}
        await asyncio.to_thread(server._ask, ask, "c.1")  # nobody listens at its port
        await asyncio.sleep(0)
        return heard.events

    assert [event["event"] for event in asyncio.run(main(killed=False))] == ["failed"]
    assert asyncio.run(main(killed=True)) == []


def test_a_lease_in_a_snapshot_is_a_request_that_has_begun(tmp_path: Path) -> None:
    heard = Heard()

    async def main() -> None:
        server = Server("e1", [sys.executable, "-c", "input()"], tmp_path, clock=lambda: 1.0,
                        tell=heard.tell)  # fmt: skip
        await server.start(stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
        server._unseen = {40: [("c/1", 0.5)]}
        own = LeaseInfo(LeaseId(1), f"vllm-engine-{server.pid}", Namespace("m"), 40, 8, 2, 9.0)
        server.seen(Snapshot(leases=(replace(own, worker=f"vllm-engine-{os.getpid()}"),)), 0.9)
        assert heard.events == []  # another's
        server.seen(Snapshot(leases=(own, own)), 1.0)
        assert server.lease_name == own.worker
        server.kill()
        await server.stop()
        assert members(server.pid) == []

    asyncio.run(main())
    (event,) = heard.events
    assert (event["event"], event["id"], event["ledger"]["hit"]) == ("started", "c/1", 8)
    assert event["waited_ms"] == pytest.approx(500)


def test_of_an_engine_that_is_killed_is_told_what_its_requests_had_found_not_what_they_computed(
    tmp_path: Path,
) -> None:
    heard = Heard()
    known = {"cmpl-c.1-e1-1-0": Ledger(hit=3, cold=37)}

    async def main() -> None:
        server = Server("e1", [sys.executable, "-c", "input()"], tmp_path, clock=lambda: 1.0,
                        tell=heard.tell, ledger=known.get)  # fmt: skip
        await server.start(stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
        server._asked = {"c/1": ("c.1-e1-1", 0.5), "c/2": ("c.2-e1-2", 0.6)}
        server.kill()
        await server.stop()

    asyncio.run(main())
    (event,) = heard.events  # nothing had been granted for the other
    assert (event["event"], event["id"]) == ("started", "c/1")
    assert event["ledger"] == Ledger(hit=3, cold=37)._asdict()


def test_shared_memory_of_a_process_is_found() -> None:
    script = (
        "from multiprocessing.shared_memory import SharedMemory as M\n"
        "m = M(create=True, size=4096); print(m.name, flush=True); input(); m.close(); m.unlink()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert SHARED / name in shared_by([process.pid])
        process.communicate("\n")


def test_engines_differ_from_vllm_alone_in_what_is_ours_only(tmp_path: Path) -> None:
    model = Model("py", "/models/m", "float32", chunk=64)
    shared, alone = model.on_pool("unix:/x"), model.alone()
    assert set(model.arguments()) <= set(shared) & set(alone)
    assert "--no-enable-prefix-caching" in alone
    assert "--spare-blocks" in shared
    assert "site-packages" not in environment(tmp_path)["PYTHONPATH"]


def test_a_missing_environment_is_said_with_the_command_that_makes_it() -> None:
    for python in ("/nowhere/python", sys.executable):
        assert "make vllm-environment" in environments.why_not(python)


def test_the_tiny_models_chats_differ_in_the_crashs_system_prompt_only() -> None:
    short, made = chats.load().quick(), tiny.chats(chats.load())
    assert [chat.turns for chat in made.chats] == [chat.turns for chat in short.chats]
    for chat, other in zip(made.chats, short.chats, strict=True):
        assert (chat.assistant == other.assistant) == (chat.assistant.name != CRASH)
        assert chat.assistant == made.assistants[chat.assistant.name]


# -------------------------------------------------------------------------------------- the figures


def request(name: str, prompt: tuple[int, ...], reused: int, took_s: float = 1.0) -> Request:
    made = Request(name, "c", 0, "a", prompt, len(prompt) - 1)
    made.sent_s, made.first_s, made.done_s = 0.0, took_s, took_s
    made.ledger = Ledger(hit=reused, cold=len(prompt) - reused)
    made.answer = [9]
    return made


def rungs(*reused: int) -> list[ladder.Rung]:
    prompts = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 6), (1, 2, 3, 7)]
    kinds = [kind for _, kind in ladder.plan(["a", "b", "c"])]
    times = (2.0, 0.4, 0.6, 0.3)
    return [
        ladder.Rung(kind, request(kind, prompt, count, took_s), 0 if kind == ladder.COLD else 3)
        for kind, prompt, count, took_s in zip(kinds, prompts, reused, times, strict=True)
    ]


def test_a_ladder_says_what_it_asked_and_what_could_be_found() -> None:
    asked: list[str] = []

    async def ask(one: Request, engine: str) -> Request:
        asked.append(engine)
        one.answer = [9]
        one.first_s = 1.0
        return one

    found = asyncio.run(
        ladder.climb(
            ["a", "b"],
            [(1, 2, 3), (1, 2, 4), (1, 2, 3)],
            lambda i, prompt: request(str(i), tuple(prompt), 2),
            ask,
        )
    )
    assert asked == ["a", "b", "a"]
    assert [rung.findable for rung in found] == [0, 2, 3]
    assert all(rung.is_exact for rung in found)  # the last token of a prompt is always computed


def test_first_tokens_are_compared_with_the_cold_ones() -> None:
    table = ladder.figures([rungs(0, 3, 3, 3), rungs(0, 3, 3, 3)])
    assert table[ladder.COLD]["of_cold"] == 1
    assert table[ladder.OTHERS]["of_cold"] == 0.25
    assert table[ladder.OTHERS]["requests"] == 4
    assert table[ladder.OWN]["computed"] == 1


def outcome() -> Outcome:
    same = Verdict(2, 20, ())
    run = Run(shared=True, workers=["a", "b", "c"])
    run.death = Death("c", 7, 1.0, True, 1, 1, 1, 5.0, 30.0, "b", "r")
    running = request("running", (1, 2), 0)
    running.answer = [1, 2, 3, 4]
    seen = Outage(2, running, request("new", (1,), 0))
    seen.again = [request("first", (1, 2, 3), 0), request("second", (1, 2, 3), 2)]
    clean = Rest("at the end", 0, 0, 0, 0, ())
    return Outcome(run, run, same, same, [rungs(0, 3, 3, 3)], seen, [clean])


def figures_of(one: Outcome) -> dict[str, Any]:
    return {
        "tokens_over_ideal_percent": 0.5,
        "tokens_computed": 201,
        "tokens_ideal": 200,
        "tokens_sent": 900,
        "requests": 12,
        "workers": 3,
        "first_tokens": ladder.figures(one.ladders),
    }


def test_where_all_held_the_last_line_says_what_it_came_to() -> None:
    promises = verdict.judge(outcome(), figures_of(outcome()))
    assert all(promise.held for promise in promises)
    line = verdict.last_line(promises, figures_of(outcome()))
    assert line.startswith("3 vLLM engines, one cache: 12 requests, 201 of 900 prompt tokens")
    assert "0.25 of a cold first token" in line


def break_answers(one: Outcome) -> None:
    one.verdict = Verdict(2, 20, (Difference("r", 3, 1, 2, None, None, tie=False),))


def break_reuse(one: Outcome) -> None:
    one.ladders = [rungs(0, 3, 2, 3)]


def break_takeover(one: Outcome) -> None:
    assert one.shared.death is not None
    one.shared.death = replace(one.shared.death, takeover_ms=None)


def break_crash(one: Outcome) -> None:
    one.shared.death = None


def break_running(one: Outcome) -> None:
    one.outage.answered_before = 4  # all of it: it did not run any more


def break_new(one: Outcome) -> None:
    one.outage.meanwhile = None


def break_again(one: Outcome) -> None:
    one.outage.again[1].ledger = Ledger(cold=3)


def break_later_answers(one: Outcome) -> None:
    one.outage_verdict = Verdict(0, 0, ())


def break_leases(one: Outcome) -> None:
    one.rests[0] = replace(one.rests[0], leases=1)


def break_quarantine(one: Outcome) -> None:
    one.rests[0] = replace(one.rests[0], quarantined=4)


def break_doctor(one: Outcome) -> None:
    one.rests[0] = replace(one.rests[0], wrong=("doctor: something",))


def break_tidiness(one: Outcome) -> None:
    one.left = ["process 5"]


@pytest.mark.parametrize(
    "broken",
    [
        break_answers,
        break_reuse,
        break_takeover,
        break_crash,
        break_running,
        break_new,
        break_again,
        break_later_answers,
        break_leases,
        break_quarantine,
        break_doctor,
        break_tidiness,
    ],
)
def test_one_thing_that_did_not_hold_fails_the_demo(broken: Any) -> None:
    one = outcome()
    broken(one)
    promises = verdict.judge(one, figures_of(one))
    assert [promise.held for promise in promises].count(False) == 1
    assert verdict.last_line(promises, figures_of(one)).startswith("FAILED: 1 of ")


def test_a_toy_may_be_killed_too_late_and_nothing_else_may() -> None:
    one = outcome()
    assert one.shared.death is not None
    one.shared.death = replace(one.shared.death, in_prefill=False, takeover_ms=None)
    assert not all(each.held for each in verdict.judge(one, figures_of(one)))
    assert all(each.held for each in verdict.judge(one, figures_of(one), may_be_late=True))
    break_takeover(one)
    one.shared.death = replace(one.shared.death, in_prefill=True)
    assert not all(each.held for each in verdict.judge(one, figures_of(one), may_be_late=True))


def test_too_much_that_is_computed_twice_fails_the_demo() -> None:
    figures = figures_of(outcome()) | {"tokens_over_ideal_percent": 2.5}
    assert not all(promise.held for promise in verdict.judge(outcome(), figures))


# ---------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON,
    reason="$PREFIXCACHE_VLLM_PYTHON names no Python that has vLLM (make vllm-environment)",
)
@pytest.mark.timeout(0)
def test_the_short_demo_holds_what_it_promises(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prefixcache_vllm.demo", "--python", PYTHON, "--quick"),
            *("--report", str(tmp_path / "vllm.json")),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'worker'}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "vllm.json").read_text())
    assert all(promise["held"] for promise in report["promises"])
    assert (tmp_path / "vllm.png").stat().st_size > 10_000
    assert done.stdout.strip().splitlines()[-1] == report["summary"]
