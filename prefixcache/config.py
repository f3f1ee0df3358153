"""What can be set: every name is a flag of `prefixcache serve` and a variable `PREFIXCACHE_…`.

One dial, `memory`; everything else has a default that is right for one machine.
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


class ServeSettings(BaseSettings):
    """Settings of the service."""

    model_config = SettingsConfigDict(
        env_prefix="PREFIXCACHE_",
        arbitrary_types_allowed=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    memory: Size = 2**31
    """Bytes of the pool."""
    block_size: Annotated[int, Field(ge=1, le=1024), AfterValidator(_power_of_two)] = 16
    """Tokens of a block."""
    first_block: Annotated[int, Field(ge=0, le=1024)] = 0
    """Blocks at the beginning of the pool that nobody is ever lent."""
    policy: str = "lru"
    """Order of eviction."""
    partial: Partial = Partial.TAILS
    """How much of a partly matching block is reused."""
    ghosts: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    """Evicted blocks that are remembered, to explain misses; by default as many as blocks."""
    history: Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=2**62)] = 2**20
    """Bytes in which past requests are remembered, to explain them; 0 remembers none."""
    layout: Annotated[Layout, BeforeValidator(parse_layout)] | None = None
    """How the bytes of a block lie; without it and `model`, the first worker decides."""
    model: Path | None = None
    """Folder whose config.json tells the layout."""
    dtype: Annotated[str, AfterValidator(_dtype)] | None = None
    """Element type for `model`, where it is not the one that config.json names."""
    pool: Literal["shm", "cuda", "none"] = "shm"
    """Shared memory, a GPU's memory, or accounts only: `none` has no memory behind the blocks."""
    device: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """The GPU of a `cuda` pool."""
    listen: Annotated[list[str], NoDecode, BeforeValidator(_split)] = []
    """Addresses; by default the default socket."""
    identities: Path | None = None
    """File that says who may use which namespaces."""
    tls_cert: Path | None = None
    """Certificate chain for TCP, PEM; read again when it changes."""
    tls_key: Annotated[Path | None, AfterValidator(_needs_certificate)] = None
    """Its key, PEM."""
    tls_ca: Annotated[Path | None, AfterValidator(_needs_certificate)] = None
    """Who may have signed clients' certificates, PEM; then each client must show one."""
    ttl: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that leases live without a sign of life."""
    quarantine: Seconds = 300.0
    """Seconds after which the blocks of a lost worker that cannot be watched come back."""
    grace: Seconds = 30.0
    """Seconds that a draining service gives to the leases that are out."""
    max_message: Annotated[Size, Field(le=_MOST)] = 16 * 2**20
    """Bytes of one message."""
    max_ops: Annotated[int, Field(ge=1, le=_MOST)] = 4096
    """Ops of one message of a session."""
    max_forks: Annotated[int, Field(ge=1, le=_MOST)] = 1024
    """Children of one fork."""
    max_wait: Seconds = 600.0
    """Seconds that one acquire or extend may wait."""
    max_waiting: Annotated[int, Field(ge=1, le=_MOST)] = 1024
    """Requests of one worker that may wait at the same time."""
    max_line: Annotated[int, Field(ge=0, le=_MOST)] = 4096
    """Requests of all workers that may wait for room at the same time."""
    pin_cap: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the pool that may be pinned."""
    max_pin: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 7 * 86400.0
    """Seconds that one pin may last."""
    max_workers: Annotated[int, Field(ge=1, le=_MOST)] = 1024
    """Workers at the same time."""
    max_leases: Annotated[int, Field(ge=1, le=_MOST)] = 65_536
    """Leases at the same time."""
    max_namespaces: Annotated[int, Field(ge=1, le=_MOST)] = 16_384
    """Namespaces at the same time; where there are more, one that is only cached makes way."""
    max_calls: Annotated[int, Field(ge=1, le=_MOST)] = 8192
    """Calls and sessions at the same time; more are refused at once."""
    record: Path | None = None
    """New file for the live requests, as a trace; gzip if it ends in .gz."""
    anonymise: Annotated[bool, AfterValidator(_needs_record)] = False
    """Whether the recording has other token ids and names, with the same prefixes in common."""
    http: str | None = None
    """Loopback address for /metrics and the page; off unless given."""
    state: Path | None = None
    """Folder in which pool and index outlive the service; None keeps nothing."""
    http_tokens: bool = False
    """Whether the page shows token ids: any user of this machine can open it."""
    watch_tokens: bool = False
    """Whether who watches events may ask for token ids."""
    events: str | None = None
    """ZeroMQ endpoint at which events are published, as tcp://127.0.0.1:PORT or ipc://PATH."""
    events_replay: str | None = None
    """ZeroMQ endpoint that gives published events again."""
    max_watchers: Annotated[int, Field(ge=1, le=_MOST)] = 64
    """Watchers of events at the same time."""
    shadow: Annotated[list[ShadowSpec], NoDecode, BeforeValidator(_parse_shadows)] = []
    """Other configurations that are tried on the live requests, in a process of their own."""
    max_shadow_lag: Size = 64 * 2**20
    """Bytes of requests that may wait for the shadow caches; with more, requests are left out."""
    trace: Annotated[str, AfterValidator(_endpoint)] | None = None
    """Where spans are sent by OpenTelemetry's protocol, as http://127.0.0.1:4317."""
    reflection: bool = True
    """Whether gRPC clients may ask for the service's description."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged, to stderr."""


def load(overrides: Mapping[str, Any]) -> ServeSettings:
    """Read the environment; `overrides` that are not None win (the flags).

    Raises:
        InvalidRequest: a value cannot be used; the message names the flag and says why.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        complaints = []
        for entry in error.errors():
            name = str(entry["loc"][0]) if entry["loc"] else "settings"
            text = entry["msg"].removeprefix("Value error, ")
            complaints.append(f"--{name.lower().replace('_', '-')}: {text}")
        raise InvalidRequest("; ".join(complaints)) from None
