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
    "arc": [(2627, 1320316799), (25394, 1552429367)],
    "cost-aware": [(2569, 2832879032), (25040, 501575529)],
    "fifo": [(2425, 1137474322), (24850, 4223043930)],
    "hazard": [(2460, 4148438270), (25286, 2324199057)],
    "lfu": [(2555, 1683170321), (24644, 2697902639)],
    "lru": [(2442, 55800100), (25169, 1947748441)],
    "priority": [(3018, 1408304633), (25091, 3379066039)],
    "s3fifo": [(2593, 4247668407), (24938, 3149475314)],
    "sieve": [(2539, 1952215848), (24903, 2719422508)],
    "slru": [(2629, 4264778895), (25384, 2280129137)],
    "2q": [(2530, 1405054890), (25205, 706472439)],
    "w-tinylfu": [(2508, 3338032395), (25155, 3497884000)],
}


@pytest.mark.walk
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", range(len(SIZES)), ids=[f"{size} blocks" for size in SIZES])
def test_it_keeps_what_it_kept(policy: str, at: int) -> None:
    assert kept(policy, SIZES[at]) == RECORDED[policy][at]


if __name__ == "__main__":
    for name in POLICIES:
        print(f'    "{name}": {[kept(name, size) for size in SIZES]},')  # noqa: T201
