"""Runs the Triton kernels: interpreted, compiled ahead of time, and on a GPU if there is one.

Triton decides when a kernel is defined whether it is interpreted, so each way has its own process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

import prefixcache_kernels
from prefixcache.errors import Unsupported
from prefixcache_kernels import ahead, attention, transfer

ROOT = Path(__file__).resolve().parents[2]
OLD_TRITON = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
NEW_NUMPY = tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)


def run(*command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )


CASES = Path(__file__).with_name("triton_cases.py")
NAMES = re.findall(r"^def (test_\w+)", CASES.read_text(), re.MULTILINE)


def run_cases(folder: Path, *, interpret: bool) -> dict[str, list[str]]:
    """Run all cases in one process, which takes seconds to start; give what failed, by name."""
    report = folder / "cases.xml"
    options = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit2", f"--junitxml={report}")
    ran = run("-m", "pytest", *options, str(CASES), interpret=interpret)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    failed: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written a moment ago
        found = failed.setdefault(case.attrib["name"].partition("[")[0], [])
        found += [one.text or "" for one in case if one.tag in ("failure", "error")]
    assert ran.returncode == 0 or any(failed.values()), ran.stdout + ran.stderr
    return failed


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_cases(tmp_path_factory.mktemp("interpreted"), interpret=True)


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_cases(tmp_path_factory.mktemp("gpu"), interpret=False)


@pytest.mark.skipif(
    OLD_TRITON and NEW_NUMPY, reason="the interpreter of triton < 3.7 fails under numpy >= 2.4"
)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_oracle_in_the_interpreter(
    interpreted: dict[str, list[str]], name: str
) -> None:
    assert interpreted[name] == [], "\n".join(interpreted[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_oracle_on_a_gpu(on_a_gpu: dict[str, list[str]], name: str) -> None:
    assert on_a_gpu[name] == [], "\n".join(on_a_gpu[name])


REPRESENTATIVE = (
    "store bf16 as fp8",
    "decode bf16 32/8x128 block 16",
    "decode bf16 on fp8",
    "prefill bf16 32/8x128 block 16",
    "shared bf16 32/8x128 for 256",
)
"""Variants that cover every kernel function; `make kernels-ahead` compiles them all."""


def test_kernels_compile_ahead_of_time_and_need_no_more_than_the_committed_table_says() -> None:
    only = [word for name in REPRESENTATIVE for word in ("--only", name)]
    ran = run("-W", "error", "-m", "prefixcache_kernels.ahead", "--json", *only, interpret=False)
    assert ran.stdout, ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["complaints"] == []
    assert ran.returncode == 0
    assert {kernel["target"] for kernel in answer["kernels"]} == set(ahead.TARGETS)
    assert len(answer["kernels"]) >= len(ahead.TARGETS) * len(REPRESENTATIVE)


def test_the_committed_table_has_every_variant_without_a_spill_and_with_wide_loads() -> None:
    _, table = ahead.read_table()
    names = {(t, variant.name) for t in ahead.TARGETS for variant in ahead.variants(t)}
    assert set(table) == names
    for one in table.values():
        assert one.spilled_bytes == 0, one
        assert one.load_bytes == ahead.VECTOR_BYTES, one
        assert 0 < one.registers <= 256, one
        # What a program may have on an H100, and on an MI300.
        assert one.shared_bytes <= (64 if one.target == "gfx942" else 160) * 1024, one


def test_the_document_has_the_committed_table() -> None:
    path = ROOT / ahead.DOCUMENT
    assert ahead.document(path) == path.read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled_bytes": 4}, "spills 4 bytes"),
        ({"load_bytes": 8}, "loads at most 8 bytes"),
        ({"narrow_loads": 1000}, "1000 narrow loads"),
        ({"registers": 400}, "400 registers"),
        ({"shared_bytes": 10**6}, "1000000 bytes shared"),
        ({"variant": "nobody's"}, "is not in the table"),
    ],
    ids=str,
)
def test_whatever_gets_worse_is_named(change: dict[str, Any], complaint: str) -> None:
    one = next(iter(ahead.read_table()[1].values()))
    said = replace(one, **change).complaints(None if "variant" in change else one, same_triton=True)
    assert len(said) == 1
    assert complaint in said[0]


def test_compiling_in_an_interpreting_process_is_refused() -> None:
    ran = run("-m", "prefixcache_kernels.ahead", "--target", "sm_80", interpret=True)
    assert ran.returncode == 1
    assert "TRITON_INTERPRET is set" in ran.stderr


def test_kernels_on_cpu_tensors_say_where_to_go() -> None:
    caches = torch.zeros(2, 3, 4, 2, 16)
    query = torch.zeros(1, 4, 16)
    one = torch.zeros(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(Unsupported, match="reference runs there"):
        attention.paged_attention(query, *caches, one[None], starts, one + 1, scale=1.0)
    with pytest.raises(Unsupported, match="on a GPU"):
        transfer.store_kv(query[:, :2], query[:, :2], *caches, one.long())
    with pytest.raises(Unsupported, match="on a GPU"):
        transfer.copy_blocks(caches[None], torch.tensor([[0, 1, 1]]))


def test_the_package_does_not_import_triton_for_a_cpu() -> None:
    code = "import sys, prefixcache_kernels; sys.exit('triton' in sys.modules)"
    assert run("-c", code, interpret=False).returncode == 0
    assert "paged_attention" in prefixcache_kernels.__all__
