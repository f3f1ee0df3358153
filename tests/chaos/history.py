"""The history of a storm, held against the sequential model of a cache.

The model is a set of prefixes per namespace: `commit` adds one, `reset` empties it, eviction, death
and loss may take any out.  Operations overlap in time, so each has two moments: when it was asked
for, and when its answer came (never, if the asker or the service died).  Then a hit of n tokens is
right if and only if some commit of these n tokens

* was asked for before the hit's answer came, and
* lies after every reset that had been answered before the hit was asked for: it was not answered
  itself before that reset was asked for.

And while a lease stands, the whole blocks that it has committed are found, unless a reset came
between.  (A tail is not kept twice: where another lease's covers it, it goes with that one.)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from chaos.universe import BLOCK_SIZE, common


@dataclass
class Verdict:
    """What a history showed."""

    commits: int = 0
    hits: int = 0
    resets: int = 0
    phantoms: list[str] = field(default_factory=list)
    """Hits that the model cannot explain."""
    forgotten: list[str] = field(default_factory=list)
    """Commits that were not found although their lease stood."""


def read(paths: Iterable[Path]) -> list[dict[str, object]]:
    """Read the actors' logs; a line that its writer's death tore is the last one of its file."""
    events = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return events


def check(events: list[dict[str, object]]) -> Verdict:
    """Explain every hit by a commit."""
    verdict = Verdict()
    answered = {e["op"]: float(str(e["t"])) for e in events if e["kind"] == "answer"}
    commits: dict[tuple[str, int], list[tuple[int, int, float, float]]] = defaultdict(list)
    resets: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for e in events:
        t, end = float(str(e["t"])), answered.get(e.get("op"), inf)
        if e["kind"] == "commit":
            verdict.commits += 1
            space = (str(e["model"]), int(str(e["system"])))
            commits[space].append((int(str(e["chat"])), int(str(e["count"])), t, end))
        elif e["kind"] == "reset":
            verdict.resets += 1
            resets[str(e["model"])].append((t, end))
    shared: dict[tuple[int, int, int], int] = {}
    for e in events:
        if e["kind"] != "hit" or not e["count"]:
            continue
        verdict.hits += 1
        model, system, chat = str(e["model"]), int(str(e["system"])), int(str(e["chat"]))
        count, asked, told = int(str(e["count"])), float(str(e["asked"])), float(str(e["t"]))
        over = [start for start, end in resets[model] if end < asked]
        after = max(over, default=-inf)
        for other, upto, start, end in commits[model, system]:
            if upto < count or start > told or end < after:
                continue
            key = (system, chat, other)
            if key not in shared:
                shared[key] = common((system, chat), (system, other))
            if shared[key] >= count:
                break
        else:
            verdict.phantoms.append(json.dumps(e))
    for e in events:
        if e["kind"] != "found":
            continue
        committed = int(str(e["committed"]))
        if int(str(e["found"])) < committed - committed % BLOCK_SIZE:
            asked, told = float(str(e["asked"])), float(str(e["t"]))
            if not any(start < told and end > asked for start, end in resets[str(e["model"])]):
                verdict.forgotten.append(json.dumps(e))
    return verdict
