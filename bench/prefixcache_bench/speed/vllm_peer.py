"""vLLM as a peer: a process of its own Python, asked over a pipe, its figures looked at."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from prefixcache.plain_json import json_text
from prefixcache_bench.speed import vllm_engine

PYTHON_VARIABLE: Final = "PREFIXCACHE_VLLM_PYTHON"
BLOCK_SIZE: Final = 32
"""Tokens; the smallest block of vLLM's attention on a CPU."""
MAX_TOKENS: Final = 4096
MEMORY_BYTES: Final = 1 << 30
ABSENT: Final = f"not measured: neither --vllm nor ${PYTHON_VARIABLE} names a Python that has vLLM"
_QUOTED_LINES: Final = 3
_END_S: Final = 20
_SILENCE_S: Final = 900.0
"""Longer than this no answer takes on any machine: it hangs, and is ended."""


class VllmFailed(RuntimeError):
    """VLLM did not start, ended, or answered what cannot be the measurement that was asked for."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What vLLM counted of one request; times in seconds of one monotonic clock."""

    prompt: int
    cached: int
    """Tokens of the prompt that were not computed, as vLLM counted them."""
    generated: int
    queued_s: float
    first_s: float
    last_s: float

    @classmethod
    def read(cls, told: dict[str, Any]) -> Generated:
        """Read one request's figures; `VllmFailed` if one is missing or times run backwards."""
        missing = [name for name in cls.__slots__ if told.get(name) is None]
        if missing:
            raise VllmFailed(f"vLLM told nothing of: {', '.join(missing)}")
        made = cls(**{name: told[name] for name in cls.__slots__})
        if not 0 < made.queued_s <= made.first_s <= made.last_s:
            raise VllmFailed(
                f"vLLM's times do not follow each other: queued {made.queued_s}, first token "
                f"{made.first_s}, last token {made.last_s}"
            )
        return made

    @property
    def first_token_s(self) -> float:
        """Seconds from the request's entry into the engine to its first token."""
        return self.first_s - self.queued_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one; `VllmFailed` where there is no second one."""
        if self.generated < 2 or self.last_s == self.first_s:
            raise VllmFailed(
                f"decoding cannot be timed: {self.generated} tokens in "
                f"{self.last_s - self.first_s} s after the first"
            )
        return (self.generated - 1) / (self.last_s - self.first_s)


def cold(found: Generated) -> Generated:
    """Give it back if all of its prompt was computed; else `VllmFailed`."""
    if found.cached:
        raise VllmFailed(
            f"a prompt of {found.prompt:,} tokens that vLLM never saw: it took {found.cached:,} "
            "from its cache, so this is no cold prefill"
        )
    return found


def warm(found: Generated, seen: int) -> Generated:
    """Give it back if every whole block of the first `seen` tokens was cached; else `VllmFailed`.

    The last token of a prompt is computed in any case.
    """
    expected = min(seen, found.prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
    if not expected or found.cached < expected:
        raise VllmFailed(
            f"a prompt of {found.prompt:,} tokens, {seen:,} of which vLLM has seen: it took "
            f"{found.cached:,} from its cache, not {expected:,}, so this is no cached prefill"
        )
    return found


def decode_tokens_per_s(batch: Sequence[Generated]) -> float:
    """Tokens per second of requests that decode side by side: the sum of their own rates."""
    return sum(one.tokens_per_s for one in batch)


class Vllm:
    """A running vLLM: `ready` before it is asked."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str], threads: int = 1) -> None:
        self._process = process
        self._log = log
        self._threads = threads
        self.pid = process.pid
        self.about: dict[str, Any] = {}
        """Its version, torch's, threads, whether the model is compiled, tokens per block."""

    def ready(self) -> Self:
        """Wait until it has loaded its model, and give itself.

        Raises:
            VllmFailed: it ended, or computes with another number of threads.
        """
        self.about = self._answer()
        if self.about["threads"] != self._threads:
            raise VllmFailed(f"vLLM runs {self.about['threads']} threads, not {self._threads}")
        return self

    def generate(self, prompts: list[list[int]], count: int) -> list[Generated]:
        """Generate `count` tokens for each prompt, all as one batch.  It blocks until all are done.

        Raises:
            VllmFailed: it ended or hung, or its answer is not whole.
        """
        made = [Generated.read(told) for told in self._ask(prompts=prompts, count=count)]
        if [(one.prompt, one.generated) for one in made] != [(len(p), count) for p in prompts]:
            raise VllmFailed(
                f"asked for {count} tokens after prompts of {[len(p) for p in prompts]} tokens, "
                f"vLLM gave {[one.generated for one in made]} after {[one.prompt for one in made]}"
            )
        return made

    def counts(self) -> dict[str, int]:
        """Give the steps planned so far and, of an engine that leases, what it asked the service.

        Raises:
            VllmFailed: it ended.
        """
        return {str(name): int(number) for name, number in self._ask(counts=True).items()}

    def play(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Play requests that come and go at its steps; give each when it has ended.

        Args:
            jobs: as `vllm_engine.play` takes them.

        Raises:
            VllmFailed: it ended.
        """
        self._tell(jobs=list(jobs))
        for _ in jobs:
            yield self._answer()

    def _ask(self, **what: Any) -> Any:
        self._tell(**what)
        return self._answer()

    def _tell(self, **what: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says it
            self._process.stdin.write(json_text(what) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        hangs = threading.Timer(_SILENCE_S, self._process.kill)
        hangs.daemon = True
        hangs.start()
        line = self._process.stdout.readline()
        hangs.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = [text.strip() for text in self._log if text.strip()][-_QUOTED_LINES:]
        raise VllmFailed(
            f"vLLM ended with exit code {code}: {' / '.join(last) or 'it said nothing'}"
        )


@contextlib.contextmanager
def vllm(
    python: str,
    model: str,
    dtype: str,
    max_requests: int,
    *,
    keep_path: bool = False,
    threads: int = 1,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Vllm]:
    """Run vLLM with its prefix cache on in a process of its own, until the end.

    Args:
        python: the Python that has vLLM installed.
        model: folder of the model.
        dtype: what it computes in.
        max_requests: how many it decodes side by side.
        keep_path: whether it finds modules where `$PYTHONPATH` says.
        threads: that it computes with.
        wait: whether it is `ready` when it is given: else others can start meanwhile.
        settings: further ones of vLLM's; they count before those made here.

    Raises:
        VllmFailed: there is no such Python, it has no vLLM, or vLLM does not start.
    """
    options = {
        "model": model,
        "dtype": dtype,
        "enable_prefix_caching": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_TOKENS,
        "max_num_batched_tokens": MAX_TOKENS,
        "max_num_seqs": max_requests,
        "kv_cache_memory_bytes": MEMORY_BYTES,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,  # else no request has times
    } | settings
    command = [python, "-P", vllm_engine.__file__, json_text(options)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(python, keep_path=keep_path, threads=threads),
            )
        except OSError as error:
            raise VllmFailed(f"{python} does not start: {error.strerror}") from error
        stack.callback(_end, process)
        made = Vllm(process, log, threads)
        yield made.ready() if wait else made


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_S)  # what it has leased, it gives back
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def environment(python: str, *, keep_path: bool = False, threads: int = 1) -> dict[str, str]:
    """Give what a process of vLLM's runs in: so many threads, and nothing asked of a network."""
    found = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a thread on every core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends when it is told to
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not keep_path:
        found.pop("PYTHONPATH", None)
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():  # comes with vLLM's wheel for CPUs, which wants it loaded first
        found["LD_PRELOAD"] = ":".join(filter(None, [found.get("LD_PRELOAD"), str(openmp)]))
    return found
