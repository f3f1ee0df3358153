from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefixcache
from cli.running import At
from prefixcache.client import Client, Session
from service.service_process import LAYOUT, running, sizes

SYSTEM = "you are a guide in a museum and answer in few words . today is "
REST = " . say so when you do not know something , and never guess : "


@pytest.fixture(scope="session")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="session")
def service(sockets: Path) -> Iterator[At]:
    """A service of 64 blocks of 4 tokens, in another process."""
    with running(f"unix:{sockets}/cli.sock", *sizes(64, 4)) as service:
        yield At(service.target)


@pytest.fixture
def at(service: At) -> At:
    """The same, with nothing stored."""
    with prefixcache.connect(service.target) as client:
        forget(client)
    return service


def forget(client: Client) -> None:
    for namespace in client.snapshot().namespaces:
        client.reset(namespace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a real tokenizer: a word or a sign is a token."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    text = f"{SYSTEM}{REST} 0 1 2 3 4 5 6 7 8 9 10 12 27 2026 - user hello old <|end|>"
    words = {word: number for number, word in enumerate(["?", *dict.fromkeys(text.split())])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


@pytest.fixture
def session(at: At) -> Iterator[Session]:
    with prefixcache.connect(at.target) as client:
        yield client.attach("tiny", LAYOUT, name="ann")
