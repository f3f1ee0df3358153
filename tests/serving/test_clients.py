"""OpenAI's own client over a real socket, and its own schema for what it gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from serving.bench import Bench, completion, continuation, events, words

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")

MESSAGES: Any = [
    {"role": "developer", "content": "w3"},
    {"role": "user", "content": [{"type": "text", "text": "w5 w7"}]},
]
ANSWER = continuation([2, 3, 0, 5, 7, 1], 6)  # "system" is no word of this tokenizer


def ask(folder: Path, use: Callable[[Any], Any], **options: Any) -> Any:
    """Let `use` work with a client, in a thread."""

    async def main() -> Any:
        bench = Bench(folder, **options)
        async with asyncio.timeout(PATIENCE_S), bench.listening() as address, bench.stepping(1e-3):

            def run() -> Any:
                key = "key-of-sixteen-signs"
                url = f"http://{address}/v1"
                with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                    return use(client)

            return await asyncio.to_thread(run)

    return asyncio.run(main())


def test_models(tokenizer_folder: Path) -> None:
    def use(client: Any) -> list[str]:
        return [one.id for one in client.models.list()] + [client.models.retrieve("played").id]

    assert ask(tokenizer_folder, use) == ["played", "played"]


def test_a_chat(tokenizer_folder: Path) -> None:
    def use(client: Any) -> Any:
        return client.chat.completions.create(
            model="played", messages=MESSAGES, max_completion_tokens=6, temperature=0
        )

    told = ask(tokenizer_folder, use)
    assert told.choices[0].message.content == words(ANSWER)
    assert told.choices[0].finish_reason == "length"
    assert told.usage.prompt_tokens_details.cached_tokens == 5


def test_a_stream(tokenizer_folder: Path) -> None:
    def use(client: Any) -> list[Any]:
        return list(
            client.chat.completions.create(
                model="played",
                messages=MESSAGES,
                max_tokens=6,
                temperature=0,
                n=2,
                stream=True,
                stream_options={"include_usage": True},
            )
        )

    *chunks, last = ask(tokenizer_folder, use)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [words(ANSWER)] * 2
    assert last.usage.completion_tokens == 12


def test_the_helper_for_streams(tokenizer_folder: Path) -> None:
    def use(client: Any) -> Any:
        terms = {"model": "played", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
        with client.chat.completions.stream(**terms) as stream:
            return [event.delta for event in stream if event.type == "content.delta"]

    assert "".join(ask(tokenizer_folder, use)) == words(ANSWER)


def test_completions_of_token_ids(tokenizer_folder: Path) -> None:
    def use(client: Any) -> Any:
        return client.completions.create(
            model="played", prompt=[[5, 6], [7, 8]], max_tokens=3, temperature=0
        )

    told = ask(tokenizer_folder, use)
    assert [one.text for one in told.choices] == [
        words(continuation(prompt, 3)) for prompt in ([5, 6], [7, 8])
    ]


def test_errors_are_those_that_the_client_knows(tokenizer_folder: Path, tmp_path: Path) -> None:
    def use(client: Any) -> Any:
        told = []
        for wrong in (
            {"model": "nope"},
            {"model": "played", "top_logprobs": 2},
            {"model": "played", "extra_body": {"foo": 1}},
            {"model": "played", "functions": [{"name": "f"}]},
            {"model": "played", "max_tokens": 9999},
        ):
            try:
                client.chat.completions.create(messages=MESSAGES, **wrong)
            except openai.APIStatusError as error:
                told.append((type(error).__name__, error.param, error.code))
        return told

    assert ask(tokenizer_folder, use) == [
        ("NotFoundError", "model", "model_not_found"),
        ("BadRequestError", "top_logprobs", "invalid_value"),
        ("BadRequestError", "foo", "unknown_field"),
        ("BadRequestError", "functions", "unsupported_field"),
        ("BadRequestError", "max_tokens", "context_length_exceeded"),
    ]
    keys = tmp_path / "keys"
    keys.write_text("another-of-sixteen-signs\n")
    keys.chmod(0o600)
    with pytest.raises(openai.AuthenticationError):
        ask(tokenizer_folder, lambda client: client.models.list(), keys=keys)


def test_every_body_is_what_openai_s_schema_says(tokenizer_folder: Path) -> None:
    from serving.openai_schema import complaints

    async def main() -> dict[str, list[str]]:
        bench = Bench(tokenizer_folder)
        found: dict[str, list[str]] = {}
        chat = {"model": "played", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
            path = "/v1/chat/completions"
            _, _, told = await bench.post(chat | {"n": 2}, path)
            found["chat"] = complaints("CreateChatCompletionResponse", told)
            _, _, told = await bench.post(chat | {"logprobs": True, "top_logprobs": 1}, path)
            assert len(told["choices"][0]["logprobs"]["content"]) == 4
            found["logprobs"] = complaints("CreateChatCompletionResponse", told)
            _, _, told = await bench.post(completion([5], 4, logprobs=1))
            assert told["choices"][0]["logprobs"]["text_offset"] == [0, 3, 7, 11]
            found["logprobs of completions"] = complaints("CreateCompletionResponse", told)
            _, _, told = await bench.post(completion([5], 4))
            found["completion"] = complaints("CreateCompletionResponse", told)
            more = {"logprobs": True, "stream": True, "stream_options": {"include_usage": True}}
            raw = json.dumps(chat | more).encode()
            kind = {"content-type": "application/json"}
            _, _, data = await bench.exchange("POST", path, raw, kind)
            for number, chunk in enumerate(events(data)[:-1]):
                told_of = complaints("CreateChatCompletionStreamResponse", chunk)
                found[f"chunk {number}"] = told_of
            _, _, told = await bench.post({"model": "nope"}, path)
            found["error"] = complaints("ErrorResponse", told)
            for path, name in (
                ("/v1/models", "ListModelsResponse"),
                ("/v1/models/played", "Model"),
            ):
                _, _, data = await bench.exchange("GET", path)
                found[path] = complaints(name, json.loads(data))
        return found

    found = asyncio.run(main())
    assert len(found) >= 7
    assert not {what: errors for what, errors in found.items() if errors}
