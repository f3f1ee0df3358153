"""A front over engines of a tiny random model that writes bytes, in one process.

It says nothing by itself that is JSON, or calls a tool: what does was held to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from patience import PATIENCE_S
from prefixcache.errors import CacheError
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Failed, to_json
from prefixcache_worker.request_line import read_request
from serving.bench import Bench
from worker.zoo import spelling

PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] %}"
    '<tool_call>\n{"name": "{{ call["name"] }}", "arguments": {{ call["arguments"] | tojson }}}\n'
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MISTRAL = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}[TOOL_CALLS][{% for call in message['tool_calls'] %}"
    '{{ call["function"] | tojson }}{{ ", " if not loop.last else "]" }}{% endfor %}{% endif %}\n'
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] %}"
    '{"name": "{{ call["name"] }}", "parameters": {{ call["arguments"] | tojson }}}{% endfor %}\n'
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"plain": PLAIN, "hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}


def save_words(folder: Path, template: str) -> Path:
    """Leave the tokenizer of bytes, and a template, in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(spelling().backend_tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


class EngineWorker:
    """An engine without a service that takes the lines of a worker's input."""

    def __init__(self, model: Model, hear: Callable[[str, dict[str, Any]], None]) -> None:
        self.name = "w1"
        self.engine = Engine(model, None, None)
        self._model = model
        self._hear = hear
        self._early: list[dict[str, Any]] = []

    def send(self, line: dict[str, Any]) -> None:
        if "cancel" in line:
            self.engine.cancel(line["cancel"])
            return
        try:
            self.engine.submit(read_request(line, self._model))
        except CacheError as error:
            self._early.append(to_json(Failed(line["id"], type(error).__name__, str(error))))

    def step(self) -> None:
        early, self._early = self._early, []
        for told in [*early, *map(to_json, self.engine.step())]:
            self._hear(self.name, told)


class TalkingBench(Bench):
    """A front, and a worker that computes."""

    def __init__(self, folder: Path, model: Model) -> None:
        about = {
            "max_tokens": model.max_tokens,
            "vocab_size": model.vocab_size,
            "stop_ids": list(model.stop_ids),
            "model": model.name,
            "layout": {"dtype": "float32"},
            "max_batch": 8,
        }
        super().__init__(folder, workers=0, about=about)
        self._worker = EngineWorker(model, self.router.hear)
        self.router.join(self._worker, 8)

    @contextlib.asynccontextmanager
    async def stepping(self, pause_s: float = 0.0) -> AsyncIterator[None]:
        async def step() -> None:
            while True:
                self._worker.step()
                await asyncio.sleep(pause_s)

        task = asyncio.create_task(step())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def talk(folder: Path, model: Model, use: Callable[[Any], Any]) -> Any:
    """Let `use` work with OpenAI's client, in a thread."""
    import openai

    async def main() -> Any:
        bench = TalkingBench(folder, model)
        async with asyncio.timeout(PATIENCE_S), bench.listening() as address, bench.stepping():

            def run() -> Any:
                url = f"http://{address}/v1"
                with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                    return use(client)

            return await asyncio.to_thread(run)

    return asyncio.run(main())
