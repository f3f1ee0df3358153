"""Sweep: every combination of block size, capacity, policy and partial reuse, on all cores.

Infinite memory comes first.  It gives both ceilings, and it answers for every capacity that holds
all that the trace ever stores: nothing is evicted there, so the replay would be the same one, step
by step.  Those rows are marked (`same_as_infinite`).  In blocks of one word there is no part of a
block, so all modes of partial reuse are one there, and replayed once.  All others are replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prefixcache.core.policies import POLICIES
from prefixcache.errors import InvalidRequest
from prefixcache.types import Partial
from prefixcache_bench.experiments.below import LEAST_POOL, BelowAsked, Tiers, replay_below
from prefixcache_bench.experiments.capacity import Capacity
from prefixcache_bench.experiments.curve import curve
from prefixcache_bench.experiments.flat import FLAT_LFU
from prefixcache_bench.experiments.forks import forked, inherited
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.rows import Key, Row, key_of, row_of, tier_row_of
from prefixcache_bench.experiments.traces import Trace

_MARGIN = 8
"""With tails, a commit may hold a few blocks more for a moment than it leaves stored."""


@dataclass(frozen=True)
class Grid:
    """What to combine with what."""

    block_sizes: tuple[int, ...]
    capacities: tuple[Capacity, ...]
    policies: tuple[str, ...] = ("lru",)
    partials: tuple[Partial, ...] = (Partial.OFF,)
    belows: tuple[BelowAsked, ...] = ()
    """What is below the pool, and how fast; empty: nobody asks."""

    def check(self, trace: Trace, working_set: int) -> None:
        """Refuse what cannot be run, before anything is.

        Raises:
            InvalidRequest: the message says what.
        """
        for policy in self.policies:
            if policy not in (*POLICIES, FLAT_LFU):
                known = ", ".join((*POLICIES, FLAT_LFU))
                raise InvalidRequest(f"no eviction policy {policy!r}; there are: {known}")
        for size in self.block_sizes:
            trace.words(size)
            for capacity in self.capacities:
                blocks = capacity.blocks(size, working_set)
                for below in self.belows:
                    below.tiers(size, working_set).check(blocks)
        if self.belows and FLAT_LFU in self.policies:
            raise InvalidRequest(f"{FLAT_LFU} is replayed without a tree, so nothing can lie below")

    def fitted(self, working_set: int, *, sizes: bool, capacities: bool) -> Grid:
        """Leave out what a small trace cannot have, of what nobody asked for.

        Args:
            working_set: Distinct tokens of the trace.
            sizes: Whether block sizes may go: the smallest stays.
            capacities: Whether capacities may go: infinite memory stays.

        >>> from prefixcache_bench.experiments.capacity import parse_capacities
        >>> grid = Grid((1, 4, 16), tuple(parse_capacities("5%,50%,inf")))
        >>> small = grid.fitted(12, sizes=True, capacities=True)
        >>> small.block_sizes, [one.text for one in small.capacities]
        ((1, 4), ['50%', 'inf'])
        """
        least = min(self.block_sizes) if sizes else max(self.block_sizes)
        pool = LEAST_POOL if any(below.text != "none" for below in self.belows) else 1
        held = {one: one.tokens(least, working_set) for one in self.capacities}
        enough = {one for one, tokens in held.items() if tokens is None or tokens >= pool * least}
        kept = tuple(one for one in self.capacities if not capacities or one in enough)
        bounds = [tokens for one in kept if (tokens := held[one]) is not None]
        room = min(bounds, default=pool * max(self.block_sizes)) // pool
        fitting = tuple(one for one in self.block_sizes if not sizes or one <= max(room, least))
        return replace(self, capacities=kept, block_sizes=fitting)

    def combinations(self) -> list[Key]:
        """Give every combination."""
        return [
            Key(size, capacity.text, policy, partial.value, below)
            for partial in self.partials
            for policy in self.policies
            for size in self.block_sizes
            for capacity in self.capacities
            for below in ([one.text for one in self.belows] or [""])
        ]


@dataclass(frozen=True)
class Ceilings:
    """The hit rates that no amount of memory exceeds, whole blocks only."""

    by_block_size: dict[int, float]
    """Infinite memory."""
    finest: float
    """Infinite memory at the finest block size that the trace knows (1, for tokens)."""
    working_set: int
    """Distinct tokens: what percentages of capacity are of."""


def ceilings(trace: Trace, block_sizes: tuple[int, ...]) -> Ceilings:
    """Find both ceilings.  One pass for each block size."""
    found = {size: curve(trace, size) for size in sorted({trace.unit, *block_sizes})}
    rates = {size: one.hit_rates([one.working_set])[0] for size, one in found.items()}
    finest = found[trace.unit]
    return Ceilings(rates, rates[trace.unit], finest.working_set * trace.unit)


def sweep(
    trace: Trace,
    grid: Grid,
    working_set: int,
    finished: list[Row],
    add: Callable[[Row], None],
    *,
    processes: int | None = None,
) -> None:
    """Run what is not finished yet; `add` gets each row as soon as it is there, in any order.

    Args:
        trace: The requests.
        grid: What to combine.
        working_set: Distinct tokens of the trace.
        finished: Rows that need not be run.
        add: Takes a row.
        processes: How many replay at the same time; all cores if not given.

    Raises:
        KeyboardInterrupt: somebody pressed Ctrl-C; the rows given so far are whole.
    """
    done = {key_of(row) for row in finished}
    todo = [key for key in grid.combinations() if key not in done]
    if grid.belows:
        _sweep_below(trace, grid, working_set, todo, add, processes)
        return
    capacities = {one.text: one for one in grid.capacities}
    bounded = {key: capacities[key.capacity].blocks(key.block_size, working_set) for key in todo}
    one_word = {size for size in grid.block_sizes if trace.words(size) == 1}

    def mode(of: Key) -> str:
        """Give the mode that is replayed for this one."""
        return Partial.OFF.value if of.block_size in one_word else of.partial

    def give_equal(infinite: Row) -> None:
        """Give, and strike out, the rows that are equal to one with infinite memory."""
        for key, blocks in list(bounded.items()):
            if (key.block_size, mode(key)) != (infinite["block_size"], infinite["partial"]):
                continue
            if blocks is None or blocks >= _enough(infinite, key.partial):
                del bounded[key]
                add(infinite | _asked(key, blocks) | {"same_as_infinite": int(blocks is not None)})

    known = [
        row | {"partial": mode(key_of(row))}
        for row in finished
        if row["capacity"] == "inf" and row["block_size"] in grid.block_sizes
    ]
    for row in known:
        give_equal(row)
    first = {(key.block_size, mode(key)) for key in todo}
    first -= {(row["block_size"], row["partial"]) for row in known}
    with forked(trace, processes) as pool:
        unbounded: list[Task] = [(size, "inf", None, "lru", partial) for size, partial in first]
        for _, row in pool.imap_unordered(_replay, sorted(unbounded)):
            give_equal(row)
        alike: dict[Task, list[Key]] = {}
        for key, blocks in bounded.items():
            task = (key.block_size, key.capacity, blocks, key.policy, mode(key))
            alike.setdefault(task, []).append(key)
        # Long ones first, so that no core idles at the end.
        for task, row in pool.imap_unordered(_replay, sorted(alike, key=lambda task: task[2] or 0)):
            for key in alike[task]:
                add(row | {"partial": key.partial})


def _sweep_below(
    trace: Trace,
    grid: Grid,
    working_set: int,
    todo: list[Key],
    add: Callable[[Row], None],
    processes: int | None,
) -> None:
    """Run what has tiers below the pool: each combination for itself."""
    capacities = {one.text: one for one in grid.capacities}
    belows = {one.text: one for one in grid.belows}
    tasks = []
    for key in todo:
        blocks = capacities[key.capacity].blocks(key.block_size, working_set)
        tiers = belows[key.below].tiers(key.block_size, working_set)
        tasks.append((key, blocks, tiers))
    with forked(trace, processes) as pool:
        for row in pool.imap_unordered(_replay_below, tasks):
            add(row)


def _replay_below(task: tuple[Key, int | None, Tiers]) -> Row:
    key, blocks, tiers = task
    asked = Configuration(key.block_size, blocks, key.policy, Partial(key.partial))
    outcome, traffic = replay_below(inherited(), asked, tiers)
    return tier_row_of(outcome, traffic, key.capacity, key.below)


Task = tuple[int, str, int | None, str, str]
"""Block size, capacity as asked and in blocks, policy, partial reuse."""


def _enough(infinite: Row, partial: str) -> int:
    """Give from how many blocks on a replay is the one with infinite memory."""
    blocks: int = infinite["peak_blocks"]
    return blocks + (_MARGIN if partial == Partial.TAILS else 0)


def _asked(key: Key, blocks: int | None) -> Row:
    """Give the fields that say what was asked for."""
    return {
        "capacity": key.capacity,
        "capacity_blocks": blocks,
        "capacity_tokens": None if blocks is None else blocks * key.block_size,
        "policy": key.policy,
        "partial": key.partial,
    }


def _replay(task: Task) -> tuple[Task, Row]:
    size, text, blocks, policy, partial = task
    asked = Configuration(size, blocks, policy, Partial(partial))
    return task, row_of(replay(inherited(), asked), text)
