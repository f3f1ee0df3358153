"""Packed weights: made once, mapped by all, made anew when they are not what they were."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.cpu.library import library
from prefixcache_worker import mapped
from prefixcache_worker import model as model_module
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Request
from prefixcache_worker.weights import VERSION, Damaged, making, open_packed, write
from worker.zoo import answers, build

TENSORS = {
    "a": torch.arange(10, dtype=torch.float32).view(2, 5),
    "b": torch.full((3,), 2.5, dtype=torch.bfloat16),
    "none": torch.empty(0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A tiny model with the demo model's tokenizer, and a cache in which its weights are packed."""
    folder = tmp_path_factory.mktemp("made")
    build("llama", vocab_size=49152).save_pretrained(folder / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tiny" / name).write_bytes((demo_folder / name).read_bytes())
    compiled = library()
    if compiled:  # so nobody who is given this cache compiles it once more
        (folder / "cache" / "native").mkdir(mode=0o700, parents=True)
        shutil.copy2(compiled.path, folder / "cache" / "native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIXCACHE_CACHE", str(folder / "cache"))
        assert Model.load(folder / "tiny").packed_now
    return folder


@pytest.fixture
def tiny_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for kept in (tmp_path / "cache").iterdir():
        kept.chmod(0o700)
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tiny"


def files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder.parent / "cache" / "weights").iterdir() if p.name != ".lock")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "made"
    write(path, {"of": ["a", 1]}, TENSORS)
    found = open_packed(path)
    assert found is not None
    assert found.facts == {"of": ["a", 1]}
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(t.data_ptr() % 64 == 0 for t in found.tensors.values() if t.numel())
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_packed(tmp_path / "none") is None


def test_mapped_weights_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "made"
    write(path, {}, TENSORS)
    script = (
        "import sys, pathlib\nfrom prefixcache_worker.weights import open_packed\n"
        "open_packed(pathlib.Path(sys.argv[1])).tensors['a'].fill_(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], check=False, capture_output=True)
    assert done.returncode < 0  # a signal: the memory is protected
    found = open_packed(path)
    assert found is not None
    assert torch.equal(found.tensors["a"], TENSORS["a"])


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "made"
    write(path, {"of": 1}, TENSORS)
    whole = path.read_bytes()
    bad = [b"", whole[:50], whole[:-1], whole + b"\0", b"x" + whole[1:]]
    bad += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for at in (20, 28, 33, 64, 96, 130, 4096, 4100, len(whole) - 1)
    ]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(Damaged):
            open_packed(path)
    path.write_bytes(whole)
    assert open_packed(path)


def test_what_is_not_a_file_of_this_user_alone_is_not_read(tmp_path: Path) -> None:
    path, other = tmp_path / "made", tmp_path / "other"
    write(other, {}, TENSORS)
    path.symlink_to(other)
    with pytest.raises(Damaged):
        open_packed(path)
    assert not path.is_symlink()
    os.link(other, path)
    with pytest.raises(Damaged):
        open_packed(path)
    path.mkdir()
    with pytest.raises(Damaged):
        open_packed(path)


def test_older_versions_of_the_same_weights_go(tmp_path: Path) -> None:
    path = tmp_path / f"model.float32.v{VERSION}"
    old, others = tmp_path / "model.float32.v0", tmp_path / "model.bfloat16.v0"
    for other in (old, others):
        other.write_text("")
    write(path, {}, TENSORS)
    assert sorted(tmp_path.iterdir()) == [others, path]


def test_a_second_load_maps_what_the_first_one_made(tiny_folder: Path) -> None:
    [path] = files(tiny_folder)
    before = path.stat()
    found = Model.load(tiny_folder)
    assert (found.kind, found.packed_now) == ("native", False)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    plain = Model.load(tiny_folder, weights="private")
    assert plain.kind == "lean"
    for name in ("name", "layout", "max_tokens", "vocab_size", "stop_ids", "windows"):
        assert getattr(found, name) == getattr(plain, name)
    prompt = plain.encode("Once upon a time")
    assert found.encode("Once upon a time") == prompt
    told = [
        answers(Engine(one, None, None), Request("a", prompt, 12))["a"] for one in (found, plain)
    ]
    assert told[0].tokens == told[1].tokens
    assert told[0].text == told[1].text


def test_a_second_worker_needs_no_transformers(tiny_folder: Path) -> None:
    script = (
        "import sys\nfrom prefixcache_worker.model import Model\n"
        "import prefixcache_worker.process\n"
        "print(Model.load(sys.argv[1]).kind, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_folder], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["native", "False"]


def test_damaged_weights_are_made_anew_and_that_is_said(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = files(tiny_folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = Model.load(tiny_folder)
    assert "is made anew: its digest" in capsys.readouterr().err
    assert again.packed_now
    assert path.read_bytes() == whole


def test_a_changed_end_of_answers_is_not_missed(tiny_folder: Path) -> None:
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert set(Model.load(tiny_folder).stop_ids) >= {7, 9}


def test_weights_that_answer_otherwise_are_made_anew(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another compiler or processor, say, on which the C library is wrong."""
    seen = mapped._some_logits
    monkeypatch.setattr(mapped, "_some_logits", lambda *given: seen(*given) * 1.5)
    assert Model.load(tiny_folder).kind == "native"
    assert "from those that its maker saw" in capsys.readouterr().err


def test_without_a_place_for_them_a_worker_has_its_own(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny_folder.parent / "cache")
    (tiny_folder.parent / "cache").mkdir()
    (tiny_folder.parent / "cache" / "weights").write_text("no folder")
    model = Model.load(tiny_folder)
    assert (model.kind, model.packed_now) == ("native", False)
    assert "not shared with other workers" in capsys.readouterr().err


def test_of_several_that_want_to_make_it_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(tmp_path))
    path, both = tmp_path / "weights" / "made", threading.Barrier(2)

    def make(number: int) -> bool:
        both.wait(PATIENCE_S)
        with making(path):
            if open_packed(path) is not None:
                return False
            write(path, {"by": number}, TENSORS)
            return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(make, range(2))) == [False, True]


def test_eight_bits_are_made_once_and_are_another_model(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Model.load(tiny_folder)
    first = Model.load(tiny_folder, weights="int8")
    assert (first.name, first.packed_now) == (f"{plain.name}+int8", True)
    assert first.made_invariant().name == f"{plain.name}+int8+invariant"
    assert [path.name.split(".", 1)[1] for path in files(tiny_folder)] == [
        f"float32.int8.v{VERSION}",
        f"float32.v{VERSION}",
    ]
    again = Model.load(tiny_folder, weights="int8")
    assert (again.name, again.packed_now, again.gap) == (first.name, False, first.gap)
    assert 1e-4 < again.gap < 0.1
    path, _ = files(tiny_folder)
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert Model.load(tiny_folder, weights="int8").packed_now
    assert f"{path} is made anew: its digest" in capsys.readouterr().err
    Model.load(tiny_folder)
    assert capsys.readouterr().err == ""


def test_eight_bits_are_refused_where_they_would_be_ignored_or_ruin_answers(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("gpt2", vocab_size=49152).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "other")
    with pytest.raises(Unsupported, match="only the network in C has weights in eight bits"):
        Model.load(tmp_path / "other", weights="int8")
    with pytest.raises(Unsupported, match="only the network in C"):
        Model.load(tiny_folder, weights="int8", lean=False)
    monkeypatch.setattr(model_module, "EIGHT_BITS_TOLERANCE", 1e-6)
    with pytest.raises(Unsupported, match="other logits in eight bits"):
        Model.load(tiny_folder, weights="int8")


def test_no_other_way_to_hold_weights_is_taken(tiny_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="weights 'int3'"):
        Model.load(tiny_folder, weights="int3")
