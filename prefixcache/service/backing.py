"""What the service owns: the pool's file and the cache that says what is in it.

Both need the layout.  Where nobody gave one at the start, the first worker that attaches decides.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from prefixcache.certificates import Certificates
from prefixcache.config import ServeSettings, format_size
from prefixcache.core.block_keys import Generations, PassingGenerations
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import TierSizes
from prefixcache.errors import InvalidRequest, LayoutMismatch
from prefixcache.pool import PoolFile, check_layout, check_sizes
from prefixcache.private_files import check_path, check_secret
from prefixcache.remote_address import MOONCAKE
from prefixcache.service.persistence.directory import StateDirectory
from prefixcache.service.pool.device_owner import DeviceOwner
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.service.pool.zeroing import BlockZeroer
from prefixcache.service.tiers.abandonments import Abandonments
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder, num_slots
from prefixcache.service.tiers.objects import Namer, Stage, head_bytes, num_stage_slots
from prefixcache.service.tiers.remote.mooncake import check_interfaces
from prefixcache.service.tiers.remote.store import RemoteError
from prefixcache.service.tiers.remote.valkey import tls_to
from prefixcache.service.tiers.slab import Slab, describe, head_type
from prefixcache.texts import many
from prefixcache.types import Layout, Namespace, PoolHandle
from prefixcache.user_folders import expand

_MOST_IN_A_HAUL = 16
_SHORTEST_SECRET, _LONGEST_SECRET = 16, 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the memory of a pool divides into blocks."""

    layout: Layout
    memory: int
    block_size: int
    first_block: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.layout.block_bytes(self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks that fit."""
        return self.memory // self.block_bytes

    @property
    def num_lent(self) -> int:
        """How many of them can be lent."""
        return self.num_blocks - self.first_block

    def __str__(self) -> str:
        """Write the arithmetic out.

        >>> print(Sizes(Layout(30, 3, 64, "bfloat16"), 2**31, 16))
        23.0 KB per token (30 layers × 3 kv heads × 64, bfloat16) · 2 GiB = 5,825 blocks of 16 = 93,200 tokens
        """  # noqa: E501 - one line of output
        layout, num_blocks = self.layout, self.num_blocks
        times = "\N{MULTIPLICATION SIGN}"
        token = self.block_bytes / self.block_size
        size = f"{token / 1000:.1f} KB" if token < 10**6 else f"{token / 10**6:.2f} MB"
        if layout.is_ours:
            what = (
                f"{many(layout.num_layers, 'layer')} {times} {many(layout.num_kv_heads, 'kv head')}"
                f" {times} {layout.head_dim}, {layout.dtype}"
            )
        else:
            what = (
                f"{many(layout.planes, 'plane')} {times} {many(layout.page_bytes, 'byte')} per "
                f"block, format {layout.format}"
            )
        kept = f", {many(self.first_block, 'block', 'are')} never lent" if self.first_block else ""
        return (
            f"{size} per token ({what}) · {format_size(self.memory)} = {num_blocks:,} blocks of "
            f"{self.block_size}{kept} = {self.num_lent * self.block_size:,} tokens"
        )


class Backing:
    """The pool and the cache, from the moment the layout is known."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.cache: PrefixCache | None = None
        self.handle: PoolHandle | None = None
        self.sizes: Sizes | None = None
        self.state: StateDirectory | None = None
        self.certificates: Certificates | None = None
        """Which models' requests may ask for segments; None: none."""
        if settings.segments is not None:
            self.certificates = Certificates.read(settings.segments, settings.segments_threshold)
        self.owner: DeviceOwner | None = None
        """The process that has the pool, if that is on a GPU."""
        self._tenants: tuple[str, ...] = ()
        self.slab: Slab | None = None
        """The memory below the pool, if there is any."""
        self.disk: DiskFolder | None = None
        """What is on disk below that, if there is any."""
        self.stage: Stage | None = None
        """Slots on the way to a store elsewhere, if there is one."""
        self._namer: Namer | None = None
        self._passing = PassingGenerations()
        """Counts resets for the store elsewhere where no folder does."""
        _check_remote(settings)
        self._secret = remote_secret(settings)
        self._own_name = secrets.token_bytes(16)
        """Goes into the names of what is stored elsewhere after a reset; of all lives, if there is
        a folder that outlives this one."""
        self.abandoned: Abandonments | None = None
        """Which copies to it nobody may believe."""
        self._file: PoolFile | None = None
        self._zeroer: BlockZeroer | None = None
        if settings.pool == "shm":
            PoolFile.sweep()
        elif settings.pool == "cuda":
            _check_cuda(settings)
        below = {"--host": settings.host, "--disk": settings.disk, "--remote": settings.remote}
        for option, given in below.items():
            if given is not None and settings.pool != "shm":
                raise InvalidRequest(
                    f"{option} needs a pool in shared memory, and --pool {settings.pool} has none "
                    "there"
                )
        if settings.state is not None:
            self.state = StateDirectory(settings.state)
        if settings.disk is not None:
            self.disk = DiskFolder(disk_folder(settings), settings.disk.num_bytes)
        try:
            self._settle_at_start()
        except BaseException:
            self.close()
            raise

    def _settle_at_start(self) -> None:
        """Make the pool now, if its layout is known."""
        settings = self.settings
        if settings.layout is not None:
            self.settle_layout(settings.layout)
        elif settings.model is not None:
            self.settle_layout(read_layout(settings.model, settings.dtype, settings.block_size))
        elif self.state is not None and self.state.layout is not None:
            self.settle_layout(self.state.layout)

    def settle_layout(self, layout: Layout, block_size: int = 0) -> PrefixCache:
        """Create pool and cache for `layout`, or check that they were created for it.

        Args:
            layout: how the bytes of a block lie.
            block_size: tokens of a block that are asked for; 0 takes the service's.

        Raises:
            LayoutMismatch: they were created for another; the message names both.
            InvalidRequest: not one block fits into the memory, or the policy is unknown.
            PoolExhausted: shared memory has no room for the pool.
        """
        settings = self.settings
        if self.cache is not None and self.handle is not None:
            if layout != self.handle.layout:
                raise LayoutMismatch(_differs(self.handle.layout, layout))
            _check_block_size(settings.block_size, block_size)
            return self.cache
        check_layout(layout)
        _check_block_size(settings.block_size, block_size)
        sizes = Sizes(layout, settings.memory, settings.block_size, settings.first_block)
        if sizes.num_lent < 1:
            room = "Raise --memory or lower --block-size"
            raise InvalidRequest(
                f"one block of {settings.block_size} tokens takes {format_size(sizes.block_bytes)} "
                f"({layout}); the pool has {format_size(settings.memory)}"
                + (
                    f", and its first {settings.first_block:,} are never lent. {room}, or lower "
                    "--first-block."
                    if settings.first_block
                    else f". {room}."
                )
            )
        check_sizes(layout, sizes.num_blocks, settings.block_size)
        cache = PrefixCache(
            sizes.num_lent,
            settings.block_size,
            policy=settings.policy,
            partial=settings.partial,
            num_ghosts=settings.ghosts,
            ttl_s=settings.ttl,
            max_pinned=int(sizes.num_lent * settings.pin_cap),
            max_line=settings.max_line,
            max_leases=settings.max_leases,
            max_namespaces=settings.max_namespaces,
            history_bytes=settings.history,
            first_block=settings.first_block,
            segments_secret=None if self.certificates is None else secrets.token_bytes(32),
            tiers=_tiers(sizes, settings),
        )
        cache.set_tenants(self._tenants)
        if settings.pool == "shm":
            self._file = self._make_pool(sizes)
            self.handle = self._file.handle
        elif settings.pool == "cuda":
            self.owner = DeviceOwner.start(
                layout, sizes.num_blocks, settings.block_size, device=settings.device
            )
            self.handle = self.owner.handle
        else:
            self.handle = PoolHandle(
                "none", "", sizes.num_blocks, settings.block_size, layout, 0, 0
            )
        self.handle = replace(self.handle, first_block=settings.first_block)
        if self.state is not None:
            self.state.restore(cache, settings.partial)
        if self.handle.kind == "shm":
            self._zeroer = BlockZeroer(self.handle)
            cache.wipe_with(self._zeroer)
        if settings.host is not None:
            self.slab = Slab(self.handle, settings.host)
        if self.disk is not None:
            self.abandoned = Abandonments.make(self.handle.num_blocks)
            remains = self.disk.open(self.handle)
            self._own_name = self.disk.own_name
            self.disk.num_found = cache.keep_below(
                self.disk.key_secret, self.disk.resets, remains, self.abandoned.note
            )
        if settings.remote is not None:
            if self.disk is None:
                cache.count_resets(self._passing)
            self.stage = Stage(self.handle)
            self._namer = Namer(str(layout), settings.block_size, self._secret)
        self.cache, self.sizes = cache, sizes
        return cache

    @property
    def has_tiers(self) -> bool:
        """Whether there is anything below the pool, here or elsewhere, and a pool."""
        has_disk = self.disk is not None and self.disk.num_slots > 0
        return self.slab is not None or has_disk or self.stage is not None

    @property
    def loses_pool(self) -> bool:
        """Whether a disk below the pool outlives the service, and the pool does not."""
        return self.state is None and self.disk is not None and self.disk.num_slots > 0

    @property
    def num_host(self) -> int:
        """Slots in memory below the pool: those on disk come behind them."""
        return 0 if self.slab is None else self.slab.num_slots

    @property
    def porters_files(self) -> list[int]:
        """The open files that a porter needs."""
        files = [] if self.disk is None else self.disk.files
        return files if self.abandoned is None else [*files, self.abandoned.fd]

    def order(self) -> dict[str, object]:
        """Say to a porter where everything is."""
        assert self.handle is not None
        order: dict[str, object] = {"pool": describe(self.handle)}
        if self.slab is not None:
            order |= self.slab.order()
        if self.disk is not None:
            order["disk"] = self.disk.order()
        if self.stage is not None:
            order |= {"stage": self.stage.order(), "secret": self._secret.hex()}
        if self.abandoned is not None:
            order["abandoned"] = self.abandoned.fd
        return order

    @property
    def num_stage(self) -> int:
        """Slots through which objects go to a store elsewhere, and come from there."""
        return 0 if self.stage is None else self.stage.num_slots

    @property
    def object_bytes(self) -> int:
        """What a block takes in a store elsewhere; the layout is known."""
        assert self.sizes is not None
        return head_bytes(self.sizes.block_size) + self.sizes.block_bytes

    def carrier_order(self) -> dict[str, object]:
        """Say to a carrier where the store is, and what he needs to name objects."""
        address = self.settings.remote
        assert self.stage is not None
        assert self.handle is not None
        assert address is not None
        return {
            "stage": self.stage.order(),
            "address": address,
            "ca": remote_ca(self.settings),
            "interface": self.settings.remote_interface or "",
            "layout": str(self.handle.layout),
            "block_size": self.handle.block_size,
            "secret": self._secret.hex(),
        }

    @property
    def resets(self) -> Generations | None:
        """Who counts resets, if anything is kept where a reset does not reach it at once."""
        if self.disk is not None:
            return self.disk.resets
        return None if self.settings.remote is None else self._passing

    def base_name(self, namespace: Namespace, resets: int) -> bytes:
        """Name what the objects of a namespace begin with: another name after each reset.

        What was reset is of this service alone, in all of its lives if there is a folder that knows
        of it: nobody else has the names that follow.
        """
        assert self._namer is not None
        told = self._own_name + resets.to_bytes(8, "little") if resets else b""
        return self._namer.base(namespace, told)

    @property
    def medium(self) -> str:
        """Where the pool's bytes are, as routers know it."""
        return "GPU" if self.handle is not None and self.handle.kind == "cuda-ipc" else "CPU"

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit of the cache is kept, once there is one."""
        self._tenants = tuple(tenants)
        if self.cache is not None:
            self.cache.set_tenants(self._tenants)

    def _make_pool(self, sizes: Sizes) -> PoolFile:
        file = None
        if self.state is not None:
            file = self.state.open_pool(
                sizes.layout, sizes.num_blocks, sizes.block_size, sizes.first_block
            )
        if file is None:
            file = PoolFile.create(sizes.layout, sizes.num_blocks, sizes.block_size)
        return file

    def close(self) -> None:
        """Unlink the pool's file, unless it is kept; end a GPU pool's owner.  Idempotent."""
        if self.slab is not None:
            self.slab.close()
            self.slab = None
        if self.disk is not None:
            self.disk.close()
            self.disk = None
        if self.stage is not None:
            self.stage.close()
            self.stage = None
        if self.abandoned is not None:
            self.abandoned.close()
            self.abandoned = None
        if self.owner is not None:
            self.owner.close()
        if self._zeroer is not None:
            self._zeroer.close()
        if self.state is not None:
            self.state.close()
        if self._file is not None:
            self._file.close()
            self._file = None


def remote_ca(settings: ServeSettings) -> str:
    """Give the file with the certificates that sign a store's; empty: those of this machine."""
    return "" if settings.remote_ca is None else str(expand(settings.remote_ca).absolute())


def disk_folder(settings: ServeSettings) -> Path:
    """Give the folder of the tier on disk.

    Raises:
        InvalidRequest: None is named.
    """
    assert settings.disk is not None
    if settings.disk.folder is not None:
        return settings.disk.folder
    if settings.state is not None:
        return settings.state / "disk"
    raise InvalidRequest(
        f"--disk {settings.disk} names no folder: write --disk {settings.disk}:FOLDER, or give "
        "--state FOLDER"
    )


def _check_remote(settings: ServeSettings) -> None:
    """Refuse a store whose clients would be reached by whom nobody has asked in.

    Raises:
        InvalidRequest: As said.
    """
    address, interface = settings.remote, settings.remote_interface
    _check_remote_ca(settings)
    if address is None or address.scheme != MOONCAKE:
        if interface is not None:
            raise InvalidRequest("--remote-interface is for --remote mooncake://MASTER:PORT")
        return
    try:
        check_interfaces(interface or "")
    except RemoteError as error:
        raise InvalidRequest(f"--remote {address}: {error}") from None


def _check_remote_ca(settings: ServeSettings) -> None:
    """Refuse certificates that nobody would look at, or that there are not.

    Raises:
        InvalidRequest: As said.
    """
    path = settings.remote_ca
    if path is None:
        return
    if settings.remote is None or not settings.remote.is_tls:
        raise InvalidRequest("--remote-ca is for --remote valkeys://HOST:PORT")
    try:
        tls_to(expand(path))
    except OSError as error:
        raise InvalidRequest(f"--remote-ca {path}: {error.strerror or error}") from None


def remote_secret(settings: ServeSettings) -> bytes:
    """Read what is known to all machines of a store elsewhere; nothing, if there is no secret.

    Raises:
        InvalidRequest: It cannot be read, others may read it, or it is too short; or none is given
            where others could write to the store.
    """
    address, path = settings.remote, settings.remote_secret
    if path is None:
        if address is not None and not address.is_near:
            raise InvalidRequest(
                f"--remote {address} is reached over a network: whoever may write to that store "
                "could put other keys and values there. Give --remote-secret FILE, the same on all "
                "machines"
            )
        return b""
    if address is None:
        raise InvalidRequest("--remote-secret is for --remote, which is not given")
    path = expand(path)
    check_path(path, "--remote-secret")
    check_secret(path, "--remote-secret")
    try:
        with path.open("rb") as file:
            told = file.read(_LONGEST_SECRET + 1)
    except OSError as error:
        raise InvalidRequest(f"--remote-secret {path}: {error.strerror}") from None
    if not _SHORTEST_SECRET <= len(told) <= _LONGEST_SECRET:
        raise InvalidRequest(
            f"--remote-secret {path} has {many(len(told), 'byte')}; give {_SHORTEST_SECRET} to "
            f"{_LONGEST_SECRET:,}, for example with: head -c 32 /dev/urandom"
        )
    return blake2b(told, digest_size=32, person=b"prefixcache/rs").digest()


def _tiers(sizes: Sizes, settings: ServeSettings) -> TierSizes:
    """Divide what is below a pool into slots.

    Raises:
        InvalidRequest: not one fits, or the pool is too small to keep a block free.
    """
    slot = sizes.block_bytes + head_type(sizes.block_size).itemsize
    host, disk = settings.host, settings.disk
    if host is not None and host < slot:
        raise InvalidRequest(
            f"--host {format_size(host)} holds not one block of {format_size(slot)}: raise it"
        )
    if disk is not None and disk.num_bytes < slot + HEADS_AT:
        raise InvalidRequest(f"--disk {disk} holds not one block of {format_size(slot)}: raise it")
    if host is None and disk is None and settings.remote is None:
        return TierSizes()
    tiers = TierSizes.of(
        sizes.num_lent,
        host=0 if host is None else host // slot,
        disk=0 if disk is None else num_slots(disk.num_bytes, slot),
        disk_per_s=math.inf if settings.disk_write is None else settings.disk_write / slot,
        remote=0 if settings.remote is None else objects_in_a_haul(sizes),
    )
    if tiers.below and not tiers.ahead:
        raise InvalidRequest(
            f"a pool of {many(sizes.num_lent, 'block')} is too small for --host and --disk: they "
            "take at least 8. Raise --memory or lower --block-size."
        )
    return tiers


def objects_in_a_haul(sizes: Sizes) -> int:
    """Give how many blocks are fetched from elsewhere together, or stored: two such each way."""
    size = head_bytes(sizes.block_size) + sizes.block_bytes
    return min(_MOST_IN_A_HAUL, num_stage_slots(size) // 4)


def _differs(ours: Layout, sent: Layout) -> str:
    """Say how two layouts differ, both named, and what to do."""
    if ours.format != sent.format:
        why = (
            f"its pages are in the format {ours.format}, yours in {sent.format}: neither could "
            "read what the other wrote"
        )
    elif ours.is_ours:
        why = "written as layers x kv heads x head size : type"
    else:
        why = "written as planes x bytes of a page : format"
    return (
        f"the pool holds {ours}, you sent {sent} ({why}). One service serves one layout: start "
        f"another with --layout {sent}"
    )


def _check_block_size(ours: int, sent: int) -> None:
    """Refuse a worker that can work with no other blocks than of another size.

    Raises:
        LayoutMismatch: As said.
    """
    if sent not in (0, ours):
        raise LayoutMismatch(
            f"the pool has blocks of {ours:,} tokens, you need {sent:,}: serve with --block-size "
            f"{sent}, or set yours to {ours}"
        )


def _check_cuda(settings: ServeSettings) -> None:
    """Refuse what a pool on a GPU cannot be combined with.

    Raises:
        InvalidRequest: As said.
    """
    if settings.layout is None and settings.model is None:
        raise InvalidRequest(
            "--pool cuda needs --model or --layout: a GPU's memory is taken at the start, not when "
            "the first worker attaches"
        )
    if settings.state is not None:
        raise InvalidRequest("--state keeps pools in shared memory; --pool cuda has none there")
    if settings.identities is not None:
        raise InvalidRequest(
            "--identities needs a pool in shared memory: blocks on a GPU are not wiped when they "
            "change tenant. Serve each tenant with a service of its own."
        )
