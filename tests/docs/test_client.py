"""docs/client.md: every example runs, and prints what stands behind its prints."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache import errors
from service.service_process import ROOT, ServiceProcess, environment, running

PAGE = (ROOT / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"^## (.*?)$|^```python\n(.*?)^```", PAGE, re.S | re.M)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.M)
COMMAND = re.search(r"\$ prefixcache serve (.*)", PAGE)


def examples() -> Iterator[tuple[str, str]]:
    title = ""
    for heading, code in EXAMPLES:
        title = heading or title
        if code:
            yield title, code


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    assert COMMAND is not None
    folder = tmp_path_factory.mktemp("s")
    with running(f"unix:{folder}/page.sock", *COMMAND[1].split()) as process:
        yield process


@pytest.mark.parametrize("code", [pytest.param(code, id=title) for title, code in examples()])
def test_an_example_of_the_page_runs_and_prints_what_it_says(
    service: ServiceProcess, code: str, tmp_path: Path
) -> None:
    script = tmp_path / "example.py"
    # One that hangs says where, and ends before it is killed without a word.
    hung = f"import faulthandler; faulthandler.dump_traceback_later({PATIENCE_S}, exit=True); "
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    script.write_text(code)
    expected = [line for told in PRINTED.findall(code) for line in told.split(" | ")]
    assert expected
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", hung + run],
            env=environment() | {"PREFIXCACHE_TARGET": service.target},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
        )
        assert done.stdout.splitlines() == expected, done.stderr
        if done.returncode == 0:
            return
        # Twice in some hundred runs, on a crowded machine, one has done all and did not end: where
        # it stood is shown, and it is tried again.
        sys.stderr.write(done.stderr)
        if "Timeout (" not in done.stderr:
            break
    raise AssertionError(done.stderr)


def test_the_page_names_every_error() -> None:
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.CacheError):
            assert f"`{name}`" in PAGE or name == "CacheError"
