"""The connector's two sides: what is copied when, with a service and pages for show."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engines.vllm_process import PYTHON, needs_vllm, vllm_environment

SCRIPT = Path(__file__).with_name("vllm_connector.py")


@needs_vllm
def test_what_is_copied_is_what_was_leased() -> None:
    run = subprocess.run(
        [PYTHON, str(SCRIPT)],
        env=vllm_environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 4
