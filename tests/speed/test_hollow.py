"""The cache that stores nothing is called as the real one is."""

from __future__ import annotations

from inspect import isfunction, signature

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache_bench.speed.hollow import HollowCache

VERBS = [name for name, one in vars(HollowCache).items() if isfunction(one) and name[0] != "_"]


@pytest.mark.parametrize("verb", VERBS)
def test_it_takes_what_the_real_one_takes(verb: str) -> None:
    real = signature(getattr(PrefixCache, verb)).parameters
    assert list(signature(getattr(HollowCache, verb)).parameters) == list(real)
