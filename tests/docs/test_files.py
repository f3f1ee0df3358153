"""Every file, heading and test that a document names is there, under the name that it has now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.service_process import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("prefixcache", "kernels", "worker", "bench", "tests", "docs")
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
] + [path.name for path in ROOT.glob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_of_python_that_a_document_names_is_there(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/.\-…])([a-z_][\w/]*\.py)\b", page.read_text()))
    lost = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)}
    assert not lost, f"{page.name} names what is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not heading or heading in headings(target), f"{page.name} links to {link}"


def headings(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_test_that_a_document_names_is_there(page: Path) -> None:
    tests = {
        f"/{path.relative_to(ROOT).as_posix()}": re.findall(r"def (test_\w+)", path.read_text())
        for path in (ROOT / "tests").rglob("*.py")
    }
    text = page.read_text()
    for file, name in re.findall(r"([\w/]+\.py)::(test_\w+)\b(?!…)", text):
        found = [named for path, named in tests.items() if path.endswith(f"/{file}")]
        assert any(name in named for named in found), f"{page.name}: {file}::{name}"
    every = [one for named in tests.values() for one in named]
    for short in re.findall(r"`…:*([\w…]+)[`\[]", text):  # only its beginning, or parts of it
        parts = short.split("…")
        assert any(all(part in one for part in parts) for one in every), f"{page.name}: …{short}"
