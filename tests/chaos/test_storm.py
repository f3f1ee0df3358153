"""A short storm, and that the model which judges it can tell right from wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chaos.history import check
from chaos.storm import storm
from chaos.universe import BLOCK_SIZE, LAYOUT, SYSTEM_TOKENS
from chaos.viewer import Viewer
from prefixcache.pool import SHARED_MEMORY, PoolFile
from prefixcache_kernels.contiguous import ContiguousViews


def test_a_short_storm_leaves_no_wrong_byte_and_nothing_behind() -> None:
    with storm(seed=3) as made:
        report = made.run(rounds=2, seconds_per_round=8.0, say=lambda text: None)
    assert not report.failures, "\n".join(report.shown())
    assert len(report.attempts) > 10, "the adversaries did little"
    assert report.cancelled > 0
    assert report.lines["answered"] > 0
    assert report.lines["refused"] > 0
    assert report.beside_s
    assert report.read_tokens > 1000
    assert report.viewed_tokens > 0
    assert report.ended_views > 0
    assert report.final_tokens > 0
    assert report.hits > 0
    assert report.moved > 0
    assert report.restored_tokens > 0


def test_a_view_that_has_not_ended_is_told_from_one_that_has(tmp_path: Path) -> None:
    watching = Viewer("", 1, str(tmp_path / "log"), "blue", 1.0)
    with PoolFile.create(LAYOUT, 8, BLOCK_SIZE, directory=SHARED_MEMORY) as file:
        with file.map() as memory:
            memory[file.handle.offset :] = b"\x01" * (len(memory) - file.handle.offset)
        with ContiguousViews.open(file.handle) as views:
            view = views.view([5, 2, 3])
            pages = view.pages()
            assert watching.left(pages) == f"{3 * file.handle.page_bytes} bytes"
            view.close()
            assert not watching.left(pages)


def event(kind: str, t: float, op: str = "", chat: int = 0, **more: Any) -> dict[str, object]:
    return {"kind": kind, "t": t, "op": op, "model": "a", "system": 0, "chat": chat} | more


def commit(start: float, end: float | None, count: int, chat: int = 0) -> list[dict[str, object]]:
    op = f"{start} {chat}"
    told = [event("commit", start, op, chat, count=count)]
    return told if end is None else [*told, event("answer", end, op)]


def reset(start: float, end: float) -> list[dict[str, object]]:
    return [event("reset", start, f"r{start}"), event("answer", end, f"r{start}")]


def hit(asked: float, told: float, count: int, chat: int = 0) -> list[dict[str, object]]:
    return [event("hit", told, "", chat, asked=asked, count=count)]


def phantoms(*parts: list[dict[str, object]]) -> int:
    return len(check([one for part in parts for one in part]).phantoms)


def test_the_model_accepts_what_a_cache_may_do_and_nothing_else() -> None:
    assert not phantoms(commit(1, 2, 50), hit(3, 4, 50))
    assert not phantoms(commit(1, None, 50), hit(3, 4, 50)), "the answer was lost"
    assert not phantoms(commit(3.5, 5, 50), hit(3, 4, 50)), "they overlap"
    assert phantoms(hit(3, 4, 50)), "nobody committed it"
    assert phantoms(commit(5, 6, 50), hit(3, 4, 50)), "committed later"
    assert phantoms(commit(1, 2, 40), hit(3, 4, 50)), "not so much"
    assert not phantoms(commit(1, 2, 90, chat=7), hit(3, 4, SYSTEM_TOKENS)), "the system prompt"
    assert phantoms(commit(1, 2, 90, chat=7), hit(3, 4, SYSTEM_TOKENS + 9)), "another chat's"
    assert phantoms(commit(1, 2, 50), reset(3, 4), hit(5, 6, 50)), "forgotten"
    assert not phantoms(commit(1, 3.5, 50), reset(3, 4), hit(5, 6, 50)), "they overlap"
    assert not phantoms(commit(1, 2, 50), reset(3, 5.5), hit(5, 6, 50)), "they overlap"
    assert not phantoms(commit(1, 2, 50), reset(3, 4), commit(4.5, 5, 50), hit(6, 7, 50))


def test_what_a_standing_lease_has_committed_must_be_found() -> None:
    seen = event("found", 9.0, committed=50, found=47, asked=5.0)
    assert len(check([seen]).forgotten) == 1
    assert not check([seen | {"found": 48}]).forgotten, "the tail was another's"
    assert not check([*reset(6, 7), seen]).forgotten
    assert len(check([*reset(1, 2), seen]).forgotten) == 1
