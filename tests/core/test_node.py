"""Children in order, however many; and the length of a common prefix, however long."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import Children, Node, Root, Run, Tail, common_prefix
from prefixcache.core.policies import POLICIES
from prefixcache.types import Grant, Namespace, WorkerId, pack

ROOT = Root(Namespace("m"))


def child(key: bytes) -> Node:
    return Run(key, array("i"), ROOT, 0)


def shared(a: bytes, b: bytes) -> int:
    """Count the equal leading bytes of whole tokens."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same & ~3


@pytest.mark.parametrize(("seed", "most"), [(0, 5), (1, 40), (2, 700), (3, 1200)])
def test_neighbours_are_those_of_a_sorted_list_whatever_comes_and_goes(
    seed: int, most: int
) -> None:
    draw, children = Random(seed), Children()
    there: dict[bytes, Node] = {}
    for number in range(3 * most):
        key = pack([draw.randrange(60), draw.randrange(60)])
        if key in there and draw.random() < 0.4:
            children.drop(key)
            del there[key]
        elif key not in there and len(there) < most:
            below = [one for one in there if one < key]
            before = children.put(key, there.setdefault(key, child(key)))
            assert before is (there[max(below)] if below else None)
        if number % (1 + most // 40):
            continue
        keys = sorted(there)
        for at, one in enumerate(keys[:50]):
            assert children.before(one) is (there[keys[at - 1]] if at else None)
            following = there[keys[at + 1]] if at + 1 < len(keys) else None
            assert children.after(one) is following
        asked = pack([draw.randrange(60), 99])
        found, size = children.nearest(asked)
        assert size == max((shared(asked, one) for one in there), default=0)
        assert (found is None) == (size == 0)
        if found is not None:
            assert shared(found.tokens, asked) == size
    assert dict(children) == there


@pytest.mark.parametrize("size", [1, 2, 700])
def test_an_order_that_lost_a_key_or_has_one_too_many_is_not_in_order(size: int) -> None:
    children, keys = Children[Node](), [pack([number, 0]) for number in range(size)]
    for key in keys:
        children.put(key, child(key))
    assert all(children.is_in_order(key) for key in keys)
    for key in keys[:: 1 + size // 5]:
        dict.__setitem__(children, other := pack([size, 7]), child(other))
        assert not children.is_in_order(key)
        dict.__delitem__(children, other)
        if size == 2:
            children._order.reverse()
            assert not all(children.is_in_order(one) for one in keys)
            children.sort()
        if size > 1:
            children._order.remove(key)
            children._order.append(other) if size == 2 else children._order.add(other)
            assert not children.is_in_order(key)
            children._order.remove(other)
            children._order.append(key) if size == 2 else children._order.add(key)
            children.sort()


@pytest.mark.parametrize("seed", range(3))
def test_an_only_child_is_found_and_replaced_as_one_of_several_is(seed: int) -> None:
    draw, above, width = Random(seed), child(b""), 8
    there: dict[bytes, Node] = {}
    for _ in range(300):
        key = pack([draw.randrange(4) for _ in range(draw.choice((1, 2, 2)))])
        if key not in there and draw.random() < 2 / (1 + len(there)):
            one = child(key) if len(key) == width else Tail(key, array("i"), above, 0)
            below = [other for other in there if other < key]
            before = above.put(one, width)
            assert before is (there[max(below)] if below else None)
            there[key] = one
        elif key in there and there[key].tail:
            above.drop(there.pop(key), width)
        elif key in there:
            other = child(key + key)
            above.replace(there[key], other, width)
            there[key] = other
            if draw.random() < 0.5:
                above.drop(there.pop(key), width)
        assert {*above.children} == {*there.values()}
        assert above.any_child() in (there.values() if there else [None])
        assert (above.only is not None, above.several is not None) == (
            len(there) == 1,
            len(there) > 1,
        )
        assert above.is_inner == any(not one.tail for one in there.values())
        asked = pack([draw.randrange(4), draw.randrange(5)])
        found, size = above.nearest(asked)
        assert size == max((shared(asked, one.tokens[:width]) for one in there.values()), default=0)
        assert (found is None) == (size == 0)
        if found is not None:
            assert shared(found.tokens[:width], asked) == size


@pytest.mark.parametrize("size", [2, 700])
def test_a_run_of_one_block_among_others_is_the_same_bytes_as_its_key(size: int) -> None:
    above, width = child(b""), 8
    runs = [child(pack([number, 0, 1, 1])) for number in range(size)]
    for run in runs:
        above.put(run, width)
    first = child(pack([1, 0]))
    above.replace(runs[1], first, width)
    assert above.several is not None
    (key,) = [key for key in above.several if key == first.tokens]
    assert key is first.tokens
    assert first.tokens == pack([1, 0])
    above.replace(first, longer := child(pack([1, 0, 2, 2])), width)
    assert above.several[key] is longer
    assert longer.tokens == pack([1, 0, 2, 2])


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 255, 256, 257, 500, 768, 1024, 5000])
def test_a_common_prefix_ends_at_the_first_byte_that_differs(size: int) -> None:
    same = bytes(Random(size).randrange(256) for _ in range(size))
    assert common_prefix(b"?" + same, 1, b"??" + same, 2, size) == size
    for at in {0, 1, size // 3, size // 2, size - 2, size - 1} & set(range(size)):
        other = bytearray(same)
        other[at] ^= 1 << (at % 8)
        assert common_prefix(b"?" + same, 1, b"??" + bytes(other), 2, size) == at


@pytest.mark.walk
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "hazard"])
def test_a_queue_of_leaves_forgets_those_that_were_held_again(policy: str) -> None:
    cache, space = PrefixCache(64, 1, policy=policy, ttl_s=1e9), Namespace("m")
    cache.attach(worker := WorkerId(1), space, now=0.0)
    for number in range(1500):
        grant = cache.acquire(worker, space, pack([number % 7, 1, 2]), now=float(number))
        assert isinstance(grant, Grant)
        cache.commit(worker, grant.lease, 3, now=float(number))
        cache.release(worker, grant.lease, now=float(number))
    assert len(cache._lessor.tree.queue) <= 1024 + 64


def test_each_policy_remembers_as_many_evicted_blocks_as_its_paper_says() -> None:
    limits = {name: PrefixCache(128, 4, policy=name)._lessor.tree.ghosts.limit for name in POLICIES}
    assert limits == dict.fromkeys(POLICIES, 128) | {"w-tinylfu": 512, "hazard": 2546}
