"""How far a request goes: one acquire is read in one sitting, and so it is run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from prefixcache import core
from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, Namespace, WorkerId, pack

pytestmark = pytest.mark.pure_core

FOLDER = str(Path(core.__file__).parent)
ME, CHAT = WorkerId(1), Namespace("tiny-model")
SYSTEM = list(range(1000))


@contextmanager
def calls() -> Iterator[list[tuple[str, str]]]:
    """Note the file and the name of each Python function of the core that is called."""
    made: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            made.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield made
    finally:
        sys.setprofile(before)


@pytest.fixture
def cache() -> PrefixCache:
    """A cache in which twenty requests went on from one system prompt."""
    cache = PrefixCache(4096, 16)
    cache.attach(ME, CHAT, now=0.0)
    for number in range(20):
        prompt = pack([*SYSTEM, *[5000 + number] * 37])
        grant = cache.acquire(ME, CHAT, prompt, reserve=256, now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(ME, grant.lease, len(prompt) // 4, now=0.0)
        cache.release(ME, grant.lease, now=0.0)
    return cache


def test_a_plain_hit_takes_at_most_40_calls_in_10_files(cache: PrefixCache) -> None:
    prompt = pack([*SYSTEM[:992], *[9999] * 45])
    with calls() as made:
        grant = cache.acquire(ME, CHAT, prompt, reserve=256, now=1.0)
    assert isinstance(grant, Grant)
    assert grant.num_cached == 992
    assert len(made) <= 40, made
    assert len({file for file, _ in made}) <= 10, made
    with calls() as made:
        cache.commit(ME, grant.lease, 1037 + 200, pack([7] * 200), now=1.0)
    assert len(made) <= 24, made
    with calls() as made:
        cache.release(ME, grant.lease, now=1.0)
    assert len(made) <= 28, made


def test_a_namespace_is_looked_up_without_a_python_call() -> None:
    assert Namespace.__hash__ is tuple.__hash__
    assert Namespace.__eq__ is tuple.__eq__


def test_the_calls_of_a_step_do_not_grow_with_the_prompt(cache: PrefixCache) -> None:
    counts = []
    for size in (37, 3700):
        prompt = pack([*SYSTEM, *[7000 + size] * size])
        with calls() as made:
            grant = cache.acquire(ME, CHAT, prompt, now=1.0)
            assert isinstance(grant, Grant)
            cache.commit(ME, grant.lease, len(SYSTEM) + size, now=1.0)
            cache.release(ME, grant.lease, now=1.0)
        counts.append(len(made))
    assert counts[1] <= counts[0] + 6, counts
