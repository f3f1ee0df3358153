"""Block-hash traces: Mooncake's form and its kin, and the agentic one that tells only changes.

**Mooncake**: `timestamp` (ms), `input_length`, `hash_ids`, one for each 512 tokens of the prompt;
the last block may be partly filled.  `output_length` may be there.  Ids are whole numbers of any
size, or texts: only which are equal matters.

**Bailian**: the same with `chat_id` and blocks of 16 tokens, `timestamp` in seconds.

**Sessions**: the same with `session_id` and `delay` (ms) where `timestamp` is missing: a request
follows the one before of its session after that delay.

Model, adapter and salt, where a line has them, say what may be shared at all, as in every form.
How many tokens a block has is said by no line.  It is taken from the form, or named by the caller,
and tried against all lines: ceil(input_length / tokens) is the number of ids.

**Agentic** (`delta-hash-v1`): a header, then `t_ms, trace, i, input_length, keep, tail`: the ids
of request i are `ids(i-1)[:keep] + tail`.  Blocks of 64 tokens, full ones only.  Ids are local to
their session (`trace`), so each session is a namespace of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prefixcache.errors import InvalidRequest
from prefixcache.prompts.logged_request import IDLE, PLACE, place_of
from prefixcache.types import TOKEN_BYTES, Namespace, pack, unpack
from prefixcache_bench.experiments.readers.lines import Source, count, given, packed_ids, seconds
from prefixcache_bench.experiments.traces import FILL, Request, Trace

MOONCAKE_UNIT = 512
BAILIAN_UNIT = 16
AGENTIC_UNIT = 64
AGENTIC = "delta-hash-v1"
_READ = {
    *("timestamp", "input_length", "hash_ids", "output_length", "chat_id", "parent_chat_id"),
    *("session_id", "delay", "t_ms", "trace", "i", "keep", "tail", *PLACE, *IDLE),
}
_LIST_COST = 10
"""Memory of an id in a list, in that of a packed one."""
_UNITS = [2**power for power in range(1, 21)]

Ids = bytes | list[int | str]
"""Packed where they fit into 32 bits."""


class _Line(NamedTuple):
    number: int
    space: Namespace
    t: float | None
    session: str | None
    delay: float
    ids: Ids
    num_ids: int
    length: int
    answer: int | None


def read_mooncake(source: Source, unit: int | None = None) -> Trace:
    """Read Mooncake JSONL and its kin.

    Requests stay in the order of the file; where some have no `timestamp` of their own, they are
    served in the order of the times that their delays give.

    Args:
        source: The lines.
        unit: Tokens per hash; seen from the form if not given: 512, or 16 with `chat_id`.

    Raises:
        InvalidRequest: another power of two fits more lines than this one, or as many where not
            all fit and none is named; the message names it.
    """
    asked = check_unit(unit)
    seen_unit = MOONCAKE_UNIT

    def make(fields: dict[str, Any]) -> _Line:
        nonlocal seen_unit
        ids, length = fields["hash_ids"], count(fields, "input_length")
        if not isinstance(ids, list):
            raise ValueError(f"hash_ids is a {type(ids).__name__}, not a list")
        scale = 1e-3
        if "chat_id" in fields or "parent_chat_id" in fields:
            seen_unit, scale = BAILIAN_UNIT, 1.0
        session = given(fields, "session_id")
        t = seconds(fields, "timestamp", scale=scale)
        delay = seconds(fields, "delay", scale=scale)
        if t is None and session is None:
            raise KeyError("timestamp")
        answer = count(fields, "output_length") if given(fields, "output_length") else None
        named = None if session is None else str(session)
        packed = _packed(ids)
        source.spend(len(ids) if isinstance(packed, bytes) else _LIST_COST * len(ids))
        space = _space(source, fields)
        return _Line(source.number, space, t, named, delay or 0.0, packed, len(ids), length, answer)

    lines = list(source.parse(make))
    unit = asked or seen_unit
    fitting = _check_fit(source, lines, unit, asked is None)
    kept = [line for line, fits in zip(lines, fitting, strict=True) if fits]
    return _trace(source, kept, unit, _others(kept, unit) if asked is None else [])


def _space(source: Source, fields: dict[str, Any], session: str = "") -> Namespace:
    """Say within what a line may share, and leave unread what says nothing that is known."""
    try:
        model, adapter, salt = place_of(fields)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    source.leave_unread(fields.keys() - _READ)
    return Namespace(model or source.name, adapter, salt=f"{salt}/{session}" if salt else session)


def check_unit(unit: int | None) -> int | None:
    """Refuse a number of tokens per hash that is not a power of two.

    Raises:
        InvalidRequest: it is none.
    """
    if unit is not None and unit not in _UNITS:
        raise InvalidRequest(
            f"--hash-block {unit} is not a power of two from {_UNITS[0]} to {_UNITS[-1]}"
        )
    return unit


def _check_fit(source: Source, lines: list[_Line], unit: int, assumed: bool) -> list[bool]:
    """Say of each line whether it fits the unit; note those that do not.

    Raises:
        InvalidRequest: another unit fits more of them, or as many where this one is assumed.
    """
    found = _fits(lines, unit)
    fitting = int(found.sum())
    every = {tokens: int(_fits(lines, tokens).sum()) for tokens in _UNITS if tokens != unit}
    best = max(every, key=lambda tokens: every[tokens])
    most = every[best]
    if most > fitting or (assumed and 0 < most == fitting < len(lines)):
        how = "which is assumed" if assumed else "as --hash-block says"
        raise InvalidRequest(
            f"{source.name}: {len(lines) - fitting} of {len(lines)} lines do not fit blocks of "
            f"{unit} tokens, {how}; {most} fit --hash-block {best}"
        )
    for line, right in zip(lines, found.tolist(), strict=True):
        if not right:
            reason = f"{line.num_ids} blocks of {unit} do not fit {line.length} tokens"
            source.note(line.number, reason)
    source.broken.sort(key=lambda one: one.number)
    return [bool(one) for one in found]


def _fits(lines: list[_Line], tokens: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    ids = np.array([line.num_ids for line in lines], np.int64)
    lengths = np.array([line.length for line in lines], np.int64)
    return np.asarray((-(-lengths // tokens) == ids) & (ids > 0))


def _others(lines: list[_Line], unit: int) -> list[str]:
    """Say that lines do not tell what a hash stands for, if they do not."""
    others = [tokens for tokens in _UNITS if tokens != unit and _fits(lines, tokens).all()]
    if not others:
        return []
    shown = f"{others[0]}" if len(others) == 1 else f"{others[0]} to {others[-1]}"
    return [
        f"{unit} tokens a hash are assumed; {shown} fit the lines as well: --hash-block says which"
    ]


def _trace(source: Source, lines: list[_Line], unit: int, doubts: list[str]) -> Trace:
    notes = source.unread() + doubts
    packed = _interned([line.ids for line in lines])
    before: dict[str, float] = {}
    requests, answers = [], []
    derived = late = started = 0
    latest = float("-inf")
    for line, tokens in zip(lines, packed, strict=True):
        t = line.t
        if t is None:
            assert line.session is not None
            started += line.session not in before
            derived += 1
            t = before.get(line.session, 0.0) + line.delay
        if line.session is not None:
            before[line.session] = t
        late += t < latest
        latest = max(latest, t)
        requests.append(Request(t, line.space, tokens, len(tokens) // TOKEN_BYTES, line.length))
        answers.append(line.answer)
    order = list(range(len(requests)))
    if derived:
        order.sort(key=lambda index: requests[index].t)
        notes.append(
            f"{derived} of {len(requests)} requests have no timestamp: a session goes on after "
            "its delay"
            + (f", and {started} begin at 0 s" if started else "")
            + "; they are served in the order of these times"
        )
    elif late:
        notes.append(
            f"{late} of {len(requests)} lines are older than one before them; they are served in "
            "the order of the file"
        )
    lengths = [answers[index] for index in order]
    told = [one for one in lengths if one is not None]
    return Trace(
        source.name,
        [requests[index] for index in order],
        unit,
        source.broken,
        counts_last=True,
        num_lines=source.num_lines,
        notes=notes,
        answers=[one or 0 for one in lengths] if told else None,
    )


def _packed(ids: list[Any]) -> Ids:
    try:
        if not set(map(type, ids)) <= {int}:  # true would be 1
            raise TypeError
        packed = pack(ids)
    except (InvalidRequest, TypeError):
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, int | str) or one == "":
                raise ValueError(f"a hash id is a whole number or a text, not {one!r}") from None
        return ids
    # The number that fills up groups is no id: what holds it is told apart in the other way.
    return ids if FILL in packed else packed


def _interned(ids: list[Ids]) -> list[bytes]:
    """Give packed ids.  Where one does not fit into 32 bits, all get numbers of their own.

    Equal ids stay equal, and no others become so.
    """
    if all(isinstance(one, bytes) for one in ids):
        return [one for one in ids if isinstance(one, bytes)]
    numbers: dict[int | str, int] = {}
    found = []
    for one in ids:
        plain = unpack(one).tolist() if isinstance(one, bytes) else one
        found.append(pack([numbers.setdefault(value, len(numbers)) for value in plain]))
    return found


def read_agentic(source: Source, unit: int | None = None) -> Trace:
    """Read an agentic trace.

    Args:
        source: The lines.
        unit: Tokens per hash, where no header says it: 64 if not given.

    Raises:
        InvalidRequest: its header names a block size that is not a power of two, or not `unit`.
    """
    asked = check_unit(unit)
    named: int | None = None
    has_header = False
    before: dict[str, tuple[bytes, int]] = {}
    """Of each session, the ids and the number of the request that was read last."""

    def make(fields: dict[str, Any]) -> Request | None:
        nonlocal named, has_header
        if "format" in fields:
            if fields["format"] != AGENTIC:
                said = str(fields["format"])[:40]
                raise InvalidRequest(f"{source.name} has the format {said!a}; {AGENTIC} is read")
            earlier_named = named
            if given(fields, "block_size") is not None:
                named = count(fields, "block_size")
            if has_header and named != earlier_named:
                raise InvalidRequest(
                    f"{source.name} has two headers, of blocks of {earlier_named or AGENTIC_UNIT} "
                    f"and of {named} tokens: give the traces one by one"
                )
            before.clear()
            has_header = True
            return None
        session = given(fields, "trace")
        if session is None:
            raise KeyError("trace")
        earlier, turn = before.pop(str(session), (b"", -1))
        here = None if given(fields, "i") is None else count(fields, "i")
        length, keep = count(fields, "input_length"), count(fields, "keep")
        if keep and here is not None and here != turn + 1:
            raise ValueError(
                f"it keeps blocks of request {here - 1} of its session, which is missing"
            )
        t = seconds(fields, "t_ms", scale=1e-3)
        if t is None:
            raise KeyError("t_ms")
        if keep * TOKEN_BYTES > len(earlier):
            raise ValueError(f"keeps {keep} of {len(earlier) // TOKEN_BYTES} blocks")
        if not isinstance(fields["tail"], list):
            raise ValueError("tail is not a list of ids")
        ids = earlier[: keep * TOKEN_BYTES] + packed_ids(fields["tail"])
        tokens = named or asked or AGENTIC_UNIT
        if not length or len(ids) // TOKEN_BYTES * tokens > length:
            raise ValueError(f"{len(ids) // TOKEN_BYTES} blocks of {tokens} exceed {length} tokens")
        space = _space(source, fields, str(session))
        before[str(session)] = ids, turn + 1 if here is None else here
        return Request(t, space, ids, len(ids) // TOKEN_BYTES, length)

    found = [request for request in source.parse(make) if request is not None]
    if named is not None and named not in _UNITS:
        raise InvalidRequest(f"the header's block size {named} is not a power of two")
    if named is not None and asked not in {None, named}:
        raise InvalidRequest(f"the header of {source.name} says blocks of {named}, not {asked}")
    return Trace(
        source.name,
        found,
        named or asked or AGENTIC_UNIT,
        source.broken,
        num_lines=source.num_lines,
        notes=source.unread(),
    )
