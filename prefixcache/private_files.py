"""Files that only this user may change: prompts and what was computed from them, sockets, keys.

A mode that is passed to `open` or `mkdir` loses the bits of the umask and is not looked at where
the file is there already; so here it is set, and what is there must be ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from prefixcache.errors import InvalidRequest, ServiceUnavailable

FILE_MODE = 0o600
FOLDER_MODE = 0o700

_MOST_LINKS = 40
"""Symlinks on the way to a file that the kernel follows."""

_ANSWER_S = 1.0
_LAST_WORDS_S = 0.2
"""How long who listens at a socket may take to answer, and to hang up where it is just ending."""


def open_private(path: Path, flags: int) -> int:
    """Open a file that only this user may read, and make it so; give its descriptor.

    Args:
        path: the file.  A symlink is not followed.
        flags: as for `os.open`; `O_CLOEXEC` and `O_NOFOLLOW` are added.

    Raises:
        OSError: it cannot be opened, is no regular file, or belongs to somebody else.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # of a pipe nobody waits for the reader
    fd = os.open(path, flags, FILE_MODE)
    try:
        if not _is_ours(os.fstat(fd)):
            raise OSError(errno.EPERM, "not a file of this user alone", str(path))
        os.fchmod(fd, FILE_MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_private(path: Path) -> int:
    """Take the lock that a file stands for, and give its descriptor: who closes that lets go.

    What is there and is no file of this user alone is removed first, but never while somebody has
    that lock: a copy of a folder that was made with hard links has given it a second name.

    Args:
        path: the file, in a folder that nobody else may write to; made if it is not there.

    Raises:
        BlockingIOError: somebody has it.
        OSError: the file cannot be made or opened.
    """
    while True:
        _clear_lock(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags, FILE_MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if _is_at(path, status):
                if _is_ours(status):
                    os.fchmod(fd, FILE_MODE)
                    return fd
                path.unlink()  # who has the other name could take the lock, too
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def refuse_strangers(folder: Path, lock: str, names: Collection[str], option: str) -> None:
    """Refuse a folder in which files have the names of ours, and that no service has taken before.

    Who took it would have left the lock there.  Files of ours that are not whole are removed and
    made anew; somebody's notes that are called `secret` are not to be taken for that.

    Args:
        folder: which.
        lock: the name of its lock.
        names: of the files.
        option: what named the folder, for the message.

    Raises:
        InvalidRequest: as said.
    """
    if os.path.lexists(folder / lock):
        return
    if there := [name for name in names if os.path.lexists(folder / name)]:
        raise InvalidRequest(
            f"{option} {folder} holds {', '.join(there)}, and no {lock}: no service has made that, "
            "and this one would write over it. Name another folder"
        )


def _clear_lock(path: Path) -> None:
    """Remove what cannot be a lock of this user; let him open what can."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        path.chmod(FILE_MODE)
    else:
        path.unlink()


def _is_at(path: Path, status: os.stat_result) -> bool:
    """Whether it is still the file that is there."""
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def make_private_folder(path: Path, option: str) -> None:
    """Make a folder that only this user can enter, or check that the one that is there is ours.

    One that others may read stays as it is: the files in it are private themselves.  Who may write
    to it could put files of their own in the place of ours.

    Args:
        path: the folder.  The one above it must be there: a path with an error in it is not made.
        option: what named it, for the message.

    Raises:
        InvalidRequest: it is not there and neither is the folder above it; it is a symlink of
            somebody else, belongs to somebody else, or others may write to it.
        OSError: it cannot be made or looked at.
    """
    try:
        path.mkdir(FOLDER_MODE)
        path.chmod(FOLDER_MODE)  # whatever the umask took away
    except FileNotFoundError:
        raise InvalidRequest(
            f"{option} {path}: there is no folder {path.parent}. Make it first, if that is no typo."
        ) from None
    except FileExistsError:
        pass
    user = os.geteuid()
    link, status = path.lstat(), path.stat()
    for owner in (link.st_uid, status.st_uid):
        if owner != user:
            raise InvalidRequest(
                f"{option} {path} belongs to user {owner}, you are {user}: whoever owns it can "
                "change what is in it. Name a folder of your own."
            )
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022:
        raise InvalidRequest(
            f"{option} {path} can be written by other users (mode {status.st_mode & 0o777:o}), who "
            f"could put files of their own there. Run: chmod 700 {path}"
        )


def own_folder(base: Path, *names: str) -> Path:
    """Give the folder `base/name/...` of what this user keeps; make what is missing of it.

    Whoever may write to a folder can put another one in the place of what is in it.  So what is
    made is this user's alone, whatever the umask, and nobody else may write to `base` from then on.

    Args:
        base: where all that this project keeps of some kind is.
        names: folders in each other below it: in these others may have put files already.

    Raises:
        InvalidRequest: one of them belongs to somebody else or is no folder, or others may write to
            one below `base`.
        OSError: one cannot be made or changed.
    """
    for above in reversed(base.parents):
        _make(above)
    path = base
    for name in ("", *names):
        path /= name
        _make(path)
        status = path.stat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise InvalidRequest(
                f"{path} belongs to user {status.st_uid}, or is no folder; you are "
                f"{os.geteuid()}: whoever owns it can change what is in it"
            )
        if status.st_mode & 0o022 and name:
            raise InvalidRequest(
                f"others may write there: {path} has the mode {status.st_mode & 0o777:o}. Remove "
                f"what is not yours, then run: chmod go-w {path}"
            )
        if status.st_mode & 0o022:
            path.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    return path


def _make(path: Path) -> None:
    """Make a folder that only this user can enter, unless something is there."""
    if not path.exists():
        path.mkdir(FOLDER_MODE, exist_ok=True)
        path.chmod(FOLDER_MODE)  # whatever the umask took away


def check_path(path: Path, option: str) -> None:
    """Check that nobody but this user and root can put something else in the place of `path`.

    Looks at each folder on the way, with the symlinks that the kernel would follow, and at what is
    at the end.  In a folder with the sticky bit, such as /tmp, others cannot replace what is ours.
    What is not there is not looked at: who opens it says so.

    Args:
        path: a file or folder.
        option: what named it, for the message.

    Raises:
        InvalidRequest: somebody else owns a part of it, or may write to one.
    """
    for part, status in _steps(path):
        if status.st_uid not in (0, os.geteuid()):
            raise InvalidRequest(
                f"{option} {path}: {part} belongs to user {status.st_uid}, you are "
                f"{os.geteuid()}: whoever owns it can put something else there. Choose a path "
                "whose folders are all root's or yours."
            )
        is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022 and not is_sticky:
            raise InvalidRequest(
                f"{option} {path}: {part} can be written by other users (mode "
                f"{status.st_mode & 0o777:o}), who could put something else there. "
                f"Run: chmod go-w {part}"
            )


def clear_socket(path: Path, option: str) -> None:
    """Remove the socket that a dead process has left at `path`, and nothing else.

    Args:
        path: where a socket is about to be.
        option: what named it, for the message.

    Raises:
        InvalidRequest: something that is no socket is there, a symlink included.
        ServiceUnavailable: somebody listens there, or it cannot be told, or not be removed.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidRequest(
                f"{option} {path}: something that is no socket is there. Remove it, or choose "
                "another path"
            )
        if _is_dead(path):
            path.unlink(missing_ok=True)
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServiceUnavailable(f"{option} {path}: {error.strerror or error}") from None
    raise ServiceUnavailable(
        f"{option} {path}: somebody listens there already; stop it, or choose another path"
    )


def _is_dead(path: Path) -> bool:
    """Whether nobody listens at a socket any more.

    A process that is just being killed may still take a connection, and drops it at once.

    Raises:
        OSError: it may not be asked, or who listens there is too busy to say.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_ANSWER_S)
        try:
            probe.connect(str(path))
            probe.settimeout(_LAST_WORDS_S)
            return not probe.recv(1)
        except TimeoutError:
            return False
        except (ConnectionRefusedError, ConnectionResetError):
            return True


def check_secret(path: Path, option: str) -> None:
    """Check that nobody but this user and root can read `path`, or that root gave it to a group.

    Looks at the file itself: a folder that keeps others out today may be opened tomorrow.

    Args:
        path: a file with a secret in it.  What is not there is not looked at.
        option: what named it, for the message.

    Raises:
        InvalidRequest: others may read or write it.
    """
    try:
        status = path.stat()
    except OSError:
        return  # who opens it says what is wrong
    # Root's file is read by who serves through a group; of our own, no group needs to know.
    allowed = 0o640 if status.st_uid == 0 != os.geteuid() else 0o600
    if more := status.st_mode & 0o077 & ~allowed:
        what = "read" if more & 0o044 else "changed or run"
        raise InvalidRequest(
            f"{option} {path} can be {what} by other users (mode {status.st_mode & 0o777:o}), and "
            f"is a secret. Run: chmod {allowed:o} {path}, and take another one if it may have been "
            "read"
        )


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Give each folder and symlink that the kernel meets on the way to `path`, and its end."""
    at = Path("/")
    yield at, at.lstat()
    left = list(reversed(path.absolute().parts[1:]))
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            at = at.parent
            continue
        part = at / name
        try:
            status = part.lstat()
            target = part.readlink() if stat.S_ISLNK(status.st_mode) else None
        except OSError:
            return  # who opens it says what is wrong
        yield part, status
        if target is None:
            at = part
            continue
        links += 1
        if links > _MOST_LINKS:
            return  # a circle: nobody can open it
        if target.is_absolute():
            at = Path("/")
        left.extend(reversed([name for name in target.parts if name != "/"]))


def remove_foreign(path: Path) -> bool:
    """Remove what is there unless it is a regular file of this user alone.

    Returns:
        Whether something was removed.

    Raises:
        OSError: it cannot be removed: it is a folder, say.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if _is_ours(status):
        path.chmod(FILE_MODE)  # one of an earlier version, or restored from a backup
        return False
    path.unlink()
    return True


def _is_ours(status: os.stat_result) -> bool:
    """Whether it is a regular file of this user that has no second name elsewhere."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1
