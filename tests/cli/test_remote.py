"""What people are told of a store that other machines have, too."""

from __future__ import annotations

import pytest

from prefixcache.cli.checks import NOTE, OK, WRONG, remote
from prefixcache.cli.status import Status, tiers
from prefixcache.types import Snapshot


def seen(**counts: int) -> Snapshot:
    return Snapshot(has_remote=True, **counts)


def test_what_goes_there_and_comes_back_is_a_line() -> None:
    assert tiers(Snapshot()) == []
    assert tiers(seen(remote_stored=1200, remote_restored=90)) == [
        "remote: stored 1,200 · come back 90"
    ]
    (told,) = tiers(seen(remote_unstored=3, remote_wrong=2, remote_late=1, declined_slow=4))
    assert told == (
        "remote: stored 0 · come back 0 · not stored in time 3 · wrong 2 · questions not answered "
        "in time 1 · declined 4 (slow 4)"
    )


@pytest.mark.parametrize(
    ("snapshot", "level", "text"),
    [
        (seen(remote_stored=7, remote_restored=1), OK, "7 blocks stored for other machines"),
        (seen(remote_stored=70, remote_unstored=71), NOTE, "71 blocks could not be stored"),
        (seen(remote_stored=70, remote_wrong=1), WRONG, "1 block of the remote store did not"),
    ],
)
def test_the_doctor_looks_at_it(snapshot: Snapshot, level: str, text: str) -> None:
    (found,) = remote(Status(snapshot, None, None, None, None))
    assert (found.level, found.text.startswith(text)) == (level, True), found.text
    assert bool(found.advice) is (level != OK)


def test_without_such_a_store_nothing_is_said() -> None:
    assert list(remote(Status(Snapshot(), None, None, None, None))) == []
