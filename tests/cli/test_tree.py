"""`prefixcache tree`: as text at every width, as JSON, as a picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.cells import cell_len

import prefixcache
from cli.running import At
from service.service_process import LAYOUT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def stored(at: At) -> At:
    """Twenty prompts that share 8 tokens; one more is leased; some are evicted."""
    with prefixcache.connect(at.target) as client:
        session = client.attach("tiny", LAYOUT)
        for i in range(20):
            with session.acquire([7] * 8 + [100 + i] * 12) as lease:
                lease.commit(20)
        session.close()
    return at


def test_the_tree_is_drawn_with_sums_shares_and_what_is_left_out(stored: At) -> None:
    told = stored.call("tree", "--limit", "4", "--namespace", "tiny")
    assert told.code == 0
    head, columns, *rows, legend = told.out.splitlines()
    assert head.startswith("tiny: ")
    assert columns.split() == ["tokens", "share", "blocks", "heat", "idle", "run"]
    assert "100.0%" in rows[0]
    assert rows[0].endswith("└─ ⑂19@8 7 7 7 7 7 7 7 7 (8)")  # all but the first part at token 8
    assert all("├─ " in row for row in rows[1:-1])
    assert rows[-1].endswith("more")
    assert "ghost" in legend


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(stored: At, width: int) -> None:
    told = stored.call("tree", COLUMNS=str(width))
    assert told.code == 0
    assert max(map(cell_len, told.out.splitlines()[:-1])) <= width


def test_json_has_the_same_numbers(stored: At) -> None:
    fields = stored.call("tree", "--depth", "1", "--sort", "heat", "--json").fields
    (tree,) = [one for one in fields["namespaces"] if one["model"] == "tiny"]
    root, shared = tree["branches"]
    assert root["below"]["tokens"] == shared["below"]["tokens"]
    assert shared["tokens"] == [7] * 8
    assert (shared["num_more"] > 0, shared["more"]["tokens"]) == (
        True,
        shared["below"]["tokens"] - 8,
    )


def test_the_picture_has_a_bar_per_run_a_tooltip_for_each_and_hatched_leases(
    stored: At, tmp_path: Path
) -> None:
    with prefixcache.connect(stored.target) as client:
        session = client.attach("tiny", LAYOUT)
        lease = session.acquire([7] * 8 + [300] * 40)
        lease.commit(48)
        told = stored.call("tree", "--svg", str(tmp_path / "tree.svg"))
        session.close()
    assert told.code == 0
    picture = ET.parse(tmp_path / "tree.svg").getroot()  # noqa: S314 - our own
    groups = picture.findall(f"{SVG}g")
    assert all(group.find(f"{SVG}title") is not None for group in groups)
    text = (tmp_path / "tree.svg").read_text()
    assert text.count('fill="url(#leased)"') >= 2 + 1  # the shared run, the new one, the legend
    assert text.count('class="ghost"') >= 1 + 1
    bars = [float(rect.get("width", "0")) for rect in picture.iter(f"{SVG}rect")]
    assert max(bars[1:]) <= 1232


def test_nothing_stored_has_exit_code_1(at: At) -> None:
    assert at.call("tree").code == 1
    assert at.call("tree", "--json").code == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--svg", "/nonexistent/tree.svg"], "/nonexistent/tree.svg"),
        (["--limit", "30000"], "20,000"),
        (["--tokenizer", "/nonexistent"], "tokenizer.json"),
        (["--depth", "0"], "--depth"),
    ],
)
def test_wrong_usage_has_exit_code_2(stored: At, arguments: list[str], text: str) -> None:
    told = stored.call("tree", *arguments)
    assert told.code == 2
    assert text in told.err
