"""What the benchmark of serving takes for a step of decoding."""

from __future__ import annotations

from typing import Any

import pytest

from prefixcache_bench.speed.serving import engine_steps
from prefixcache_worker.request import Token


class Told:
    """An engine whose steps are known: which prompts have a token in each, and its time."""

    chunk = 512
    stalled = False

    def __init__(self, steps: list[tuple[str, float]]) -> None:
        self._steps, self.now = steps, 0.0

    @property
    def idle(self) -> bool:
        return not self._steps

    def submit(self, request: object) -> None:
        pass

    def step(self) -> list[Any]:
        who, seconds = self._steps.pop(0)
        self.now += seconds
        return [Token(id=f"n.{one}", token=1, text="") for one in who]


@pytest.mark.parametrize(
    ("prompts", "steps", "want"),
    [
        (1, [("0", 9.0), ("0", 1.0), ("0", 2.0)], [1.0, 2.0]),
        (2, [("0", 9.0), ("01", 10.0), ("01", 1.0), ("0", 1.0)], [1.0]),
        (2, [("", 9.0), ("01", 10.0), ("01", 3.0)], [3.0]),
    ],
)
def test_a_step_that_computes_a_prompt_is_none_of_decoding(
    prompts: int, steps: list[tuple[str, float]], want: list[float]
) -> None:
    made: Any = Told(steps)
    taken = engine_steps(made, [[1, 2]] * prompts, 2, "n", clock=lambda: made.now)
    assert taken == want
