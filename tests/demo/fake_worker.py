"""Speaks as `prefixcache worker` does and uses the real service, but has no model.

The next token follows from the sum of all tokens before, so that an answer is right only if the
whole prompt was taken into account; a chunk takes a fixed time.
"""

import argparse
import json
import sys
import threading
import time

import prefixcache
from prefixcache.errors import ServiceUnavailable
from prefixcache.types import Layout, Ledger

LAYOUT = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
CHUNK = 64
CHUNK_S = 0.02
SOLO_CHUNK_S = 0.002
TOKEN_S = 0.002


def say(**event):
    with say.lock:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


say.lock = threading.Lock()


class Cache:
    """A session, and another one when its service is gone and there is one again."""

    def __init__(self, target, name):
        self.target, self.name = target, name
        self.session = self.attach()
        threading.Thread(target=self.watch, daemon=True).start()

    def attach(self):
        return prefixcache.connect(self.target).attach("fake@1", LAYOUT, name=self.name)

    def watch(self):
        while True:
            time.sleep(0.02)
            if not self.session.alive:
                try:
                    self.session = self.attach()
                except ServiceUnavailable:
                    continue
                say(event="joined", worker=self.session.attachment.worker)


def next_token(tokens):
    return sum(i * t for i, t in enumerate(tokens, start=7)) % 26 + ord("a")


def serve(request, cache, known):
    session = cache.session if cache is not None else None
    generated = request.get("generated", [])
    tokens = request["tokens"] + generated
    limit = request["max_new_tokens"] - len(generated)
    lease = None
    began_s = time.monotonic()
    cached, ledger = 0, Ledger(cold=len(tokens))
    if session is not None:
        lease = session.acquire(tokens, reserve=limit, wait_s=request["wait_s"])
        cached, ledger = lease.num_cached, lease.ledger
    fates = ("hit", "partial", "joined", "cold", "evicted", "granularity", "restored")
    stated = {fate: getattr(ledger, fate) for fate in fates}
    waited_ms = (time.monotonic() - began_s) * 1e3
    say(
        event="started",
        id=request["id"],
        ledger=stated,
        num_cached=cached,
        waited_ms=waited_ms,
        num_to_compute=len(tokens) - cached,
    )
    chunk = len(tokens) if known.swift else CHUNK
    for end in [*range(cached + chunk, len(tokens), chunk), len(tokens)]:
        time.sleep(0 if known.swift else CHUNK_S if session is not None else SOLO_CHUNK_S)
        if lease is not None:
            lease.commit(end)
    answer = []
    for _ in range(limit):
        token = next_token([*tokens, *answer])
        second = 8.9995 if known.tie else 5.0
        if (known.broken or known.tie) and cached and len(answer) == 2:
            token += 1
        if known.blurred and cached and len(answer) == 2:
            second += 2**-20
        extra = {"top": [[token, 9.0], [token + 1, second]]} if request["log_logits"] else {}
        say(event="token", id=request["id"], token=token, text=chr(token), **extra)
        answer.append(token)
        if lease is not None and len(answer) > 1:
            lease.commit(len(tokens) + len(answer) - 1, prefixcache.pack(answer[-2:-1]))
        time.sleep(TOKEN_S)
    if lease is not None:
        lease.release()
    say(
        event="finished",
        id=request["id"],
        tokens=generated + answer,
        text="".join(map(chr, generated + answer)),
        reason="length",
        num_computed=len(tokens) - cached + limit - 1,
        kv_read_bytes=64 * (len(tokens) - cached // 2) * limit,  # as if two shared what was cached
        kv_alone_bytes=64 * len(tokens) * limit,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect")
    parser.add_argument("--solo", action="store_true")
    parser.add_argument("--name", default="")
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--tie", action="store_true")
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--blurred", action="store_true")
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--swift", action="store_true")
    parser.add_argument("--fragile", action="store_true")
    parser.add_argument("--stillborn", action="store_true")
    known, _ = parser.parse_known_args()
    if known.stillborn or known.bits != known.invariant:
        sys.exit("no model here")
    cache = None if known.solo else Cache(known.connect, known.name)
    layout = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "dtype": "float32"}
    say(
        event="ready",
        worker=cache.session.attachment.worker if cache else "",
        layout=layout,
        chunk=CHUNK,
    )
    for number, line in enumerate(sys.stdin):
        if known.fragile and number == 2:
            sys.exit("no more")
        args = (json.loads(line), cache, known)
        threading.Thread(target=serve, args=args, daemon=True).start()
    if cache is not None:
        cache.session.close()


if __name__ == "__main__":
    main()
