"""An account adds up the roots of a namespace, and forgets those of which nothing is left."""

from __future__ import annotations

from prefixcache.core.account import Account
from prefixcache.core.node import Root
from prefixcache.types import Namespace

HERE = Namespace("m", tenant="t")


def test_roots_of_which_nothing_is_left_are_dropped_and_those_that_are_held_stay() -> None:
    tenant = Account("t", None)
    account = Account(HERE, tenant)
    held = []
    for number in range(1000):
        root = Root(HERE)
        account.adopt(root)
        assert root.account is account
        assert root.sums is tenant.found
        if number % 100 == 50:
            root.lock_ref += 1
            held.append(root)
        elif number % 100 == 70:
            root.num_blocks = 3
            held.append(root)
        assert len(account.roots) <= 2 * (len(held) + 1) + 9
        assert set(map(id, held)) <= set(map(id, account.roots))


def test_it_is_named_as_people_write_it_without_the_salt() -> None:
    tenant = Account("t", None)
    assert str(tenant) == "tenant 't'"
    assert str(Account("", None)) == "the nameless tenant"
    assert str(Account(Namespace("m", "a", "t", "secret"), tenant)) == (
        f"namespace {Namespace('m', 'a', 't')}"
    )
    assert (tenant.tenant, Account(HERE, tenant).tenant) == ("t", "t")


def test_it_has_a_quota_as_soon_as_one_of_both_numbers_is_said() -> None:
    account = Account("t", None)
    assert not account.has_quota
    account.max_held = 0
    assert account.has_quota
    account.max_held, account.guaranteed = None, 1
    assert account.has_quota
