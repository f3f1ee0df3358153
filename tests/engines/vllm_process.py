"""A vLLM engine in another process, for tests, where an environment has one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from service.service_process import ROOT, environment

PYTHON = os.environ.get("PREFIXCACHE_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not PYTHON,
    reason="$PREFIXCACHE_VLLM_PYTHON names no Python that has vLLM (make vllm-environment)",
)
SCRIPT = Path(__file__).with_name("vllm_engine.py")


def vllm_environment() -> dict[str, str]:
    """Give what an engine runs in: one process, one thread, nothing asked of a network."""
    found = environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for folder in (Path(PYTHON).parents[1], Path(PYTHON).resolve().parents[1]):
        if (openmp := folder / "lib" / "libiomp5.so").exists():
            found["LD_PRELOAD"] = str(openmp)
    return found


def write_model(folder: Path, *, hears: bool = False) -> None:
    """Write the tiny model that all engines of a test run."""
    subprocess.run(
        [PYTHON, str(SCRIPT), str(folder), "write-hearing" if hears else "write"],
        env=vllm_environment(),
        check=True,
        capture_output=True,
    )


class VllmProcess:
    """One engine.  Answers come in the order of the questions."""

    def __init__(self, folder: Path, mode: str, target: str = "") -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as it
        self.process = subprocess.Popen(
            [PYTHON, str(SCRIPT), str(folder), mode, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=vllm_environment(),
            cwd=ROOT,
            text=True,
            bufsize=1,
        )
        self.ready = self._later()

    def _later(self) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()

        def read() -> None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if line:
                future.set_result(json.loads(line))
            else:
                future.set_exception(AssertionError(f"the engine ended: {self.log()[-3000:]}"))

        threading.Thread(target=read, daemon=True).start()
        return future

    def log(self) -> str:
        """Give what it has printed so far."""
        self.errors.seek(0)
        return self.errors.read()

    def ask_later(self, **what: Any) -> Future[dict[str, Any]]:
        """Ask, and go on; one question at a time."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._later()

    def ask(self, **what: Any) -> dict[str, Any]:
        """Ask, and wait."""
        return self.ask_later(**what).result(600)

    def generate_later(self, *prompts: list[int], max_tokens: int = 12) -> Future[dict[str, Any]]:
        """Answer prompts in one batch."""
        return self.ask_later(prompts=prompts, max_tokens=max_tokens)

    def generate(self, *prompts: list[int], max_tokens: int = 12) -> dict[str, Any]:
        """Answer prompts in one batch, and wait."""
        return self.generate_later(*prompts, max_tokens=max_tokens).result(600)

    def counts(self) -> dict[str, Any]:
        """Tell what it has asked the service."""
        return self.ask(counts=True)

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End it, as a user would."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if self.process.poll() is None:
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()
