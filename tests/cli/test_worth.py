"""What people are told of fetching and computing."""

from __future__ import annotations

import pytest

from prefixcache.cli.explain import _tier_line
from prefixcache.cli.status import tiers
from prefixcache.cli.view import show_holding
from prefixcache.types import HoldingInfo, Snapshot, TierSpan


@pytest.mark.parametrize(
    ("span", "line"),
    [
        (
            TierSpan("disk", 1024, 2048, 0.029, 0.74, is_worth=True),
            "tokens 1,024 to 2,047 lie on DISK: 29 ms to fetch, 740 ms to compute",
        ),
        (
            TierSpan("host", 0, 16, 0.029, 0.012, is_worth=False),
            "tokens 0 to 15 lie on HOST: 29 ms to fetch, 12 ms to compute; they are computed",
        ),
        (
            TierSpan("host", 0, 16, 0.029, None, is_worth=True),
            "tokens 0 to 15 lie on HOST: 29 ms to fetch for who waits; how long to compute is not "
            "known yet",
        ),
    ],
)
def test_where_evicted_tokens_lie_is_told_with_the_sum(span: TierSpan, line: str) -> None:
    assert _tier_line(span) == line


def test_what_is_declined_is_told_by_why() -> None:
    held = {"host_blocks": 1000, "host_used": 500, "sunk": 700, "restored": 90}
    assert tiers(Snapshot(**held)) == [
        "host 500 of 1,000 (50.0%) · gone down 700 · come back 90 · spoilt 0"
    ]
    (told,) = tiers(Snapshot(**held, host_advantage=25.51, declined_slow=1200, declined_room=3))
    assert told.endswith(
        " · spoilt 0 · computing takes 25.5x as long · declined 1,203 (slow 1,200, room 3)"
    )


@pytest.mark.parametrize(
    ("holding", "text"),
    [
        (HoldingInfo("a", 0, 0, 0, 0), "0 blocks below the pool"),
        (HoldingInfo("a", 1, 0, 0, 0), "1 block below the pool"),
        (HoldingInfo("a", 5, 7, 0, 7), "5 blocks below the pool · 7 kept for it"),
        (
            HoldingInfo("a", 500, 200, 700, 2000),
            "1,200 blocks below the pool · 500 in memory · 2,000 kept for it, 200 in memory",
        ),
    ],
)
def test_what_a_tenant_has_below_is_told_with_what_is_kept_for_it(
    holding: HoldingInfo, text: str
) -> None:
    assert show_holding(holding) == text


def test_each_tier_is_told_in_a_line_of_its_own() -> None:
    disk = {"disk_blocks": 2000, "disk_used": 1, "disk_written": 5, "disk_restored": 4}
    disk |= {"sunk": 7, "restored": 6}
    assert tiers(Snapshot()) == []
    assert tiers(Snapshot(**disk, disk_advantage=3.0)) == [
        "disk 1 of 2,000 (0.1%) · gone down 7 · come back 6 · spoilt 0 · computing takes 3.0x as "
        "long"
    ]
    assert tiers(Snapshot(**disk, host_blocks=10, declined_busy=1)) == [
        "host 0 of 10 (0.0%) · gone down 7 · come back 6 · spoilt 0 · declined 1 (busy 1)",
        "disk 1 of 2,000 (0.1%) · written 5 · come back 4",
    ]
