"""The kernel benchmark, proven at small sizes: every section runs, and every answer is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from prefixcache_bench.speed import kernels

ROOT = Path(__file__).resolve().parents[2]
OLD_TRITON = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
NEW_NUMPY = tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)


@pytest.mark.skipif(
    OLD_TRITON and NEW_NUMPY, reason="the interpreter of triton < 3.7 fails under numpy >= 2.4"
)
def test_every_section_runs_at_small_sizes_and_every_answer_is_right(tmp_path: Path) -> None:
    path = ":".join(str(ROOT / folder) for folder in (".", "kernels", "bench"))
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "prefixcache_bench.speed.kernels", "--tiny"]
    output = tmp_path / "new" / "result.json"
    ran = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(output.read_text())
    assert result["interpreted"] is (not torch.cuda.is_available())
    assert {"command", "commit", "machine", "time", "device", "versions"} <= set(result)
    assert {row["section"] for row in result["rows"]} == set(kernels.SECTIONS)
    assert all(row["equal"] for row in result["rows"])
    assert all(row["us"] > 0 for row in result["rows"])
    assert str(output) in ran.stdout
    if result["interpreted"]:
        assert "the times mean nothing" in ran.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
