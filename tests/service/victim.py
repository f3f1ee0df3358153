"""A worker in a process of its own: leases a prompt, says so, and does nothing more until it dies.

Arguments: target, number of tokens, how many of them to commit, and the model's name.
"""

from __future__ import annotations

import sys
import time

import prefixcache
from prefixcache.errors import CacheError
from service.service_process import LAYOUT


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    target, num_tokens, num_committed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = sys.argv[4] if len(sys.argv) > 4 else "model"
    client = prefixcache.connect(target)
    session = client.attach(model, LAYOUT, name="victim")
    lease = session.acquire(list(range(num_tokens)))
    if num_committed:
        lease.commit(num_committed)
    say(f"holding {lease.id}")
    for _ in sys.stdin:
        try:
            say(str(lease.commit(num_tokens)))
        except CacheError as error:
            say(type(error).__name__)
    time.sleep(600)


if __name__ == "__main__":
    main()
