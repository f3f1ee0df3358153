"""A tenant that means harm: everything it may send, in random order, for as long as it lives.

Arguments: target, seed, log, address of HTTP.  It speaks the wire itself, without the client that
keeps honest callers from mistakes, and has a token that is valid and says that it is `red`.  Every
second it tells how often it did what, and what it was answered (see `Told`).

It does not write to memory that was never lent to it: who maps a pool can, and tenants that must
not trust each other so far have pools of their own (domains).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import grpc

import prefixcache
from chaos.universe import LAYOUT, MODELS, RED, TOKENS, tokens_of
from fuzz.wire import throw
from prefixcache.client import unary
from prefixcache.client.address import this_host
from prefixcache.errors import CacheError
from prefixcache.pool import map_pool
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import environment

TIMEOUT_S = 3.0
BROKEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)
"""What no request may be answered with: something ended that should not have."""
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

NASTY = (
    *("a\nb", "\x1b[2J", "\x1b]52;c;AAAA\x07", "\u202eb", "\u200b", "\x00", "a\tb", "\u2800", "\r"),
    *("x" * 2000, "../../x", "workers of an earlier life", "*", "", " ", "é" * 700, "%s%n", "{}"),
)
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Adversary:
    """One process of the tenant."""

    def __init__(self, target: str, seed: int, log: str, http: str) -> None:
        self.target, self.http = target, http
        self.random = Random(seed)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self.ending = False
        self.path = target.removeprefix("unix:")
        self.held: list[Any] = []
        """Connections and streams that are left standing for a while."""
        self.children: list[subprocess.Popen[bytes]] = []
        self._open()

    def _open(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        options.append(("grpc.max_reconnect_backoff_ms", 300))
        self.channel = grpc.insecure_channel(self.target, options)
        self.stranger = grpc.insecure_channel(self.target, options)
        self.metadata = (("authorization", f"Bearer {TOKENS[RED]}"),)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.end)
        kinds = self.kinds()
        told = 0.0
        while not self.ending:
            name = self.random.choice(list(kinds))
            self.counts[f"{name}:done"] += 1
            try:
                kinds[name]()
            except ConnectionError:
                self.counts[f"{name}:broken off"] += 1
            except (OSError, ValueError):
                self.counts[f"{name}:given up"] += 1
            self.let_go()
            if time.monotonic() > told + 1.0:
                self.tell()
                told = time.monotonic()
        self.let_go(everything=True)
        self.tell()

    def end(self, *_: object) -> None:
        self.ending = True

    def tell(self) -> None:
        line = json.dumps(
            {"kind": "counts", "t": time.monotonic(), "counts": self.counts, "broken": self.broken}
        )
        os.write(self.log, line.encode() + b"\n")

    def let_go(self, *, everything: bool = False) -> None:
        while len(self.held) > 300 or (self.held and everything):
            one = self.held.pop(0)
            one.cancel() if hasattr(one, "cancel") else one.close()
        for child in self.children:
            if len(self.children) > 2 or everything:
                child.kill()
        self.children = [child for child in self.children if child.poll() is None]

    def kinds(self) -> dict[str, Callable[[], None]]:
        return {
            "former and foreign names": self.names,
            "foreign leases and keys": self.foreign,
            "floods of attaches": self.attaches,
            "cancelled waits": self.cancelled,
            "streams cut": self.cut,
            "floods of forks": self.forks,
            "floods of namespaces": self.namespaces,
            "full lines": self.lines,
            "calls without proof": self.unproven,
            "half-open connections": self.half_open,
            "idle HTTP": self.idle_http,
            "huge answers": self.huge,
            "control characters": self.controls,
            "replayed request ids": self.replays,
            "claimed pids": self.pids,
            "processes killed and stopped": self.victims,
            "resets while watching": self.resets,
            "slow readers": self.slow,
            "garbage": self.garbage,
            "odd numbers": self.numbers,
        }

    # ------------------------------------------------------------------ how it asks

    def note(self, kind: str, error: grpc.RpcError | None) -> None:
        if error is None:
            self.counts[f"{kind}:ok"] += 1
        elif error.code() in BROKEN:
            self.counts[f"{kind}:broken"] += 1
            self.broken.append(f"{kind}: {error.code().name} {error.details()}"[:300])
            del self.broken[20:]
        else:
            self.counts[f"{kind}:{'unanswered' if error.code() in GONE else 'refused'}"] += 1

    def ask(self, kind: str, verb: str, *, proof: bool = True, **fields: Any) -> Any:
        """Make a unary call; None if it was refused."""
        try:
            call = self._call(verb, proof=proof)
            answer = call(
                unary.RPCS[verb].request(**fields), timeout=TIMEOUT_S, metadata=self.proof(proof)
            )
        except grpc.RpcError as error:
            self.note(kind, error)
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                time.sleep(0.05)
                raise ConnectionError from None  # it is being killed: something else, then
            return None
        self.note(kind, None)
        return answer

    def later(self, verb: str, **fields: Any) -> Any:
        call = self._call(verb)
        request = unary.RPCS[verb].request(**fields)
        return call.future(request, timeout=TIMEOUT_S, metadata=self.metadata)

    def proof(self, proof: bool) -> Any:
        return self.metadata if proof else None

    def _call(self, verb: str, *, proof: bool = True) -> Any:
        rpc = unary.RPCS[verb]
        channel = self.channel if proof else self.stranger
        return channel.unary_unary(rpc.path, rpc.request.SerializeToString, rpc.response.FromString)

    def attach(
        self, kind: str, *, salt: str = "", name: str = "", pid: int = 0, host: str = ""
    ) -> str:
        """Attach a worker; give its key, or nothing."""
        fields: dict[str, Any] = {"namespace": self.space(salt), "layout": _layout()}
        told = self.ask(kind, "attach", **fields, name=name, pid=pid, host=host)
        return str(told.worker_key) if told is not None else ""

    def space(self, salt: str = "") -> pb.Namespace:
        return pb.Namespace(model=self.random.choice(MODELS), salt=salt)

    def prompt(self) -> bytes:
        """The very prompts of the honest: what is stored of them must not be found here."""
        return tokens_of(self.random.randrange(4), self.random.randrange(48))

    def lease(self, kind: str, key: str, **more: Any) -> int:
        told = self.ask(kind, "acquire", worker_key=key, tokens=self.prompt(), **more)
        return int(told.grant.lease) if told is not None else 0

    def session(self, *verbs: tuple[str, dict[str, Any]]) -> Stream:
        stream = Stream(self.channel, self.metadata)
        attach = {"namespace": self.space(), "layout": _layout(), "pid": os.getpid()}
        stream.send(("attach", attach), *verbs)
        return stream

    # ------------------------------------------------------------------ what it does

    def names(self) -> None:
        kind = "former and foreign names"
        number = self.random.randrange(200)
        names = (
            "workers of an earlier life",
            f"w{number}",
            f"w{number}#{number}",
            f"actor{number}",
        )
        keys = [self.attach(kind, name=name) for name in names]
        for key in filter(None, keys):
            self.lease(kind, key)
            self.ask(kind, "detach", worker_key=key)

    def foreign(self) -> None:
        kind = "foreign leases and keys"
        key = self.attach(kind)
        if not key:
            return
        own = self.lease(kind, key)
        for lease in {*range(1, 12), *(own + step for step in range(-6, 7))} - {own, 0}:
            verb = self.random.choice(("commit", "extend", "truncate", "release", "fork"))
            fields = {"commit": {"num_tokens": 40}, "extend": {"num_tokens": 60}}.get(verb, {})
            if verb in ("truncate", "fork"):
                fields = {"num_tokens": 1} if verb == "truncate" else {"count": 2}
            self.ask(kind, verb, worker_key=key, lease=max(1, lease), **fields)
        for guess in ("", "w1", key[:-1], key + "x", "1", "0"):
            self.ask(kind, self.random.choice(("detach", "renew")), worker_key=guess)
        for tenant in ("blue", "green", ""):
            space = pb.Namespace(model=MODELS[0], tenant=tenant)
            self.ask(kind, "reset", namespace=space)
            self.ask(kind, "lookup", namespace=space, tokens=self.prompt())
        self.ask(kind, "quota", tenant="blue")
        self.ask(kind, "detach", worker_key=key)

    def attaches(self) -> None:
        for _ in range(60):
            self.attach("floods of attaches", name=f"w{self.random.randrange(99)}")

    def cancelled(self) -> None:
        """Fill its own quota, wait for room, and hang up just when some comes."""
        kind = "cancelled waits"
        key = self.attach(kind)
        if not key:
            return
        leases = [lease for _ in range(6) if (lease := self.lease(kind, key, reserve=300))]
        for _ in range(12):
            fields = {"tokens": self.prompt(), "reserve": 300, "wait_s": 2.0}
            calls = [self.later("acquire", worker_key=key, **fields) for _ in range(4)]
            time.sleep(self.random.random() * 0.01)
            freed = leases and self.later("release", worker_key=key, lease=leases.pop())
            time.sleep(self.random.random() * 0.002)
            for call in calls:
                call.cancel()
                self.counts[f"{kind}:cancelled"] += 1
            if freed:
                with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
                    freed.result()
                if lease := self.lease(kind, key, reserve=300):
                    leases.append(lease)
        if self.random.random() < 0.7:
            self.ask(kind, "detach", worker_key=key)

    def cut(self) -> None:
        for _ in range(8):
            acquires = [("acquire", {"tokens": self.prompt(), "reserve": 20}) for _ in range(4)]
            stream = self.session(*acquires)
            if self.random.random() < 0.7:
                stream.take(0.2)
            self.counts["streams cut:cut"] += 1
            stream.cancel()

    def forks(self) -> None:
        kind = "floods of forks"
        key = self.attach(kind)
        lease = self.lease(kind, key) if key else 0
        for _ in range(20 if lease else 0):
            self.ask(kind, "fork", worker_key=key, lease=lease, count=1024)
        if self.random.random() < 0.6 and key:
            self.ask(kind, "detach", worker_key=key)

    def namespaces(self) -> None:
        for number in range(150):
            key = self.attach("floods of namespaces", salt=f"{self.random.random()}{number}")
            if key and number % 3:
                self.ask("floods of namespaces", "detach", worker_key=key)

    def lines(self) -> None:
        kind = "full lines"
        key = self.attach(kind)
        if not key:
            return
        prompts = [pack([self.random.randrange(9_999) for _ in range(400)]) for _ in range(60)]
        calls = [self.later("acquire", worker_key=key, tokens=one, wait_s=2.0) for one in prompts]
        time.sleep(self.random.random())
        for call in calls:
            call.cancel()
        if self.random.random() < 0.5:
            self.ask(kind, "detach", worker_key=key)

    def unproven(self) -> None:
        kind = "calls without proof"
        for verb in ("snapshot", "attach", "tree", "check", "quota"):
            self.ask(kind, verb, proof=False)
        for path in (HEALTH + "Watch", HEALTH + "Check", REFLECTION, unary.SESSION_PATH):
            for _ in range(12):
                method = self.stranger.stream_stream(path, bytes, bytes)
                self.held.append(method(iter([b""]), timeout=20.0))
                self.counts[f"{kind}:streams"] += 1

    def half_open(self) -> None:
        for _ in range(20):
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            raw.settimeout(1.0)
            self.held.append(raw)
            raw.connect(self.path)
            raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: self.random.randrange(24)])
            self.counts["half-open connections:opened"] += 1

    def idle_http(self) -> None:
        host, _, port = self.http.rpartition(":")
        starts = (
            b"",
            b"GET / HT",
            b"GET /state HTTP/1.1\r\nHost: x\r\n",
            b"GET /live HTTP/1.1\r\n",
        )
        for _ in range(20):
            raw = socket.create_connection((host, int(port)), 1.0)
            self.held.append(raw)
            raw.sendall(self.random.choice(starts))
            self.counts["idle HTTP:opened"] += 1

    def huge(self) -> None:
        kind = "huge answers"
        long = pack(range(3_000))
        looks = [("explain", {"tokens": long}) for _ in range(100)]
        asked = [("snapshot", {}), ("acquire", {"tokens": self.prompt(), "request_id": "big"})]
        stream = self.session(*asked, *looks)
        self.counts[f"{kind}:{'answered' if stream.take(2.0) else 'refused'}"] += 1
        stream.cancel()
        space = pb.Namespace(model=MODELS[0])
        for _ in range(10):
            self.ask(kind, "snapshot")
            self.ask(kind, "tree", namespace=space)
            self.ask(kind, "explain", namespace=space, request_id="big")

    def controls(self) -> None:
        kind = "control characters"
        for _ in range(20):
            texts = dict.fromkeys(("model", "adapter", "salt"), "m@1")
            texts[self.random.choice(list(texts))] = self.random.choice(NASTY)
            space = pb.Namespace(**texts, tenant=self.random.choice(("", "", "b\nlue", "blue")))
            name = self.random.choice(("", *NASTY))
            told = self.ask(kind, "attach", namespace=space, layout=_layout(), name=name)
            if told is not None:
                nasty = self.random.choice(NASTY)
                key = told.worker_key
                self.ask(kind, "acquire", worker_key=key, tokens=b"abcd", request_id=nasty)
                self.ask(kind, "explain", namespace=space, request_id=nasty)
                self.ask(kind, "detach", worker_key=key)

    def replays(self) -> None:
        kind = "replayed request ids"
        key = self.attach(kind)
        if not key:
            return
        leases = [self.lease(kind, key, request_id=f"r{n % 2}") for n in range(4)]
        for lease in filter(None, leases):
            for verb, fields in (
                ("commit", {"num_tokens": 5}),
                ("fork", {"count": 2}),
                ("extend", {"num_tokens": 150}),
                ("truncate", {"num_tokens": 2}),
            ):
                self.ask(kind, verb, worker_key=key, lease=lease, request_id="1", **fields)
        self.ask(kind, "detach", worker_key=key)

    def pids(self) -> None:
        kind = "claimed pids"
        host = this_host()
        for pid in (1, 0, 2**31 - 1, 2**32 - 1, os.getpid()):
            key = self.attach(kind, pid=pid, host=self.random.choice((host, "", "x")))
            if key:
                self.lease(kind, key, reserve=60)  # and nothing more is heard of it

    def victims(self) -> None:
        command = [sys.executable, "-m", "chaos.adversary", "victim", self.target]
        child = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.children.append(child)
        self.counts["processes killed and stopped:started"] += 1
        if len(self.children) > 1:
            old = self.children[0]
            old.send_signal(self.random.choice((signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM)))

    def resets(self) -> None:
        kind = "resets while watching"
        space = pb.Namespace(model=MODELS[0])
        watching = self.channel.unary_stream(
            unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
        )
        calls = [watching(pb.WatchRequest(), timeout=5.0, metadata=self.metadata) for _ in range(4)]
        for _ in range(60):
            self.ask(kind, "reset", namespace=space)
        self.held += calls

    def slow(self) -> None:
        looks = [("snapshot", {}) for _ in range(500)]
        stream = self.session(*looks)
        for _ in range(6):
            stream.send(*looks)
        self.counts["slow readers:begun"] += 1
        self.held.append(stream)

    def garbage(self) -> None:
        for _ in range(10):
            throw(self.path, self.random)
            self.counts["garbage:thrown"] += 1

    def numbers(self) -> None:
        kind = "odd numbers"
        key = self.attach(kind)
        odd = (0, -1, 1, 2**31, 2**62, -(2**63), 2**63 - 1)
        lease = self.lease(kind, key, reserve=self.random.choice(odd)) if key else 0
        for number in odd if key else ():
            wait_s = self.random.choice((float("nan"), float("inf"), -1.0, 1e308, 0.01))
            lease = lease or self.lease(kind, key, wait_s=wait_s)
            for verb, field in (
                ("commit", "num_tokens"),
                ("extend", "num_tokens"),
                ("fork", "count"),
            ):
                self.ask(kind, verb, worker_key=key, lease=lease, **{field: number})
            space = pb.Namespace(model=MODELS[0])
            self.ask(kind, "pin", namespace=space, tokens=self.prompt(), ttl_s=wait_s)
        self.ask(kind, "detach", worker_key=key)


class Stream:
    """A session's stream, written and read by hand."""

    def __init__(self, channel: grpc.Channel, metadata: Any) -> None:
        self._out: queue.SimpleQueue[pb.OpBatch | None] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        method: Any = channel.stream_stream(
            unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )
        sent: Iterator[pb.OpBatch] = iter(self._out.get, None)
        self._call = method(sent, metadata=metadata, timeout=8.0)

    def send(self, *ops: tuple[str, dict[str, Any]]) -> None:
        batch = pb.OpBatch()
        for verb, fields in ops:
            op = batch.ops.add(id=next(self._ids))
            getattr(op, verb).CopyFrom(unary.RPCS[verb].request(**fields))
        self._out.put(batch)

    def take(self, within_s: float) -> bool:
        """Wait for the first answer; whether one came."""
        found: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def read() -> None:
            try:
                found.put(next(self._call, None) is not None)
            except grpc.RpcError:
                found.put(False)

        threading.Thread(target=read, daemon=True).start()
        try:
            return found.get(timeout=within_s)
        except queue.Empty:
            return False

    def cancel(self) -> None:
        self._out.put(None)
        self._call.cancel()


def victim(target: str) -> None:
    """A worker of red's that forks, and goes on writing after its end, if it can."""
    with contextlib.suppress(CacheError), prefixcache.connect(target, token=TOKENS[RED]) as client:
        session = client.attach("a", LAYOUT, name="victim")
        memory = map_pool(session.pool)
        lease = session.acquire(tokens_of(0, 0), reserve=30)
        lease.commit(len(tokens_of(0, 0)) // 4)
        if os.fork() == 0:
            for _ in range(200):  # the kernel ends it at the first word: it has not the memory
                memory[session.pool.offset] = 0xEE
                time.sleep(0.01)
            os._exit(0)
        time.sleep(4.0)


def _layout() -> pb.Layout:
    return pb.Layout(
        num_layers=LAYOUT.num_layers,
        num_kv_heads=LAYOUT.num_kv_heads,
        head_dim=LAYOUT.head_dim,
        dtype=pb.ELEMENT_TYPE_FLOAT32,
    )


if __name__ == "__main__":
    if sys.argv[1] == "victim":
        victim(sys.argv[2])
    else:
        Adversary(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]).run()
