"""A hundred callers in one process: each asks for much, and reads nothing of it until it dies.

Arguments: the service's target, its page's port, how many.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import time
from typing import Any

import grpc

from prefixcache.client import unary
from prefixcache.client.address import this_host
from prefixcache.client.codec import write_layout
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
NUM_TOKENS = 10_000
"""Of the long prompt that the test has stored."""
MANY = 400
"""Answers of 40 kB, or of 10 kB for each of ten children, that a session asks for."""


def session(channel: grpc.Channel, number: int) -> Any:
    """Attach, lease the prompt, ask for much by little; the results are read by nobody."""
    hello = pb.OpBatch()
    attach = hello.ops.add(id=1).attach
    attach.namespace.model = "model"
    attach.pid, attach.host = os.getpid(), this_host()
    write_layout(LAYOUT, attach.layout)
    messages: queue.SimpleQueue[pb.OpBatch | None] = queue.SimpleQueue()
    stream: Any = channel.stream_stream(
        unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
    )
    call = stream(iter(messages.get, None))
    messages.put(hello)
    next(call)
    lease = pb.OpBatch()
    lease.ops.add(id=2).acquire.tokens = pack(range(NUM_TOKENS))
    messages.put(lease)
    granted = next(call).results[0].acquire.grant.lease
    much = pb.OpBatch()
    for op_id in range(3, 3 + MANY):
        op = much.ops.add(id=op_id)
        if number % 4 == 0:
            op.explain.request_id = "long"
        else:
            op.fork.lease, op.fork.count = granted, 10
    messages.put(much)
    return call


def watch(channel: grpc.Channel) -> Any:
    stream: Any = channel.unary_stream(
        unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
    )
    call = stream(pb.WatchRequest())
    next(call)
    return call


def page(port: int) -> socket.socket:
    viewer = socket.socket()
    viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    viewer.connect(("127.0.0.1", port))
    viewer.sendall(f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    return viewer


def main() -> None:
    target, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    kept: list[Any] = []
    for number in range(count):
        kind = number % 4
        if kind == 3:
            kept.append(page(port))
            continue
        channel = grpc.insecure_channel(target, OWN_CONNECTION)
        kept.append(channel)
        if kind == 2:
            kept.append(watch(channel))
        else:
            kept.append(session(channel, number))
    sys.stdout.write("all are there\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main()
