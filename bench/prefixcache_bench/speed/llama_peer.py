"""llama.cpp as a peer: the PyPI package `xllamacpp` in a process of its own, asked over a pipe.

```
{"prompts": [[1, 4093], ...], "count": 33}  ──►  llama.cpp's server, a slot each, greedy
{"timings": [{"cache_n": 0, "prompt_ms": ..., "predicted_per_second": ...}, ...]}  ◄──
```

Its weights are those of the demo model's package, brought to eight bits (Q8_0) once.  The wheel is
a generic build: compiled for this processor, llama.cpp may be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

from prefixcache.model_folders import own_cache
from prefixcache.plain_json import json_text
from prefixcache_worker import smollm2

SLOTS: Final = 16
_SLOT_TOKENS: Final = 2304


class LlamaFailed(RuntimeError):
    """llama.cpp is not there, ended, or did not do what was to be measured."""


def eight_bits() -> Path:
    """Give the demo model's GGUF with all its matrices in Q8_0, made if need be (150 MB, once)."""
    import gguf
    import numpy as np

    path = own_cache() / f"{smollm2.FOLDER}.q8_0.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(smollm2.find_gguf())
    part = path.with_suffix(f".{os.getpid()}")
    writer = gguf.GGUFWriter(part, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, inner = field.types[0], field.types[-1]
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_key_value(
            field.name, value, kind, inner if kind == gguf.GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        numbers = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if numbers.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            numbers = gguf.quantize(numbers, kind)
        writer.add_tensor(tensor.name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)
    return path


class Llama:
    """A running llama.cpp."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.about: dict[str, Any] = self._answer()

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[dict[str, Any]]:
        """Generate `count` tokens after each prompt, side by side; give llama.cpp's own timings.

        Raises:
            LlamaFailed: it ended, or counted other tokens than were asked for.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json_text({"prompts": prompts, "count": count}) + "\n")
        self._process.stdin.flush()
        timings: list[dict[str, Any]] = self._answer()["timings"]
        for prompt, told in zip(prompts, timings, strict=True):
            seen = (told["cache_n"] + told["prompt_n"], told["predicted_n"])
            if seen != (len(prompt), count):
                raise LlamaFailed(f"{len(prompt)} and {count} tokens; llama.cpp counted {seen}")
        return timings

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told
        raise LlamaFailed(f"llama.cpp ended with exit code {self._process.wait()}")


@contextlib.contextmanager
def llama(threads: int) -> Iterator[Llama]:
    """Run llama.cpp with the demo model in eight bits.

    Raises:
        LlamaFailed: `xllamacpp` is not installed, or it does not start.
    """
    if find_spec("xllamacpp") is None:
        raise LlamaFailed("not measured: pip install xllamacpp")
    command = [sys.executable, "-m", "prefixcache_bench.speed.llama_peer", str(eight_bits())]
    with subprocess.Popen(
        [*command, "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield Llama(process)
        finally:
            process.kill()


def serve(path: Path, threads: int, lines: IO[str], out: IO[str]) -> None:
    """Answer lines until there are no more."""
    xllamacpp: Any = import_module("xllamacpp")  # of no environment but who asks for it

    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_parallel, asked.n_ctx = SLOTS, SLOTS * _SLOT_TOKENS
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(asked)

    def one(prompt: list[int], count: int) -> dict[str, Any]:
        body = {"prompt": [prompt], "max_tokens": count, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions({**body, "cache_prompt": True})
        timings: dict[str, Any] = answer["timings"]
        return timings

    def tell(fields: dict[str, Any]) -> None:
        out.write(json_text(fields) + "\n")
        out.flush()

    tell({"version": metadata.version("xllamacpp"), "threads": threads, "weights": "Q8_0"})
    with ThreadPoolExecutor(SLOTS) as pool:
        for line in lines:
            fields = json.loads(line)
            running = [pool.submit(one, p, fields["count"]) for p in fields["prompts"]]
            tell({"timings": [each.result() for each in running]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    # What llama.cpp prints goes to standard error; the pipe is for answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(given.model, given.threads, sys.stdin, answers)
