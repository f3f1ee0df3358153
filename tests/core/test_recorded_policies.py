"""What each policy keeps, request by request, is what it kept when it was written down.

The other tests say what a policy is for; these notice that it decides anything differently: a
boundary, a constant, a tie.  Who changes a policy on purpose writes down what is printed then:
`PYTHONPATH=tests python -m core.test_recorded_policies`.
"""

from __future__ import annotations

import random
import zlib

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.core.policies import POLICIES
from prefixcache.types import Grant, LeaseId, Namespace, WorkerId, pack

ME = WorkerId(1)
CHATS, SCANS = Namespace("m", tenant="chats"), Namespace("m", tenant="scans")
SIZES = (30, 300)
REQUESTS = 700


def kept(policy: str, num_blocks: int) -> tuple[int, int]:
    """Serve chats, returning visitors and scans; give all tokens found, and a sum over each."""
    draw = random.Random(f"trace {num_blocks}")
    cache = PrefixCache(num_blocks, 2, policy=policy, ttl_s=1e9, num_ghosts=4 * num_blocks)
    for space in (CHATS, SCANS):
        cache.attach(ME, space, now=0.0)
    if policy == "priority":
        cache.rank(CHATS, 7, ttl_s=40.0)
    chats = [[number] * 3 for number in range(num_blocks // 4)]
    open_leases: list[LeaseId] = []
    now, found = 0.0, []
    for number in range(REQUESTS):
        now += draw.choice((0.5, 1.0, 1.0, 9.0))
        space = SCANS if draw.random() < 0.25 else CHATS
        if space is SCANS:
            tokens = [1000 + number] * draw.randrange(2, 14)
        else:
            at = min(int(draw.expovariate(0.25)), len(chats) - 1)
            chats[at] += [draw.randrange(3) for _ in range(draw.randrange(4))]
            if len(chats[at]) > num_blocks // 2:
                chats[at] = chats[at][:3]
            tokens = chats[at]
        grant = cache.acquire(ME, space, pack([*tokens, 99]), now=now)
        assert isinstance(grant, Grant)
        found.append(grant.num_cached)
        cache.commit(ME, grant.lease, len(tokens), now=now)
        if policy == "priority" and draw.random() < 0.1:
            cache.retain(ME, grant.lease, draw.randrange(10), ttl_s=20.0, now=now)
        open_leases.append(grant.lease)
        while len(open_leases) > draw.randrange(3):
            cache.release(ME, open_leases.pop(0), now=now)
    cache.check()
    return sum(found), zlib.crc32(repr(found).encode())


RECORDED: dict[str, list[tuple[int, int]]] = {
    "arc": [(2654, 1665591353), (25412, 794642066)],
    "cost-aware": [(2586, 2113208585), (25064, 2041470221)],
    "fifo": [(2363, 3687421493), (24850, 126548307)],
    "hazard": [(2710, 3841580684), (25372, 3598686336)],
    "lfu": [(2594, 551719244), (24645, 2058881609)],
    "lru": [(2382, 1892325438), (25130, 3501842119)],
    "priority": [(3035, 888890690), (24966, 3000419657)],
    "s3fifo": [(2610, 1792342516), (24983, 1491860558)],
    "sieve": [(2559, 352677882), (24923, 3740306478)],
    "slru": [(2646, 4026241377), (25385, 1931447342)],
    "2q": [(2492, 125935055), (25261, 1196457611)],
    "w-tinylfu": [(2603, 2123250340), (25222, 2039297273)],
}


@pytest.mark.walk
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", range(len(SIZES)), ids=[f"{size} blocks" for size in SIZES])
def test_it_keeps_what_it_kept(policy: str, at: int) -> None:
    assert kept(policy, SIZES[at]) == RECORDED[policy][at]


if __name__ == "__main__":
    for name in POLICIES:
        print(f'    "{name}": {[kept(name, size) for size in SIZES]},')  # noqa: T201
