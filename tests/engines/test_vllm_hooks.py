"""vLLM's inside, where ours takes hold of it, is what it was when somebody read it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from engines.vllm_process import PYTHON, needs_vllm, vllm_environment

FOLDER = Path(__file__).parent
READ = FOLDER / "vllm_hooks.json"


@needs_vllm
def test_every_hook_is_the_one_that_was_read() -> None:
    run = subprocess.run(
        [PYTHON, str(FOLDER / "vllm_hooks.py")],
        env=vllm_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    there = json.loads(run.stdout[run.stdout.index("{") :])
    read = json.loads(READ.read_text())
    changed = [
        f"{name}: {hook['signature']} became {(there['hooks'].get(name) or {}).get('signature')}"
        for name, hook in read["hooks"].items()
        if there["hooks"].get(name) != hook
    ]
    assert there["hooks"].keys() == read["hooks"].keys()
    assert not changed, (
        f"vLLM {there['version']} is not as {read['version']} was, where ours takes hold of it; "
        "read what changed, adapt, then write vllm_hooks.json anew:\n" + "\n".join(changed)
    )


def test_each_hook_was_there_when_it_was_read() -> None:
    read = json.loads(READ.read_text())
    assert len(read["hooks"]) > 60
    assert not [name for name, hook in read["hooks"].items() if hook is None]
