"""Shares: nobody can take what is kept for another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.core.shares import Shares
from prefixcache.errors import PoolExhausted

TENANTS = ("", "a", "b", "stranger")


def make(limit: int, *tenants: str) -> Shares:
    shares = Shares(limit, "--max-leases", "leases")
    shares.set_tenants(tenants)
    return shares


def test_one_user_may_have_all() -> None:
    shares = make(10)
    shares.take("", 10)
    with pytest.raises(PoolExhausted, match="10 leases, and 1 more is asked for; --max-leases"):
        shares.take("")


def test_the_only_tenant_of_a_file_has_nothing_kept_for_it_and_all_may_have_all() -> None:
    shares = make(10, "a")
    shares.take("b", 10)
    shares.give("b", 10)
    shares.take("a", 10)


def test_a_refusal_is_a_sentence_also_where_there_is_one():
    shares = make(4, "a", "b")
    shares.take("a", 1)
    one = "'a' has 1 of the leases and asks for 3 more; of the 4 of --max-leases 1 is kept"
    with pytest.raises(PoolExhausted, match=one):
        shares.take("a", 3)
    alone = make(1)
    alone.take("a")
    with pytest.raises(PoolExhausted, match="1 of the leases, and 1 more is asked for"):
        alone.take("a")


def test_a_part_is_kept_for_each_tenant_and_the_rest_is_for_who_comes_first() -> None:
    shares = make(12, "a", "b")
    shares.take("a", 9)
    with pytest.raises(PoolExhausted, match="tenant 'a' has 9 leases and asks for 1 more"):
        shares.take("a")
    shares.take("b", 3)
    with pytest.raises(PoolExhausted):
        shares.take("b")
    shares.give("a", 4)
    shares.take("b", 4)


def test_who_is_in_no_file_takes_only_of_what_is_kept_for_nobody() -> None:
    shares = make(12, "a", "b")
    shares.take("gone", 6)
    with pytest.raises(PoolExhausted):
        shares.take("gone")
    shares.take("a", 3)
    shares.take("b", 3)


def test_what_is_there_counts_even_if_nobody_asked() -> None:
    shares = make(12, "a", "b")
    shares.force("a", 11)
    with pytest.raises(PoolExhausted):
        shares.take("a")
    shares.take("b")
    with pytest.raises(PoolExhausted):
        shares.take("b")  # 12 of 12


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(TENANTS), st.integers(1, 6)),
        st.tuples(st.just("give"), st.sampled_from(TENANTS), st.integers(1, 6)),
        st.tuples(st.just("tenants"), st.sets(st.sampled_from(TENANTS)), st.just(0)),
    ),
    max_size=60,
)


@given(limit=st.integers(1, 24), steps=STEPS)
def test_against_the_sums(limit: int, steps: list[tuple[str, object, int]]) -> None:
    """The rule, counted anew each time: beyond the parts kept, all share what is left."""
    shares, used, known = make(limit), dict.fromkeys(TENANTS, 0), frozenset[str]()
    for act, what, count in steps:
        if act == "tenants":
            assert isinstance(what, set)
            known = frozenset(what) if len(what) > 1 else frozenset()
            shares.set_tenants(what)
        elif act == "give":
            assert isinstance(what, str)
            count = min(count, used[what])
            if count:
                shares.give(what, count)
                used[what] -= count
        else:
            assert isinstance(what, str)
            kept = limit // (2 * len(known)) if known else 0
            own = {who: kept if who in known else 0 for who in TENANTS}
            before = sum(max(0, used[who] - own[who]) for who in TENANTS)
            now = before + max(0, used[what] + count - own[what]) - max(0, used[what] - own[what])
            fits = sum(used.values()) + count <= limit
            may = fits and (now == before or now <= limit - kept * len(known))
            if may:
                shares.take(what, count)
                used[what] += count
            else:
                with pytest.raises(PoolExhausted):
                    shares.take(what, count)
        assert {who: shares.used(who) for who in TENANTS} == used
        shares.check_counts()


@pytest.mark.parametrize(
    ("tenants", "others"),
    [
        ("ab", "of the 12 of --max-leases 3 are kept for the other tenant."),
        ("abc", "of the 18 of --max-leases 6 are kept for the 2 other tenants."),
        ("bc", "of the 12 of --max-leases 6 are kept for the 2 other tenants."),
    ],
)
def test_a_refusal_counts_the_others(tenants: str, others: str) -> None:
    shares = make(6 * len(tenants), *tenants)
    with pytest.raises(PoolExhausted) as full:
        shares.take("a", 6 * len(tenants))
    assert others in str(full.value)
