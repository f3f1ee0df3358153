"""The clients that are tried, and how: a script for each, run by the environment that has it.

```
tests/clients/scripts/with_llm.py   URL MODEL [FOLDER]   ──►   {"client": "llm 0.36"}
                                                               {"what": "chat", "ok": true, ...}
```
A script imports its client and nothing of prefixcache, and does what the client's users do.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
LONGEST_S = 900.0
"""Longer than this no client takes on any machine: it hangs."""
LIGHT = (
    *("openai", "litellm", "langchain", "llm", "pydantic_ai", "instructor", "openai_agents"),
    "openai_node",
)
HEAVY = ("inspect", "lm_eval")


@dataclass
class Tried:
    """What a client's script told."""

    name: str
    client: str = ""
    """With its version."""
    done: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """What the endpoint says by its name that it does not serve."""
    failed: dict[str, str] = field(default_factory=dict)
    """What did not work, and why."""


def try_client(name: str, folder: Path, url: str, model: str, files: Path) -> Tried:
    """Run a client's script to its end.

    Args:
        name: of `LIGHT` or `HEAVY`.
        folder: the environment that has it.
        url: of the endpoint.
        model: what is served.
        files: the model's folder, for clients that read its tokenizer.
    """
    node = SCRIPTS / f"with_{name}.mjs"
    if node.exists():
        command = ["node", str(node), url, model, str(folder / "node")]
    else:
        python = str(folder / "bin" / "python")
        script = str(SCRIPTS / f"with_{name}.py")
        command = [python, "-W", "ignore", script, url, model, str(files)]
    tried = Tried(name)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        tried.failed["end"] = f"it does not come to its end within {LONGEST_S:.0f} s"
        return tried
    told: list[dict[str, Any]] = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    ]
    for one in told:
        if "client" in one:
            tried.client = one["client"]
        elif one["ok"]:
            tried.done.append(one["what"])
        elif "is not served" in one["why"]:
            tried.refused[one["what"]] = one["why"]
        else:
            tried.failed[one["what"]] = one["why"]
    if done.returncode or not tried.client:
        tried.failed["end"] = done.stderr[-2000:] or f"it ended with {done.returncode}"
    return tried


def lacks(name: str, folder: Path | None) -> str:
    """Say why a client cannot be tried; empty: it can."""
    if folder is None or not (folder / "bin" / "python").exists():
        return "no environment with clients is there (make clients-environment)"
    if (SCRIPTS / f"with_{name}.mjs").exists():
        if shutil.which("node") is None:
            return "node is not on this machine"
        if not (folder / "node" / "node_modules").is_dir():
            return "npm could not install its packages"
    return ""
