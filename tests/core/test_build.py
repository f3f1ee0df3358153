"""What the core runs as: what was asked for, all of it, and of the sources beside it."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import prefixcache
from prefixcache import core_build

PACKAGE = Path(prefixcache.__file__).parent
SUFFIX = EXTENSION_SUFFIXES[0]


def test_all_of_the_core_runs_as_what_was_asked_for() -> None:
    names = [path.stem for path in core_build.sources()]
    files = [str(importlib.import_module(f"prefixcache.core.{name}").__file__) for name in names]
    is_compiled = core_build.kind() == core_build.COMPILED
    assert [not file.endswith(".py") for file in files] == [is_compiled] * len(names)
    if "PREFIXCACHE_EXPECT_COMPILED" in os.environ:
        assert core_build.kind() == core_build.COMPILED


def test_the_name_of_the_library_comes_from_all_that_the_compiled_modules_import() -> None:
    below = set()
    for path in core_build.sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("prefixcache."):
                below.add(str(node.module).removeprefix("prefixcache."))
    assert {name for name in below if not name.startswith("core")} <= set(core_build._BELOW)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Sources as they are, and files named as what would be compiled of them."""
    package = tmp_path / "prefixcache"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in core_build.sources(package):
        path.with_name(path.stem + SUFFIX).touch()
    (tmp_path / f"{core_build.library(package)}__mypyc{SUFFIX}").touch()
    assert core_build.kind(package) == core_build.COMPILED
    return package


def test_sources_alone_are_plain_python(built: Path) -> None:
    for path in built.glob(f"core/*{SUFFIX}"):
        path.unlink()
    assert core_build.kind(built) == core_build.PURE


@pytest.mark.parametrize("name", ["core/radix_tree.py", "core/eviction.py", "types.py"])
def test_a_source_that_has_changed_since_is_noticed(built: Path, name: str) -> None:
    before = (built / name).stat()
    text = (built / name).read_text()
    (built / name).write_text(text.replace("e", "E", 1))
    os.utime(built / name, ns=(before.st_atime_ns, before.st_mtime_ns))  # not by its date
    assert core_build.kind(built) == core_build.STALE
    (built / name).write_text(text)
    assert core_build.kind(built) == core_build.COMPILED


def test_a_module_that_is_new_or_gone_or_was_not_compiled_is_noticed(built: Path) -> None:
    (built / "core" / "new.py").write_text("ONE = 1\n")
    assert core_build.kind(built) == core_build.STALE
    (built / "core" / "new.py").unlink()
    (built / "core" / f"node{SUFFIX}").unlink()
    assert core_build.kind(built) == core_build.STALE


def test_the_library_of_another_build_beside_it_is_noticed(built: Path) -> None:
    (built.parent / f"prefixcache_core_0000000000000000__mypyc{SUFFIX}").touch()
    assert core_build.kind(built) == core_build.STALE


def test_a_policy_of_ones_own_does_not_make_it_stale(built: Path) -> None:
    (built / "core" / "policies" / "mine.py").write_text("ONE = 1\n")
    assert core_build.kind(built) == core_build.COMPILED


def test_the_command_says_which_core_runs_and_what_to_do_about_a_stale_one(built: Path) -> None:
    def told() -> tuple[str, str]:
        run = subprocess.run(
            [sys.executable, "-c", "from prefixcache.cli.main import main; main()", "--version"],
            cwd=built.parent,
            env={name: value for name, value in os.environ.items() if "PREFIXCACHE" not in name},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip(), run.stderr.strip()

    version = f"prefixcache {prefixcache.__version__} (core: "
    assert told() == (version + "compiled)", "")
    (built / "core" / "node.py").write_text("ONE = 1\n")
    out, err = told()
    assert out == version + "compiled from other sources)"
    assert "make compiled" in err
    assert "make pure" in err
