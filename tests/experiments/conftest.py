from __future__ import annotations

from pathlib import Path

import pytest

from prefixcache_bench.experiments.readers.load import load
from prefixcache_bench.experiments.traces import Trace

SMALL = Path(__file__).parent / "chats.jsonl.gz"
"""195 requests: prefixcache generate chats --count 60 --seed 7 --prefixes 3 --prefix-tokens 70
--question-tokens 9 --answer-tokens 21 --turns 3 --packed"""


@pytest.fixture(scope="session")
def small() -> Trace:
    return load(str(SMALL))
