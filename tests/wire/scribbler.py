"""A worker that outlives its service: it goes on writing to all blocks it was ever lent.

Argument: target.  Says how many blocks are its own, and writes rubbish until its input ends.
"""

from __future__ import annotations

import select
import sys

import prefixcache
from chaos.pattern import Pool, prompt
from prefixcache.pool import map_pool
from wire.service_process import LAYOUT


def main() -> None:
    client = prefixcache.connect(sys.argv[1])
    session = client.attach("model", LAYOUT, name="scribbler")
    pool = Pool(map_pool(session.pool), session.pool)
    tokens = prompt((77, 42))
    lease = session.acquire(tokens, reserve=20)
    pool.write("model", tokens, lease.block_table, 0, 30)
    lease.commit(30)  # 7 whole blocks, and a tail of 2 in a block to which it writes on
    room = len(lease.block_table) * pool.handle.block_size
    mine = pool.places(lease.block_table, 30, room)
    sys.stdout.write(f"{len(lease.block_table) - 7}\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        pool.slots[:, mine] += 1


if __name__ == "__main__":
    main()
