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
    "arc": [(2625, 1537475895), (25393, 822258306)],
    "cost-aware": [(2557, 2996149295), (25024, 614333901)],
    "fifo": [(2428, 4285135274), (24866, 2267140226)],
    "hazard": [(2465, 168480453), (25289, 2947939592)],
    "lfu": [(2554, 741944641), (24641, 913506366)],
    "lru": [(2443, 1076054484), (25169, 1947748441)],
    "priority": [(3010, 2346177620), (25067, 1334050167)],
    "s3fifo": [(2593, 615488155), (24933, 931481458)],
    "sieve": [(2542, 1976931837), (24901, 3243227979)],
    "slru": [(2625, 1311907688), (25383, 2416128517)],
    "2q": [(2520, 1277406633), (25201, 2209423713)],
    "w-tinylfu": [(2506, 1875234817), (25176, 259774510)],
}


@pytest.mark.walk
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", range(len(SIZES)), ids=[f"{size} blocks" for size in SIZES])
def test_it_keeps_what_it_kept(policy: str, at: int) -> None:
    assert kept(policy, SIZES[at]) == RECORDED[policy][at]


if __name__ == "__main__":
    for name in POLICIES:
        print(f'    "{name}": {[kept(name, size) for size in SIZES]},')  # noqa: T201
