"""The three standard streams: whatever they are, a command ends in order, and says how.

A closed pipe is the reader's right (`| head`): 0.  A full disk, or no output at all, is a failure.
A sign that the output's encoding lacks is written as a question mark.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from prefixcache.cli.codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from prefixcache.texts import escape

_OUTPUT = {errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EPERM}
"""How writing to a file, a terminal or a device may fail."""


_LONGEST = 4000
"""Characters of what is said on stderr: a word of the command line may have 128 KiB."""


def say(line: str) -> None:
    """Write a line on stderr, if there is one to write to."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"prefixcache: {fit(line)}\n")
        sys.stderr.flush()


def fit(line: str) -> str:
    """Write a line so that it can be shown anywhere, with its middle left out if it is too long."""
    line = escape(line)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}"


def guarded(run: Callable[[], int]) -> int:
    """Run a command; give the exit code, however it ends."""
    try:
        if not _prepare():
            say("standard output is closed; nothing was done")
            return EXIT_FAILED
        try:
            code = run()
        except SystemExit as stop:  # as `sys.exit` of some library would have it
            code = _code_of(stop)
        sys.stdout.flush()
    except BrokenPipeError as error:
        is_ours = _has_no_reader()
        _write_no_more()
        return EXIT_OK if is_ours else _crashed(error)
    except KeyboardInterrupt:
        _write_no_more()
        return EXIT_INTERRUPTED
    except OSError as error:
        _write_no_more()
        if error.filename is not None or error.errno not in _OUTPUT:
            return _crashed(error)
        say(f"cannot write the output: {error.strerror}")
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer
        _write_no_more()
        return _crashed(error)
    return code


def _prepare() -> bool:
    """Make the streams such that no text and no reader can end a command by a traceback.

    Returns:
        Whether there is a standard output.
    """
    is_there = sys.stdout is not None
    for fd in range(3):
        # A free number would go to the next file that is opened, and what is printed into it.
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - as long as we live
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return is_there


def _has_no_reader() -> bool:
    """Whether it is standard output, not some other pipe, whose reader has gone."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _write_no_more() -> None:
    """Let what is still in the buffer, which Python writes at the exit, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)


def _code_of(stop: SystemExit) -> int:
    if isinstance(stop.__context__, BrokenPipeError):  # as rich would have it
        return EXIT_OK
    if isinstance(stop.code, str):
        say(stop.code)
        return EXIT_FAILED
    return stop.code or EXIT_OK


def _crashed(error: Exception) -> int:
    """Tell of an error that nobody foresaw: in one line, and all of it in a file."""
    lines = traceback.format_exception(error)
    first = (str(error).splitlines() or [""])[0][:200]
    told = f"unforeseen error, which is a fault of ours: {type(error).__name__}: {first}"
    if os.environ.get("PREFIXCACHE_TRACEBACK"):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("".join(lines))
        say(told)
        return EXIT_FAILED
    where = "PREFIXCACHE_TRACEBACK=1 shows where"
    with contextlib.suppress(OSError):
        fd, path = tempfile.mkstemp(".txt", "prefixcache-traceback-")  # this user's alone
        with os.fdopen(fd, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(lines)
        where = f"{path} says where (as does PREFIXCACHE_TRACEBACK=1)"
    say(f"{told}; {where}")
    return EXIT_FAILED
