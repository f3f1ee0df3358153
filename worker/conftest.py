"""Modules that are made of vLLM's are looked through for examples only where it is installed."""

import re
from importlib.util import find_spec
from pathlib import Path

_FOLDER = Path(__file__).with_name("prefixcache_vllm")

collect_ignore = (
    []
    if find_spec("vllm")
    else [
        str(path)
        for path in _FOLDER.glob("*.py")
        if re.search(r"^from vllm\b", path.read_text(), re.MULTILINE)
    ]
)
