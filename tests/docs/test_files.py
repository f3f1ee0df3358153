"""Every file that a document names is there, under the name that it has now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.service_process import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("prefixcache", "kernels", "worker", "bench", "tests")
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_of_python_that_a_document_names_is_there(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/.\-…])([a-z_][\w/]*\.py)\b", page.read_text()))
    lost = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)}
    assert not lost, f"{page.name} names what is not there"
