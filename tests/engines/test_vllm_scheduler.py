"""vLLM's own schedulers, both kinds, over leases: any order of steps, with a runner for show."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engines.vllm_process import PYTHON, needs_vllm, vllm_environment, write_model

SCRIPT = Path(__file__).with_name("vllm_scheduler.py")
SEEDS = range(2, 8)


@needs_vllm
def test_steps_that_overlap_are_read_rightly_and_nothing_is_left(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    run = subprocess.run(
        [PYTHON, str(SCRIPT), str(tmp_path / "model"), *map(str, SEEDS)],
        env=vllm_environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if "checked" in line]
    assert len(lines) == 2 * len(SEEDS)
    assert all("'lost': 0" not in line and "'reused': 0" not in line for line in lines)
    assert all("'moved': 0" not in line for line in lines)
