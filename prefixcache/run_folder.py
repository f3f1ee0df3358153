"""A folder for what one run writes: gone with it, or, where that was killed, with the next run.

```
/tmp/pfx-up-k3v9x1ab/     locked by its run (flock): the kernel lets go of it, however the run ends
    made-for-one-run      written under the lock: what has no such file is not ours to remove
    service.stderr  w1.stderr …
```
Services that tidy up /tmp leave alone what is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

MARK: Final = "made-for-one-run"
"""The file in it that says so."""


class RunFolder:
    """A folder among this machine's temporary ones that only this user can enter.

    Removes those of the same prefix that dead runs of this user have left.  O(what is in /tmp).

    Args:
        prefix: what its name begins with.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, prefix: str) -> None:
        sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock: int | None = _open(self.path)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / MARK).touch(0o600)  # from now on whoever finds it unlocked may remove it

    def close(self) -> None:
        """Remove it and all that is in it, as far as possible.  Idempotent."""
        if self._lock is not None:
            _remove(self.path)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        """Give its path."""
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove it."""
        self.close()


def sweep(prefix: str) -> list[Path]:
    """Remove the folders whose run is dead; give their paths.  O(what is in /tmp).

    Nothing else is touched: not what belongs to another user or lets one in, a symlink, a folder
    without the mark, or one whose run lives.
    """
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            fd = _open(path)
        except OSError:  # gone meanwhile, or no folder
            continue
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                continue
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.stat(MARK, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove(path)
                removed.append(path)
        except OSError:  # its run lives, it has no mark, or another sweep was faster
            continue
        finally:
            os.close(fd)
    return removed


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove(path: Path) -> None:
    """Remove a folder, its mark last: who is killed meanwhile leaves one that is removed later."""
    with suppress(OSError):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != MARK:
                Path(entry.path).unlink(missing_ok=True)
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()
