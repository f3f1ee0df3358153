"""A stream that says nothing for a while is kept open by what no reader takes for a message."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from serving.bench import Bench, continuation, words

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")

ANSWER = words(continuation([0, 5, 1], 4))
CHAT = {"model": "played", "max_tokens": 4, "temperature": 0}


def pieces_of(body: bytes) -> list[bytes]:
    """Take a chunked body apart as its sender has sent it."""
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    return found


def test_a_reader_that_strips_what_comes_together_misses_nothing(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache_serving.front.QUIET_S", 0.01)

    async def main() -> bytes:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening():
            reader, writer = await bench.connect()
            messages = [{"role": "user", "content": "w5"}]
            raw = json.dumps(CHAT | {"messages": messages, "stream": True}).encode()
            kind = {"content-type": "application/json"}
            writer.write(bench.head("POST", "/v1/chat/completions", len(raw), kind) + raw)
            await reader.readuntil(b"\r\n\r\n")
            quiet = await reader.readexactly(12)  # at least two of them, before any token
            async with bench.stepping(0.02):
                data = await reader.readuntil(b"\r\n0\r\n\r\n")
            writer.close()
        return quiet + data

    stripped = [one.strip() for one in pieces_of(asyncio.run(main()))]
    assert stripped[:2] == [b"", b""]
    *chunks, done = [one for one in stripped if one]
    assert done == b"data: [DONE]"
    told = [json.loads(one.removeprefix(b"data: ")) for one in chunks]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told) == ANSWER


def test_openai_s_client_reads_on(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache_serving.front.QUIET_S", 0.01)

    async def main() -> tuple[str, str]:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening() as address:

            def use() -> tuple[str, str]:
                with openai.OpenAI(
                    base_url=f"http://{address}/v1", api_key="none", max_retries=0
                ) as client:
                    messages: Any = [{"role": "user", "content": "w5"}]
                    chat = client.chat.completions.create(messages=messages, stream=True, **CHAT)
                    said = "".join(one.choices[0].delta.content or "" for one in chat)
                    terms = {"model": "played", "max_output_tokens": 4, "temperature": 0}
                    events = client.responses.create(input="w5", stream=True, **terms)
                    return said, list(events)[-1].response.output_text

            asked = asyncio.create_task(asyncio.to_thread(use))
            await asyncio.sleep(0.1)
            async with bench.stepping(0.05):
                return await asked

    assert asyncio.run(main()) == (ANSWER, ANSWER)
