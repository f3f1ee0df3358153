"""The front over real sockets, with raw bytes; workers are played."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache_serving.bodies import Bodies
from prefixcache_serving.body_reader import DEEPEST, BodyReader, parse
from prefixcache_serving.front_server import FrontServer, read_address
from prefixcache_serving.refusals import Refused
from serving.bench import Bench, completion, continuation, events, read_answer, words

PROMPT = [5, 9, 2, 14]
ANSWER = words(continuation(PROMPT, 6))
KEY = "key-of-sixteen-signs"


def play(test: Callable[[Bench], Awaitable[None]], folder: Path, **options: Any) -> Bench:
    """Run a test against a front that listens."""

    async def main() -> Bench:
        bench = Bench(folder, **options)
        async with asyncio.timeout(PATIENCE_S), bench.listening():
            await test(bench)
        return bench

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_an_answer_tells_its_text_and_what_of_the_prompt_was_cached(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        async with bench.stepping():
            status, headers, body = await bench.post(completion([7] * 40, 6))
        assert status == 200
        assert headers["x-request-id"] == body["id"]
        (choice,) = body["choices"]
        assert choice["text"] == words(continuation([7] * 40, 6))
        assert choice["finish_reason"] == "length"
        assert body["usage"] == {
            "prompt_tokens": 40,
            "completion_tokens": 6,
            "total_tokens": 46,
            "prompt_tokens_details": {"cached_tokens": 16},
        }

    play(test, tokenizer_folder)


def test_an_answer_over_segments_says_that_it_is_approximate(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        async with bench.stepping():
            asked = completion([7] * 40, 6) | {"segments": True}
            _, _, body = await bench.post(asked)
            assert body["usage"]["approximate"] is True
            assert body["usage"]["prompt_tokens_details"] == {
                "cached_tokens": 16,
                "approximate_tokens": 12,
            }
            _, _, body = await bench.post(asked | {"n": 2})
            assert body["usage"]["prompt_tokens_details"]["approximate_tokens"] == 12
            told = {"model": "played", "input": "w5 w7 w8 w9", "segments": True}
            _, _, body = await bench.post(told, "/v1/responses")
            assert body["usage"]["approximate"] is True
            assert body["usage"]["input_tokens_details"]["approximate_tokens"] == 0
            _, _, body = await bench.post(completion([7] * 40, 6) | {"segments": False})
            assert "approximate" not in body["usage"]
            status, _, body = await bench.post(asked | {"echo": True, "logprobs": 1})
            assert (status, body["error"]["param"]) == (400, "segments")
        lines = (await bench.exchange("GET", "/metrics"))[2].decode()
        assert "prefixcache_front_approximate_tokens_total 36.0" in lines

    play(test, tokenizer_folder)


def test_an_answer_that_was_refused_segments_says_why(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        asked = asyncio.create_task(bench.post(completion([7] * 40, 6) | {"segments": True}))
        await until(lambda: any(worker.jobs for worker in bench.workers))
        worker = next(worker for worker in bench.workers if worker.jobs)
        (name,) = worker.jobs
        why = "segments of 'm': no certificate there allows them"
        worker.tell({"event": "failed", "id": name, "error": "Unsupported", "message": why})
        status, _, body = await asked
        assert (status, body["error"]["message"]) == (400, why)

    play(test, tokenizer_folder)


def test_a_chat_goes_through_the_template(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        body = {
            "model": "played",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "w5 w7"}]}],
            "max_completion_tokens": 3,
            "temperature": 0,
        }
        async with bench.stepping():
            _, _, told = await bench.post(body, "/v1/chat/completions")
        message = told["choices"][0]["message"]
        assert message["content"] == words(continuation([0, 5, 7, 1], 3))

    play(test, tokenizer_folder)


def test_a_stream_begins_with_role_and_first_token_and_ends_with_usage_and_done(
    tokenizer_folder: Path,
) -> None:
    async def test(bench: Bench) -> None:
        body = {
            "model": "played",
            "messages": [{"role": "user", "content": "w5"}],
            "max_tokens": 4,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        raw = json.dumps(body).encode()
        async with bench.stepping(0.001):
            status, headers, data = await bench.exchange(
                "POST", "/v1/chat/completions", raw, {"content-type": "application/json"}
            )
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(data)
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 4
        first = chunks[0]["choices"][0]["delta"]
        answer = continuation([0, 5, 1], 4)
        assert first["role"] == "assistant"
        assert first["content"].startswith(words(answer[:1]))
        assert all("role" not in one["choices"][0]["delta"] for one in chunks[1:])
        assert all(one["usage"] is None for one in chunks)
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
        assert text == words(answer)
        assert [one["choices"][0]["finish_reason"] for one in chunks][-1] == "length"

    play(test, tokenizer_folder)


def test_several_prompts_and_answers_are_told_apart(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        body = completion([[5, 6], [7, 8]], 3, n=2, seed=4, temperature=1.0)
        async with bench.stepping():
            _, _, told = await bench.post(body)
        texts = [one["text"] for one in told["choices"]]
        wanted = [
            words(continuation(prompt, 3, seed)) for prompt in ([5, 6], [7, 8]) for seed in (4, 5)
        ]
        assert texts == wanted
        assert told["usage"]["prompt_tokens"] == 4  # each prompt once
        assert told["usage"]["completion_tokens"] == 12

    play(test, tokenizer_folder)


def test_what_one_of_several_answers_computes_for_all_of_them_was_not_cached(
    tokenizer_folder: Path,
) -> None:
    """Whichever of them it is: the first may have joined what the second one is computing."""

    async def test(bench: Bench) -> None:
        asked = asyncio.create_task(bench.post(completion(PROMPT, 1, n=2)))
        lines: list[Any] = []
        await until(lambda: len([line for one in bench.workers for line in one.lines]) == 2)
        for worker in bench.workers:
            lines += [(worker, line["id"]) for line in worker.lines]
        for (worker, name), joined in zip(
            sorted(lines, key=lambda one: one[1]), (3, 0), strict=True
        ):
            ledger = {"joined": joined, "cold": len(PROMPT) - joined}
            worker.tell({"event": "started", "id": name, "ledger": ledger, "num_to_compute": 1})
            worker.tell({"event": "token", "id": name, "token": 8})
            worker.tell({"event": "finished", "id": name, "reason": "length"})
        _, _, body = await asked
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    play(test, tokenizer_folder)


def test_a_stop_text_ends_the_answer_and_the_worker_is_told(tokenizer_folder: Path) -> None:
    answer = continuation(PROMPT, 50)

    async def test(bench: Bench) -> None:
        async with bench.stepping(0.001):
            body = completion(PROMPT, 50, stop=[words(answer[2:4])])
            _, _, told = await bench.post(body)
        assert told["choices"][0]["text"].strip() == words(answer[:2])
        assert told["choices"][0]["finish_reason"] == "stop"
        assert sum(len(worker.cancelled) for worker in bench.workers) == 1

    play(test, tokenizer_folder)


def test_a_token_that_ends_the_answer_is_not_shown(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        told = asyncio.create_task(bench.post(completion(PROMPT, 50)))
        await until(lambda: any(worker.lines for worker in bench.workers))
        (worker,) = [worker for worker in bench.workers if worker.lines]
        name = worker.lines[0]["id"]
        for token in (8, 96):
            worker.tell({"event": "token", "id": name, "token": token})
        worker.tell({"event": "finished", "id": name, "reason": "stop"})
        _, _, body = await told
        assert body["choices"][0]["text"] == "w8"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == 2

    play(test, tokenizer_folder)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("has_begun", [True, False], ids=["begun", "waiting"])
def test_a_client_that_leaves_is_cancelled_at_once(
    tokenizer_folder: Path, stream: bool, has_begun: bool
) -> None:
    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 50, stream=stream)).encode()
        _, writer = await bench.connect()
        head = bench.head("POST", "/v1/completions", len(raw), {"content-type": "application/json"})
        writer.write(head + raw)
        await until(lambda: any(worker.lines for worker in bench.workers))
        (worker,) = [worker for worker in bench.workers if worker.lines]
        if has_begun:
            worker.step()
            await asyncio.sleep(0.01)
        writer.close()
        await until(lambda: bool(worker.cancelled))
        await until(lambda: bench.front.num_open == 0)
        assert (bench.router.num_running, bench.router.num_waiting) == (0, 0)

    play(test, tokenizer_folder)


def test_a_worker_that_is_killed_in_a_stream_changes_no_byte_of_it(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6, stream=True)).encode()
        asked = asyncio.create_task(
            bench.exchange("POST", "/v1/completions", raw, {"content-type": "application/json"})
        )
        for killed in range(2):
            await until(lambda: any(worker.jobs for worker in bench.workers))
            (worker,) = [worker for worker in bench.workers if worker.jobs]
            worker.step()
            worker.is_gone, worker.jobs = True, {}
            bench.router.part(worker.name, died=True)
            bench.workers.append(bench.join(f"w{killed + 3}"))
        async with bench.stepping(0.001):
            _, _, data = await asked
        *chunks, done = events(data)
        assert done == "[DONE]"
        assert "".join(one["choices"][0]["text"] for one in chunks) == ANSWER

    play(test, tokenizer_folder)


def test_a_stream_that_cannot_go_on_says_so_and_is_not_done(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6, stream=True)).encode()
        asked = asyncio.create_task(
            bench.exchange("POST", "/v1/completions", raw, {"content-type": "application/json"})
        )
        await until(lambda: any(worker.lines for worker in bench.workers))
        (worker,) = [worker for worker in bench.workers if worker.lines]
        worker.step()
        await asyncio.sleep(0.02)
        told = {"id": worker.lines[0]["id"], "error": "CacheError", "message": "broken"}
        worker.tell({"event": "failed", **told})
        _, _, data = await asked
        *_, last = events(data)
        assert last["error"]["message"] == "broken"

    play(test, tokenizer_folder)


def test_a_slow_reader_holds_nobody_up(tokenizer_folder: Path) -> None:
    """It does not read at all; others are answered, and when it reads, nothing is missing."""

    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 500, stream=True)).encode()
        reader, writer = await bench.connect()
        head = bench.head("POST", "/v1/completions", len(raw), {"content-type": "application/json"})
        writer.write(head + raw)
        async with bench.stepping():
            for _ in range(3):
                _, _, told = await bench.post(completion(PROMPT, 6))
                assert told["choices"][0]["text"] == ANSWER
            _, _, data = await read_answer(reader)
        *chunks, _ = events(data)
        text = "".join(one["choices"][0]["text"] for one in chunks)
        assert text == words(continuation(PROMPT, 500))
        writer.close()

    play(test, tokenizer_folder)


def test_a_full_queue_is_429_with_retry_after(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        tasks = [asyncio.create_task(bench.post(completion(PROMPT, 6))) for _ in range(10)]
        await until(lambda: bench.router.num_waiting == 2 and bench.router.num_running == 8)
        status, headers, body = await bench.post(completion(PROMPT, 6))
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert body["error"]["type"] == "rate_limit_error"
        async with bench.stepping():
            assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}

    play(test, tokenizer_folder, queue=2)


def test_requests_of_a_tenant_leave_room_for_those_of_the_others(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps them open: here, bodies that do not come."""
    monkeypatch.setattr("prefixcache_serving.front.MOST_REQUESTS", 8)
    keys = tmp_path / "keys"
    keys.write_text("key-of-the-greedy-one greedy\nkey-of-the-modest-one modest\n")
    keys.chmod(0o600)
    kind = {"content-type": "application/json"}
    greedy = kind | {"authorization": "Bearer key-of-the-greedy-one"}
    modest = kind | {"authorization": "Bearer key-of-the-modest-one"}
    raw = json.dumps(completion(PROMPT, 6)).encode()

    async def test(bench: Bench) -> None:
        writers = []
        for _ in range(6):
            _, writer = await bench.connect()
            writer.write(bench.head("POST", "/v1/completions", 999, greedy))
            writers.append(writer)
        await until(lambda: bench.front.num_open == 6)
        status, headers, _ = await bench.exchange("POST", "/v1/completions", raw, greedy)
        assert (status, headers["retry-after"]) == (429, "1")
        async with bench.stepping():
            assert (await bench.exchange("POST", "/v1/completions", raw, modest))[0] == 200
            for writer in writers:
                writer.close()
            await until(lambda: not bench.front.num_open)
            assert (await bench.exchange("POST", "/v1/completions", raw, greedy))[0] == 200

    play(test, tokenizer_folder, keys=keys)


def test_a_fault_of_ours_in_mid_answer_leaves_no_worker_with_it(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(bodies: Bodies, piece: Any) -> None:
        raise KeyError("something nobody foresaw")

    monkeypatch.setattr(Bodies, "take", take)

    async def test(bench: Bench) -> None:
        asked = asyncio.create_task(bench.post(completion(PROMPT, 50)))
        await until(lambda: any(worker.jobs for worker in bench.workers))
        (worker,) = [worker for worker in bench.workers if worker.jobs]
        worker.step()
        status, _, told = await asked
        assert (status, told["error"]["code"]) == (500, "internal_error")
        assert worker.cancelled
        assert (bench.router.num_running, bench.front.num_open) == (0, 0)
        _, _, data = await bench.exchange("GET", "/metrics")
        assert b'requests_total{path="completions",status="500"} 1.0' in data

    play(test, tokenizer_folder)


def test_a_front_that_is_ending_begins_nothing(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.router.is_draining = True
        status, headers, _ = await bench.post(completion(PROMPT, 6))
        assert status == 503
        assert "retry-after" in headers
        assert (await bench.exchange("GET", "/health"))[0] == 503

    play(test, tokenizer_folder)


# --------------------------------------------------------------------------------- what is refused

BODIES: dict[str, tuple[bytes, int]] = {
    "no body": (b"", 400),
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "deep": (b"[" * 200_000, 400),
    "deep objects": (b'{"a":' * 100_000, 400),
    "a mark and UTF-16": ('{"model": "played"}'.encode("utf-16"), 400),
    "half a character": (b'{"model": "\\ud800", "prompt": "a"}', 400),
    "not UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "latin-1": ('{"model": "ä"}'.encode("latin-1"), 400),
    "NaN": (b'{"model": "played", "prompt": "w5", "temperature": NaN}', 400),
    "infinite": (b'{"model": "played", "prompt": "w5", "temperature": 1e999}', 400),
    "long number": (b'{"model": "played", "prompt": "w5", "seed": ' + b"9" * 5000 + b"}", 400),
    "twice": (b'{"model": "played", "prompt": "w5", "n": 1, "n": 2}', 400),
    "too long": (b'{"model": "' + b"x" * (2 << 20) + b'"}', 413),
    "a prompt of nothing": (b'{"model": "played", "prompt": []}', 400),
    "no token id": (b'{"model": "played", "prompt": [1, 97]}', 400),
    "a negative one": (b'{"model": "played", "prompt": [-1]}', 400),
    "true for 1": (b'{"model": "played", "prompt": [true]}', 400),
    "many prompts": (json.dumps(completion(["w5"] * 200, 1)).encode(), 400),
    "too many answers": (json.dumps(completion(["w5"] * 9, 1, n=100)).encode(), 400),
    "a long prompt": (json.dumps(completion([5] * 600, 1)).encode(), 400),
    "a long answer": (json.dumps(completion([5], 600)).encode(), 400),
    "another model": (b'{"model": "nope", "prompt": "w5"}', 404),
}


@pytest.mark.parametrize("kind", BODIES)
def test_what_is_no_request_is_refused_in_openai_s_form(tokenizer_folder: Path, kind: str) -> None:
    body, wanted = BODIES[kind]

    async def test(bench: Bench) -> None:
        for path in ("/v1/completions", "/v1/chat/completions"):
            status, _, told = await bench.post(body, path)
            if path == "/v1/completions":
                assert status == wanted, told
            assert status in (400, 404, 413)
            assert set(told["error"]) == {"message", "type", "param", "code"}
            assert len(told["error"]["message"]) < 500
        assert (bench.router.num_running, bench.router.num_waiting) == (0, 0)
        async with bench.stepping():
            assert (await bench.post(completion(PROMPT, 6)))[0] == 200

    play(test, tokenizer_folder)


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json", "host": "evil.example"}, 421),
        ({"content-type": "application/json", "host": "127.0.0.1"}, 421),
    ],
)
def test_headers_that_a_stranger_s_page_could_send_are_refused(
    tokenizer_folder: Path, headers: dict[str, str], wanted: int
) -> None:
    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6)).encode()
        status, _, data = await bench.exchange("POST", "/v1/completions", raw, headers)
        assert status == wanted
        assert json.loads(data)["error"]["message"]

    play(test, tokenizer_folder)


def test_paths_and_methods_that_are_none_are_told_in_openai_s_form(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        for method, path, wanted in (
            ("GET", "/v1/nothing", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/chat/completions", 405),
            ("GET", "/v1/models/other", 404),
        ):
            status, _, data = await bench.exchange(method, path)
            assert (status, path) == (wanted, path)
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}
        _, headers, data = await bench.exchange("GET", "/v1/completions")
        assert headers["allow"] == "POST"
        told = json.loads(data)["error"]["message"]
        assert told == "this path takes POST: GET '/v1/completions'"
        _, _, data = await bench.exchange("GET", "/v1/models/played")
        assert json.loads(data)["max_model_len"] == 512

    play(test, tokenizer_folder)


def test_connections_that_only_sit_there_keep_nobody_out(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        sitting = []
        for number in range(600):
            _, writer = await bench.connect()
            if number % 2:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-half")
            sitting.append(writer)
        async with bench.stepping():
            assert (await bench.post(completion(PROMPT, 6)))[0] == 200
        for writer in sitting:
            writer.close()

    play(test, tokenizer_folder)


def test_connections_that_read_no_answer_keep_nobody_out(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has no key, or looks at something: only whose answer is computed keeps its place."""
    monkeypatch.setattr("prefixcache_serving.front_server.MOST_CONNECTIONS", 8)
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)

    async def test(bench: Bench) -> None:
        mine = {"authorization": f"Bearer {KEY}"}
        raw = json.dumps(completion(PROMPT, 6)).encode()
        told = {"content-type": "application/json", **mine}
        asked = [
            asyncio.create_task(bench.exchange("POST", "/v1/completions", raw, told))
            for _ in range(4)
        ]
        await until(lambda: bench.router.num_running == 4)
        insistent = []
        for number in range(20):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((bench.address.host, bench.address.port))
            path, more = ("/page/page.js", {}) if number % 2 else ("/metrics", mine)
            ask = bench.head("GET", path, 0, more) * 500
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(ask)
            insistent.append(connection)
        bound = bench.server._bound
        await until(lambda: len(bound._open) == 8 and all(one.is_busy for one in bound._open))
        async with bench.stepping():
            assert (await bench.exchange("POST", "/v1/completions", raw, told))[0] == 200
            assert [(await one)[0] for one in asked] == [200] * 4
        for connection in insistent:
            connection.close()

    play(test, tokenizer_folder, keys=keys)


def test_who_has_sent_ahead_and_leaves_is_cancelled_all_the_same(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6)).encode()
        told = {"content-type": "application/json"}
        for ahead in (b"G", bench.head("GET", "/health", 0) * 2):
            _, writer = await bench.connect()
            writer.write(bench.head("POST", "/v1/completions", len(raw), told) + raw)
            await until(lambda: bench.router.num_running == 1)
            writer.write(ahead)
            (connection,) = bench.server._bound._open
            await until(lambda seen=connection: seen.flow.read_paused)  # type: ignore[misc]
            writer.close()
            await until(lambda: bench.router.num_running == 0)
        assert [len(worker.cancelled) for worker in bench.workers] == [1, 1]

    play(test, tokenizer_folder)


@pytest.mark.parametrize(("size", "wanted"), [(2, 400), (200, 200)])
def test_a_body_in_hundreds_of_crumbs_is_refused(
    tokenizer_folder: Path, size: int, wanted: int
) -> None:
    """To read a chunk of a byte takes as long as to read one of thousands."""

    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6)).encode() + b" " * 30_000
        chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {bench.address}\r\n"
        head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks)
        reader, writer = await bench.connect()
        writer.write(head.encode() + body + b"0\r\n\r\n")
        async with bench.stepping():
            assert int((await reader.readline()).split()[1]) == wanted
        writer.close()

    play(test, tokenizer_folder)


@pytest.mark.parametrize("crumbs", [b"zz\r\n", b"1\r\n \r\n" * 300])
def test_of_what_is_no_http_behind_a_request_nothing_is_logged(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, crumbs: bytes
) -> None:
    """Nor of what is none by itself: a stranger could fill a disk with it."""

    async def test(bench: Bench) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {bench.address}\r\n"
        reader, writer = await bench.connect()
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        assert (await read_answer(reader))[0] == 415
        writer.write(crumbs)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        for said in (b"nonsense\r\n\r\n", f"{head}upgrade: websocket\r\n\r\n".encode()):
            reader, writer = await bench.connect()
            writer.write(said)
            await reader.readline()
            writer.close()
        assert (await bench.exchange("GET", "/health"))[0] == 200

    play(test, tokenizer_folder)
    assert not caplog.records


def test_a_body_that_does_not_come_ends(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache_serving.body_reader.BODY_S", 0.05)

    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect()
        head = bench.head("POST", "/v1/completions", 999, {"content-type": "application/json"})
        writer.write(head + b"{")
        status, _, _ = await read_answer(reader)
        assert status == 408
        await until(lambda: bench.front.num_open == 0)
        writer.close()

    play(test, tokenizer_folder)


WRONG = [
    *(b'{"a": {"b": [NaN]}}', b"-Infinity", b'[{"a": 1, "a": 1}]', b'{"a": [-1e999]}'),
    *(b'{"a": ["\\ud800"]}', b'{"a": {"\\uDC00": 1}}', b'{"\\udfff": 1}', b'"\\ude00\\ud83d"'),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_other_readers_would_read_otherwise_is_refused(wrong: bytes) -> None:
    """Or could not be told again in any answer: half a character, a number beyond all."""
    with pytest.raises(Refused):
        parse(wrong)


def test_a_body_is_as_deep_as_all_that_is_done_with_it_can_go(tokenizer_folder: Path) -> None:
    def body(depth: int) -> bytes:
        """A response that repeats its tools, none of which is to be called."""
        inside = "[" * (depth - 4) + "]" * (depth - 4)
        tool = f'{{"type": "function", "name": "f", "parameters": {{"a": {inside}}}}}'
        rest = '"model": "played", "input": "w5", "max_output_tokens": 2, "tool_choice": "none"'
        return f'{{{rest}, "tools": [{tool}]{" " * 20_000}}}'.encode()

    async def test(bench: Bench) -> None:
        async with bench.stepping():
            for depth in (DEEPEST, DEEPEST + 1, 950, 980, 100_000):
                status, _, told = await bench.post(body(depth), "/v1/responses")
                assert status == (200 if depth == DEEPEST else 400), depth
                if status == 400:
                    assert "nested too deeply" in told["error"]["message"]

    play(test, tokenizer_folder)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_what_takes_long_to_write_is_written_beside_the_others(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    """In another thread, and it is the same: every piece, the whole answer, the end of a stream."""
    body: dict[str, Any] = {"model": "played", "temperature": 0, "stream": stream}
    if path == "completions":
        body |= {"prompt": PROMPT, "max_tokens": 6, "logprobs": 1, "n": 2 - stream, "echo": True}
    elif path == "responses":
        body |= {"input": "w5", "max_output_tokens": 6, "top_logprobs": 1}
        body |= {"include": ["message.output_text.logprobs"], "instructions": "w7"}
    else:
        messages = [{"role": "user", "content": "w5"}]
        body |= {"messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 1}
    num_beside = 0
    in_thread = asyncio.to_thread

    async def counted(*given: Any) -> Any:
        nonlocal num_beside
        num_beside += 1
        return await in_thread(*given)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    told: list[bytes] = []

    async def test(bench: Bench) -> None:
        raw, kind = json.dumps(body).encode(), {"content-type": "application/json"}
        async with bench.stepping(0.002):
            _, _, data = await bench.exchange("POST", f"/v1/{path}", raw, kind)
        for named in (rb'"(id|item_id)": ?"[^"]*"', rb'"(created|created_at|completed_at)": ?\d+'):
            data = re.sub(named, b"", data)
        told.append(data)

    for heavy in (10**9, 0):
        monkeypatch.setattr("prefixcache_serving.front._HEAVY", heavy)
        num_before = num_beside
        play(test, tokenizer_folder)
        if heavy:
            assert num_beside - num_before <= 2  # the echo's log-probabilities
    assert num_beside - num_before >= 2
    if not stream:
        assert told[0] == told[1]
        return
    texts = [b"".join(re.findall(rb'"(?:text|content|delta)": "([^"]*)"', one)) for one in told]
    assert texts[0] == texts[1]


def test_a_character_that_is_written_in_its_two_halves_is_one() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00 \\\\ud800", "b": 1e308}') == {
        "a": "😀 \\ud800",
        "b": 1e308,
    }


def test_all_bodies_together_are_bounded() -> None:
    """One alone may be as long as it may be; two at once are too much here."""

    async def main() -> None:
        reader = BodyReader(longest=100, most=150)
        scope = {"headers": [(b"content-type", b"application/json")]}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * 100, "more_body": False}

        async with reader.reading(scope, receive) as data:
            assert len(data) == 100
            with pytest.raises(Exception, match="too many long requests") as told:
                async with reader.reading(scope, receive):
                    pass
            assert told.value.status == 429  # type: ignore[attr-defined]
        async with reader.reading(scope, receive) as data:
            assert len(data) == 100

    asyncio.run(main())


def test_bodies_of_a_tenant_leave_room_for_those_of_the_others() -> None:
    async def main() -> None:
        reader = BodyReader(longest=100, most=300, tenants=("greedy", "modest"))
        scope = {"headers": [(b"content-type", b"application/json")]}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * 75, "more_body": False}

        async with contextlib.AsyncExitStack() as stack:
            for tenant in ("greedy", "greedy", "greedy"):
                held = reader.reading(scope, receive, tenant)
                assert len(await stack.enter_async_context(held)) == 75
            with pytest.raises(Refused):
                await stack.enter_async_context(reader.reading(scope, receive, "greedy"))
            await stack.enter_async_context(reader.reading(scope, receive, "modest"))

    asyncio.run(main())


# -------------------------------------------------------------------------- who may ask, and where


def test_with_keys_nobody_is_answered_without_one(tokenizer_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nkey-of-sixteen-signs\nanother-of-sixteen-signs  # spare\n")
    keys.chmod(0o600)

    async def test(bench: Bench) -> None:
        raw = json.dumps(completion(PROMPT, 6)).encode()
        base = {"content-type": "application/json", "host": "any.example"}
        async with bench.stepping():
            for given in ("", "Bearer nope", "Basic key-of-sixteen-signs", "Bearer"):
                for method, path in (
                    ("POST", "/v1/completions"),
                    ("GET", "/v1/models"),
                    ("GET", "/v1/models/played"),
                    ("GET", "/metrics"),
                ):
                    body = raw if method == "POST" else b""
                    headers = base | {"authorization": given}
                    status, got, data = await bench.exchange(method, path, body, headers)
                    assert status == 401, path
                    assert got["www-authenticate"] == "Bearer"
                    assert json.loads(data)["error"]["code"] == "invalid_api_key"
            for key in ("key-of-sixteen-signs", "another-of-sixteen-signs"):
                headers = base | {"authorization": f"Bearer {key}"}
                status, _, _ = await bench.exchange("POST", "/v1/completions", raw, headers)
                assert status == 200
        assert (await bench.exchange("GET", "/health"))[0] == 200

    play(test, tokenizer_folder, keys=keys)


def test_a_unix_socket_is_this_user_s_alone(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "front.sock"

    async def main() -> None:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening(f"unix:{path}"):
            assert path.stat().st_mode & 0o777 == 0o600
            async with bench.stepping():
                assert (await bench.post(completion(PROMPT, 6)))[0] == 200
            with pytest.raises(ServiceUnavailable, match="already"):
                FrontServer(bench.address, has_keys=False).bind()
        assert not path.exists()
        path.write_text("a file")
        with pytest.raises(InvalidRequest, match="no socket"):
            FrontServer(bench.address, has_keys=False).bind()

    asyncio.run(main())


def test_other_machines_are_served_with_keys_only() -> None:
    assert read_address("0.0.0.0:80", has_keys=True).port == 80
    assert read_address(":80", has_keys=False).host == "127.0.0.1"
    for target in ("0.0.0.0:8000", "[::]:8000", "example.org:80"):
        with pytest.raises(InvalidRequest, match="--api-keys"):
            read_address(target, has_keys=False)


def test_metrics_tell_what_was_served(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> None:
        async with bench.stepping():
            await bench.post(completion([7] * 40, 6))
        await bench.post(completion(PROMPT, 6, suffix="x"))
        _, _, data = await bench.exchange("GET", "/metrics")
        lines = data.decode().splitlines()
        assert 'prefixcache_front_requests_total{path="completions",status="200"} 1.0' in lines
        assert 'prefixcache_front_requests_total{path="completions",status="400"} 1.0' in lines
        assert "prefixcache_front_prompt_tokens_total 40.0" in lines
        assert "prefixcache_front_cached_tokens_total 16.0" in lines
        assert "prefixcache_front_generated_tokens_total 6.0" in lines

    play(test, tokenizer_folder)
