"""A front in this process, on a real socket, with workers that are played.

The played model's next token follows from all tokens before, so that an answer is right only if
whoever goes on was told all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import tokenizers

from prefixcache.client.address import Address
from prefixcache_serving.front import Front
from prefixcache_serving.front_server import FrontServer
from prefixcache_serving.keys import Keys
from prefixcache_serving.meter import Meter
from prefixcache_serving.router import Router
from prefixcache_serving.served_model import ServedModel
from prefixcache_worker.child import ProcessFailed

VOCAB = 97
STOP = 96
MAX_TOKENS = 512
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tokenizer(folder: Path, template: str = TEMPLATE) -> None:
    """Leave a tokenizer of one word a token, and a chat template."""
    words = {"user": 0, "assistant": 1} | {f"w{number}": number for number in range(2, VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def next_token(tokens: list[int], seed: int = 0) -> int:
    """The played model: never the token that ends an answer."""
    return (sum(at * token for at, token in enumerate(tokens, 7)) + 31 * seed) % 94 + 2


def continuation(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """What the model goes on with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


class Played:
    """A worker that computes a token of each request when it is told to."""

    def __init__(self, name: str, hear: Callable[[str, dict[str, Any]], None]) -> None:
        self.name = name
        self.pid = 1
        self.lines: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.jobs: dict[str, tuple[dict[str, Any], list[int]]] = {}
        self.is_gone = False
        self._hear = hear

    def send(self, line: dict[str, Any]) -> None:
        if self.is_gone:
            raise ProcessFailed(f"{self.name} is gone")
        if "cancel" in line:
            self.cancelled.append(line["cancel"])
            self.jobs.pop(line["cancel"], None)
            return
        self.lines.append(line)
        self.jobs[line["id"]] = (line, [])

    def step(self) -> None:
        """Compute a token of each request in hand; tell of it."""
        for name, (line, made) in list(self.jobs.items()):
            known = [*line["tokens"], *line.get("generated", [])]
            scored = "prompt_logprobs" in line
            if not made:
                cached = 0 if scored else min(16, len(line["tokens"]) - 1)
                ledger = {"hit": cached, "cold": len(line["tokens"]) - cached}
                begun = {"event": "started", "id": name, "num_to_compute": 3}
                if line.get("segments"):  # half of the rest was found elsewhere
                    ledger["approximate"] = ledger["cold"] // 2
                    ledger["cold"] -= ledger["approximate"]
                    begun["approximate"] = True
                self.tell({**begun, "ledger": ledger})
            if scored and not made:
                told = [-float(token) for token in line["tokens"][1:]]
                top = [[[5, -0.25]]] * len(told)
                self.tell(
                    {"event": "scored", "id": name, "start": 1}
                    | {"logprobs": told, "top_logprobs": top}
                )
            if not line["max_new_tokens"]:
                del self.jobs[name]
                self.tell({"event": "finished", "id": name, "reason": "length"})
                continue
            made.append(next_token(known + made, line.get("seed", 0) + line.get("sample", 0)))
            more = {"logprob": -0.5, "top_logprobs": [[5, -0.25]]} if line.get("logprobs") else {}
            self.tell({"event": "token", "id": name, "token": made[-1], **more})
            if len(known) + len(made) - len(line["tokens"]) == line["max_new_tokens"]:
                del self.jobs[name]
                self.tell({"event": "finished", "id": name, "reason": "length"})

    def tell(self, event: dict[str, Any]) -> None:
        if not self.is_gone:
            self._hear(self.name, event)


ABOUT = {
    "max_tokens": MAX_TOKENS,
    "vocab_size": VOCAB,
    "stop_ids": [STOP],
    "model": "played",
    "layout": {"dtype": "float32"},
    "max_batch": 4,
}


class Bench:
    """The front and its played workers."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        queue: int = 8,
        keys: Path | None = None,
        about: dict[str, Any] = ABOUT,
    ) -> None:
        self.meter = Meter()
        self.keys = Keys(keys)
        self.router = Router(self.meter, longest_queue=queue, tenants=self.keys.tenants)
        self.model = ServedModel("played", folder, about)
        self.front = Front(self.model, self.router, self.keys, self.meter)
        self.workers = [self.join(f"w{number}") for number in range(1, workers + 1)]
        self.address = Address()

    def join(self, name: str, seats: int = 4) -> Played:
        worker = Played(name, self.router.hear)
        self.router.join(worker, seats)
        return worker

    @contextlib.asynccontextmanager
    async def listening(self, target: str = "127.0.0.1:0") -> AsyncIterator[Address]:
        """Answer over HTTP."""
        has_keys = not self.keys.is_open
        self.server = server = FrontServer(Address.parse(target), has_keys=has_keys)
        server.bind()
        await server.start(self.front.app(), self.front.board.close)
        self.address = server.address
        try:
            yield server.address
        finally:
            await server.close()

    @contextlib.asynccontextmanager
    async def stepping(self, pause_s: float = 0.0) -> AsyncIterator[None]:
        """Let the workers compute all the time."""

        async def step() -> None:
            while True:
                for worker in self.workers:
                    worker.step()
                await asyncio.sleep(pause_s)

        task = asyncio.create_task(step())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def post(
        self, body: Any, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Ask; give status, headers and the body as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"content-type": "application/json", **headers}
        status, got, data = await self.exchange("POST", path, raw, told)
        return status, got, json.loads(data) if data else None

    async def exchange(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Make one request over a connection of its own."""
        reader, writer = await self.connect()
        try:
            writer.write(self.head(method, path, len(body), headers) + body)
            return await read_answer(reader)
        finally:
            writer.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.address.path:
            return await asyncio.open_unix_connection(self.address.path)
        return await asyncio.open_connection(self.address.host, self.address.port)

    def head(
        self, method: str, path: str, size: int, headers: dict[str, str] | None = None
    ) -> bytes:
        told = {"host": str(self.address), "content-length": str(size), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)
    }
    status = int(head[0].split()[1])
    if headers.get("transfer-encoding") != "chunked":
        return status, headers, await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return status, headers, body


def events(body: bytes) -> list[Any]:
    """Read server-sent events."""
    found = [part[6:] for part in body.split(b"\n\n") if part.startswith(b"data: ")]
    return [json.loads(one) if one != b"[DONE]" else "[DONE]" for one in found]


def completion(prompt: Any, count: int, **more: Any) -> dict[str, Any]:
    """A body for the played model."""
    told = {"model": "played", "prompt": prompt, "max_tokens": count, "temperature": 0}
    return told | more


def words(tokens: list[int]) -> str:
    """How tokens read."""
    return " ".join(f"w{token}" for token in tokens)
