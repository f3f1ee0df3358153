"""Folders that last as long as a run: what is removed, and what never."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache.run_folder import MARK, RunFolder, sweep

PREFIX = "pfx-test-"


@pytest.fixture(autouse=True)
def folder_of_temporary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by_a_killed_run() -> Path:
    """A folder as a process leaves it that is killed while it has one."""
    code = (
        "import os, signal, sys; from prefixcache.run_folder import RunFolder\n"
        f"path = RunFolder({PREFIX!r}).path\n"
        "(path / 'w1.stderr').write_text('x'); (path / 'deep').mkdir(); "
        "(path / 'deep' / 'x').touch()\n"
        "print(path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": tempfile.gettempdir(), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout, done.stderr
    return Path(done.stdout.strip())


def test_it_ends_with_its_run_and_with_all_that_is_in_it() -> None:
    with RunFolder(PREFIX) as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "deep").mkdir()
        (path / "deep" / "file").touch()
    assert not path.exists()


def test_what_a_killed_run_has_left_the_next_one_removes() -> None:
    left = left_by_a_killed_run()
    assert (left / "deep" / "x").exists()
    with RunFolder(PREFIX) as path:
        assert not left.exists()
        assert path.exists()


def test_that_of_a_run_that_lives_stays() -> None:
    with RunFolder(PREFIX) as one, RunFolder(PREFIX) as other:
        assert sweep(PREFIX) == []
        assert one.exists()
        assert other.exists()


def test_the_mark_goes_last_so_that_who_is_killed_meanwhile_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = left_by_a_killed_run()
    unlink = Path.unlink
    at_a_mark = []

    def look(path: Path, missing_ok: bool = False) -> None:
        if path.name == MARK:
            at_a_mark.append(sorted(one.name for one in left.iterdir()))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    assert sweep(PREFIX) == [left]
    assert at_a_mark == [[MARK]]
    assert not left.exists()


def test_what_is_not_ours_to_remove_stays(folder_of_temporary_ones: Path) -> None:
    here = folder_of_temporary_ones
    somebodys = here / f"{PREFIX}notes"  # no run has made it
    somebodys.mkdir(mode=0o700)
    (somebodys / "diary").touch()
    opened = left_by_a_killed_run()  # others may have put something there
    opened.chmod(0o755)
    elsewhere = here / "elsewhere"
    left_by_a_killed_run().rename(elsewhere)
    (here / f"{PREFIX}link").symlink_to(elsewhere)
    (here / f"{PREFIX}file").touch()
    faked = here / f"{PREFIX}faked"
    faked.mkdir(mode=0o700)
    (faked / MARK).symlink_to(elsewhere / MARK)
    assert sweep(PREFIX) == []
    assert (somebodys / "diary").exists()
    assert (opened / "w1.stderr").exists()
    assert (elsewhere / "w1.stderr").exists()
    assert faked.exists()


def test_one_of_another_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by_a_killed_run()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep(PREFIX) == []
    assert left.exists()
