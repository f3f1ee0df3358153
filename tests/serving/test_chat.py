"""`prefixcache chat` against a front whose workers are played."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache.cli.front import read_front
from prefixcache.client.address import Address
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache_serving.chat import Endpoint, chat
from prefixcache_serving.front import _Stream
from serving.bench import Bench, continuation, words


def talk(
    folder: Path, target: str, lines: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Bench:
    """Say some lines."""

    async def main() -> Bench:
        bench = Bench(folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening(target), bench.stepping(1e-3):
            monkeypatch.setattr("sys.stdin", io.StringIO(lines))
            terms = {"temperature": 0.0, "max_tokens": 3, "key_file": None} | options
            # As `prefixcache up` says it to clients, which is what people have at hand.
            http = str(bench.address) if bench.address.path else f"http://{bench.address}/v1"
            await asyncio.to_thread(lambda: chat(http=http, model="", **terms))
        return bench

    return asyncio.run(main())


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_chat_goes_on_with_what_was_said(
    tokenizer_folder: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = "127.0.0.1:0" if where == "tcp" else f"unix:{tmp_path}/f.sock"
    bench = talk(tokenizer_folder, target, "w5\n\nw7\n", monkeypatch, system="w9")
    first = continuation([2, 9, 0, 5, 1], 3)
    second = continuation([2, 9, 0, 5, 1, *first, 0, 7, 1], 3)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == words(first)
    assert told[1].startswith("[cached 4 of 5 · 3 tokens · w")
    assert told[2] == words(second)
    assert bench.router.num_running == 0


def test_what_is_refused_is_said_and_the_chat_goes_on(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["w5"] * 600)
    talk(tokenizer_folder, "127.0.0.1:0", f"{long}\nw5\n", monkeypatch, system="")
    out, err = capsys.readouterr()
    assert "this model takes 512 tokens" in err
    assert out.startswith(words(continuation([0, 5, 1], 3)))


def test_an_answer_that_breaks_off_is_told_and_the_chat_goes_on(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The front is killed in mid-sentence: nothing ends the body."""
    whole = _Stream.write
    num_cut = 0

    async def cut(stream: _Stream, data: bytes) -> None:
        nonlocal num_cut
        await whole(stream, data)
        if not num_cut:
            num_cut += 1
            raise RuntimeError("killed, as far as the client sees")

    monkeypatch.setattr(_Stream, "write", cut)
    talk(tokenizer_folder, "127.0.0.1:0", "w5\nw5\n", monkeypatch, system="")
    out, err = capsys.readouterr()
    assert "the answer broke off" in err
    assert words(continuation([0, 5, 1], 3)) in out


def test_where_nobody_answers_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="prefixcache up"):
        Endpoint(Address.parse(f"{tmp_path}/none.sock"), "").model()


USAGE = '{"usage": {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": null}'
STREAMS = (
    "5",
    "[]",
    '{"error": "no such model"}',
    '{"error": {"message": 5}}',
    "{}",
    '{"choices": [{"delta": null}]}',
    '{"choices": [{"delta": {"content": [5]}}]}',
    USAGE + ', "choices": []}',
    "NaN",
)


@pytest.mark.parametrize("said", STREAMS)
@pytest.mark.parametrize("status", [200, 404, None])
def test_whoever_else_listens_there_may_say_anything(
    status: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of somebody else: as the first answer, as a refusal, as a chunk of a stream."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = said if status else f"data: {said}\n\n"
        head = f"HTTP/1.1 {status or 200} x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(f"{head}{body}".encode())
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        endpoint = Endpoint(Address(host=host, port=port), "")

        def ask() -> None:
            if status is None:
                list(endpoint.stream({"model": "m", "messages": []}))
            else:
                endpoint.model()

        async with asyncio.timeout(PATIENCE_S), server:
            with pytest.raises(ServiceUnavailable, match=r"broke off|no endpoint answers"):
                await asyncio.to_thread(ask)

    asyncio.run(main())


@pytest.mark.parametrize("key", ["clé-secrète-de-seize", "secret key", "secret\x1b[2J", "sec\nret"])
def test_a_key_that_is_none_is_told_and_not_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    terms: Any = {"model": "m", "system": "", "temperature": 0.0, "max_tokens": 1, "key_file": None}
    for ask in (
        lambda: chat(http=f"unix:{tmp_path}/none.sock", **terms),
        lambda: read_front(Address.parse(f"{tmp_path}/none.sock")),
    ):
        with pytest.raises(InvalidRequest, match="OPENAI_API_KEY holds no API key") as told:
            ask()
        assert "ret" not in str(told.value)
    monkeypatch.setenv("OPENAI_API_KEY", " pfx-0123456789abcdef\r\n")  # of a file of Windows
    with pytest.raises(ServiceUnavailable, match="no front"):
        read_front(Address.parse(f"{tmp_path}/none.sock"))


def test_the_ledger_is_told_to_who_asks(tokenizer_folder: Path) -> None:
    async def main() -> None:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
            body = {"model": "played", "prompt": [5] * 40, "max_tokens": 2, "n": 2}
            _, _, told = await bench.post(body, **{"x-prefixcache-explain": "1"})
            assert [one["ledger"]["hit"] for one in told["prefixcache"]] == [16, 16]
            assert all(len(one["workers"]) == 1 for one in told["prefixcache"])
            _, _, told = await bench.post(body)
            assert "prefixcache" not in told

    asyncio.run(main())
