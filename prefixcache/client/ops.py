"""Ops and their replies, and batches of them: what a session says, not how it travels.

Both clients use this: the synchronous one hands the bytes to a thread, the asynchronous one awaits.

```
BatchOps   verbs on leases ──► ops of one Step
Step   ops in order ──► cut() ──► one OpBatch (more only if it would break the service's limits)
Reply  one per op   ◄── settle() ◄── OpResult, whenever it comes
```
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any, Generic, Protocol, TypedDict, TypeVar

from prefixcache.client import codec
from prefixcache.client.lease import Clocked, LeaseState
from prefixcache.client.progress import MOST_TOLD, Told
from prefixcache.errors import CacheError, InvalidRequest, LeaseExpired
from prefixcache.types import (
    Again,
    Committed,
    Explanation,
    Grant,
    Lookup,
    Namespace,
    Pinned,
    PoolHandle,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TokensLike,
    Unpinned,
    pack,
    shown,
)
from prefixcache.v1 import prefixcache_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")
L = TypeVar("L", bound=LeaseState)
L_co = TypeVar("L_co", bound=LeaseState, covariant=True)

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

    def tell_error(self, told: Callable[[CacheError], object]) -> None:
        """Have somebody told when the op fails, beside its listener; at once if it has failed."""
        listener = self.listener

        def settled(reply: Reply[T]) -> None:
            if listener is not None:
                listener(reply)
            if isinstance(reply.error, CacheError):
                try:
                    told(reply.error)
                except Exception:
                    # Whoever settles this reply has others to settle.
                    log.exception("who is told of the errors of a batch has raised")

        if self.done:
            settled(self)
        else:
            self.listener = settled

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
        self.is_sent = False
        self.message = pb.OpBatch()
        self.replies: list[Reply[Any]] = []

    def ask(self, verb: str, *, wait_s: float = 0.0, **fields: Any) -> Reply[Any]:
        """Add an op.  One with a field that no message can hold is refused at once, alone.

        Args:
            verb: what is asked.
            wait_s: how long it may wait; of those that can.
            fields: of its message.
        """
        op = self.message.ops.add()
        op.id = op_id = next(self._ids)
        reply: Reply[Any] = Reply(op_id, wait_s)
        self.replies.append(reply)
        message = getattr(op, verb)
        message.SetInParent()
        if not isinstance(wait_s, int | float) or wait_s != 0:
            fields["wait_s"] = wait_s
        name = ""
        try:
            for name, value in fields.items():
                if name.endswith("_s"):
                    codec.check_seconds(name, value)
                setattr(message, name, value)
        except InvalidRequest as error:
            self._refuse_last(f"{verb}: {error}")
        except codec.FOREIGN_ERRORS as error:
            self._refuse_last(f"{verb}: {name}: {error}")
        return reply

    def _refuse_last(self, why: str) -> None:
        del self.message.ops[-1]
        reply = self.replies[-1]
        reply.wait_s = 0.0
        reply.settle(InvalidRequest(why))

    def attach(self, request: pb.AttachRequest) -> Reply[pb.AttachResponse]:
        """Add an attach; the first op of a session."""
        reply = self.ask("attach")
        self.message.ops[-1].attach.CopyFrom(request)
        return reply

    def renew(self, told: Told) -> Reply[Any]:
        """Add a sign of life."""
        reply = self.ask("renew")
        message = self.message.ops[-1].renew
        message.in_hand, message.stalled_s = told.in_hand, told.stalled_s
        message.untaken = min(told.inbox.num_untaken, MOST_TOLD)
        message.oldest_untaken_s = told.inbox.oldest_s
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


class Terms(TypedDict, total=False):
    """What may be said with an `acquire`, beside how long it waits; see `BatchOps.acquire`."""

    reserve: int
    request_id: str
    salt: str | None
    adapter: str | None
    reuse: bool
    min_partial: int
    for_room: bool
    segments: Again | None


class Lessee(Clocked, Protocol[L_co]):
    """The part of a session that a batch needs."""

    ids: Iterator[int]

    @property
    def pool(self) -> PoolHandle:
        """Where the pool's memory is."""

    def named(self, salt: str | None, adapter: str | None) -> Namespace:
        """Give the session's namespace with another salt or adapter."""
        ...

    def refuse_unheard_terms(self) -> None:
        """Refuse to say how much is reused where the service would not hear it."""
        ...

    def refuse_unheard_segments(self) -> None:
        """Refuse to ask for segments where the service would not hear it, or gives none."""
        ...

    def make_lease(self, grant: Grant, sent_at: float) -> L_co:
        """Wrap a grant into this client's kind of lease."""
        ...


class BatchOps(Generic[L]):
    """Adds ops to one step.  Nothing is sent before the step is; each op fails on its own.

    Every method gives a reply: `reply.result()` is the answer or raises the op's own error.
    """

    def __init__(self, session: Lessee[L]) -> None:
        self._session = session
        self.step = Step(session.ids)

    def is_of(self, session: object) -> bool:
        """Whether it is a batch of this very session."""
        return self._session is session

    def check_reply(self, reply: Any) -> None:
        """Refuse to wait for what is no reply of this batch.

        Raises:
            InvalidRequest: it is none.
        """
        if not any(reply is one for one in self.step.replies):
            raise InvalidRequest(f"{shown(reply)} is no reply of this batch")

    def acquire(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        salt: str | None = None,
        adapter: str | None = None,
        reuse: bool = True,
        min_partial: int = 0,
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Reply[L]:
        """Lease blocks for a prompt: match, pin and allocate in one atomic step.

        Args:
            tokens: the prompt; fastest as packed bytes or a numpy int32 array.
            reserve: tokens that may be added after it; their blocks are taken now.
            wait_s: how long to wait if another worker is computing the prefix now.
            request_id: makes a repeated call give the same lease.
            salt: a secret that keeps this prompt apart, in place of the session's own.  A session
                may use as many as it likes: nothing is left of one that nobody uses.
            adapter: which adapter computes it, in place of the session's own.
            reuse: if False, every token is computed, whatever is stored: for the logits of a
                prompt.  What is committed is shared as always.
            min_partial: tokens of a partly matching block from which on it is worth its copy.
            for_room: if False, `wait_s` is for a prefix that another computes: without room it is
                refused at once, for who can do without.
            segments: also use what of the prompt is stored at other places, and compute this of it
                again; `session.segments` is the cheapest that is allowed.  An approximation, which
                the lease tells by `approximate`; docs/segments.md says what the caller does then.

        Raises:
            PoolExhausted: not enough blocks; `retry_after_s` is a hint.
            InvalidRequest: it can never be served as it is.
            Unsupported: segments, which this service does not allow of this model.
            ServiceUnavailable: the service is lost.
        """
        packed, named = pack(tokens), None
        if salt is not None or adapter is not None:
            named = pb.Namespace()
            with codec.no_foreign_errors("acquire"):
                codec.write_namespace(self._session.named(salt, adapter), named)
        policy = None
        if segments is not None:
            self._session.refuse_unheard_segments()
            if not isinstance(segments, Again):
                raise InvalidRequest(
                    f"segments is {shown(segments)}: give an Again, such as session.segments"
                )
            policy = pb.Again()
            with codec.no_foreign_errors("acquire"):
                codec.write_again(segments, policy)
        terms: dict[str, Any] = {}
        if reuse is not True or for_room is not True:
            codec.check_flag("reuse", reuse)
            codec.check_flag("for_room", for_room)
        if not (reuse and for_room and type(min_partial) is int and min_partial == 0):
            self._session.refuse_unheard_terms()
            terms = {
                "recompute": not reuse,
                "min_partial": min_partial,
                "not_for_room": not for_room,
            }
        reply: Reply[L] = self.step.ask(
            "acquire", tokens=packed, reserve=reserve, wait_s=wait_s, request_id=request_id, **terms
        )
        if named is not None and not reply.done:
            self.step.message.ops[-1].acquire.namespace.CopyFrom(named)
        if policy is not None and not reply.done:
            self.step.message.ops[-1].acquire.segments.CopyFrom(policy)
        reply.request_id = request_id
        reply.finish = partial(self._session.make_lease, sent_at=time.monotonic())
        return reply

    def commit(self, lease: L, num_tokens: int, new_tokens: TokensLike = b"") -> Reply[Committed]:
        """Say that slots below `num_tokens` hold valid KV: they become visible to all.

        Call it only after the device has finished writing.  `new_tokens` (generated since) are
        appended to the lease's tokens first.
        """
        packed = pack(new_tokens)
        return self._on(lease, "commit", num_tokens=num_tokens, new_tokens=packed)

    def extend(self, lease: L, num_tokens: int, *, wait_s: float = 0.0) -> Reply[TableUpdate]:
        """Make room for `num_tokens` tokens in all; `block_table` is up to date afterwards.

        It counts from position 0, and waits up to `wait_s` for room.  Leases that all wait for each
        other's blocks get none: `reserve` at `acquire` what will be needed.
        """
        reply = self._on(lease, "extend", num_tokens=num_tokens, wait_s=wait_s)
        reply.finish = lease.apply
        return reply

    def truncate(self, lease: L, num_tokens: int) -> Reply[TableUpdate]:
        """Roll back to `num_tokens` tokens; `block_table` is up to date afterwards."""
        self._refuse_foreign(lease)
        with suppress(TypeError):  # no whole number: it is refused below
            num_tokens = operator.index(num_tokens)
            if not lease.released and num_tokens >= 0:
                lease.cut_off(-(-num_tokens // self._session.pool.block_size))
        reply = self._on(lease, "truncate", num_tokens=num_tokens)
        reply.finish = lease.apply
        return reply

    def fork(self, lease: L, n: int) -> Reply[list[L]]:
        """Make `n` children that share every block.  `extend` a child before it writes."""
        reply: Reply[list[L]] = self._on(lease, "fork", count=n, shared_table=True)
        make = partial(self._session.make_lease, sent_at=time.monotonic())
        reply.finish = lambda grants: [make(grant) for grant in grants]
        return reply

    def release(self, lease: L) -> Reply[Released]:
        """End a lease: nothing writes to its blocks any more.  Idempotent.

        One that expired is released as well: else the blocks that it could write to come back only
        when its process has ended.
        """
        self._refuse_foreign(lease)
        lease.mark_released()
        for other in tuple(self._session.watched):  # the same one, by the same request id
            if other.id == lease.id:
                other.let_go()
        return self.step.ask("release", lease=lease.id)

    def lookup(self, tokens: TokensLike) -> Reply[Lookup]:
        """Ask what `acquire` would find, without taking anything."""
        return self.step.ask("lookup", tokens=pack(tokens))

    def explain(self, tokens: TokensLike) -> Reply[Explanation]:
        """Ask why each token would or would not be reused."""
        return self.step.ask("explain", tokens=pack(tokens))

    def reset(self) -> Reply[Reset]:
        """Make the session's namespace forget what it has stored.  Leases live on."""
        return self.step.ask("reset")

    def pin(self, tokens: TokensLike, *, ttl_s: float) -> Reply[Pinned]:
        """Let what the session's namespace stores of a prefix be evicted last for `ttl_s`."""
        return self.step.ask("pin", tokens=pack(tokens), ttl_s=ttl_s)

    def unpin(self, tokens: TokensLike = b"") -> Reply[Unpinned]:
        """End the pin of exactly this prefix, or all pins of the session's namespace."""
        return self.step.ask("unpin", tokens=pack(tokens))

    def snapshot(self) -> Reply[Snapshot]:
        """Ask for the state of the whole cache."""
        return self.step.ask("snapshot")

    def _refuse_foreign(self, lease: Any) -> None:
        """Refuse what is no lease of this session, before anything is changed.

        Raises:
            InvalidRequest: it is none.
        """
        if not isinstance(lease, LeaseState):
            raise InvalidRequest(f"{shown(lease)} is no lease")
        if not lease.is_of(self._session):
            raise InvalidRequest(
                f"lease {lease.id} is another session's: use a batch of that one, or the lease's "
                "own methods"
            )

    def _on(self, lease: L, verb: str, **fields: Any) -> Reply[Any]:
        self._refuse_foreign(lease)
        try:
            lease.check()
        except LeaseExpired as error:
            refused: Reply[Any] = Reply(0)
            refused.settle(error)
            self.step.replies.append(refused)
            return refused
        return self.step.ask(verb, lease=lease.id, **fields)


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
