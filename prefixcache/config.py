"""What can be set: every name is a flag of `prefixcache serve` and a variable `PREFIXCACHE_…`.

One dial, `memory`; everything else has a default that is right for one machine.  A setting is said
once, here: `serve` makes its flags and its help of these fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from prefixcache.errors import InvalidRequest
from prefixcache.remote_address import RemoteAddress, parse_remote
from prefixcache.types import PAGES, Layout, Partial, dtype_named

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}I": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)
_LAYOUT = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})(?::(\w+))?")
_PAGES = re.compile(rf"{PAGES}:([0-9]{{1,10}})x([0-9]{{1,10}}):(.+)", re.DOTALL)


def parse_size(text: str | int) -> int:
    """Read a number of bytes.

    Raises:
        ValueError: it is not a size.

    >>> parse_size("2GiB"), parse_size("1.5 MB"), parse_size(4096)
    (2147483648, 1500000, 4096)
    """
    if isinstance(text, int):
        return text
    found = _SIZE.fullmatch(text)
    if found is None or found[2].upper() == "I":
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"cannot read the size {shown!a}; write for example 2GiB, 512MiB or 1.5GB")
    size = float(found[1]) * _UNITS[found[2].upper()]
    if size >= 2**63:
        raise ValueError(f"the size {text[:40]} is beyond what memory can be addressed")
    return int(size)


def _size_or_none(text: str | int | None) -> int | None:
    return None if text is None else parse_size(text)


def _rate_or_none(text: str | int | None) -> int | None:
    return (
        None
        if text is None
        else parse_size(text.removesuffix("/s") if isinstance(text, str) else text)
    )


def format_size(num_bytes: int) -> str:
    """Write a number of bytes for people, in powers of two.

    >>> format_size(2**31), format_size(368640)
    ('2 GiB', '360 KiB')
    """
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def parse_layout(text: str | Layout) -> Layout:
    """Read a layout as `str(layout)` writes it, in either form.

    ```
    LAYERSxKV_HEADSxHEAD_DIM[:TYPE]     30x3x64:bfloat16       our own order of bytes
    pages:PLANESxPAGE_BYTES:FORMAT      pages:30x24576:vllm-0.32/LBHNC/amx/bfloat16
    ```

    Raises:
        ValueError: it is not a layout.

    >>> parse_layout("30x3x64:float32").token_bytes
    46080
    >>> parse_layout("pages:30x24576:vllm-0.32/LBHNC/amx/bfloat16").planes
    30
    """
    if isinstance(text, Layout):
        return text
    if found := _PAGES.fullmatch(text):
        try:
            return Layout(planes=int(found[1]), page_bytes=int(found[2]), format=found[3])
        except InvalidRequest as error:  # pydantic asks for a ValueError
            raise ValueError(str(error)) from None
    found = _LAYOUT.fullmatch(text)
    if found is None or 0 in (int(found[1]), int(found[2]), int(found[3])):
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise ValueError(
            f"cannot read the layout {shown!a}; write LAYERSxKV_HEADSxHEAD_DIM:TYPE, for example "
            "30x3x64:bfloat16, or pages:PLANESxPAGE_BYTES:FORMAT, for example "
            "pages:30x24576:vllm-0.32/LBHNC/amx/bfloat16"
        )
    return Layout(int(found[1]), int(found[2]), int(found[3]), _dtype(found[4] or "bfloat16"))


def _dtype(name: str) -> str:
    try:
        return dtype_named(name)
    except InvalidRequest as error:  # pydantic asks for a ValueError
        raise ValueError(str(error)) from None


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


def _split(text: str | list[str]) -> list[str]:
    return [part for part in text.split(",") if part] if isinstance(text, str) else text


def _needs_record(value: bool, info: ValidationInfo) -> bool:
    if value and info.data.get("record") is None:
        raise ValueError("there is nothing to anonymise without --record FILE")
    return value


def _needs_certificate(value: Path | None, info: ValidationInfo) -> Path | None:
    if value is not None and info.data.get("tls_cert") is None:
        raise ValueError("is of no use without --tls-cert FILE")
    return value


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"cannot read {url!r}; write for example http://127.0.0.1:4317")
    return url


_MOST = 2**31 - 1
"""Of what the wire and the system count in 32 bits."""

_LONGEST_S = 1e9

Seconds = Annotated[float, Field(ge=0, le=_LONGEST_S)]

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=2**62)]


class Option(NamedTuple):
    """How help shows a setting."""

    section: str
    metavar: str | None
    """What stands for the value; None for a switch."""
    text: str
    unset: str | None = None
    """What holds without a value, where the default is None and that is not plain from the text."""


class DiskSpec(NamedTuple):
    """What a tier on disk may take, and where."""

    num_bytes: int
    folder: Path | None = None
    """None: in that of the state."""

    def part(self, share: float, name: str) -> DiskSpec:
        """Give the tier of a part of the service, in a folder of its own.

        >>> DiskSpec(1000, Path("/d")).part(0.5, "acme")
        DiskSpec(num_bytes=500, folder=PosixPath('/d/acme'))
        """
        folder = None if self.folder is None else self.folder / name
        return DiskSpec(int(self.num_bytes * share), folder)

    def __str__(self) -> str:
        size = format_size(self.num_bytes).replace(" ", "")
        return size if self.folder is None else f"{size}:{self.folder}"


def parse_disk(text: str | int | DiskSpec | None) -> DiskSpec | None:
    """Read `SIZE` or `SIZE:FOLDER`.

    Raises:
        ValueError: it is neither.

    >>> parse_disk("20GiB:/var/cache/kv")
    DiskSpec(num_bytes=21474836480, folder=PosixPath('/var/cache/kv'))
    """
    if text is None or isinstance(text, DiskSpec):
        return text
    size, colon, folder = str(text).partition(":")
    if colon and not folder.strip():
        raise ValueError(f"{text!r} names no folder behind the colon")
    num_bytes = parse_size(size.strip())
    if not 0 < num_bytes <= 2**62:
        raise ValueError(f"a disk of {num_bytes} bytes")
    return DiskSpec(num_bytes, Path(folder.strip()) if colon else None)


MAX_SHADOWS = 4


class ShadowSpec(NamedTuple):
    """What a shadow cache has that the service has not; None: the same."""

    name: str
    policy: str | None = None
    block_size: int | None = None
    memory: int | None = None
    partial: Partial | None = None


def parse_shadow(text: str | ShadowSpec) -> ShadowSpec:
    """Read `policy=slru,block_size=32,memory=4GiB,partial=off`, or some of it.

    Raises:
        ValueError: it is no such list.

    >>> parse_shadow("block_size=32, policy=slru")
    ShadowSpec(name='policy=slru,block_size=32', policy='slru', block_size=32, memory=None, partial=None)
    """  # noqa: E501 - one line of output
    if isinstance(text, ShadowSpec):
        return text
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in ShadowSpec._fields[1:] or not value or key in found:
            raise ValueError(
                f"cannot read {part.strip()!r}; write for example policy=slru,block_size=32, with "
                "any of policy, block_size, memory, partial, each once"
            )
        found[key] = value
    try:
        if "block_size" in found:
            size = found["block_size"] = int(found["block_size"])
            if not 1 <= size <= 1024:
                raise ValueError(f"{size} is not from 1 to 1024")
            _power_of_two(size)
        if "memory" in found:
            found["memory"] = parse_size(found["memory"])
        if "partial" in found:
            found["partial"] = Partial(found["partial"])
    except ValueError as error:
        raise ValueError(f"cannot read {text!r}: {error}") from None
    shown = {key: found[key] for key in ShadowSpec._fields[1:] if key in found}
    if "memory" in shown:
        shown["memory"] = format_size(shown["memory"]).replace(" ", "")
    return ShadowSpec(",".join(f"{key}={value}" for key, value in shown.items()), **found)


def _parse_shadows(texts: str | list[str]) -> list[ShadowSpec]:
    given = texts.split(";") if isinstance(texts, str) else texts
    if len(given) > MAX_SHADOWS:
        raise ValueError(f"{len(given)} shadow caches; at most {MAX_SHADOWS}")
    return [parse_shadow(text) for text in given]


_POOL, _SERVICE, _ACCESS, _LIMITS = "Pool", "Service", "Access", "Limits"
_Count = Annotated[int, Field(ge=1, le=_MOST)]


class ServeSettings(BaseSettings):
    """Settings of the service, in the order in which help shows them."""

    model_config = SettingsConfigDict(
        env_prefix="PREFIXCACHE_",
        arbitrary_types_allowed=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    memory: Annotated[Size, Option(_POOL, "SIZE", "Memory of the pool.")] = 2**31
    host: Annotated[
        Annotated[int, Field(gt=0, le=2**62)] | None,
        BeforeValidator(_size_or_none),
        Option(
            _POOL,
            "SIZE",
            "Memory below the pool, for what it evicts: that comes back for who waits, in place of "
            "being computed again. See docs/tiers.md.",
            unset="none",
        ),
    ] = None
    disk: Annotated[
        DiskSpec | None,
        BeforeValidator(parse_disk),
        Option(
            _POOL,
            "SIZE[:FOLDER]",
            "What a folder on disk may take of the same, below --host if that is given, too. "
            "The next start finds it again. Without a folder: in that of --state.",
            unset="none",
        ),
    ] = None
    disk_write: Annotated[
        Annotated[int, Field(gt=0, le=2**62)] | None,
        BeforeValidator(_rate_or_none),
        Option(
            _POOL,
            "SIZE/s",
            "How much is written there in a second at most; what is more is given up.",
            unset="no limit",
        ),
    ] = None
    remote: Annotated[
        RemoteAddress | None,
        BeforeValidator(parse_remote),
        Option(
            _POOL,
            "ADDRESS",
            "A store that other machines have, too: what is computed goes there, and what is not "
            "here is fetched from there. valkey+unix:///PATH, valkey://HOST:PORT or, with TLS, "
            "valkeys://HOST:PORT, where a user and a password may stand before the host; or "
            "mooncake://MASTER:PORT. See docs/tiers.md.",
            unset="none",
        ),
    ] = None
    remote_ca: Annotated[
        Path | None,
        Option(
            _POOL,
            "FILE",
            "Certificates (PEM) that sign the one of a store behind valkeys://.",
            unset="those that this machine trusts",
        ),
    ] = None
    remote_interface: Annotated[
        str | None,
        Option(
            _POOL,
            "NAME",
            "Of the network, the interface that is safe: a client of Mooncake listens on all there "
            "are, so none but this one and the loopback may be up.",
            unset="none",
        ),
    ] = None
    remote_secret: Annotated[
        Path | None,
        Option(
            _POOL,
            "FILE",
            "What all machines of that store know, and nobody else: names are made and what is "
            "stored is signed with it. At least 16 bytes.",
            unset="none",
        ),
    ] = None
    block_size: Annotated[
        int,
        Field(ge=1, le=1024),
        AfterValidator(_power_of_two),
        Option(_POOL, "TOKENS", "Tokens of a block, a power of two."),
    ] = 16
    layout: Annotated[
        Annotated[Layout, BeforeValidator(parse_layout)] | None,
        Option(
            _POOL,
            "LAYOUT",
            "Layers x KV heads x head size and the type, e.g. 30x3x64:bfloat16; or, where the "
            "order of the bytes is not ours, pages:PLANESxPAGE_BYTES:FORMAT.",
            unset="that of the first worker",
        ),
    ] = None
    model: Annotated[
        Path | None,
        Option(
            _POOL,
            "MODEL",
            "Folder whose config.json tells the layout, or the name of a model in a cache of this "
            "machine.",
        ),
    ] = None
    dtype: Annotated[
        Annotated[str, AfterValidator(_dtype)] | None,
        Option(_POOL, "TYPE", "Element type, if not the one in config.json."),
    ] = None
    first_block: Annotated[
        int,
        Field(ge=0, le=1024),
        Option(
            _POOL,
            "BLOCK",
            "The first block that is ever lent: 1 for engines in which block 0 stands for none.",
        ),
    ] = 0
    policy: Annotated[str, Option(_POOL, "NAME", "Order of eviction.")] = "lru"
    partial: Annotated[
        Partial, Option(_POOL, "MODE", "Reuse inside a block: off, blocks or tails.")
    ] = Partial.TAILS
    ghosts: Annotated[
        Annotated[int, Field(ge=0, le=_MOST)] | None,
        Option(
            _POOL,
            "BLOCKS",
            "Evicted blocks to remember, to explain misses.",
            unset="as many as blocks",
        ),
    ] = None
    history: Annotated[
        int,
        BeforeValidator(parse_size),
        Field(ge=0, le=2**62),
        Option(
            _POOL,
            "SIZE",
            "Memory in which past requests are remembered, for explain and the stats; 0 remembers "
            "none.",
        ),
    ] = 2**20
    pool: Annotated[
        Literal["shm", "cuda", "none"],
        Option(
            _POOL,
            "KIND",
            "shm, cuda (one GPU; needs --model or --layout), or none to keep accounts without "
            "memory.",
        ),
    ] = "shm"
    device: Annotated[int, Field(ge=0, le=_MOST), Option(_POOL, "N", "The GPU of a cuda pool.")] = 0
    segments: Annotated[
        Path | None,
        Option(
            _POOL,
            "CERTIFICATES",
            "Let requests ask for the same tokens at other places, approximately: of models whose "
            "certificate, in this file or folder, allows it (prefixcache verify-segments). Keeps "
            "an index of all tokens.",
            unset="off",
        ),
    ] = None
    segments_threshold: Annotated[
        float,
        Field(ge=0, le=100),
        Option(
            _POOL,
            "NATS",
            "With it: largest mean divergence, with any kind of text, that a policy may have.",
        ),
    ] = 0.01
    pin_cap: Annotated[
        float,
        Field(ge=0, le=1),
        Option(_POOL, "SHARE", "Share of the pool that may be pinned, 0 to 1."),
    ] = 0.25

    listen: Annotated[
        list[str],
        NoDecode,
        BeforeValidator(_split),
        Option(_SERVICE, "ADDRESS", "unix:PATH or 127.0.0.1:PORT; may be repeated."),
    ] = []
    ttl: Annotated[
        float,
        Field(gt=0, le=3600),
        Option(_SERVICE, "SECONDS", "Life of a lease without a heartbeat."),
    ] = 30.0
    quarantine: Annotated[
        Seconds,
        Option(
            _SERVICE,
            "SECONDS",
            "After this long the blocks of a lost worker come back, if its process cannot be "
            "watched (another host or container).",
        ),
    ] = 300.0
    grace: Annotated[
        Seconds,
        Option(
            _SERVICE,
            "SECONDS",
            "Time at the end for leases to come back, and the cache to go to the disk below.",
        ),
    ] = 30.0
    state: Annotated[
        Path | None,
        Option(
            _SERVICE,
            "DIR",
            "Keep pool and index in this folder, so that the next start finds what was stored. In "
            "/dev/shm they outlive the service, on a disk also a reboot.",
        ),
    ] = None
    record: Annotated[
        Path | None,
        Option(
            _SERVICE,
            "FILE",
            "Write the live requests to this new file, as a trace for replay and sweep; gzip if "
            "it ends in .gz.",
        ),
    ] = None
    anonymise: Annotated[
        bool,
        AfterValidator(_needs_record),
        Option(
            _SERVICE,
            None,
            "Record other token ids and names in place of the real ones; every common prefix "
            "keeps its length.",
        ),
    ] = False
    http: Annotated[
        str | None,
        Option(
            _SERVICE,
            "ADDRESS",
            "Serve /metrics and the live page at 127.0.0.1:PORT; readable by every user of this "
            "machine.",
            unset="off",
        ),
    ] = None
    http_tokens: Annotated[
        bool,
        Option(_SERVICE, None, "Let the page show token ids to every user of this machine."),
    ] = False
    watch_tokens: Annotated[
        bool, Option(_SERVICE, None, "Let who watches events ask for token ids.")
    ] = False
    events: Annotated[
        str | None,
        Option(
            _SERVICE,
            "ENDPOINT",
            "Publish events over ZeroMQ for prefix-aware routers: tcp://127.0.0.1:PORT or "
            "ipc://PATH.",
            unset="off",
        ),
    ] = None
    events_replay: Annotated[
        str | None,
        Option(_SERVICE, "ENDPOINT", "Give published events again at this ZeroMQ endpoint."),
    ] = None
    shadow: Annotated[
        list[ShadowSpec],
        NoDecode,
        BeforeValidator(_parse_shadows),
        Option(
            _SERVICE,
            "SPEC",
            "Also try another configuration on the live requests, in a process of its own, e.g. "
            f"policy=slru,block_size=32 or memory=4GiB; up to {MAX_SHADOWS}. See prefixcache "
            "what-if.",
        ),
    ] = []
    trace: Annotated[
        Annotated[str, AfterValidator(_endpoint)] | None,
        Option(
            _SERVICE,
            "URL",
            "Send OpenTelemetry spans to this collector (OTLP over gRPC), e.g. "
            "http://127.0.0.1:4317.",
            unset="off",
        ),
    ] = None
    reflection: Annotated[bool, Option(_SERVICE, None, "Let gRPC clients ask what there is.")] = (
        True
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Option(_SERVICE, "LEVEL", "debug, info, warning or error."),
    ] = "info"

    identities: Annotated[
        Path | None,
        Option(_ACCESS, "FILE", "Who may use which namespaces (TOML); see SECURITY.md."),
    ] = None
    tls_cert: Annotated[
        Path | None,
        Option(_ACCESS, "PEM", "Certificate chain for TCP; read again when it changes."),
    ] = None
    tls_key: Annotated[
        Path | None, AfterValidator(_needs_certificate), Option(_ACCESS, "PEM", "Its key.")
    ] = None
    tls_ca: Annotated[
        Path | None,
        AfterValidator(_needs_certificate),
        Option(_ACCESS, "PEM", "Demand client certificates that this authority signed."),
    ] = None

    max_message: Annotated[
        Size, Field(le=_MOST), Option(_LIMITS, "SIZE", "Bytes of one message.")
    ] = 16 * 2**20
    max_ops: Annotated[_Count, Option(_LIMITS, "N", "Ops of one message of a session.")] = 4096
    max_forks: Annotated[_Count, Option(_LIMITS, "N", "Children of one fork.")] = 1024
    max_wait: Annotated[
        Seconds, Option(_LIMITS, "SECONDS", "Longest wait of one acquire or extend.")
    ] = 600.0
    max_waiting: Annotated[_Count, Option(_LIMITS, "N", "Waiting requests of one worker.")] = 1024
    max_line: Annotated[
        int,
        Field(ge=0, le=_MOST),
        Option(_LIMITS, "N", "Requests that wait for room, in all."),
    ] = 4096
    max_pin: Annotated[
        float,
        Field(gt=0, le=_LONGEST_S),
        Option(_LIMITS, "SECONDS", "Longest time of one pin."),
    ] = 7 * 86400.0
    max_workers: Annotated[_Count, Option(_LIMITS, "N", "Workers at the same time.")] = 1024
    max_shadow_lag: Annotated[
        Size,
        Option(
            _LIMITS,
            "SIZE",
            "Bytes that may wait for the shadow caches; with more, requests are left out.",
        ),
    ] = 64 * 2**20
    max_watchers: Annotated[
        _Count, Option(_LIMITS, "N", "Watchers of events at the same time.")
    ] = 64
    max_leases: Annotated[_Count, Option(_LIMITS, "N", "Leases at the same time.")] = 65_536
    max_namespaces: Annotated[
        _Count,
        Option(
            _LIMITS,
            "N",
            "Namespaces at the same time; where there are more, one that is only cached makes way.",
        ),
    ] = 16_384
    max_calls: Annotated[
        _Count,
        Option(_LIMITS, "N", "Calls and sessions at the same time; more are refused at once."),
    ] = 8192


def load(overrides: Mapping[str, Any]) -> ServeSettings:
    """Read the environment; `overrides` that are not None win (the flags).

    Raises:
        InvalidRequest: a value cannot be used; the message names the flag and says why.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if value == "":  # of a variable that is not set, say: as a path it would be this folder
            flag = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"{flag} is empty: give a value, or leave it out")
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        complaints = []
        for entry in error.errors():
            name = str(entry["loc"][0]) if entry["loc"] else "settings"
            text = entry["msg"].removeprefix("Value error, ")
            complaints.append(f"--{name.lower().replace('_', '-')}: {text}")
        raise InvalidRequest("; ".join(complaints)) from None
