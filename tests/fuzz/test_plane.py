"""A moment of what `make fuzz` does to the data plane, and the seeds that once found something."""

from __future__ import annotations

import pytest

from fuzz.plane import plane, ways
from patience import PATIENCE_S


@pytest.mark.parametrize("name", [f"{way}/{part}" for way, part, _ in ways("native")])
def test_what_is_drawn_is_answered_as_defined_or_refused(name: str) -> None:
    """Each in a process of its own: a crash would be told with its seed."""
    ((count, finding),) = plane(PATIENCE_S, only=name, most=40).values()
    assert not finding
    assert count == 40
