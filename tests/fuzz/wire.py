"""Strategies for requests at their edges, and garbage for sockets."""

from __future__ import annotations

import socket
from random import Random
from typing import Any

from hypothesis import strategies as st

from prefixcache.v1 import prefixcache_pb2 as pb

EDGES = [0, 1, 2, 3, 7, 8, 9, 16, 63, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]
UNSIGNED = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
LEASE = st.integers(0, 12) | UNSIGNED
SIGNED = st.sampled_from([*EDGES, -1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(0, 40) | SIGNED
TOKENS = st.binary(max_size=70) | st.lists(st.integers(0, 2), max_size=30).map(
    lambda ids: b"".join(one.to_bytes(4, "little") for one in ids)
)
SECONDS = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 0.01, -1.0])
TEXT = st.text(max_size=8) | st.just("x" * 2000)
INDEX = st.integers(0, 2) | st.integers(0, 2**32 - 1)
NAMESPACE = st.builds(
    pb.Namespace,
    model=st.sampled_from(["m", "n", ""]) | TEXT,
    adapter=TEXT,
    tenant=st.just("") | TEXT,
    salt=st.just("") | TEXT,
    approximate=st.sampled_from([False, False, False, True]),
)
SHARES = st.sampled_from([0.0, 0.5, 1.0]) | st.floats()
AGAIN = st.builds(pb.Again, first=st.integers(0, 9) | INDEX, share=SHARES)


def op(**verb: st.SearchStrategy[Any]) -> st.SearchStrategy[pb.Op]:
    """Make ops of one verb."""
    return st.builds(pb.Op, id=UNSIGNED, **verb)


LAYOUT = st.builds(
    pb.Layout,
    num_layers=INDEX,
    num_kv_heads=INDEX,
    head_dim=INDEX,
    dtype=st.integers(0, 5),
    planes=st.just(0) | INDEX,
    page_bytes=st.just(0) | INDEX,
    format=st.just("") | TEXT,
)
OPS = st.one_of(
    op(
        attach=st.builds(
            pb.AttachRequest,
            namespace=NAMESPACE,
            layout=LAYOUT,
            name=TEXT,
            block_size=st.just(0) | INDEX,
        )
    ),
    op(
        acquire=st.builds(
            pb.AcquireRequest,
            namespace=st.none() | NAMESPACE,
            namespace_index=INDEX,
            tokens=TOKENS,
            reserve=SMALL,
            wait_s=SECONDS,
            request_id=st.sampled_from(["", "a", "b"]) | TEXT,
            recompute=st.sampled_from([False, False, True]),
            segments=st.none() | st.just(pb.Again(first=2)) | AGAIN,
        )
    ),
    op(commit=st.builds(pb.CommitRequest, lease=LEASE, num_tokens=SMALL, new_tokens=TOKENS)),
    op(extend=st.builds(pb.ExtendRequest, lease=LEASE, num_tokens=SMALL)),
    op(fork=st.builds(pb.ForkRequest, lease=LEASE, count=st.integers(-1, 3) | SIGNED)),
    op(truncate=st.builds(pb.TruncateRequest, lease=LEASE, num_tokens=SMALL)),
    op(release=st.builds(pb.ReleaseRequest, lease=LEASE)),
    op(cancel=st.builds(pb.CancelRequest, op=UNSIGNED)),
    op(renew=st.just(pb.RenewRequest())),
    op(lookup=st.builds(pb.LookupRequest, namespace_index=INDEX, tokens=TOKENS)),
    op(explain=st.builds(pb.ExplainRequest, namespace=NAMESPACE, tokens=TOKENS)),
    op(reset=st.builds(pb.ResetRequest, namespace_index=INDEX, unnamed=st.booleans())),
    op(snapshot=st.just(pb.SnapshotRequest())),
    st.builds(pb.Op, id=UNSIGNED),
)
BATCHES = st.lists(OPS, max_size=12).map(lambda ops: pb.OpBatch(ops=ops))

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def garbage(random: Random) -> bytes:
    """Make bytes for a socket: nothing, nearly HTTP/2, or frames of it with anything in them."""
    start = random.choice([b"", b"GET / HTTP/1.1\r\n\r\n", PREFACE, PREFACE + SETTINGS])
    parts = [start]
    for _ in range(random.randrange(4)):
        body = random.randbytes(random.choice([0, 1, 40, 3000]))
        head = len(body).to_bytes(3, "big") + bytes([random.randrange(12), random.randrange(256)])
        parts.append(head + random.randrange(2**31).to_bytes(4, "big") + body)
    if start == PREFACE + SETTINGS and random.random() < 0.5:
        parts.insert(
            1,
            call(b"/prefixcache.v1.PrefixCache/" + random.randbytes(random.choice([0, 1, 9, 900]))),
        )
    parts.append(random.randbytes(random.choice([0, 0, 9, 70_000])))
    return b"".join(parts)


def call(path: bytes, stream: int = 1) -> bytes:
    """Write a call with an empty message as frames, with whatever path."""
    said = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    said |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in said.items())
    return _frame(1, 4, stream, headers) + _frame(0, 1, stream, bytes(5))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def _text(text: bytes) -> bytes:
    """A text of a header, as HPACK has it: its length begins with seven bits."""
    length, rest = bytes([min(len(text), 127)]), len(text) - 127
    while rest >= 0:
        length += bytes([rest % 128 + (128 if rest >= 128 else 0)])
        rest = rest // 128 if rest >= 128 else -1
    return length + text


def throw(path: str, random: Random) -> None:
    """Connect, send garbage, hang up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(2.0)
        raw.connect(path)
        try:
            raw.sendall(garbage(random))
            if random.random() < 0.3:
                raw.recv(100)
        except OSError:
            return  # it hung up first: its right
