"""A child is started also where its folder was tidied away; if it cannot be, that is said."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from prefixcache_worker.child import Child, ProcessFailed

SAY = (sys.executable, "-c", "import sys; sys.exit('enough')")


async def run(folder: Path) -> Child:
    child = Child("one", SAY, folder)
    await child.start(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert child.process is not None
    await child.process.wait()
    return child


def test_a_folder_that_was_tidied_away_is_made_again(tmp_path: Path) -> None:
    child = asyncio.run(run(tmp_path / "gone"))
    assert (child.exit_code, child.complaint()) == (1, "enough")


def test_how_it_ended_is_known_also_if_it_is_stopped_at_that_moment(tmp_path: Path) -> None:
    async def end() -> list[int | None]:
        codes = []
        for _ in range(20):
            child = Child(
                "one", (sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"), tmp_path
            )
            await child.start(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            assert child.process is not None
            assert child.process.stdout is not None
            await child.process.stdout.read()
            child.gone.set()
            await child.stop()
            codes.append(child.exit_code)
        return codes

    assert set(asyncio.run(end())) == {-9}


def test_what_cannot_be_started_has_failed(tmp_path: Path) -> None:
    """So that it is tried again later: whoever else runs goes on."""
    (tmp_path / "file").touch()
    with pytest.raises(ProcessFailed, match="one cannot be started"):
        asyncio.run(run(tmp_path / "file"))
