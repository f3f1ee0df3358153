"""`prefixcache up` with answers that are held to JSON, whose worker is killed in mid-sentence."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serving.talking import TEMPLATES
from serving.test_up import Up
from worker.zoo import save_talker

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")
pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")
pytestmark = pytest.mark.slow

NAMES = {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 12}
SCHEMA = {
    "type": "object",
    "properties": {"names": NAMES | {"maxItems": 12}, "n": {"type": "integer"}},
    "required": ["names", "n"],
    "additionalProperties": False,
}
FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "names", "schema": SCHEMA, "strict": True},
}


@pytest.mark.parametrize(
    ("temperature", "count"), [(0.0, 1), (1.0, 2)], ids=["greedy", "two that are drawn"]
)
def test_json_whose_worker_is_killed_is_the_same_json(
    up: Up, temperature: float, count: int
) -> None:
    url = up.says(r"(http://127\.0\.0\.1:\d+/v1)")[1]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for attempt in range(10):  # on a bad day the answer is whole before it is killed
            messages: Any = [{"role": "user", "content": f"Names, please ({attempt}, {count})."}]
            terms = {
                "model": "tiny",
                "messages": messages,
                "response_format": FORM,
                "temperature": temperature,
                "seed": 5,
                "n": count,
                "max_tokens": 300,
            }
            before = up.meters()
            since = len(up.said)
            texts = [""] * count
            reasons: set[str] = set()
            with client.chat.completions.create(**terms, stream=True) as stream:
                for number, chunk in enumerate(stream):
                    choice = chunk.choices[0]
                    texts[choice.index] += choice.delta.content or ""
                    reasons |= {choice.finish_reason} - {None}
                    if number == 12 and (found := up.busy()) is not None:
                        name, pid = found
                        os.kill(pid, signal.SIGKILL)
            if up.meters()["moved_total"] > before["moved_total"]:
                break
        assert up.meters()["moved_total"] > before["moved_total"]
        up.says(rf"{name} \(pid \d+\) is ready", since)
        whole = client.chat.completions.create(**terms).choices
    assert texts == [one.message.content for one in whole]
    assert {one.finish_reason for one in whole} == reasons
    for text, one in zip(texts, whole, strict=True):
        if one.finish_reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tmp_path_factory.mktemp("talker")
    save_talker(model, TEMPLATES["plain"])
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        found = Up(model, Path(folder), "--memory", "16MiB")
        try:
            for name in ("w1", "w2"):
                found.says(rf"{name} \(pid \d+\) is ready")
            yield found
        finally:
            found.end()
