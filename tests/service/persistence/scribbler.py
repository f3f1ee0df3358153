"""A worker that goes on writing rubbish to all slots that are its own, whatever happens meanwhile.

Argument: target.  Says how many blocks are its own, and writes until its input ends; then it asks
the service itself, past its own client's better knowledge, to commit, and says what came of it.
"""

from __future__ import annotations

import select
import sys

import prefixcache
from chaos.pattern import Pool, prompt
from prefixcache.client.ops import Step
from prefixcache.errors import CacheError
from prefixcache.pool import map_pool
from service.service_process import LAYOUT


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


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
    say(str(len(lease.block_table) - 7))
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        pool.slots[:, mine] += 1
    step = Step(session.ids)
    reply = step.ask("commit", lease=lease.id, num_tokens=42)
    session._run(step)
    try:
        say(str(reply.result()))
    except CacheError as error:
        say(f"{type(error).__name__} {error.code}")


if __name__ == "__main__":
    main()
