"""Quotas at their boundaries: the last block that is allowed and the first that is not."""

from __future__ import annotations

import pytest

from prefixcache.core.account import Account
from prefixcache.core.node import Root
from prefixcache.core.quota import MAX_QUOTAS, Quotas
from prefixcache.errors import InvalidRequest, QuotaExceeded
from prefixcache.types import Namespace, QuotaInfo

HERE = Namespace("m", tenant="t")


def private(quotas: Quotas, namespace: Namespace, count: int) -> Account:
    """Let leases own so many blocks, as the lessor counts them."""
    account = quotas.account(namespace)
    account.private += count
    assert account.above is not None
    account.above.private += count
    return account


@pytest.mark.parametrize("scope", [HERE, "t"])
def test_exactly_the_quota_may_be_held_and_no_block_more(scope: Namespace | str) -> None:
    quotas = Quotas(100)
    quotas.set(scope, 10, 0)
    account = private(quotas, HERE, 7)
    quotas.admit(account, 3)
    assert quotas.allows(account, 3)
    assert not quotas.allows(account, 4)
    with pytest.raises(QuotaExceeded, match=r"needs 4 more blocks, and .* holds 7 of at most 10"):
        quotas.admit(account, 4)


@pytest.mark.parametrize("scope", [HERE, "t"])
def test_what_fits_in_an_empty_quota_is_not_hopeless(scope: Namespace | str) -> None:
    quotas = Quotas(100)
    quotas.set(scope, 10, 0)
    account = private(quotas, HERE, 7)
    quotas.refuse_hopeless(account, 10)
    with pytest.raises(QuotaExceeded, match=r"needs 11 blocks, and .* may hold at most 10"):
        quotas.refuse_hopeless(account, 11)


def test_without_a_quota_there_is_no_limit() -> None:
    quotas = Quotas(100)
    account = private(quotas, HERE, 7)
    quotas.admit(account, 10**9)
    quotas.refuse_hopeless(account, 10**9)
    assert quotas.allows(account, 10**9)


def test_a_quota_of_nothing_is_a_quota_and_a_negative_one_is_refused() -> None:
    quotas = Quotas(100)
    told = quotas.set("t", 0, 0)
    assert told == QuotaInfo("t", None, 0, 0, 0, 0)
    assert quotas.any_limit
    assert not quotas.allows(quotas.account(HERE), 1)
    for max_held, share in ((-1, 0), (None, -1), (5, -1)):
        with pytest.raises(InvalidRequest, match="give 0 or more"):
            quotas.set("t", max_held, share)
    assert quotas.get("t") == told


def test_all_shares_together_are_at_most_the_pool_and_ones_own_counts_once() -> None:
    quotas = Quotas(100)
    quotas.set("a", None, 60)
    quotas.set("b", None, 40)
    quotas.set("b", None, 40)
    assert [one.guaranteed for one in quotas.shares] == [60, 40]
    assert not quotas.any_limit
    with pytest.raises(InvalidRequest, match="41 guaranteed blocks and 60 of others"):
        quotas.set("b", None, 41)
    quotas.set("a", None, 0)
    quotas.set("b", None, 100)
    assert [one.scope for one in quotas.shares] == ["b"]


def test_so_many_accounts_may_have_a_quota_and_no_more() -> None:
    quotas = Quotas(100)
    for number in range(MAX_QUOTAS):
        quotas.set(f"t{number}", 1, 0)
    for max_held, share in ((1, 0), (None, 1)):
        with pytest.raises(InvalidRequest, match="1024 accounts have a quota"):
            quotas.set("late", max_held, share)
    quotas.set("t0", 2, 0)
    quotas.set("late", None, 0)
    quotas.set("t0", None, 0)
    quotas.set("late", 1, 0)
    assert len(quotas.limited()) == MAX_QUOTAS


def test_an_account_about_which_nothing_is_said_any_more_is_gone() -> None:
    quotas = Quotas(100)
    quotas.set(HERE, 5, 0)
    quotas.set("other", None, 5)
    assert [one.scope for one in quotas.limited()] == ["other", HERE]
    assert [one.scope for one in quotas.tenants()] == ["t", "other"]
    assert [one.scope for one in quotas.namespaces("t")] == [HERE]
    assert [one.scope for one in quotas.namespaces(None)] == [HERE]
    assert quotas.namespaces("nobody") == []
    quotas.set(HERE, None, 0)
    quotas.set("other", None, 0)
    assert quotas.limited() == quotas.tenants() == quotas.namespaces(None) == []
    assert quotas.get(HERE) == QuotaInfo("t", HERE, None, 0, 0, 0)
    assert not quotas.any_limit


def test_of_a_namespace_that_is_closed_nobody_answers_for_what_is_still_cached() -> None:
    quotas = Quotas(100)
    quotas.account(HERE).adopt(root := Root(HERE))
    assert root.account is quotas.account(HERE)
    quotas.close(HERE)
    assert root.account is None
    assert quotas.tenants() == quotas.namespaces(None) == []


def test_a_tenant_that_holds_something_is_not_forgotten_with_its_quota() -> None:
    quotas = Quotas(100)
    private(quotas, HERE, 7)
    quotas.set("t", 10, 0)
    told = quotas.set("t", None, 0)
    assert told.num_held == 7
    assert [one.scope for one in quotas.tenants()] == ["t"]


def test_quarantined_blocks_count_in_the_namespace_and_in_its_tenant() -> None:
    quotas = Quotas(100)
    account = private(quotas, HERE, 2)
    account.count_quarantined(3)
    assert (quotas.get(HERE).num_held, quotas.get("t").num_held) == (5, 5)
    account.count_quarantined(-3)
    assert (quotas.get(HERE).num_held, quotas.get("t").num_held) == (2, 2)


def test_a_namespace_is_needed_for_blocks_that_are_held_or_a_quota_alone() -> None:
    quotas = Quotas(100)
    quotas.account(HERE)
    assert not quotas.is_needed(HERE)
    account = private(quotas, HERE, 1)
    assert quotas.is_needed(HERE)
    account.private = 0
    assert not quotas.is_needed(HERE)
    quotas.set(HERE, 0, 0)
    assert quotas.is_needed(HERE)
