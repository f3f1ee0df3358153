"""What two engines say on a pool that is too small for them is what vLLM says alone.

Here with 100 requests; the command itself asks 1,000.
"""

from __future__ import annotations

import pytest

from engines.vllm_process import PYTHON, needs_vllm
from prefixcache_bench.speed import vllm_truth
from service.service_process import environment


@needs_vllm
@pytest.mark.timeout(0)  # three engines start: minutes on a busy machine
def test_a_hundred_requests_of_all_kinds_are_answered_as_by_vllm_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # engines run this checkout
    code = vllm_truth.main(["--python", PYTHON, "--requests", "100"])
    assert code == 0, capsys.readouterr().out
