"""The table of namespaces: turns, who is attached, and under which names counts are kept."""

from __future__ import annotations

import pytest

from prefixcache.core.namespaces import _MOST_NAMES, NamespaceTable
from prefixcache.types import Namespace


def names(count: int, tenant: str = "") -> list[Namespace]:
    return [Namespace(f"m{number}", tenant=tenant) for number in range(count)]


def test_everyone_is_looked_at_in_turn_and_who_goes_is_not_looked_at_again() -> None:
    table = NamespaceTable(10)
    for one in names(4):
        table.open(one)
    assert list(table.next(3)) == names(4)[:3]
    assert list(table.next(9)) == [names(4)[3], *names(4)[:3]]
    gone = next(table.next(1))
    table.close(gone)
    assert len(table) == 3
    assert gone not in list(table.next(9))
    assert list(table.next(0)) == []


def test_a_namespace_is_used_until_the_last_worker_leaves_it() -> None:
    table, space = NamespaceTable(10), Namespace("m")
    assert not table.is_used(space)
    table.join(space)
    table.join(space)
    table.leave(space)
    assert table.is_used(space)
    table.leave(space)
    assert not table.is_used(space)


def test_counts_are_kept_without_the_salt_and_of_many_names_together() -> None:
    table = NamespaceTable(10)
    assert table.depart(Namespace("m", "a", "t", "salt")) == Namespace("m", "a", "t")
    for one in names(_MOST_NAMES - 1):
        assert table.depart(one) == one
    late = Namespace("late", tenant="t")
    assert table.depart(late) == Namespace("", tenant="t")
    assert table.depart(Namespace("m", "a", "t", "other")) == Namespace("m", "a", "t")
    for number in range(_MOST_NAMES - 1):
        tenant = f"tenant {number}"
        assert table.depart(Namespace("late", tenant=tenant)) == Namespace("", tenant=tenant)
    assert table.depart(Namespace("late", tenant="one more")) == Namespace("")
    assert table.depart(late) == Namespace("", tenant="t")


def test_a_namespace_that_goes_out_of_turn_is_a_fault_of_ours() -> None:
    table = NamespaceTable(10)
    for one in names(2):
        table.open(one)
    with pytest.raises(AssertionError, match="out of turn"):
        table.close(names(2)[0])
