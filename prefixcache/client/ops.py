"""Ops and their replies: what a session says, without saying how it travels.

Both clients use this: the synchronous one hands the bytes to a thread, the asynchronous one awaits.

```
Step   ops in order ──► cut() ──► one OpBatch (more only if it would break the service's limits)
Reply  one per op   ◄── settle() ◄── OpResult, whenever it comes
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Generic, TypeVar

from prefixcache.client import codec
from prefixcache.client.progress import MOST_TOLD, Told
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.types import LeaseId, Namespace, TokensLike, pack
from prefixcache.v1 import prefixcache_pb2 as pb

T = TypeVar("T")

_FRAME_BYTES = 16
"""At most what one op adds to a message beside its own bytes: a tag and a length."""


class Reply(Generic[T]):
    """The answer of one op, now or later.

    `finish` turns what the wire says into what the caller gets (a grant into a lease); it runs
    once, where the answer arrives, so that block tables change in the order in which the service
    changed them.
    """

    __slots__ = (
        "_answer",
        "_error",
        "done",
        "finish",
        "is_abandoned",
        "listener",
        "op_id",
        "request_id",
        "wait_s",
    )

    def __init__(self, op_id: int, wait_s: float = 0.0) -> None:
        self.op_id = op_id
        self.wait_s = wait_s
        self.request_id = ""
        self.is_abandoned = False
        """Whether nobody waits any more: leases that it brings are given back."""
        self.done = False
        self.finish: Callable[[Any], T] | None = None
        self.listener: Callable[[Reply[T]], None] | None = None
        self._answer: Any = None
        self._error: BaseException | None = None

    def settle(self, answer: Any) -> None:
        """Store the answer, or the error if it is an exception, and tell the listener."""
        if self.done:
            return
        if isinstance(answer, BaseException):
            self._error = answer.with_traceback(None)  # no frames, as in `result`
        elif self.finish is not None:
            self._answer = self.finish(answer)
        else:
            self._answer = answer
        self.done = True
        if self.listener is not None:
            self.listener(self)

    @property
    def error(self) -> BaseException | None:
        """The op's error, None if it succeeded or is not answered yet."""
        return self._error

    def result(self) -> T:
        """Give the answer.

        Raises:
            CacheError: the op's own error; the other ops of its step are not touched by it.
            InvalidRequest: not answered yet: leave the batch first.
        """
        if not self.done:
            raise InvalidRequest("this op is not answered yet: leave the `with` block, then ask")
        if self._error is not None:
            # A copy: whoever raises an exception hangs the frames that it passes on it, the one
            # that holds this reply too.  In such a circle they, and the pool that one of them has
            # mapped, would stay until the garbage collector comes by.
            raise copy(self._error)
        answer: T = self._answer
        return answer


class Step:
    """Ops that travel together.  Each method adds one op and gives its reply."""

    def __init__(self, ids: Iterator[int]) -> None:
        self._ids = ids
        self.message = pb.OpBatch()
        self.replies: list[Reply[Any]] = []

    def _add(self, wait_s: float = 0.0) -> tuple[pb.Op, Reply[Any]]:
        op = self.message.ops.add()
        op.id = op_id = next(self._ids)
        reply: Reply[Any] = Reply(op_id, wait_s)
        self.replies.append(reply)
        return op, reply

    def _fill(self, reply: Reply[Any], message: Any, **fields: float | str) -> Reply[Any]:
        verb = type(message).DESCRIPTOR.name.removesuffix("Request").lower()
        try:
            for name, value in fields.items():
                if name.endswith("_s"):
                    codec.check_seconds(name, value)
                with codec.no_foreign_errors(name):
                    setattr(message, name, value)
        except InvalidRequest as error:
            del self.message.ops[-1]
            reply.wait_s = 0.0
            reply.settle(InvalidRequest(f"{verb}: {error}"))
        return reply

    def attach(self, request: pb.AttachRequest) -> Reply[pb.AttachResponse]:
        """Add an attach; the first op of a session."""
        op, reply = self._add()
        op.attach.CopyFrom(request)
        return reply

    def acquire(
        self,
        tokens: TokensLike,
        reserve: int,
        wait_s: float,
        request_id: str,
        namespace: Namespace | None = None,
    ) -> Reply[Any]:
        """Add an acquire; by default in the session's own namespace."""
        packed = pack(tokens)
        named = pb.Namespace()
        if namespace is not None:
            with codec.no_foreign_errors("acquire"):
                codec.write_namespace(namespace, named)
        op, reply = self._add(wait_s)
        message = op.acquire
        message.tokens = packed
        if namespace is not None:
            message.namespace.CopyFrom(named)
        if request_id:
            reply.request_id = request_id
            return self._fill(reply, message, reserve=reserve, wait_s=wait_s, request_id=request_id)
        return self._fill(reply, message, reserve=reserve, wait_s=wait_s)

    def cancel(self, op_id: int) -> Reply[None]:
        """Add a cancel of an earlier acquire or extend that still waits."""
        op, reply = self._add()
        op.cancel.op = op_id
        return reply

    def commit(self, lease: LeaseId, num_tokens: int, new_tokens: TokensLike) -> Reply[Any]:
        """Add a commit."""
        packed = pack(new_tokens)
        op, reply = self._add()
        message = op.commit
        message.lease = lease
        if packed:
            message.new_tokens = packed
        return self._fill(reply, message, num_tokens=num_tokens)

    def extend(self, lease: LeaseId, num_tokens: int, wait_s: float = 0.0) -> Reply[Any]:
        """Add an extend."""
        op, reply = self._add(wait_s)
        message = op.extend
        message.lease = lease
        if wait_s != 0:
            return self._fill(reply, message, num_tokens=num_tokens, wait_s=wait_s)
        return self._fill(reply, message, num_tokens=num_tokens)

    def fork(self, lease: LeaseId, count: int) -> Reply[Any]:
        """Add a fork."""
        op, reply = self._add()
        message = op.fork
        message.lease = lease
        message.shared_table = True
        return self._fill(reply, message, count=count)

    def truncate(self, lease: LeaseId, num_tokens: int) -> Reply[Any]:
        """Add a truncate."""
        op, reply = self._add()
        message = op.truncate
        message.lease = lease
        return self._fill(reply, message, num_tokens=num_tokens)

    def release(self, lease: LeaseId) -> Reply[Any]:
        """Add a release."""
        op, reply = self._add()
        op.release.lease = lease
        return reply

    def renew(self, told: Told) -> Reply[None]:
        """Add a sign of life."""
        op, reply = self._add()
        message = op.renew
        message.SetInParent()
        message.in_hand, message.stalled_s = told.in_hand, told.stalled_s
        message.untaken = min(told.inbox.num_untaken, MOST_TOLD)
        message.oldest_untaken_s = told.inbox.oldest_s
        return reply

    def detach(self) -> Reply[Any]:
        """Add a detach: the last op of a session."""
        op, reply = self._add()
        op.detach.SetInParent()
        return reply

    def lookup(self, tokens: TokensLike, namespace: Namespace | None = None) -> Reply[Any]:
        """Add a lookup."""
        packed = pack(tokens)
        op, reply = self._add()
        op.lookup.tokens = packed
        if namespace is not None:
            codec.write_namespace(namespace, op.lookup.namespace)
        return reply

    def explain(self, tokens: TokensLike, namespace: Namespace | None = None) -> Reply[Any]:
        """Add an explain."""
        packed = pack(tokens)
        op, reply = self._add()
        op.explain.tokens = packed
        if namespace is not None:
            codec.write_namespace(namespace, op.explain.namespace)
        return reply

    def reset(self) -> Reply[Any]:
        """Add a reset of the session's own namespace."""
        op, reply = self._add()
        op.reset.SetInParent()
        return reply

    def pin(self, tokens: TokensLike, ttl_s: float) -> Reply[Any]:
        """Add a pin in the session's own namespace."""
        packed = pack(tokens)
        op, reply = self._add()
        op.pin.tokens = packed
        return self._fill(reply, op.pin, ttl_s=ttl_s)

    def unpin(self, tokens: TokensLike) -> Reply[Any]:
        """Add an unpin in the session's own namespace."""
        packed = pack(tokens)
        op, reply = self._add()
        op.unpin.SetInParent()
        op.unpin.tokens = packed
        return reply

    def snapshot(self) -> Reply[Any]:
        """Add a snapshot."""
        op, reply = self._add()
        op.snapshot.SetInParent()
        return reply

    def cut(self, max_bytes: int, max_ops: int) -> list[bytes]:
        """Serialise the step, into one message unless that would break the service's limits.

        An op that is too large alone fails alone, with the numbers; nothing of it is sent.
        """
        ops = self.message.ops
        if not ops:
            return []
        whole = self.message.SerializeToString()
        if len(whole) <= max_bytes and len(ops) <= max_ops:
            return [whole]
        replies = {reply.op_id: reply for reply in self.replies}
        parts: list[bytes] = []
        part, room = pb.OpBatch(), max_bytes
        for op in ops:
            size = op.ByteSize() + _FRAME_BYTES
            if size > max_bytes:
                replies[op.id].settle(
                    InvalidRequest(
                        f"{op.WhichOneof('op')} of {size:,} bytes; the service takes messages up "
                        f"to {max_bytes:,} bytes (prefixcache serve --max-message)"
                    )
                )
                continue
            if size > room or len(part.ops) == max_ops:
                parts.append(part.SerializeToString())
                part, room = pb.OpBatch(), max_bytes
            part.ops.add().CopyFrom(op)
            room -= size
        if part.ops:
            parts.append(part.SerializeToString())
        return parts


def read_result(result: pb.OpResult) -> Any:
    """Give the answer of an op as a dataclass, or its error as an exception (not raised)."""
    verb = result.WhichOneof("result")
    if verb is None:
        return CacheError("the service answered in a way that this client does not know")
    if verb == "error":
        return codec.read_error(result.error)
    try:
        return codec.READ[verb](getattr(result, verb))
    except (ValueError, KeyError, OverflowError) as error:
        return CacheError(f"the service's answer to {verb} cannot be read: {error}")
