"""Rows of a sweep: one per configuration; as CSV while it runs, as JSON at the end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache_bench.experiments.below import Traffic
from prefixcache_bench.experiments.outcome import FATES, Outcome, percentages

Row = dict[str, Any]
_TEXTS = {"capacity", "policy", "partial", "below"}
_FLOATS = {"hit_rate", "hit_rate_partial", "reused_rate", "mean_request_hit", "cpu_s"}
_FLOATS |= {"block_hit_rate_ceil"} | {f"{fate}_percent" for fate in FATES}
_COUNTS = ("requests", "prompt_tokens", "hit_tokens", "partial_tokens")
_RATES = ("hit_rate", "hit_rate_partial", "reused_rate", "mean_request_hit", "block_hit_rate_ceil")
COLUMNS = (
    *("block_size", "capacity", "capacity_tokens", "capacity_blocks", "policy", "partial"),
    *_COUNTS,
    *_RATES,
    *("evictions", "peak_blocks"),
    *(f"{fate}_tokens_ledger" for fate in FATES),
    *(f"{fate}_percent" for fate in FATES),
    *("same_as_infinite", "cpu_s"),
)


TIER_COLUMNS = (
    *("below", "restored_tokens", "restored_percent", "restored_blocks", "written_blocks"),
    *(
        "disk_written_blocks",
        "writes_a_request",
        "dropped_blocks",
        "declined_slow",
        "declined_busy",
        "declined_room",
    ),
    *("first_token_mean_s", "first_token_p99_s"),
)
"""More of them, where there are tiers below the pool."""
_FLOATS |= {"restored_percent", "writes_a_request", "first_token_mean_s", "first_token_p99_s"}


class Key(NamedTuple):
    """What tells one row from another."""

    block_size: int
    capacity: str
    policy: str
    partial: str
    below: str = ""


def key_of(row: Row) -> Key:
    """Give a row's key."""
    where = row["block_size"], row["capacity"], row["policy"], row["partial"]
    return Key(*where, row.get("below", ""))


def row_of(outcome: Outcome, capacity: str) -> Row:
    """Make the row of an outcome, for the capacity as it was asked for."""
    fields = outcome.fields()
    shares = percentages(outcome.ledger)
    row = {name: fields[name] for name in COLUMNS if name in fields}
    row |= {"capacity": capacity, "same_as_infinite": 0}
    row |= {f"{fate}_tokens_ledger": getattr(outcome.ledger, fate) for fate in FATES}
    row |= {f"{fate}_percent": shares[fate] for fate in FATES}
    return {name: row[name] for name in COLUMNS}


def tier_row_of(outcome: Outcome, traffic: Traffic, capacity: str, below: str) -> Row:
    """Make the row of an outcome with tiers below the pool.  What came back counts as hit."""
    mean_s, p99_s = traffic.first_token_s
    return row_of(outcome, capacity) | {
        "below": below,
        "restored_tokens": traffic.restored_tokens,
        "restored_percent": round(100 * traffic.restored_tokens / outcome.prompt_tokens, 3),
        "restored_blocks": sum(traffic.restored_blocks),
        "written_blocks": traffic.written_blocks,
        "disk_written_blocks": traffic.disk_written_blocks,
        "writes_a_request": round(traffic.written_blocks / outcome.requests, 3),
        "dropped_blocks": traffic.dropped_blocks,
        **{f"declined_{why}": count for why, count in traffic.declined.items()},
        "first_token_mean_s": round(mean_s, 6),
        "first_token_p99_s": round(p99_s, 6),
    }


class RowFile:
    """A CSV file that grows row by row, so that an interrupted sweep has lost nothing.

    Args:
        path: The file.
        head: What its first lines say, as comments: `# name: value`.
        resume: Keep the rows that are there, if the trace is the same.
        columns: What each row has.

    Raises:
        InvalidRequest: it cannot be written; or it is to be resumed and has another trace.
    """

    def __init__(
        self,
        path: Path,
        head: dict[str, str],
        *,
        resume: bool = False,
        columns: tuple[str, ...] = COLUMNS,
    ) -> None:
        self.path = path
        self.rows: list[Row] = []
        old = _read(path, columns) if resume and path.exists() else None
        if old is not None:
            was, rows = old
            if was.get("fingerprint") != head.get("fingerprint"):
                raise InvalidRequest(
                    f"{path} has rows of another trace ({was.get('trace', 'unnamed')}); choose "
                    "another --out, or leave out --resume to begin anew"
                )
            self.rows = rows
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("w", newline="")
        except OSError as error:
            raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
        for name, value in head.items():
            self._file.write(f"# {name}: {value}\n")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._writer.writerows(self.rows)
        self._file.flush()

    def add(self, row: Row) -> None:
        """Write a row; it is on disk when this returns."""
        self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_json(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Write all rows and what they belong to as one JSON object."""
    path.write_text(json_text(head | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path, columns: tuple[str, ...]) -> tuple[dict[str, str], list[Row]]:
    head, lines = {}, []
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            name, _, value = line[2:].partition(": ")
            head[name] = value
        elif line.count(",") == len(columns) - 1:  # not one that broke off
            lines.append(line)
    return head, [
        {name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(lines)
    ]


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if not text:
        return None
    return float(text) if name in _FLOATS else int(text)
