from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers

from patience import PATIENCE_S
from prefixcache.errors import NotFound
from prefixcache.model_folders import own_cache
from prefixcache_worker import smollm2
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Request
from worker.zoo import answers

CHAT = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("PREFIXCACHE_CACHE", raising=False)
    assert own_cache() == Path("/x/prefixcache")
    monkeypatch.setenv("PREFIXCACHE_CACHE", "/y")
    assert own_cache() == Path("/y")


def test_a_missing_package_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match="make demo"):
        smollm2.folder()
    assert not list(tmp_path.iterdir())


def test_of_two_that_convert_at_the_same_time_both_get_the_whole_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_folder: Path
) -> None:
    both = threading.Barrier(2)

    def convert(source: Path, target: Path, *, quiet: bool = False) -> None:
        (target / "config.json").write_text("half")
        both.wait(PATIENCE_S)  # now each is in the middle of it
        (target / "config.json").write_text("whole")

    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: smollm2.folder(quiet=True), range(2)))
    assert folders == [tmp_path / smollm2.FOLDER] * 2
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.FOLDER]
    assert (folders[0] / "config.json").read_text() == "whole"


def test_its_greedy_answer_is_that_of_transformers(demo_folder: Path) -> None:
    model = Model.load(smollm2.NAME)
    assert model.kind == "native"
    prompt = model.chat(CHAT)
    module = transformers.AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    full = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    done = answers(Engine(model, None, None), Request("a", prompt, 16))["a"]
    assert list(done.tokens) == full[0, len(prompt) :].tolist()
    assert "Paris" in done.text
