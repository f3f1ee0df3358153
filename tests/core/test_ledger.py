"""Tallies: what is counted as it happens is what a walk over all requests would sum up."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest

from prefixcache.core.ledger import MOST_SERIES, OTHER, Tallies
from prefixcache.types import Ledger, Namespace


def summed(ledgers: list[Ledger]) -> Ledger:
    return Ledger(
        hit=sum(one.hit for one in ledgers),
        partial=0,
        joined=sum(one.joined for one in ledgers),
        cold=sum(one.cold for one in ledgers),
        evicted=0,
        granularity=0,
        resumed=sum(one.resumed for one in ledgers),
    )


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))]
)
def test_the_sums_are_those_of_a_walk_whatever_comes_goes_and_is_renamed(seed: int) -> None:
    draw, tallies = Random(seed), Tallies()
    walked: dict[Namespace, list[Ledger]] = {}
    series: dict[Namespace, list[Ledger]] = defaultdict(list)
    for _ in range(400):
        named = Namespace(f"m{draw.randrange(80)}", tenant=draw.choice(["", "t"]))
        space = Namespace(named.model, "", named.tenant, draw.choice(["", "s", "t", "u"]))
        if draw.random() < 0.7:
            ledger = Ledger(
                hit=draw.randrange(9),
                joined=draw.choice([0, 0, 4]),
                cold=draw.randrange(9),
                resumed=draw.choice([0, 0, 0, 2]),
            )
            tallies.add(space, ledger)
            walked.setdefault(space, []).append(ledger)
            if named not in series and len(series) >= MOST_SERIES:
                named = OTHER
            series[named].append(ledger)
        elif walked:
            gone = draw.choice([space, draw.choice(list(walked))])
            name = draw.choice([Namespace("", tenant=gone.tenant), named, gone])
            kept = walked.pop(gone, [])
            tallies.rename(gone, name)
            if kept:
                walked.setdefault(name, []).extend(kept)
        tallies.check()
        assert tallies.names() == list(walked)
        for one, ledgers in walked.items():
            told = tallies.get(one)
            assert told is not None
            assert told.total() == summed(ledgers)
        assert {name: tally.total() for name, tally in tallies.series.items()} == {
            name: summed(ledgers) for name, ledgers in series.items()
        }
        every = [ledger for ledgers in series.values() for ledger in ledgers]
        fresh = sum(not one.resumed for one in every)
        joins = sum(one.joined > 0 for one in every)
        assert tallies.total().counts() == (fresh, joins, summed(every))


def test_the_first_names_keep_their_series_and_all_others_share_one() -> None:
    tallies = Tallies()
    for number in range(MOST_SERIES + 30):
        tallies.add(Namespace(f"m{number}"), Ledger(hit=number, cold=1))
    assert list(tallies.series) == [*(Namespace(f"m{n}") for n in range(MOST_SERIES)), OTHER]
    assert tallies.series[OTHER].requests == 30


def test_salts_share_a_series_which_never_goes_back() -> None:
    """A counter that Prometheus reads must not fall, also when a namespace leaves."""
    tallies = Tallies()
    for number in range(200):
        space = Namespace("m", salt=str(number))
        tallies.add(space, Ledger(joined=8))
        assert tallies.series[Namespace("m")].requests == number + 1
        tallies.rename(space, Namespace(""))
        assert tallies.series[Namespace("m")].requests == number + 1
    assert list(tallies.series) == [Namespace("m")]
    assert len(tallies) == 1
