"""The words of the project: ids, packed tokens, and the frozen answers that the verbs give.

Floor 0: imports nothing of the project but its errors, and only the standard library; numpy when
the first array of token ids comes.

Token ids travel and are stored as packed little-endian uint32 `bytes`, from the client through the
wire to the tree; block ids as int32.  `pack` and `unpack` are the only places that convert.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple, NewType, SupportsIndex, TypeAlias

from prefixcache.errors import InvalidRequest

if sys.byteorder != "little":  # pragma: no cover - no such machine runs the workers
    raise ImportError("prefixcache stores tokens as native little-endian words; this host is not")

BlockId = NewType("BlockId", int)
LeaseId = NewType("LeaseId", int)
TicketId = NewType("TicketId", int)
HaulId = NewType("HaulId", int)
WorkerId = NewType("WorkerId", int)
"""Handed out by whoever runs a cache, and the key of all that a worker holds.  No client chooses or
sends one: what it calls itself is a name, to be shown and nothing else."""

BlockTable: TypeAlias = "array[int]"
"""A sequence's blocks in order: `array('i')`, so that it is also a buffer of int32."""

TOKEN_BYTES: Final = 4
"""Bytes of one packed token id."""
BLOCK_ID_BYTES: Final = 4
"""Bytes of one block id in a table."""

TokensLike: TypeAlias = "bytes | bytearray | memoryview | Sequence[int] | Iterable[int]"
"""What the client takes for token ids: packed bytes, or any integers."""

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
"""The element types a pool can hold, and their size in bytes.  Scales of the eight-bit type are not
in the pool: they are the model's, and part of its name where they may differ."""

OUR_FORMAT: Final = "prefixcache"
"""The name of the order in which our own kernels keep keys and values."""

PAGES: Final = "pages"
"""What a layout begins with, written as a text, that is not given by the shape of a token."""

MAX_FORMAT: Final = 200
"""Characters of the name of a format."""
MAX_PLANES: Final = 2**16
MAX_PAGE_BYTES: Final = 2**32 - 1
"""What the wire can carry."""

DTYPE_ALIASES: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}
"""Other names that people give them."""


def dtype_named(name: str) -> str:
    """Give the whole name of an element type that a pool can hold, by any of its names.

    Raises:
        InvalidRequest: a pool holds no such type.

    >>> dtype_named("bf16"), dtype_named("float32")
    ('bfloat16', 'float32')
    """
    dtype = DTYPE_ALIASES.get(name, name) if isinstance(name, str) else None
    if dtype not in DTYPE_BYTES:
        raise InvalidRequest(f"a pool cannot hold {name!r}; it can hold {', '.join(DTYPE_BYTES)}")
    return str(dtype)


MAX_TOKEN: Final = 2**32 - 1
"""The largest token id."""


def pack(tokens: TokensLike) -> bytes:
    """Pack token ids as little-endian uint32.  Changes nothing.  O(n).

    Bytes (`bytes`, `bytearray`, a `memoryview` of one) are taken as packed already; everything
    else as ids.  Fast for numpy arrays, tensors and `array`: one copy and one comparison.  A list
    is converted by C, one by one; what is looked at in Python is only its zeros and ones.

    Raises:
        InvalidRequest: something is not an id from 0 to `MAX_TOKEN` (the message says which, and
            what it is), or there is more than one row of them.

    >>> pack([1, 2]).hex()
    '0100000002000000'
    """
    if isinstance(tokens, bytes):
        return tokens
    if isinstance(tokens, bytearray):
        return bytes(tokens)
    if isinstance(tokens, list | tuple | range):
        return _pack_each(tokens)
    if isinstance(tokens, str):
        raise InvalidRequest(f"token ids are numbers, not the text {shown(tokens)}: encode it")
    if isinstance(tokens, memoryview) and isinstance(tokens.obj, bytes | bytearray):
        if tokens.format != "B" or tokens.ndim != 1:
            raise InvalidRequest(
                f"a memoryview of bytes as {tokens.format!r}: give packed token ids as bytes"
            )
        return tokens.tobytes()
    dtype = getattr(tokens, "dtype", None)
    if dtype is None:
        try:
            return _pack_array(memoryview(tokens))  # type: ignore[arg-type]
        except TypeError:  # no buffer
            pass
        try:
            return _pack_each(list(tokens))
        except TypeError as error:
            raise InvalidRequest(f"token ids are a sequence of integers: {error}") from None
    try:
        if hasattr(tokens, "as_strided") and "int" in str(dtype):
            tokens = _at_hand(tokens)
        return _pack_array(tokens)
    except TypeError:  # an element type that numpy does not know
        raise InvalidRequest(f"token ids are integers, not {dtype}") from None
    except RuntimeError as error:  # PyTorch's, of which the first line says what is wrong
        why = str(error).strip().partition("\n")[0][:200]
        raise InvalidRequest(f"token ids of a tensor that has none in its memory: {why}") from None


def _at_hand(tensor: Any) -> Any:
    """Give a tensor as an array on the host, or PyTorch's error if its memory is not its shape's.

    NumPy does not look: it gives what lies elsewhere.
    """
    whole = tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).cpu()
    array = whole.numpy()
    if array.size and array.ctypes.data != whole.data_ptr():
        raise RuntimeError("it has no memory")
    return array


def _pack_array(tokens: Any) -> bytes:
    # Loaded when the first array comes, for whoever brings one has it already.
    import numpy as np

    ids = np.asarray(tokens)
    _check_one_row(ids.shape)
    kind, width = ids.dtype.kind, ids.dtype.itemsize
    if kind not in "iu" or not ids.dtype.isnative:
        raise InvalidRequest(f"token ids are integers in native byte order, not {ids.dtype}")
    # Read without a sign, a negative number is larger than every id of its width.
    largest = min(MAX_TOKEN, 2 ** (8 * width - (kind == "i")) - 1)
    unsigned = ids.reshape(-1).view(f"u{width}")
    if (kind == "i" or width > TOKEN_BYTES) and unsigned.size and unsigned.max() > largest:
        index = int(np.argmax(unsigned > largest))
        raise _out_of_range(index, int(ids.reshape(-1)[index]))
    packed: bytes = unsigned.astype(np.uint32, copy=False).tobytes()
    return packed


def _pack_each(ids: Sequence[int]) -> bytes:
    try:
        packed = array("I", ids).tobytes()
    except (OverflowError, TypeError, ValueError):
        for index, token in enumerate(ids):
            _check_integer(index, token)
            if not 0 <= int(token) <= MAX_TOKEN:
                raise _out_of_range(index, int(token)) from None
        raise InvalidRequest("these token ids cannot be packed") from None
    if isinstance(ids, range):
        return packed
    # True and False are integers to Python, but no ids: they are among the zeros and ones.
    for index in _small(packed):
        if type(ids[index]) is not int:
            _check_integer(index, ids[index])
    return packed


_FEW: Final = 64


def _small(packed: bytes) -> Iterable[int]:
    """Give the places of all zeros and ones (of short prompts, all places).  Two passes in C."""
    if len(packed) <= _FEW * TOKEN_BYTES:
        return range(len(packed) // TOKEN_BYTES)
    import numpy as np

    return np.flatnonzero(np.frombuffer(packed, np.uint32) <= 1).tolist()


def _check_integer(index: int, token: object) -> None:
    if (
        not isinstance(token, SupportsIndex)
        or isinstance(token, bool)
        or "int" not in str(getattr(token, "dtype", "int"))
    ):
        raise InvalidRequest(f"token {index} is {shown(token)}: token ids are integers")


def _out_of_range(index: int, token: int) -> InvalidRequest:
    number = shown_number(token)
    return InvalidRequest(f"token {index} is {number}: token ids are from 0 to {MAX_TOKEN:,}")


def shown_number(number: int) -> str:
    """Write an integer that somebody handed in; Python refuses to write the largest ones.

    >>> shown_number(-4096), shown_number(10**5000)
    ('-4,096', 'a number of 16,610 bits')
    """
    bits = number.bit_length()
    return f"{number:,}" if bits <= 256 else f"a number of {bits:,} bits"


def _check_one_row(shape: tuple[int, ...]) -> None:
    if not shape or any(size != 1 for size in shape[:-1]):
        raise InvalidRequest(f"token ids of one prompt are one row; these have the shape {shape}")


def shown(value: object) -> str:
    """Write what somebody handed in, whatever it is, in few characters.

    Of a tensor its type alone: to write one that let go of its memory ends the process.

    >>> shown("8"), shown([10**5000])
    ("'8'", 'list of a very large number')
    """
    if hasattr(value, "untyped_storage"):
        return f"a {type(value).__name__} of {getattr(value, 'dtype', '?')}"
    try:
        text = repr(value)
    except ValueError:  # it has a number in it that Python refuses to write
        text = f"{type(value).__name__} of a very large number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def unpack(tokens: bytes) -> array[int]:
    """Give packed token ids as `array('I')`.  Changes nothing.  One copy.

    Raises:
        InvalidRequest: these are no packed ids, or the last one is torn.

    >>> unpack(pack([7, 9])).tolist()
    [7, 9]
    """
    if not isinstance(tokens, bytes | bytearray | memoryview):
        raise InvalidRequest(f"packed token ids are bytes, not {shown(tokens)}")
    try:
        return array("I", bytes(tokens))
    except ValueError:
        raise InvalidRequest(f"{len(tokens)} bytes are not whole tokens of 4") from None


class Namespace(NamedTuple):
    """What may share: prefixes are never reused across two namespaces.

    A tuple of fields, never a joined string, so that no two namespaces can collide; it is the key
    of much, and hashed and compared in C.
    """

    model: str
    adapter: str = ""
    tenant: str = ""
    salt: str = ""
    approximate: bool = False
    """What was put together from segments, and all that was computed on top of that: it lies beside
    what is exact, and is never found by who asks for that.  Nobody names it, and no listener hears
    of it."""

    @property
    def num_characters(self) -> int:
        """How long its names are together.  O(1)."""
        return len(self.model) + len(self.adapter) + len(self.tenant) + len(self.salt)

    def __str__(self) -> str:
        """Name it for people, without its salt: that is a secret."""
        named = "/".join(part for part in (self.tenant, self.model, self.adapter) if part)
        said = f"{named} (salted)" if self.salt else named
        return f"{said} (approximate)" if self.approximate else said


_NO_DTYPE: Final = ("", "bfloat16")
"""What stands where nobody gave one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the bytes of a block lie in the pool: one page in each of its planes.

    ```
    plane 0   │ page of block 0 │ page of block 1 │ … │      block b of plane p begins at
    plane 1   │ page of block 0 │ page of block 1 │ … │      (p * num_blocks + b) * page_bytes
    ```
    The service moves, wipes and sums pages as wholes, and asks no more.  What lies where inside one
    is named by `format`: who names another may not share the pool.  There are two forms:

    - *our own*, that our kernels read: a plane of keys and one of values in each layer, and in a
      page `[slot][head][dim]`.  It is given by the shape of one token; how many bytes a page has
      follows from the block size.
    - *another's*: `planes`, `page_bytes` and `format`, by name, and nothing is known of a page.

    >>> Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16").block_bytes(16)
    368640
    >>> print(Layout(planes=30, page_bytes=24576, format="vllm-0.32/LBHNC/amx/bfloat16"))
    pages:30x24576:vllm-0.32/LBHNC/amx/bfloat16
    """

    num_layers: int = 0
    """0, as the next three, where the pages are another's."""
    num_kv_heads: int = 0
    head_dim: int = 0
    dtype: str = "bfloat16"
    """A name of `DTYPE_BYTES` or `DTYPE_ALIASES`.  Empty where the pages are another's, or if a
    newer service named one that this version does not know."""
    planes: int = field(default=0, kw_only=True)
    """Pages of one block."""
    page_bytes: int = field(default=0, kw_only=True)
    """Bytes of one of them; 0 in our own form, where they follow from the block size."""
    format: str = field(default="", kw_only=True)
    """How the bytes of a page lie: printable ASCII, compared and never read."""

    def __post_init__(self) -> None:
        if not self.is_ours:
            self._check_pages()
            object.__setattr__(self, "dtype", "")
            return
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.page_bytes or (self.planes and not (self.format and self.num_layers)):
            raise InvalidRequest(
                f"pages ({shown(self.planes)} planes of {shown(self.page_bytes)} bytes) need the "
                f"name of their format, and that is not {OUR_FORMAT}: ours is given as layers, KV "
                "heads, head size and type"
            )
        object.__setattr__(self, "planes", 2 * self.num_layers)
        object.__setattr__(self, "format", OUR_FORMAT)
        if self.dtype != "":
            object.__setattr__(self, "dtype", dtype_named(self.dtype))

    def _check_pages(self) -> None:
        """Refuse what is no description of pages.

        Raises:
            InvalidRequest: As said.
        """
        check_format(self.format)
        if self.num_layers or self.num_kv_heads or self.head_dim or self.dtype not in _NO_DTYPE:
            raise InvalidRequest(
                f"pages of the format {self.format} have no layers, heads, head size or type that "
                "we know of: give planes, page_bytes and format alone"
            )
        for name, number, most in (
            ("planes", _whole("planes", self.planes), MAX_PLANES),
            ("page_bytes", _whole("page_bytes", self.page_bytes), MAX_PAGE_BYTES),
        ):
            if not 1 <= number <= most:
                raise InvalidRequest(
                    f"{name} is {shown(number)}: a whole number from 1 to {most:,} is expected"
                )
            object.__setattr__(self, name, number)

    @property
    def is_ours(self) -> bool:
        """Whether our own kernels know how the bytes of a page lie."""
        return self.format in ("", OUR_FORMAT)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: keys and values of all layers.

        Raises:
            InvalidRequest: The pages are another's: only bytes of whole blocks are known; or a
                newer service named a type that this version does not know.
        """
        if not self.is_ours:
            raise InvalidRequest(
                f"{self} does not tell bytes of one token, only of whole blocks: give a layout as "
                "LAYERSxKV_HEADSxHEAD_DIM:TYPE"
            )
        if self.dtype not in DTYPE_BYTES:
            raise InvalidRequest("this version does not know the element type of the pool")
        width = self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]
        return 2 * self.num_layers * width

    def block_bytes(self, block_size: int) -> int:
        """Give the bytes of a block of so many tokens: all of its pages."""
        if self.is_ours:
            return self.token_bytes * block_size
        return self.planes * self.page_bytes

    def __str__(self) -> str:
        if self.is_ours:
            return f"{self.num_layers}x{self.num_kv_heads}x{self.head_dim}:{self.dtype}"
        return f"{PAGES}:{self.planes}x{self.page_bytes}:{self.format}"


def _whole(name: str, number: object) -> int:
    if isinstance(number, SupportsIndex) and not isinstance(number, bool):
        with contextlib.suppress(TypeError, RuntimeError):  # several numbers, or without memory
            return number.__index__()
    raise InvalidRequest(
        f"{name} of a layout is {shown(number)}: whole numbers are expected; pages are given by "
        "name, as Layout(planes=30, page_bytes=24576, format=...)"
    )


def check_format(text: str) -> None:
    """Refuse a text that names no format: it stands in headers, messages and command lines.

    Raises:
        InvalidRequest: As said, without repeating what cannot be shown.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"the name of a format is a text, not {shown(text)}")
    if not 1 <= len(text) <= MAX_FORMAT:
        raise InvalidRequest(
            f"the name of a format has {len(text):,} characters: 1 to {MAX_FORMAT} are expected"
        )
    for at, char in enumerate(text):
        if not "!" <= char <= "~":
            raise InvalidRequest(
                f"the name of a format has the character U+{ord(char):04X} at {at}: printable "
                "ASCII without spaces is expected"
            )


@dataclass(frozen=True, slots=True)
class PoolHandle:
    """Where a worker finds the pool.  A handle of another `epoch`, or life of it, is refused."""

    kind: str
    """`"shm"` (POSIX shared memory, CPU), `"cuda-ipc"` (one GPU) or `"none"` (accounting only)."""
    name: str
    """shm: the path of the 0600 file to map.  cuda-ipc: the exported handle."""
    num_blocks: int
    block_size: int
    layout: Layout
    epoch: int
    offset: int
    """Bytes before block 0 (the pool's own header)."""
    first_block: int = 0
    """Blocks below this one are memory like any other, and nobody is ever lent one of them."""

    @property
    def planes(self) -> int:
        """Pages of one block."""
        return self.layout.planes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all of its pages."""
        return self.layout.block_bytes(self.block_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one plane."""
        return self.block_bytes // self.planes

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks, without the header."""
        return self.num_blocks * self.block_bytes


class Partial(enum.StrEnum):
    """How much of a block that matches only in part may be reused (by copy-on-write)."""

    OFF = "off"
    """Whole blocks only."""
    BLOCKS = "blocks"
    """Also the first tokens of the best partly matching full block."""
    TAILS = "tails"
    """Also of partly filled last blocks: reuse is token-exact at every block size."""


class Copy(NamedTuple):
    """Copy the first `num_tokens` slots of block `src` to `dst`, in every layer, before writing.

    Or its whole pages, in every plane: the only way where the order inside a page is another's.
    What lies behind those slots is of the same namespace, and is written over.
    """

    src: BlockId
    dst: BlockId
    num_tokens: int


class Again(NamedTuple):
    """Which tokens of segments are computed again, over what was moved: the policy of a request.

    >>> str(Again()), str(Again(first=16)), str(Again(share=0.7))
    ('none', 'first 16', 'deviation 70%')
    """

    first: int = 0
    """So many tokens at the beginning of each one."""
    share: float = 0.0
    """This share of all of them: those whose keys and values are furthest from fresh ones, which
    only who computes can tell."""

    def count(self, num_moved: int) -> int:
        """Give how many of so many moved tokens `share` is.

        >>> Again(share=0.7).count(32)
        22
        """
        return min(num_moved, round(self.share * num_moved))

    def __str__(self) -> str:
        """Name it as certificates do."""
        if self.first:
            return f"first {self.first}"
        return f"deviation {self.share:.0%}" if self.share else "none"


class Segment(NamedTuple):
    """A run of a prompt that is stored elsewhere: copy it, and turn its keys by `delta`.

    ```
    stored   … │ block │ block │ …        `source`: position of the first token there
    prompt   … x │ block │ block │ y …    `start`: its position here; any offset into a block
    ```
    Slot by slot, in every layer: token i of the run is in slot `i % block_size` of
    `blocks[i // block_size]`, and goes to the slot of position `start + i`.
    """

    start: int
    source: int
    blocks: BlockTable
    """Whole ones; they stay as they are until the lease's first commit, or its end."""
    num_again: int = 0
    """So many of its tokens, the first ones, are computed again."""

    @property
    def delta(self) -> int:
        """Positions that keys are turned by; values stay."""
        return self.start - self.source

    @property
    def is_exact(self) -> bool:
        """Whether it is the prompt's own beginning, to the bit: nothing of it is computed again."""
        return self.start == self.source == 0


class Ledger(NamedTuple):
    """The fate of each prompt token.  The fields sum to the prompt's length."""

    hit: int = 0
    """In whole blocks that were read in place."""
    partial: int = 0
    """In the first slots of a block that was copied."""
    joined: int = 0
    """Another lease was computing them; this request waited and reads them in place."""
    cold: int = 0
    """Never seen (or forgotten so long ago that no ghost remembers them)."""
    evicted: int = 0
    """Were stored once; a ghost remembers them."""
    granularity: int = 0
    """Stored, but shorter than what can be shared (always at least one token is computed)."""
    resumed: int = 0
    """Computed by this very request, under an earlier lease with the same request id."""
    approximate: int = 0
    """Taken from segments, or from what was put together of segments before."""
    restored: int = 0
    """Had been evicted, and came back from a tier while this request waited for them."""

    @property
    def total(self) -> int:
        """The prompt's length in tokens."""
        return self.reused + self.cold + self.evicted + self.granularity

    @property
    def reused(self) -> int:
        """Tokens that need not be computed (again): all but cold, evicted and granularity."""
        exact = self.hit + self.partial + self.joined + self.resumed + self.restored
        return exact + self.approximate

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that others had computed, and that are exact.

        What was resumed is left out of both.

        >>> Ledger(hit=30, cold=30, resumed=40).hit_rate
        0.5
        """
        fresh = self.total - self.resumed
        found = self.hit + self.partial + self.joined + self.restored
        return found / fresh if fresh else 0.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """Answer of `attach`."""

    worker: str
    pool: PoolHandle
    ttl_s: float

    def __repr__(self) -> str:
        """Say it in one short line: the name of a pool on a GPU is a long row of bytes."""
        pool = self.pool
        return (
            f"<Attachment {self.worker}: {pool.kind} pool of {pool.num_blocks:,} blocks of "
            f"{pool.block_size} tokens, {pool.layout}, ttl {self.ttl_s:g} s>"
        )


class Grant(NamedTuple):
    """Answer of `acquire` and of each child of `fork`: a lease on blocks.

    ```
    tokens   0 ──────────── num_cached ─────────────── prompt ──── room
    blocks   shared, read-only │ copied │ private, to be computed and committed
    ```
    """

    lease: LeaseId
    block_table: BlockTable
    num_cached: int
    """Tokens from position 0 that hold valid KV once `copies` are made."""
    num_pending: int
    """Of the tokens after `num_cached`, how many another lease was computing at that moment."""
    copies: tuple[Copy, ...]
    ledger: Ledger
    ttl_s: float
    segments: tuple[Segment, ...] = ()
    """To be put in place after `copies`, and before anything is computed; in order."""
    approximate: bool = False
    """Whether what it reads, or computes on top of that, is not what a full prefill gives: others
    find it only if they ask for segments, too."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Answer of `acquire` or `extend` when the caller chose to wait, and there is reason to.

    Nothing was taken.  The outcome comes later, under this ticket, from
    `PrefixCache.take_outcomes`.
    """

    ticket: TicketId
    owner: LeaseId | None
    """Whose lease is computing the prefix now; None if it waits for room."""
    num_pending: int
    """Tokens that need not be computed once the owner has."""


class TableUpdate(NamedTuple):
    """Answer of `extend` and `truncate`: the new table is `old[:keep] + blocks`."""

    keep: int
    blocks: BlockTable
    copies: tuple[Copy, ...] = ()


class Committed(NamedTuple):
    """Answer of `commit`."""

    num_tokens: int
    """Tokens of the lease that now hold valid KV."""
    num_indexed: int
    """Blocks (the tail included) that this call made visible to all."""


class Released(NamedTuple):
    """Answer of `release`."""

    num_freed: int
    """Private blocks that are free again, and what the lease was the last to hold of a namespace
    that was reset; the others stay cached until evicted."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Answer of `lookup`: what `acquire` would find.  Takes no reference."""

    num_tokens: int
    num_hit: int
    num_partial: int
    num_pending: int


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` (exclusive) of a prompt share one fate, named as in `Ledger`."""

    start: int
    end: int
    fate: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Answer of `explain`: why each token of a prompt would or would not be reused."""

    spans: tuple[Span, ...]
    ledger: Ledger
    parted_at: int | None
    """Index of the first token that differs from what is stored; None if nothing parts there."""
    stored_next: bytes
    """Up to 64 packed tokens that the closest stored prompt has from `parted_at` on."""
    num_parted: int
    """How many requests of the last hour have parted from the stored ones at this very place."""
    resumes_at: int | None = None
    """Index of a token from which on the prompt is the same again as what is stored."""
    num_same: int = 0
    """For how many tokens that is."""
    extra_blocks: int | None = None
    """How many blocks more would have kept what was evicted (exact for LRU, else an estimate)."""
    num_pending: int = 0
    """Of the tokens that are not stored, how many another lease is computing now."""
    elsewhere: tuple[tuple[Namespace, int], ...] = ()
    """Namespaces of the same tenant that store more of it, and how many tokens."""
    past: PastRequest | None = None
    """The request that was asked for; then all of this, but `elsewhere`, is as it was then."""
    num_below: int = 0
    """Of the evicted tokens, how many lie in a tier, and come back for who waits."""
    below_s: float = 0.0
    """About how long that takes."""
    below: tuple[TierSpan, ...] = ()
    """Which they are, and whether it is worth it; and behind them those that lay in a store
    elsewhere a moment ago, if that is known."""
    holding: HoldingInfo | None = None
    """What its tenant has below the pool, if there is anything below."""


@dataclass(frozen=True, slots=True)
class TierSpan:
    """Tokens `start` to `end` (exclusive) of a prompt lie in one tier below the pool."""

    tier: str
    start: int
    end: int
    fetch_s: float
    """About how long they take to come back, those before them on the way included."""
    compute_s: float | None
    """About how long they take to compute; None: their namespace has not computed enough yet."""
    is_worth: bool
    """Whether they come back for who waits; if not, computing them is about as quick."""


@dataclass(frozen=True, slots=True)
class PastRequest:
    """A request that was granted lately."""

    request_id: str
    worker: str
    lease: LeaseId
    namespace: Namespace
    """Without its salt."""
    age_s: float
    num_tokens: int
    tokens: bytes
    """Its prompt, packed; empty if the service no longer remembers it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Answer of `check`: what was looked at, and what does not hold."""

    num_runs: int
    """Runs of the trees that were looked at."""
    failure: str = ""
    """What does not hold, with the tree if it is small; empty if nothing was found wrong."""
    left_out: tuple[str, ...] = ()
    """What was not checked, and why: it is too long to be checked while others are served."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Answer of `reset`."""

    num_blocks: int
    """Indexed blocks that can no longer be found."""
    num_leased: int
    """Of these, blocks that leases still hold; they come back when the leases end."""
    num_leases: int = 0
    """Leases of the namespace that live on."""
    num_pins: int = 0
    """Pins that ended with it."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """Answer of `pin`: what of the prefix is stored, and is evicted last from now on."""

    num_tokens: int
    num_blocks: int
    num_new: int
    """Of these, blocks that were not pinned before."""
    num_leased: int
    """Of these, blocks that leases hold at this moment."""
    ttl_s: float
    """How long it lasts: an earlier, longer pin is not shortened."""
    pinned: int
    """Blocks that are pinned now, all pins together."""
    max_pinned: int
    """Their cap."""


@dataclass(frozen=True, slots=True)
class Unpinned:
    """Answer of `unpin`."""

    num_pins: int
    num_blocks: int
    """Blocks that no pin covers any more; they stay cached, in the usual order of eviction."""
    num_leased: int
    """Of these, blocks that leases hold at this moment."""
    pinned: int
    max_pinned: int


@dataclass(frozen=True, slots=True)
class PinInfo:
    """One pin in a `Snapshot`."""

    namespace: Namespace
    num_tokens: int
    num_blocks: int
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class HoldingInfo:
    """What a tenant has below the pool: in an `Explanation`, and in a `Snapshot`."""

    tenant: str
    host: int
    """Its blocks in memory of the host."""
    host_kept: int
    """So many are kept for it there: while it has no more, others' go on to disk, or go, first."""
    disk: int
    """Its blocks on disk, and those on their way there from memory."""
    kept: int
    """So many are kept for it of both together: while it has no more, others' are given up first,
    if others have more than that."""


@dataclass(frozen=True, slots=True)
class QuotaInfo:
    """What a tenant or a namespace may hold, and holds: answer of `quota`, and in a `Snapshot`."""

    tenant: str
    namespace: Namespace | None
    """None: the whole tenant is meant."""
    max_held: int | None
    """Most blocks that leases may hold; None is no limit."""
    guaranteed: int
    """Stored blocks that are evicted only when nobody else's are left."""
    num_held: int
    """Blocks that leases hold now."""
    num_stored: int
    """The same and all cached ones."""


class Ended(NamedTuple):
    """What the end of leases gave back (`expire`, `detach`)."""

    leases: tuple[LeaseId, ...] = ()
    num_freed: int = 0
    num_quarantined: int = 0

    @classmethod
    def total(cls, ends: Sequence[Ended]) -> Ended:
        """Give what all ends together gave back.  O(leases)."""
        return cls(
            tuple([lease for end in ends for lease in end.leases]),
            sum([end.num_freed for end in ends]),
            sum([end.num_quarantined for end in ends]),
        )


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """One lease in a `Snapshot`."""

    lease: LeaseId
    worker: str
    namespace: Namespace
    num_tokens: int
    num_committed: int
    num_blocks: int
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of a cache at one moment.

    Free + private + indexed + quarantined + leaving = num_blocks.

    The one place where they are named: a snapshot has them before its rows, the wire, the metrics
    and the page show them, and the readings of every second are some of them.
    """

    num_blocks: int = 0
    block_size: int = 0
    free: int = 0
    private: int = 0
    indexed: int = 0
    quarantined: int = 0
    evictable: int = 0
    """Of the indexed blocks, those that no lease protects."""
    pinned: int = 0
    """Of the indexed blocks, those that a pin covers."""
    max_pinned: int = 0
    ghosts: int = 0
    """Evicted blocks that are still remembered."""
    nodes: int = 0
    num_leases: int = 0
    """Leases that are out, listed or not."""
    num_flights: int = 0
    """Prompts that leases are computing."""
    num_namespaces: int = 0
    """Those with requests."""
    waiting: int = 0
    requests: int = 0
    flights_saved: int = 0
    """Requests that waited for another lease's prefill and read it in place."""
    ledger: Ledger = field(default_factory=Ledger)
    """Sum over all requests since the start."""
    evicted: int = 0
    """Blocks evicted since the start; never more than were asked for."""
    eviction_age_s: float | None = None
    """Time since the last use of what was evicted last; None before the first eviction."""
    index_bytes: int = 0
    """About what the service needs to know which block holds which tokens."""
    history_bytes: int = 0
    """What it remembers of past requests, for people."""
    max_history_bytes: int = 0
    leaving: int = 0
    """Blocks that are being copied to the tiers below the pool, and are free then."""
    host_blocks: int = 0
    """What fits there in memory of the host; 0: there is none."""
    host_used: int = 0
    """Of these, what holds something."""
    disk_blocks: int = 0
    """What fits there on disk; 0: there is none."""
    disk_used: int = 0
    """Of these, what holds something."""
    disk_found: int = 0
    """Of these, what an earlier life left there, and nobody has asked for since."""
    disk_written: int = 0
    """Blocks that were written to disk since the start."""
    disk_moved: int = 0
    """Of these, those that lay in memory of the host before."""
    disk_restored: int = 0
    """Of those that came back, the blocks that came from there."""
    sunk: int = 0
    """Blocks that were copied there since the start."""
    restored: int = 0
    """Blocks that came back from there since the start."""
    spoilt: int = 0
    """Blocks that were not there as they had been written: they were computed instead."""
    declined_slow: int = 0
    """Requests that did not wait for what lies there, since computing it is about as quick …"""
    declined_busy: int = 0
    """… since as much as may be was on its way already …"""
    declined_room: int = 0
    """… or since there was no room for it."""
    host_advantage: float = 0.0
    """How many times as long as fetching it computing would have taken, of late; 0: unknown."""
    disk_advantage: float = 0.0
    """The same of what lies on disk."""
    has_remote: bool = False
    """Whether there is a store that other machines have, too."""
    remote_stored: int = 0
    """Blocks that were stored there since the start."""
    remote_unstored: int = 0
    """Blocks that should have been: it was too slow, or failed."""
    remote_restored: int = 0
    """Of those that came back, the blocks that came from there."""
    remote_wrong: int = 0
    """Blocks that came from there and were not what they should be: nobody has read them."""
    remote_late: int = 0
    """Questions that it did not answer in time."""
    remote_advantage: float = 0.0
    """How many times as long as fetching from there computing would have taken, of late."""

    def fields(self) -> dict[str, Any]:
        """Give them by their names."""
        return {name: getattr(self, name) for name in COUNTS}


COUNTS: Final = tuple([count.name for count in fields(Counts)])
"""The names of the numbers."""


@dataclass(frozen=True, slots=True)
class Snapshot(Counts):
    """State of a cache: its numbers, and rows.

    The numbers are those of one moment.  Of a service that others use meanwhile, the rows are told
    just after it, one after another: what has ended by then is not among them.
    """

    leases: tuple[LeaseInfo, ...] = ()
    """The oldest, up to a thousand."""
    namespaces: dict[Namespace, Ledger] = field(default_factory=dict)
    """As many as have 4 MiB of names; `num_namespaces` says how many there are.  Of the other rows,
    as many of each kind as have 2 MiB."""
    pins: tuple[PinInfo, ...] = ()
    quotas: tuple[QuotaInfo, ...] = ()
    """Of the tenants and namespaces for which there are any."""
    holdings: tuple[HoldingInfo, ...] = ()
    """Of the tenants that have anything below the pool."""
    shortage: tuple[tuple[int, int], ...] = ()
    """Evicted tokens that were asked for again: (blocks, tokens that so many more blocks would have
    kept, and fewer would not).  Exact for LRU, else an estimate."""
