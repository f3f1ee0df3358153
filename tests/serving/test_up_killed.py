"""`prefixcache up` itself is killed while it streams: what it leaves, what others find."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

import prefixcache
from serving.test_up import COUNT, PROMPT, Up
from serving.test_up_ends import until
from worker.zoo import save

pytestmark = pytest.mark.slow

ONE = ("--workers", "1")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all runs of a test keep what they write."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_killed_in_mid_stream_it_leaves_no_process_and_no_block(
    tmp_path: Path, temporary: Path
) -> None:
    save(tmp_path)
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        first = Up(tmp_path, Path(folder), "--memory", "8MiB", *ONE)
        first.says(r"w1 \(pid \d+\) is ready")
        second = Up(tmp_path, Path(folder), *ONE)
        second.says(r"w1 \(pid \d+\) is ready")
        streams = [second.stream(prompt=[*PROMPT, 7, one]) for one in range(4)]
        for stream in streams:
            stream.read(5)
        with prefixcache.connect(f"unix:{folder}/s.sock") as client:
            assert client.snapshot().num_leases  # else there is nothing to leave behind
            second.process.kill()
            assert second.end_by_itself() == -signal.SIGKILL
            for stream in streams:
                stream.close()
            until(lambda: not second.alive())
            until(lambda: not client.snapshot().num_leases)
            until(lambda: not client.snapshot().quarantined)
            assert client.snapshot().private == 0

        # What its worker had computed is there for others.
        stream = first.stream(prompt=[*PROMPT, 7, 0], max_tokens=2)
        stream.read()
        assert stream.usage["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) + 1

        # The one whose service it is: that ends, too, and the next one starts another.
        stream = first.stream(prompt=PROMPT)
        stream.read(5)
        first.process.kill()
        assert first.end_by_itself() == -signal.SIGKILL
        stream.close()
        until(lambda: not first.alive())
        assert len(list(temporary.glob("pfx-up-*"))) == 2
        third = Up(tmp_path, Path(folder), "--memory", "8MiB", *ONE)
        stream = third.stream(prompt=PROMPT)
        stream.read()
        assert stream.usage["completion_tokens"] == COUNT
        assert third.end() == 0
        # What the killed ones had written is gone, too.
        assert list(temporary.iterdir()) == []


def test_a_worker_that_is_stopped_ends_with_a_front_that_is_killed(tmp_path: Path) -> None:
    save(tmp_path)
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        up = Up(tmp_path, Path(folder), "--memory", "8MiB", *ONE)
        pid = int(up.says(r"w1 \(pid (\d+)\) is ready")[1])
        os.kill(pid, signal.SIGSTOP)
        up.process.kill()
        assert up.end_by_itself() == -signal.SIGKILL
        try:
            until(lambda: not up.alive())
        finally:
            for left in up.alive():
                os.kill(left, signal.SIGKILL)
