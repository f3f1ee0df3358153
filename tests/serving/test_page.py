"""The front's page in a real browser: lanes, an answer that moves, the box, keys."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache.cli.front import KEY_VARIABLE, read_front
from prefixcache.cli.top_screen import Screen
from prefixcache.client.address import Address
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.outline import Order
from prefixcache_bench.reports.photograph import browser
from prefixcache_serving.board import MOST_VIEWERS
from prefixcache_serving.front import PAGE
from prefixcache_serving.journey import Journey
from serving.bench import Bench, continuation, words

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="this machine has no chromium and chromedriver (Debian: chromium chromium-driver)",
)
KEY = "pfx-0123456789abcdef"
FRONT = (
    b'{"workers": %b, "waiting": 1, "tokens_per_s": 1.5, "longest_queue": 8, "moved": 0, '
    b'"is_draining": false}'
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium drives the browser; it is in the dev extra")
    driver = browser(1200, 900, tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


async def seen(driver: Any, script: str, is_it: Callable[[Any], bool] = bool) -> Any:
    """Ask the page until it is so; give what it says then."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_it(found := await asyncio.to_thread(driver.execute_script, script)):
            await asyncio.sleep(0.02)
    return found


def text_of(selector: str) -> str:
    return f"return document.querySelector({json.dumps(selector)})?.textContent ?? ''"


async def ask(driver: Any, prompt: str, count: int) -> None:
    await asyncio.to_thread(
        driver.execute_script,
        "document.getElementById('prompt').value = arguments[0];"
        "document.getElementById('most').value = arguments[1];"
        "document.getElementById('send').click()",
        prompt,
        count,
    )


@needs_chromium
def test_an_answer_moves_from_lane_to_lane_and_the_box_shows_all_of_it(
    driver: Any, tokenizer_folder: Path
) -> None:
    bench = Bench(tokenizer_folder)

    async def look() -> None:
        async with bench.listening():
            await asyncio.to_thread(driver.get, f"http://{bench.address}/")
            await seen(driver, "return document.querySelectorAll('.lane').length", lambda n: n == 2)
            await ask(driver, "w5 w9", 30)
            lane = "return document.querySelector('.chip')?.closest('.lane').dataset.worker ?? ''"
            first = await seen(driver, lane)
            station = bench.router.stations[first]
            bench.router.open(station, False)
            bench.router.hand_over(station)
            assert await seen(driver, lane, lambda name: name not in ("", first))
            assert await seen(driver, "return document.querySelector('.chip.moved') !== null")
            assert await seen(
                driver,
                text_of(f".lane[data-worker={first}] .pill"),
                lambda text: text == "set aside",
            )
            async with bench.stepping():
                cost = await seen(driver, text_of("#cost"))
            assert "30 tokens" in cost
            assert f"{first}, then " in cost
            told = await seen(driver, text_of("#answer"))
            line = bench.workers[0].lines[0]
            assert told == words(continuation(line["tokens"], 30, line["seed"]))
            await seen(driver, "return document.querySelectorAll('.chip').length", lambda n: n == 0)
        assert "lost" in await seen(driver, text_of("#status"), lambda text: "lost" in text)
        assert not [one for one in driver.get_log("browser") if "Content Security" in str(one)]

    asyncio.run(look())


@needs_chromium
def test_the_box_misses_nothing_behind_what_keeps_a_quiet_stream_open(
    driver: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache_serving.front.QUIET_S", 0.02)
    bench = Bench(tokenizer_folder)

    async def look() -> None:
        async with bench.listening():
            await asyncio.to_thread(driver.get, f"http://{bench.address}/")
            await seen(driver, "return document.querySelectorAll('.lane').length", lambda n: n == 2)
            await ask(driver, "w5 w9", 5)
            await seen(driver, "return document.querySelector('.chip') !== null")
            async with bench.stepping(0.1):
                assert "5 tokens" in await seen(driver, text_of("#cost"))
            line = next(one for worker in bench.workers for one in worker.lines)
            told = await seen(driver, text_of("#answer"))
            assert told == words(continuation(line["tokens"], 5, line["seed"]))

    asyncio.run(look())


@needs_chromium
def test_with_keys_the_page_asks_for_one(
    driver: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY} research\n")
    file.chmod(0o600)
    bench = Bench(tokenizer_folder, keys=file)
    give = (
        "document.getElementById('key').value = arguments[0];"
        "document.querySelector('#door button').click()"
    )

    async def look() -> None:
        async with bench.listening(), bench.stepping():
            await asyncio.to_thread(driver.get, f"http://{bench.address}/")
            await seen(driver, text_of("#status"), lambda text: text == "needs a key")
            assert not await asyncio.to_thread(
                driver.execute_script, "return document.getElementById('door').hidden"
            )
            await asyncio.to_thread(driver.execute_script, give, KEY[::-1])
            await asyncio.to_thread(driver.execute_script, give, KEY)
            await seen(driver, "return document.querySelectorAll('.lane').length", lambda n: n == 2)
            await ask(driver, "w5 w9", 3)
            assert "3 tokens" in await seen(driver, text_of("#cost"))

    asyncio.run(look())


def test_the_page_is_local_small_and_told_to_talk_to_nobody(tokenizer_folder: Path) -> None:
    bench = Bench(tokenizer_folder)

    async def look() -> None:
        async with bench.listening():
            for path in ("/", *(f"/page/{one.name}" for one in PAGE.iterdir())):
                status, headers, body = await bench.exchange("GET", path)
                assert status == 200
                assert "default-src 'none'" in headers["content-security-policy"]
                assert len(body) < 20_000
                text = body.decode().replace("http://www.w3.org/2000/svg", "")
                assert "//" not in text.replace("// ", "").replace("// -", "")
            for path in ("/page/../front.py", "/page/%2e%2e/front.py", "/page/none"):
                assert (await bench.exchange("GET", path))[0] == 404
            assert (await bench.exchange("POST", "/"))[0] == 405

    asyncio.run(look())


def test_what_is_shown_tells_nothing_of_prompts_or_keys(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY} research\n")
    file.chmod(0o600)
    bench = Bench(tokenizer_folder, keys=file)

    async def look() -> None:
        async with bench.listening():
            for path in ("/workers", "/workers/live"):
                assert (await bench.exchange("GET", path))[0] == 401
            mine = {"authorization": f"Bearer {KEY}"}
            body = {"model": "played", "prompt": "w71 w72 w73", "max_tokens": 4}
            asked = asyncio.create_task(bench.post(body, **mine))
            while not bench.router.num_running:
                await asyncio.sleep(0.005)
            status, _, data = await bench.exchange("GET", "/workers", headers=mine)
            assert status == 200
            told = json.loads(data)
            (answer,) = [a for worker in told["workers"] for a in worker["answers"]]
            assert (answer["prompt"], answer["generated"], answer["most"]) == (3, 0, 4)
            assert told["waiting"] == 0
            for secret in (KEY, "research", "71", "w7"):
                assert secret not in data.decode()
            async with bench.stepping():
                assert (await asked)[0] == 200
            told = json.loads((await bench.exchange("GET", "/workers", headers=mine))[2])
            assert told["tokens"] == 4
            assert sum(worker["tokens"] for worker in told["workers"]) == 4

    asyncio.run(look())


def test_a_tenant_is_told_of_answers_of_others_that_they_are_there_and_no_more(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}-a acme\n{KEY}-b bolt\n")
    file.chmod(0o600)
    bench = Bench(tokenizer_folder, keys=file, workers=1)

    async def look() -> None:
        async with bench.listening():
            theirs = {"authorization": f"Bearer {KEY}-a"}
            body = {"model": "played", "prompt": "w71 w72 w73", "max_tokens": 4}
            asked = asyncio.create_task(bench.post(body, **theirs))
            while not bench.router.num_running:
                await asyncio.sleep(0.005)
            listed = {}
            for key in "ab":
                mine = {"authorization": f"Bearer {KEY}-{key}"}
                told = json.loads((await bench.exchange("GET", "/workers", headers=mine))[2])
                reader, writer = await bench.connect()
                writer.write(bench.head("GET", "/workers/live", 0, mine))
                line = await asyncio.wait_for(reader.readuntil(b"}\n\n"), PATIENCE_S)
                writer.close()
                live = json.loads(line.partition(b"data: ")[2])
                assert live["workers"][0]["answers"] == told["workers"][0]["answers"]
                listed[key] = told["workers"][0]["answers"]
                assert told["workers"][0]["running"] == 1
            assert [len(answers) for answers in listed.values()] == [1, 0]
            async with bench.stepping():
                assert (await asked)[0] == 200

    asyncio.run(look())


def test_pages_of_a_tenant_leave_room_for_those_of_the_others(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}-a acme\n{KEY}-b bolt\n")
    file.chmod(0o600)
    bench = Bench(tokenizer_folder, keys=file)

    async def look() -> None:
        async with bench.listening():
            writers = []

            async def open_one(key: str) -> bytes:
                reader, writer = await bench.connect()
                writers.append(writer)
                mine = {"authorization": f"Bearer {KEY}-{key}"}
                writer.write(bench.head("GET", "/workers/live", 0, mine))
                return (await asyncio.wait_for(reader.readline(), PATIENCE_S)).split()[1]

            said = await asyncio.gather(*(open_one("a") for _ in range(MOST_VIEWERS)))
            assert (said.count(b"200"), said.count(b"503")) == (24, 8)
            assert await open_one("b") == b"200"
            mine = {"authorization": f"Bearer {KEY}-b"}
            head = await bench.exchange("HEAD", "/workers/live", headers=mine)
            assert head[::2] == (200, b"")  # and it is over
            assert bench.front.board.viewers == {"acme": 24, "bolt": 1}
            for writer in writers:
                writer.close()

    asyncio.run(look())


def test_nobody_looks_nothing_is_painted(tokenizer_folder: Path) -> None:
    bench = Bench(tokenizer_folder)

    async def look() -> None:
        async with bench.listening():
            board = bench.front.board
            reader, writer = await bench.connect()
            writer.write(bench.head("GET", "/workers/live", 0))
            for _ in range(3):
                await asyncio.wait_for(reader.readuntil(b'"model":"played"'), PATIENCE_S)
            assert board.viewers.total() == 1
            writer.close()
            async with asyncio.timeout(PATIENCE_S):
                while board.viewers.total() or board._painter is not None:
                    await asyncio.sleep(0.01)

    asyncio.run(look())


@pytest.mark.parametrize(
    "said",
    [
        b"[]",
        b'{"workers": [], "waiting": 1, "tokens_per_s": 1.5}',
        FRONT % b'[{"worker": "w1", "state": "ready", "running": null}]',
        FRONT % b'[{"worker": 5, "state": "starting"}]',
        FRONT % b"[5]",
        FRONT % b"null",
    ],
)
def test_whoever_else_listens_there_is_no_front(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))
        writer.close()

    async def look() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with asyncio.timeout(PATIENCE_S), server:
            with pytest.raises(ServiceUnavailable, match="no front"):
                await asyncio.to_thread(read_front, Address(host=host, port=port))

    asyncio.run(look())


def test_top_shows_a_row_for_each_worker(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    bench = Bench(tokenizer_folder, keys=file)
    screen = Screen(None, Order.HEAT)

    async def look() -> None:
        async with bench.listening():
            with pytest.raises(InvalidRequest, match=KEY_VARIABLE):
                await asyncio.to_thread(read_front, bench.address)
            monkeypatch.setenv(KEY_VARIABLE, KEY)
            bench.router.admit([Journey("a", {"tokens": [5], "max_new_tokens": 9}, frozenset())])
            bench.router.open(bench.router.stations["w2"], False)
            screen.front = await asyncio.to_thread(read_front, bench.address)
        with pytest.raises(ServiceUnavailable, match="no front"):
            await asyncio.to_thread(read_front, bench.address)

    asyncio.run(look())
    first, *rows = [line.plain for line in screen.rows_of_front()]
    assert first == "front: 0.0 tokens/s, 0 of 8 wait, 0 went on elsewhere"
    assert [row.split()[:2] for row in rows] == [["w1", "ready"], ["w2", "set"]]
    assert sum(int(row.split(" of 4 answers")[0].split()[-1]) for row in rows) == 1
