"""The service is killed and starts again: what was stored is there or a miss, never wrong."""

from __future__ import annotations

import mmap
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import prefixcache
from chaos.pattern import Pool, prompt
from chaos.storm import Disk
from patience import PATIENCE_S
from prefixcache.client import Client, Session
from prefixcache.config import load
from prefixcache.errors import EpochMismatch, InvalidRequest, ServiceUnavailable
from prefixcache.pool import HEADER_BYTES, PoolFile, epoch_of, map_pool
from prefixcache.service.backing import Backing
from prefixcache.service.events.recorder import Recorder
from prefixcache.service.persistence import writer
from prefixcache.service.persistence.directory import StateDirectory
from prefixcache.service.persistence.manifest import Manifest
from prefixcache.types import Grant, Namespace, PoolHandle, WorkerId
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import (
    LAYOUT,
    ServiceProcess,
    environment,
    eventually,
    running,
    sizes,
)

BLOCKS, SIZE = 256, 4
MEMORY = BLOCKS * SIZE * LAYOUT.token_bytes
SYSTEM = (1, 23)
CHATS = [prompt(SYSTEM, (seed, 20 + seed)) for seed in range(2, 12)]
TOKENS = sum(len(chat) // 4 for chat in CHATS)
MODEL = "model"
MINE = Namespace(MODEL)


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/cache.sock"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def serve(target: str, state: Path, *flags: str) -> ServiceProcess:
    return ServiceProcess(target, *sizes(BLOCKS, SIZE), "--state", str(state), *flags)


class Reader:
    """A worker that writes and reads patterns through the real pool."""

    def __init__(self, client: Client, model: str = MODEL, salt: str = "") -> None:
        self.session: Session = client.attach(model, LAYOUT, salt=salt)
        self.pool = Pool(map_pool(self.session.pool), self.session.pool)
        self.model = model + salt

    def store(self, tokens: bytes) -> None:
        """Compute what is not cached, commit all, and release."""
        with self.session.acquire(tokens) as lease:
            self.pool.copy(lease.copies)
            count = len(tokens) // 4
            self.pool.write(self.model, tokens, lease.block_table, lease.num_cached, count)
            lease.commit(count)

    def read(self, tokens: bytes) -> int:
        """Give how many tokens are cached, having verified every one of them."""
        with self.session.acquire(tokens + bytes(4)) as lease:
            self.pool.copy(lease.copies)
            assert not self.pool.wrong(self.model, tokens, lease.block_table, lease.num_cached)
            return lease.num_cached

    def close(self) -> None:
        self.session.close()
        del self.pool

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def info(client: Client) -> pb.StateInfo:
    found: pb.StateInfo = client.call("snapshot", pb.SnapshotRequest()).service.state
    return found


def written(client: Client) -> Callable[[], bool]:
    """Whether the manifest has all that is indexed."""

    def check() -> bool:
        now = info(client)
        return now.restored_blocks + now.written_blocks >= client.snapshot().indexed

    return check


@contextmanager
def filled(target: str, state: Path, *, wait: bool = True) -> Iterator[ServiceProcess]:
    """A service that has stored all chats."""
    service = serve(target, state)
    try:
        with prefixcache.connect(target) as client:
            with Reader(client) as reader:
                for chat in CHATS:
                    reader.store(chat)
            if wait:
                eventually(written(client))
        yield service
    finally:
        service.close()


@contextmanager
def scribbler(target: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that goes on writing; see `scribbler.py`."""
    with subprocess.Popen(
        [sys.executable, "-m", "service.persistence.scribbler", target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def kill(service: ServiceProcess) -> None:
    service.signal(signal.SIGKILL)
    service.wait()


def hits(target: str) -> int:
    with prefixcache.connect(target) as client, Reader(client) as reader:
        return sum(reader.read(chat) for chat in CHATS)


def test_after_a_kill_nearly_every_token_hits_again_and_every_byte_is_right(
    target: str, state: Path
) -> None:
    with filled(target, state) as first:
        kill(first)
    with serve_again(target, state) as second:
        assert "restored from" in "".join(second.lines)
        assert hits(target) >= 0.99 * TOKENS


@contextmanager
def serve_again(target: str, state: Path, *flags: str) -> Iterator[ServiceProcess]:
    service = serve(target, state, *flags)
    try:
        yield service
    finally:
        service.close()


def test_after_a_clean_end_every_token_hits_again(target: str, state: Path) -> None:
    with filled(target, state, wait=False) as first:
        assert first.stop() == 0
    with serve_again(target, state):
        assert hits(target) == TOKENS


def test_the_third_life_still_knows_what_the_first_stored(target: str, copied: Path) -> None:
    state, more = copied, prompt(SYSTEM, (99, 30))
    with serve_again(target, state) as second, prefixcache.connect(target) as client:
        with Reader(client) as reader:
            reader.store(more)
        eventually(written(client))
        kill(second)
    with serve_again(target, state):
        assert hits(target) >= 0.99 * TOKENS
        with prefixcache.connect(target) as client, Reader(client) as reader:
            assert reader.read(more) == len(more) // 4


def test_what_was_evicted_and_overwritten_is_a_miss(target: str, state: Path) -> None:
    with filled(target, state) as first, prefixcache.connect(target) as client:
        with Reader(client, "other") as reader:
            for seed in range(100, 130):  # more than the whole pool
                reader.store(prompt((seed, 60)))
            before = info(client).written_blocks
            reader.store(prompt((130, 60)))
            eventually(lambda: info(client).written_blocks > before)
            for seed in range(131, 135):
                reader.store(prompt((seed, 60)))
        kill(first)  # the manifest may be behind
    with serve_again(target, state), prefixcache.connect(target) as client:
        reader, other = Reader(client), Reader(client, "other")
        for chat in CHATS:
            reader.read(chat)
        assert sum(other.read(prompt((seed, 60))) for seed in range(100, 135))


def test_a_reset_holds_at_once_whatever_dies(target: str, state: Path) -> None:
    with filled(target, state) as first, prefixcache.connect(target) as client:
        client.reset(Namespace(MODEL))
        kill(first)
    with serve_again(target, state):
        assert hits(target) == 0


def test_another_salt_finds_nothing(target: str, copied: Path) -> None:
    with serve_again(target, copied), prefixcache.connect(target) as client:
        stranger = Reader(client, salt="secret")
        assert all(stranger.read(chat) == 0 for chat in CHATS)


def test_old_handles_are_refused_and_who_maps_the_pool_can_tell(target: str, state: Path) -> None:
    with filled(target, state) as first, prefixcache.connect(target) as client:
        old: PoolHandle = client.attach(MODEL, LAYOUT).pool
        memory = map_pool(old)
        assert epoch_of(memory) == old.epoch
        kill(first)
        with serve_again(target, state):
            assert epoch_of(memory) != old.epoch
            with pytest.raises(EpochMismatch, match="Attach again"):
                map_pool(old)


def test_blocks_that_a_survivor_may_still_write_to_are_lent_to_nobody_until_it_lets_go(
    target: str, state: Path
) -> None:
    with (
        filled(target, state) as first,
        scribbler(target) as survivor,
    ):
        assert survivor.stdout is not None
        assert survivor.stdin is not None
        private = int(survivor.stdout.readline())
        kill(first)
        with serve_again(target, state), prefixcache.connect(target) as client:
            for name in ("workers of an earlier life", "0", "w0"):  # no name is theirs
                client.attach(MODEL, LAYOUT, name=name).close()
            assert client.snapshot().quarantined == private
            with Reader(client, "other") as reader:
                for seed in range(100, 140):  # use the whole pool, while it writes on
                    reader.store(prompt((seed, 60)))
                    reader.read(prompt((seed, 60)))
                survivor.stdin.close()
                assert survivor.wait(PATIENCE_S) == 0
                eventually(lambda: client.snapshot().quarantined == 0)
                assert client.snapshot().free + client.snapshot().evictable == BLOCKS


# ------------------------------------------------------------------------------------ damage


def flip_bytes(state: Path) -> None:
    with (state / "pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for block in range(30, BLOCKS, 2):
            memory[HEADER_BYTES + block * SIZE * 16 + 5] ^= 0x40


def swap_blocks(state: Path) -> None:
    size = SIZE * 16
    with (state / "pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        one, two = (
            slice(at, at + size) for at in (HEADER_BYTES + 40 * size, HEADER_BYTES + 41 * size)
        )
        memory[one], memory[two] = memory[two], memory[one]


def change_tokens(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        for number, tokens in base.execute("SELECT id, tokens FROM runs").fetchall():
            torn = bytes([tokens[0] ^ 1]) + tokens[1:]
            base.execute("UPDATE runs SET tokens = ? WHERE id = ?", (torn, number))
    base.close()


def change_types(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        base.execute("UPDATE runs SET blocks = 'text' WHERE id % 3 = 0")
        base.execute("UPDATE runs SET parent = NULL WHERE id % 3 = 1")
        base.execute("UPDATE runs SET stamps = x'00' WHERE id % 3 = 2")
    base.close()


def name_foreign_blocks(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        for number, blocks in base.execute("SELECT id, blocks FROM runs").fetchall():
            far = np.full(len(blocks) // 4, 2**31 - 1, np.int32).tobytes()
            base.execute("UPDATE runs SET blocks = ? WHERE id = ?", (far, number))
    base.close()


def rename_namespace(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        base.execute("UPDATE namespaces SET tenant = 'somebody else'")
    base.close()


def truncate_manifest(state: Path) -> None:
    for name in ("manifest-wal", "manifest-shm"):
        (state / name).unlink(missing_ok=True)
    os.truncate(state / "manifest", 6000)


def scribble_over_manifest(state: Path) -> None:
    for name in ("manifest-wal", "manifest-shm"):
        (state / name).unlink(missing_ok=True)
    size = (state / "manifest").stat().st_size
    (state / "manifest").write_bytes(np.random.default_rng(3).bytes(size))


def drop_tables(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        base.execute("DROP TABLE runs")
        base.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, other TEXT)")
    base.close()


def lose_stamps(state: Path) -> None:
    (state / "stamps").unlink()


def lose_pool(state: Path) -> None:
    (state / "pool").unlink()


def forge_layout(state: Path) -> None:
    with sqlite3.connect(state / "manifest") as base:
        base.execute("UPDATE meta SET value = '2x1x2:float32' WHERE name = 'layout'")
    base.close()


DAMAGES = [
    (flip_bytes, "partly"),
    (swap_blocks, "partly"),
    (change_tokens, "nothing"),
    (change_types, "nothing"),
    (name_foreign_blocks, "nothing"),
    (rename_namespace, "nothing"),
    (truncate_manifest, "nothing"),
    (scribble_over_manifest, "nothing"),
    (drop_tables, "nothing"),
    (lose_stamps, "nothing"),
    (lose_pool, "nothing"),
    (forge_layout, "nothing"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state as a killed service left it."""
    folder = tmp_path_factory.mktemp("saved")
    with filled(f"unix:{folder}/s", folder / "state") as service:
        kill(service)
    return folder / "state"


def local_hits(state: Path, namespace: Namespace = MINE) -> int:
    """Revive a state in this process; verify all that it offers, and count it."""
    me = WorkerId(1)
    backing = Backing(
        load({"memory": MEMORY, "block_size": SIZE, "layout": LAYOUT, "state": state})
    )
    try:
        assert backing.cache is not None
        assert backing.handle is not None
        backing.cache.check()
        pool = Pool(map_pool(backing.handle), backing.handle)
        backing.cache.attach(me, namespace, now=0.0)
        found = 0
        for chat in CHATS:
            grant = backing.cache.acquire(me, namespace, chat + bytes(4), now=0.0)
            assert isinstance(grant, Grant)
            pool.copy(grant.copies)
            assert not pool.wrong(MODEL, chat, grant.block_table, grant.num_cached)
            backing.cache.release(me, grant.lease, now=0.0)
            found += grant.num_cached
        return found
    finally:
        backing.close()


@pytest.fixture
def copied(state: Path, saved: Path) -> Path:
    state.mkdir()
    for path in saved.iterdir():
        (state / path.name).write_bytes(path.read_bytes())
    return state


@pytest.mark.parametrize(("damage", "left"), DAMAGES, ids=[one.__name__ for one, _ in DAMAGES])
def test_what_is_torn_or_foreign_is_a_miss(
    copied: Path, damage: Callable[[Path], None], left: str
) -> None:
    damage(copied)
    found = local_hits(copied)
    assert found < 0.95 * TOKENS
    assert (found > 0) == (left == "partly")


def test_a_namespace_that_was_renamed_is_not_offered_to_another(copied: Path) -> None:
    rename_namespace(copied)
    assert local_hits(copied, Namespace(MODEL, tenant="somebody else")) == 0


def test_what_is_not_damaged_is_all_there(copied: Path) -> None:
    assert local_hits(copied) >= 0.99 * TOKENS


def test_another_layout_starts_cold_and_keeps_from_then_on(target: str, copied: Path) -> None:
    flags = [*sizes(BLOCKS, 2 * SIZE), "--state", str(copied)]
    for expected in (0, TOKENS):
        with running(target, *flags) as service:
            assert hits(target) == expected
            with prefixcache.connect(target) as client, Reader(client) as reader:
                for chat in CHATS:
                    reader.store(chat)
            assert service.stop() == 0


def test_without_a_layout_the_one_of_the_state_is_taken(target: str, copied: Path) -> None:
    flags = ["--memory", str(MEMORY), "--block-size", str(SIZE), "--state", str(copied)]
    with running(target, *flags):
        assert hits(target) >= 0.99 * TOKENS


def test_two_services_do_not_share_a_state(copied: Path) -> None:
    first = StateDirectory(copied)
    for has_copy in (False, True):
        if has_copy:  # one that was made with hard links
            (copied / "lock.copy").hardlink_to(copied / "lock")
        with pytest.raises(ServiceUnavailable, match="another service keeps its state"):
            StateDirectory(copied)
    first.close()
    StateDirectory(copied).close()


@pytest.mark.parametrize("name", ["manifest", "pool", "stamps", "manifest-wal"])
def test_somebodys_files_are_not_taken_for_a_state_that_is_damaged(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "home"
    folder.mkdir(0o700)
    (folder / name).write_text("of mine")
    with pytest.raises(InvalidRequest, match=f"holds {name}, and no lock"):
        StateDirectory(folder)
    assert (folder / name).read_text() == "of mine"
    assert [one.name for one in folder.iterdir()] == [name]


def test_a_folder_that_cannot_be_used_costs_the_state_and_nothing_else(
    target: str, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with serve_again(target, blocked) as service:
        assert any("nothing is kept" in line for line in service.lines)
        with prefixcache.connect(target) as client, Reader(client) as reader:
            reader.store(CHATS[0])
            assert reader.read(CHATS[0]) == len(CHATS[0]) // 4
            assert "directory" in info(client).failure.lower()
        assert service.stop() == 0


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize("made_before", [False, True])
def test_what_is_kept_is_private_whatever_the_umask(
    state: Path, umask: int, made_before: bool
) -> None:
    if made_before:
        state.mkdir()
        state.chmod(0o755)
    backing = Backing(
        load({"memory": MEMORY, "block_size": SIZE, "layout": LAYOUT, "state": state})
    )
    try:
        found = modes(state)  # while it is open, with the files that SQLite makes beside its own
    finally:
        backing.close()
    assert set(found) == {"lock", "manifest", "manifest-wal", "manifest-shm", "pool", "stamps"}
    assert set(found.values()) == {0o600}
    assert stat.S_IMODE(state.stat().st_mode) == (0o755 if made_before else 0o700)


def test_a_recording_and_its_pool_are_private_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    Recorder(tmp_path / "requests.jsonl").close()
    with PoolFile.create(LAYOUT, BLOCKS, SIZE) as pool:
        assert stat.S_IMODE(Path(pool.handle.name).stat().st_mode) == 0o600
    assert modes(tmp_path) == {"requests.jsonl": 0o600}


def test_what_an_earlier_version_left_open_to_others_is_closed(copied: Path) -> None:
    for path in copied.iterdir():
        path.chmod(0o644)
    assert local_hits(copied) >= 0.99 * TOKENS
    assert set(modes(copied).values()) == {0o600}


@pytest.mark.parametrize("name", ["manifest", "manifest-wal", "pool", "stamps", "lock"])
@pytest.mark.parametrize("way", ["symlink", "second name", "pipe"])
def test_a_file_that_may_be_somebody_elses_is_neither_followed_nor_kept(
    copied: Path, tmp_path: Path, name: str, way: str
) -> None:
    place, elsewhere = copied / name, tmp_path / "precious"
    elsewhere.write_bytes(place.read_bytes() if place.exists() else b"")
    before = elsewhere.read_bytes()
    place.unlink(missing_ok=True)
    if way == "symlink":
        place.symlink_to(elsewhere)
    elif way == "second name":
        place.hardlink_to(elsewhere)
    else:
        os.mkfifo(place)
    local_hits(copied)
    assert elsewhere.read_bytes() == before
    assert place not in copied.iterdir() or stat.S_ISREG(place.lstat().st_mode)


def test_a_folder_that_others_may_write_to_is_refused(state: Path) -> None:
    state.mkdir()
    for mode in (0o777, 0o770, 0o702):
        state.chmod(mode)
        with pytest.raises(InvalidRequest, match="chmod 700"):
            StateDirectory(state)
        assert not list(state.iterdir())


def test_a_folder_of_somebody_else_is_refused(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.mkdir()
    link = tmp_path / "link"
    link.symlink_to(state)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for path in (state, link):
        with pytest.raises(InvalidRequest, match="belongs to user"):
            StateDirectory(path)
    assert not list(state.iterdir())


def test_a_path_with_an_error_in_it_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no folder"):
        StateDirectory(tmp_path / "typo" / "state")
    assert not list(tmp_path.iterdir())


def test_a_writer_that_ends_unforeseen_is_told_and_keeps_nothing_back(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("nobody thought of this")

    backing = Backing(
        load({"memory": MEMORY, "block_size": SIZE, "layout": LAYOUT, "state": state})
    )
    kept, cache = backing.state, backing.cache
    assert kept is not None
    assert cache is not None
    try:
        monkeypatch.setattr(Manifest, "write", fail)
        cache.attach(WorkerId("w"), MINE, now=0.0)
        for count, chat in enumerate(CHATS):
            grant = cache.acquire(WorkerId("w"), MINE, chat, now=0.0)
            assert isinstance(grant, Grant)
            cache.commit(WorkerId("w"), grant.lease, len(chat) // 4, now=0.0)
            cache.release(WorkerId("w"), grant.lease, now=0.0)
            if not count:
                eventually(lambda: kept.condition.failure)
        assert "nobody thought of this" in kept.condition.failure
        assert kept.condition.pending_bytes == 0
        assert kept.condition.dropped_runs >= len(CHATS) - 1
    finally:
        backing.close()


def test_a_full_disk_costs_what_it_could_not_take_until_there_is_room(
    target: str, tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "disk")
    state = disk.folder / "state"
    try:
        with serve_again(target, state) as first, prefixcache.connect(target) as client:
            with Reader(client) as reader:
                reader.store(CHATS[0])
                eventually(written(client))
                disk.fill(first.process.pid)
                for chat in CHATS[1:]:
                    reader.store(chat)
                    assert reader.read(chat) == len(chat) // 4, "the service goes on"
                eventually(lambda: info(client).failure)
                disk.free(first.process.pid)
            eventually(written(client))
            assert not info(client).failure
            kill(first)
        with serve_again(target, state):
            assert hits(target) >= 0.99 * TOKENS
    finally:
        disk.close()


def test_namespaces_that_went_leave_their_numbers_to_others(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A salt for each request: the last is kept like the first, and none finds another's."""
    monkeypatch.setattr(writer, "MAX_NAMESPACES", 64)
    settings = load({"memory": MEMORY, "block_size": SIZE, "layout": LAYOUT, "state": state})
    tokens = bytes(4 * SIZE)
    for life in range(2):
        backing = Backing(settings)
        cache = backing.cache
        assert cache is not None
        assert backing.state is not None
        kept = backing.state._writer
        assert kept is not None
        for n in range(500):
            me, space = WorkerId(n + 1), Namespace(MODEL, salt=f"{life} {n}")
            cache.attach(me, space, now=0.0)
            grant = cache.acquire(me, space, tokens, now=0.0)
            assert isinstance(grant, Grant)
            assert not grant.num_cached
            cache.commit(me, grant.lease, SIZE, now=0.0)
            cache.release(me, grant.lease, now=0.0)
            if n < 499:
                cache.reset(space)
            cache.detach(me, now=0.0, gone=True)
            assert len(kept._numbers) < 64
            assert min(kept._numbers.values()) >= 0, "it has no number, and is not kept"
        backing.close()
    backing = Backing(settings)
    try:
        assert backing.cache is not None
        for n in range(500):
            hit = backing.cache.lookup(Namespace(MODEL, salt=f"1 {n}"), tokens + tokens).num_hit
            assert hit == (SIZE if n == 499 else 0)
    finally:
        backing.close()
