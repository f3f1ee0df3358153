"""What callers hand in: taken for what it is, or refused in one line of ours."""

from __future__ import annotations

import asyncio
import math
import os
import re
import threading
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefixcache
from kernels.strange_tensors import NOT_PLAIN, made
from patience import PATIENCE_S
from prefixcache.client import calls, connect_async
from prefixcache.config import load, parse_layout
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable
from prefixcache.types import Layout, Namespace, pack, unpack
from prefixcache_bench.experiments.layouts import layout_named
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

IDS = [1, 2, 3, 4, 100]
SPACE = Namespace("model")


@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5)])
def test_integers_of_every_width_are_ids(kind: str, shape: tuple[int, ...]) -> None:
    numbers = np.array(IDS, dtype=kind).reshape(shape)
    assert unpack(pack(numbers)).tolist() == IDS
    spaced = np.repeat(np.array(IDS, dtype=kind), 2)[::2]
    assert unpack(pack(spaced)).tolist() == IDS
    assert unpack(pack(torch.from_numpy(numbers))).tolist() == IDS


def test_sequences_and_generators_are_ids_and_bytes_are_packed_already() -> None:
    for tokens in (IDS, tuple(IDS), iter(IDS), (i for i in IDS), array("q", IDS), array("B", IDS)):
        assert unpack(pack(tokens)).tolist() == IDS
    packed = pack(IDS)
    for same in (packed, bytearray(packed), memoryview(packed), memoryview(bytearray(packed))):
        assert pack(same) == packed
    assert pack([]) == pack(np.array([], dtype="int32")) == b""
    assert unpack(pack([0, 2**31, 2**32 - 1])).tolist() == [0, 2**31, 2**32 - 1]
    assert unpack(pack([np.int64(7), np.uint8(8)])).tolist() == [7, 8]


@pytest.mark.parametrize("size", [3, 65, 1000])
@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (True, "token {} is True"),
        (False, "token {} is False"),
        (np.True_, "token {} is .*True"),
        (torch.tensor(True), "token {} is a Tensor of torch.bool"),
        (1.0, "token {} is 1.0"),
        (np.float32(1), "token {} is .*1.0"),
        ("1", "token {} is '1'"),
        (-1, "token {} is -1"),
        (2**32, "token {} is 4,294,967,296"),
        (2**70, "token {} is 1,180,"),
        pytest.param(10**5000, "token {} is a number of 16,610 bits", id="vast"),
        pytest.param([10**5000], "token {} is list of a very large number", id="[vast]"),
        ([1], r"token {} is \[1\]"),
    ],
    ids=str,
)
def test_one_odd_thing_among_many_ids_is_refused_by_its_place(
    size: int, odd: Any, told: str
) -> None:
    for at in (0, 1, size - 1):
        ids: list[Any] = [0, 1, *range(100, 98 + size)]
        ids[at] = odd
        for tokens in (ids, tuple(ids), iter(ids)):
            with pytest.raises(InvalidRequest, match=told.format(at)):
                pack(tokens)
        if type(odd) is int and odd < 2**63:
            with pytest.raises(InvalidRequest, match=told.format(at)):
                pack(np.array(ids))


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64"])
def test_a_negative_id_is_refused_by_its_place_whatever_its_width(kind: str) -> None:
    for tokens in (
        np.array([5, 6, -1], dtype=kind),
        np.array([5, 0, 6, 0, -1, 0], dtype=kind)[::2],
        torch.tensor([5, 6, -1], dtype=getattr(torch, kind)),
        [5, 6, -1],
    ):
        with pytest.raises(InvalidRequest, match=r"token 2 is -1: .* from 0 to 4,294,967,295"):
            pack(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [2**32],
        np.array([2**32]),
        [1.0, 2.0],
        [True, False],
        ["1"],
        [None],
        [[1, 2], [3, 4]],
        "hello",
        None,
        5,
        np.array([1.0, 2.0]),
        np.array([1.0], dtype="float32"),
        np.array([True]),
        np.array([1, 2], dtype=">i4"),
        np.array([1, 2], dtype=object),
        np.array(["1", "2"]),
        np.array([1, 2], dtype="complex64"),
        np.array([1, 2], dtype="datetime64[s]"),
        np.int32(4),
        np.arange(8, dtype="int32").reshape(2, 4),
        np.arange(8).reshape(2, 4),
        torch.arange(8).reshape(2, 4),
        torch.tensor(4),
        torch.tensor([1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.tensor([True]),
        array("f", [1.0]),
        memoryview(array("d", [1.0])),
        memoryview(bytes(16)).cast("f"),
        {"a": 1},
    ],
    ids=lambda tokens: re.sub(r" at 0x\w+", "", f"{type(tokens).__name__}-{tokens}")[:40],
)
def test_what_is_no_row_of_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match="token"):
        pack(tokens)


@pytest.mark.parametrize("name", sorted(NOT_PLAIN.keys() - {"rows of bytes"}))
def test_a_tensor_that_has_not_the_memory_of_its_ids_is_refused(name: str) -> None:
    """NumPy gave what lies elsewhere: a prompt of whatever was there."""
    ids = torch.arange(70, 78)
    tokens = made(name, ids)
    if name in ("a list", "an array", "derived"):
        assert pack(tokens) == pack(ids)
        return
    with pytest.raises(InvalidRequest, match="token") as error:
        pack(tokens)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("packed", [None, 5, "abcd", [1, 2], np.ones(2), b"abc", bytearray(5)])
def test_what_is_no_row_of_packed_ids_is_not_unpacked(packed: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"packed token ids are bytes|not whole tokens"):
        unpack(packed)


@pytest.mark.parametrize(
    "odd", [np.ones(2, int), torch.ones(1, device="meta").int(), [1], "1", 1.0]
)
def test_sizes_of_a_layout_and_places_of_an_item_are_single_numbers(odd: Any) -> None:
    for field in ("num_layers", "num_kv_heads", "head_dim"):
        with pytest.raises(InvalidRequest, match=field):
            Layout(**({"num_layers": 1, "num_kv_heads": 1, "head_dim": 1} | {field: odd}))
    for field in ("offset", "length"):
        item = prefixcache.MediaItem(0, 1, "a" * 8)._replace(**{field: odd})
        with pytest.raises(InvalidRequest, match=f"the {field} of an item"):
            prefixcache.media_keys([1, 2, 3], [item])


def test_a_layout_knows_its_element_types() -> None:
    for name, whole in (
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp32", "float32"),
        ("fp8", "float8_e4m3fn"),
    ):
        assert Layout(1, 1, 4, name) == Layout(1, 1, 4, whole)
        assert parse_layout(f"1x1x4:{name}") == Layout(1, 1, 4, whole)
        assert layout_named(f"1x1x4:{name}") == Layout(1, 1, 4, whole)
        assert load({"dtype": name}).dtype == whole
    with pytest.raises(InvalidRequest, match=r"--dtype.*cannot hold 'fp4'"):
        load({"dtype": "fp4"})
    for name in ("fp4", "BF16", None, 2):
        with pytest.raises(InvalidRequest, match="a pool cannot hold"):
            Layout(1, 1, 4, name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{sockets}/inputs.sock", *sizes(64, 4), "--ttl", "60") as process:
        yield process


NUMBERS = (
    *(math.nan, math.inf, -math.inf, -1, -1e300, 2**70, "1", None, 1e999, 10**400, -(10**400)),
    *([], np.ones(2), torch.ones(1, device="meta"), 1j, b""),
)
TEXTS = ("\ud800", 5, None, b"\xff")

ODD: dict[str, tuple[Callable[[Any, Any], Any], tuple[Any, ...]]] = {
    "acquire wait_s": (lambda s, odd: s.acquire([1], wait_s=odd), NUMBERS),
    "acquire reserve": (lambda s, odd: s.acquire([1], reserve=odd), NUMBERS),
    "acquire request_id": (lambda s, odd: s.acquire([1], request_id=odd), ("\ud800", 5, b"\xff")),
    "acquire min_partial": (lambda s, odd: s.acquire([1], min_partial=odd), NUMBERS),
    "pin ttl_s": (lambda s, odd: s.pin([1], ttl_s=odd), NUMBERS),
}


@pytest.mark.parametrize("what", ODD)
def test_no_odd_argument_breaks_a_session_or_raises_an_error_of_others(
    service: ServiceProcess, what: str
) -> None:
    call, values = ODD[what]
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        lease = session.acquire([9, 9, 9], reserve=5)
        for odd in values:
            with pytest.raises(CacheError):
                call(session, odd)
            assert session.alive, odd
        for odd in NUMBERS:
            for on_lease in (lease.commit, lease.extend, lease.truncate, lease.fork):
                with pytest.raises(CacheError):
                    on_lease(odd)  # type: ignore[operator]
            with pytest.raises(CacheError):
                lease.extend(6, wait_s=odd)  # type: ignore[arg-type]
        assert session.alive
        lease.commit(3)
        lease.release()


def test_no_odd_word_of_a_client_raises_an_error_of_others(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target) as client:
        for odd in TEXTS:
            space = Namespace(odd)  # type: ignore[arg-type]
            calls: tuple[Callable[[], Any], ...] = (
                lambda odd=odd: client.attach(odd, LAYOUT),
                lambda odd=odd: client.attach("model", LAYOUT, name=odd or 1),
                lambda space=space: client.lookup(space, [1]),
                lambda space=space: client.explain(space, [1]),
                lambda space=space: client.reset(space),
                lambda space=space: client.pin(space, [1], ttl_s=1.0),
                lambda space=space: client.quota(space),
                lambda space=space: client.outline(space),
                lambda space=space: next(client.watch(namespace=space)),
                lambda odd=odd: client.outline(order=odd),
                lambda odd=odd: client.check(-1 if odd in (5, None) else odd),
            )
            for call in calls:
                with pytest.raises(CacheError):
                    call()
        assert client.snapshot().num_blocks == 64


NO_LEASES = (None, 0, "1", [], np.ones(2), Namespace("m"))


def test_what_is_no_lease_of_the_session_is_refused_and_keeps_all_that_it_holds(
    service: ServiceProcess,
) -> None:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
        client.attach("model", LAYOUT) as other,
        other.acquire([1, 2, 3, 4, 5, 6]) as lease,
    ):
        table, batch = lease.block_table, session.batch()
        for odd in (*NO_LEASES, lease):
            said = "is another session's" if odd is lease else "is no lease"
            for add in (
                lambda odd=odd: batch.commit(odd, 1),
                lambda odd=odd: batch.extend(odd, 9),
                lambda odd=odd: batch.truncate(odd, 1),
                lambda odd=odd: batch.fork(odd, 1),
                lambda odd=odd: batch.release(odd),
            ):
                with pytest.raises(InvalidRequest, match=said):
                    add()
        assert batch.step.replies == []
        assert not lease.released
        assert lease.block_table is table
        assert lease.commit(6).num_tokens == 6


@pytest.mark.parametrize("whole", [int, np.int64, np.uint8, torch.tensor])
def test_who_watches_a_lease_is_told_before_it_is_truncated(
    service: ServiceProcess, whole: Callable[[int], Any]
) -> None:
    class Watcher:
        kept: tuple[int, ...] = ()

        def keep(self, num_blocks: int) -> None:
            self.kept = (*self.kept, num_blocks)

        def end(self, *, in_use: bool = False) -> None:
            """Let go of all."""

    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
        session.acquire([1, 2, 3, 4, 5, 6]) as lease,
    ):
        lease.watch(watcher := Watcher())
        with session.batch() as batch:
            batch.truncate(lease, whole(3))
            assert watcher.kept == (1,)


def test_a_batch_goes_to_the_session_that_opened_it(service: ServiceProcess) -> None:
    async def post(odd: Any) -> None:
        async with (
            await connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):
            session.post(odd)

    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
        client.attach("model", LAYOUT) as other,
    ):
        batch = other.batch()
        reply = batch.acquire([1, 2, 3])
        for odd in (batch, None, [], reply, batch.step):
            with pytest.raises(InvalidRequest, match="is no batch of this session"):
                session.post(odd)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="is no batch of this session"):
                asyncio.run(post(odd))
        with session.batch() as own:
            waited = own.acquire([4, 5], wait_s=1.0)
        for odd in (reply, None, "x", lambda: 0):
            with pytest.raises(InvalidRequest, match="is no reply of this batch"):
                own.wait(odd)
        own.wait(waited).release()
        assert client.snapshot().num_leases == 0
        with batch:
            pass
        reply.result().release()


def test_a_connection_takes_texts_and_its_own_words(service: ServiceProcess) -> None:
    def refused(match: str, **odd: Any) -> None:
        with pytest.raises(InvalidRequest, match=match):
            prefixcache.connect(**({"target": service.target} | odd))

    for odd in (True, 5, 0, 1.5, [], b"", b"x", np.ones(2)):
        refused("an address is a text", target=odd)
        refused("a token is a text", token=odd)
    for odd in (True, 0, "", "ca.pem", {}, np.ones(2)):
        refused("tls is .*, not a Tls", tls=odd)
    with prefixcache.connect(service.target) as client:
        for verb in (None, [], "", "nope"):
            with pytest.raises(InvalidRequest, match="is none of attach, acquire"):
                client.call(verb, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ["no", "", 0, 1, None, []])
def test_a_yes_or_no_that_is_neither_is_named(service: ServiceProcess, odd: Any) -> None:
    """To Python the text "no" is true."""

    async def attach() -> None:
        async with await connect_async(service.target) as client:
            await client.attach("model", LAYOUT, keep_alive=odd)

    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        asked: dict[str, list[Callable[[], Any]]] = {
            "reuse": [lambda: session.acquire([1], reuse=odd)],
            "for_room": [lambda: session.acquire([1], for_room=odd)],
            "ghosts": [lambda: client.outline(ghosts=odd)],
            "keep_alive": [
                lambda: client.attach("model", LAYOUT, keep_alive=odd),
                lambda: asyncio.run(attach()),
            ],
        }
        for name, ways in asked.items():
            for ask in ways:
                with pytest.raises(InvalidRequest, match=f"{name} is .*; it must be True or False"):
                    ask()
        assert client.snapshot().num_leases == 0


@pytest.mark.parametrize("odd", [2**64, -1, 1.5, "3", "", [], False, torch.ones(1, device="meta")])
def test_a_number_that_no_message_holds_is_named_with_its_field(odd: Any) -> None:
    asked: dict[str, Callable[[], Any]] = {
        "max_held": lambda: calls.set_quota("t", max_held=odd),
        "guaranteed": lambda: calls.set_quota("t", max_held=None, guaranteed=odd),
        "max_branches": lambda: calls.outline(max_branches=odd),
        "max_depth": lambda: calls.outline(max_depth=odd),
        "max_runs": lambda: calls.check(odd),
        "from_sequence": lambda: calls.watch(odd),
    }
    for field, ask in asked.items():
        with pytest.raises(InvalidRequest, match=re.escape(f"{field} is {odd!a:.20}")):
            ask()


def test_an_attachment_is_shown_in_one_short_line(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT, name="w") as session,
    ):
        assert repr(session.attachment) == (
            f"<Attachment {session.attachment.worker}: shm pool of 64 blocks of 4 tokens, "
            "1x1x4:float32, ttl 60 s>"
        )


def test_a_closed_client_says_so(service: ServiceProcess) -> None:
    client = prefixcache.connect(service.target)
    client.close()
    client.close()
    for call in (client.snapshot, lambda: client.attach("m", LAYOUT), lambda: next(client.watch())):
        with pytest.raises(ServiceUnavailable, match="this client is closed"):
            call()

    async def run() -> None:
        client = await connect_async(service.target)
        await client.close()
        await client.close()
        calls: tuple[Callable[[], Awaitable[Any]], ...] = (
            client.snapshot,
            lambda: client.attach("m", LAYOUT),
            lambda: anext(client.watch()),
        )
        for call in calls:
            with pytest.raises(ServiceUnavailable, match="this client is closed"):
                await call()

    asyncio.run(run())


def test_who_still_waits_when_the_client_is_closed_is_told_and_not_cancelled(
    service: ServiceProcess,
) -> None:
    """Closing a channel cancels its calls: in asyncio that looks as if the caller was cancelled."""

    async def to_the_end(watching: AsyncIterator[Any]) -> None:
        async for _ in watching:
            pass

    async def run() -> None:
        client = await connect_async(service.target)
        watching = client.watch()
        assert (await anext(watching)).is_snapshot
        waiting = [
            asyncio.ensure_future(to_the_end(watching)),
            asyncio.ensure_future(client.snapshot()),
        ]
        for _ in range(3):
            await asyncio.sleep(0)
        await client.close()
        for told in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(told, ServiceUnavailable)
            assert "this client is closed" in str(told)

        async with await connect_async(service.target) as client:
            watching = client.watch()
            await anext(watching)
            task = asyncio.ensure_future(to_the_end(watching))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


@pytest.mark.parametrize(
    "odd", [0, -1, math.nan, math.inf, "10", None, pytest.param(10**400, id="vast"), 1e10, []]
)
def test_a_time_limit_is_a_positive_number(service: ServiceProcess, odd: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s is"):
        prefixcache.connect(service.target, timeout_s=odd)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_sessions_that_broke_leave_nothing_when_the_client_attaches_again(
    service: ServiceProcess,
) -> None:
    """Keys are passed on without a close(), but never while a lease may be written to."""
    with prefixcache.connect(service.target) as client:
        kept = None
        before: list[int] = []
        for number in range(300):
            if number == 10:
                before = [descriptors(os.getpid()), descriptors(service.process.pid)]
            session = client.attach("model", LAYOUT)
            lease = session.acquire([number] * 8)
            if number == 0:
                kept = lease
            session._call.cancel()
            session._reader.join(PATIENCE_S)
            assert not session.alive
        # What the last breaks have left is on its way: on neither side it is more than a few.
        eventually(lambda: descriptors(os.getpid()) <= before[0] + 8)
        eventually(lambda: descriptors(service.process.pid) <= before[1] + 8)
        eventually(
            lambda: sum(t.name.startswith("prefixcache") for t in threading.enumerate()) < 10
        )
        del lease
        with client.attach("model", LAYOUT):
            # Those of the lease that is still in hand: its blocks may be being written to.
            assert kept is not None
            assert client.snapshot().quarantined == len(kept.block_table)
            assert len(client._sessions) == 2
            del kept
        with client.attach("model", LAYOUT):
            assert client.snapshot().quarantined == 0
            assert (len(client._sessions), client.finished) == (1, [])
