"""Every command that a document names is there, takes these options, and works.

All are parsed, as the command line parses them.  What is quick is also run, against a real service
that has what the documents speak of.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import typer

import prefixcache
from patience import PATIENCE_S
from prefixcache.cli.main import app
from prefixcache.types import Layout
from service.service_process import ROOT, ServiceProcess, command, environment

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = ROOT / "README.md"
LAYOUT = Layout(30, 3, 64, "bfloat16")
"""That of README's example."""

_NAMED = re.compile(r"`((?:prefixcache|make|python -m|pip install) [^`]+)`")
_PROGRAMS = ("prefixcache", "make", "python", "pip")


class Shown(NamedTuple):
    """A command, and where it stands."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def blocks(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Give the fenced blocks: the language, if any, and the lines."""
    found: list[str] | None = None
    language = ""
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if found is None:
                found, language = [], line[3:].strip()
            else:
                yield language, found
                found = None
        elif found is not None:
            found.append(line)


def shown() -> Iterator[Shown]:
    for page in PAGES:
        for language, lines in blocks(page):
            for line in lines:
                told = line.removeprefix("$ ")
                is_typed = line.startswith("$ ") or (language == "" and line == told)
                is_one = re.match(rf"({'|'.join(_PROGRAMS)}) [\w-]", told)
                if is_typed and is_one and (line != told or _is_command(told)):
                    yield Shown(page.name, told)
        for found in _NAMED.findall(page.read_text()):
            yield Shown(page.name, " ".join(found.split()))


def _is_command(line: str) -> bool:
    """Whether a line of a block without prompts is typed, not told: it begins with a command."""
    words = line.split()
    return words[0] != "prefixcache" or words[1] in _commands()


def _commands() -> list[str]:
    group = typer.main.get_command(app)
    return list(group.list_commands(None))  # type: ignore[attr-defined, arg-type]


SHOWN = list(dict.fromkeys(shown()))
RUN = {
    # What the documents say of it is true of a service that has stored something.
    *("stat", "top", "tree", "doctor", "explain", "lookup", "pin", "unpin", "quota", "what-if"),
    *("reset", "encode", "token", "sweep", "replay", "curve", "memory", "generate"),
}
SLOW = re.compile(
    r" traces\b|mooncake|--front|llama-3|-o |FILE|TRACE|KIND|MODEL|PROMPT|REQUEST_ID|DIR\b|curve$"
)
"""Needs what is not here, or minutes: then only parsed."""


@pytest.mark.parametrize("command", SHOWN, ids=lambda one: f"{one.page}: {one.line}")
def test_a_command_that_is_shown_is_there_and_takes_these_options(command: Shown) -> None:
    program, *words = command.words
    if program == "prefixcache":
        _parse(words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "python":
        assert words[0] == "-m"
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, words[1]
        assert spec.origin is not None
        place = Path(spec.origin)
        if place.name == "__init__.py":
            place = place.with_name("__main__.py")
        text = place.read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{words[1]} has no {option}"
    else:
        with (ROOT / "pyproject.toml").open("rb") as file:
            extras = tomllib.load(file)["project"]["optional-dependencies"]
        for extra in re.findall(r"(?:prefixcache\S*|\.)\[(\w+)\]", command.line):
            assert extra in extras


MAKEFILE = (ROOT / "Makefile").read_text()
SETTINGS = sorted(
    (target, name)
    for target, about in re.findall(r"^([a-z-]+):[^#\n]*##(.*)$", MAKEFILE, re.MULTILINE)
    for name in set(re.findall(r"\b([A-Z_]{4,})=", about))
)
"""What the Makefile says may be set of which target."""


@pytest.mark.parametrize(("target", "name"), SETTINGS)
def test_what_may_be_set_of_a_target_is_not_set_by_itself(target: str, name: str) -> None:
    """A list of tests had the name by which one asks for a short demo: all demos were short."""

    def made(*words: str) -> str:
        told = subprocess.run(
            ["make", "--dry-run", "--always-make", target, *words],
            cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return told.stdout

    assert not re.search(rf"^{name}\s*[:?+]?=", MAKEFILE, re.MULTILINE)
    assert made(f"{name}=") == made()
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    if f"$({name})" in recipe[1]:  # the others are in the environment of what is run
        assert made(f"{name}=23") != made()


def _parse(words: list[str]) -> None:
    """Parse a command line as `prefixcache` does, and do nothing."""
    group = typer.main.get_command(app)
    context = group.make_context("prefixcache", list(words), resilient_parsing=True)
    rest = [*context._protected_args, *context.args]  # type: ignore[attr-defined]
    if not rest:
        assert set(words) <= {"--version", "--install-completion"}, words
        return
    name, *arguments = rest
    found = group.get_command(context, name)  # type: ignore[attr-defined]
    assert found is not None, f"there is no command {name}"
    if "--help" in arguments or not arguments:  # named, not shown
        return
    with found.make_context(name, arguments, parent=context):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents name."""
    folder = tmp_path_factory.mktemp("here")
    system = {"role": "system", "content": "You are kind. " * 40}
    lines = [
        json.dumps({"messages": [system, {"role": "user", "content": f"what is {number}? " * 60}]})
        for number in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "request.json").write_text(json.dumps({"tokens": list(range(40))}))
    (folder / "system-prompt.txt").write_text(" ".join(map(str, range(40))))
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    sockets = tmp_path_factory.mktemp("d")
    flags = ["--memory", "256MiB", "--layout", str(LAYOUT), "--shadow", "policy=slru"]
    found = ServiceProcess(f"unix:{sockets}/s", *flags)
    with prefixcache.connect(found.target) as client, client.attach("m", LAYOUT) as session:
        for name in ("travel-dog", "museum-cutter-again"):
            with session.acquire(list(range(40)), request_id=name) as lease:
                lease.commit(40)
        yield found
    found.close()


def quick() -> list[Shown]:
    """Give what is run, on one service: `reset` last, since the others look for what is there."""
    found = []
    for one in SHOWN:
        words = one.words
        if words[0] == "prefixcache" and words[1] in RUN and not SLOW.search(one.line):
            found.append(one)
    return sorted(found, key=lambda one: one.words[1] == "reset")


@pytest.mark.parametrize("shown", quick(), ids=lambda one: f"{one.page}: {one.line}")
def test_what_is_quick_is_run(
    shown: Shown, service: ServiceProcess, place: Path, tmp_path: Path
) -> None:
    words = shown.words[1:]
    if words[0] == "top" and "--once" not in words:
        words.append("--once")
    if words[0] == "stat" and len(words) == 1:
        words.append("--once")
    told = subprocess.run(
        command(*words),
        cwd=shutil.copytree(place, tmp_path / "here"),
        env=environment() | {"PREFIXCACHE_TARGET": service.target, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    # 1 is an answer, such as "there is no quota"; but nothing may be wrong with the command.
    assert told.returncode in (0, 1), told
    assert told.stdout
    said = [line for line in told.stderr.splitlines() if "the service knows no tenant" not in line]
    assert not re.search("error|Traceback|prefixcache: ", "\n".join(said)), told.stderr


def serves() -> Iterator[tuple[Shown, list[str]]]:
    """Give the services whose start is shown with what it prints."""
    for page in (README, ROOT / "docs" / "operations.md"):
        found = list(blocks(page))
        for at, (_, lines) in enumerate(found):
            first = lines[0].removeprefix("$ ") if lines else ""
            if first.startswith("prefixcache serve"):
                told = lines[1:] or found[at + 1][1]
                yield Shown(page.name, first), told


@pytest.mark.parametrize(
    ("shown", "told"), list(serves()), ids=lambda one: one.line if isinstance(one, Shown) else ""
)
def test_serve_prints_what_is_shown(shown: Shown, told: list[str], tmp_path: Path) -> None:
    words = shown.words[2:]
    if "--model" in words:  # the same model, without its files
        at = words.index("--model")
        words[at : at + 2] = ["--layout", str(LAYOUT)]
    service = ServiceProcess(f"unix:{tmp_path}/s", *words, "--pool", "none")
    try:
        assert [line for line in service.lines if not line.startswith("listening")] == told[:-1]
        assert told[-1].startswith("listening at unix:")
    finally:
        service.close()


PYTHON = [
    (page.name, "\n".join(lines))
    for page in PAGES
    for language, lines in blocks(page)
    if language == "python"
    and page.name not in ("client.md", "llm.md")  # those: test_client.py, worker/test_llm.py
]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[page for page, _ in PYTHON])
def test_examples_in_python_run(
    page: str, text: str, service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("PREFIXCACHE_TARGET", service.target)
    # What an example leaves to its reader: tokens, and a model that computes.
    given = {"tokens": list(range(100, 140)), "compute": lambda *_: None}
    with patch.dict(os.environ):  # what an example sets is its own
        exec(compile(text, page, "exec"), given)  # noqa: S102 - our own documents
