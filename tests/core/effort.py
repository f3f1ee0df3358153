"""What a step costs, counted in calls: no clock, so it is the same on every machine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from prefixcache import core_build


def calls(step: Callable[[], Any]) -> int:
    """Count the calls, of Python and of C, that a step makes; a compiled core tells of none."""
    if core_build.kind() != core_build.PURE:
        pytest.skip("calls are counted in the core as plain Python")
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what others left to be collected is none of this step's
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def most_in_one_go(work: Generator[None, None, Any]) -> tuple[int, Any]:
    """Run work that pauses; give the most calls between two pauses, and what it gave."""
    most, given = 0, []

    def step() -> None:
        try:
            next(work)
        except StopIteration as end:
            given.append(end.value)

    while not given:
        most = max(most, calls(step))
    return most, given[0]
