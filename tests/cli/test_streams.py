"""However a command ends, its exit code says how: whatever its streams are, whatever fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefixcache
from cli.running import At, call, run
from patience import PATIENCE_S
from prefixcache import core_build
from prefixcache.cli import variables
from prefixcache.cli.codes import EXIT_FAILED, EXIT_NO_SERVER, EXIT_OK, EXIT_REFUSED, EXIT_USAGE
from prefixcache.config import ServeSettings
from prefixcache.types import Layout
from service.service_process import LAYOUT, command, environment

QUESTIONS = (
    *(("stat", "--once"), ("tree",), ("tree", "--json"), ("doctor",), ("top", "--once")),
    *(("top", "--once", "--json"), ("pin", "--list"), ("explain", "--model", "m", "1", "2", "3")),
)
"""Commands that answer at once."""


@pytest.fixture
def busy(at: At) -> At:
    with (
        prefixcache.connect(at.target) as client,
        client.attach("m", LAYOUT) as session,
        session.acquire(list(range(12))) as lease,
    ):
        lease.commit(12)
    return at


def shell(script: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `script`, in which "$@" is the command."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *command(*arguments)],
        env=environment() | extra,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_failure(busy: At, question: tuple[str, ...]) -> None:
    told = shell('"$@" | sleep 0.01', *question, "-c", busy.target)
    assert (told.returncode, told.stderr) in ((EXIT_OK, ""), (1, ""))  # 1: what it answers
    gone = shell('"$@" > >(:); echo $?', *question, "-c", busy.target)
    assert gone.stderr == ""


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_a_closed_pipe_ends_with_nought(busy: At, question: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = subprocess.run(
        command(*question, "-c", busy.target),
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    os.close(writing)
    assert (told.returncode, told.stderr) == (EXIT_OK, "")


@pytest.mark.parametrize("question", [*QUESTIONS, ("--help",), ("--version",)], ids=" ".join)
@pytest.mark.parametrize("output", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_one_line_and_a_code_of_its_own(
    busy: At, question: tuple[str, ...], output: str
) -> None:
    where = () if question[0].startswith("--") else ("-c", busy.target)
    told = shell(f'"$@" {output}', *question, *where)
    assert told.returncode == EXIT_FAILED
    assert len(told.stderr.splitlines()) == 1
    assert "output" in told.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_any_encoding_does(busy: At, question: tuple[str, ...], encoding: str) -> None:
    told = subprocess.run(
        command(*question, "-c", busy.target),
        env=environment() | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"},
        capture_output=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert told.returncode in (EXIT_OK, 1)
    assert told.stderr == b""
    assert told.stdout


def test_closed_streams_are_not_what_the_next_file_gets(busy: At) -> None:
    told = shell('"$@" <&- 2>&-', "stat", "--once", "--json", "-c", busy.target)
    assert told.returncode == EXIT_OK
    assert json.loads(told.stdout)


PLUGIN = """
import os, sys
from importlib.metadata import EntryPoint
from prefixcache.cli import plugins
from prefixcache.cli.main import main
fail = EntryPoint("fail", "failing:fail", plugins.GROUP)
plugins.found = lambda: {"fail": fail}
main()
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('tokens')", "KeyError"),
        ("raise RecursionError", "RecursionError"),
        ("raise MemoryError", "MemoryError"),
        ("open('/no/such/file')", "FileNotFoundError"),
        ("raise BrokenPipeError(32, 'another pipe')", "BrokenPipeError"),
        ("raise AssertionError('several\\nlines')", "AssertionError"),
    ],
)
def test_what_nobody_foresaw_is_one_line_with_the_place_of_the_rest(
    tmp_path: Path, body: str, said: str
) -> None:
    (tmp_path / "failing.py").write_text(f"def fail() -> None:\n    {body}\n")
    for extra in ({}, {"PREFIXCACHE_TRACEBACK": "1"}):
        told = subprocess.run(
            [sys.executable, "-c", PLUGIN, "fail"],
            env=environment()
            | {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}", "TMPDIR": str(tmp_path)}
            | extra,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert told.returncode == EXIT_FAILED
        assert said in told.stderr
        if extra:
            assert "Traceback" in told.stderr
            continue
        assert len(told.stderr.splitlines()) == 1
        (kept,) = re.findall(r"(\S+\.txt) says where", told.stderr)
        assert "failing.py" in Path(kept).read_text()
        assert Path(kept).stat().st_mode & 0o077 == 0


def test_other_ends_have_their_codes(tmp_path: Path, at: At) -> None:
    assert call("stat", "--once", "-c", f"unix:{tmp_path}/none").code == EXIT_NO_SERVER
    assert call("nosuch").code == EXIT_USAGE
    assert call("stat", "--nosuch").code == EXIT_USAGE
    assert call("stat", "--interval", "inf", "-c", at.target).code == EXIT_USAGE
    assert call("top", "--interval", "1e300", "-c", at.target).code == EXIT_USAGE
    taken = run("serve", "--listen", at.target)
    assert taken.code == EXIT_REFUSED
    assert "a service is listening" in taken.err
    layout = str(Layout(1, 1, 4, "float32"))
    large = run("serve", "--listen", f"unix:{tmp_path}/s", "--memory", "900TiB", "--layout", layout)
    assert large.code == EXIT_REFUSED
    assert "enlarge" in large.err


def test_help_and_version_are_commands_as_well() -> None:
    assert call("help").out == call("--help").out
    assert call("help", "stat").out == call("stat", "--help").out
    versions = {call(one).out for one in ("version", "--version", "-V", "-v")}
    core = core_build.kind()
    assert versions == {f"prefixcache {prefixcache.__version__} (core: {core})\n"}
    assert call("help", "nosuch").code == EXIT_USAGE


def test_json_may_stand_before_the_command(at: At) -> None:
    before = call("--json", "pin", "--list", "-c", at.target)
    assert before.fields == at.call("pin", "--list", "--json").fields
    assert call("--json", "serve").code == EXIT_USAGE


def test_a_misspelt_variable_is_told_and_all_that_mean_something_are_known(at: At) -> None:
    told = at.call("pin", "--list", PREFIXCACHE_MEMROY="2GiB", PREFIXCACHE_TARGET="unix:/x")
    (line,) = told.err.splitlines()
    assert "PREFIXCACHE_MEMROY" in line
    assert "did you mean PREFIXCACHE_MEMORY?" in line
    assert {name.upper() for name in ServeSettings.model_fields} <= variables.known()
    root = Path(__file__).resolve().parents[2]
    sources = [*root.glob("prefixcache/**/*.py"), *root.glob("*/prefixcache_*/**/*.py")]
    read = {
        name
        for path in sources
        for name in re.findall(r"\"PREFIXCACHE_([A-Z_]*[A-Z])\"", path.read_text())
    }
    assert read
    assert {one for one in read if not any(k.startswith(one) for k in variables.known())} == set()
