"""Chats whose turns move from engine to engine, and what a system makes of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefixcache_bench.speed.vllm_figures import Say
from prefixcache_bench.speed.vllm_peer import Generated, Vllm


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a chat, and who answers it."""

    chat: int
    number: int
    engine: int
    prompt: list[int]


def turns(draw: random.Random, chats: int, length: int, engines: int) -> list[Turn]:
    """Write chats that begin with a document of their own and go on with short questions.

    All share instructions of 200 tokens.  The turns of all chats are interleaved; each goes to
    another engine than the chat's last one.  Answers are written here as well, so that all systems
    read the same: what an engine generates is not read.

    Args:
        draw: seeded.
        chats: how many.
        length: turns of each.
        engines: how many there are.
    """
    instructions = tokens(draw, 200)
    histories = [instructions + tokens(draw, draw.randint(700, 1100)) for _ in range(chats)]
    at = [draw.randrange(engines) for _ in range(chats)]
    made = []
    for number in range(length):
        for chat in draw.sample(range(chats), chats):
            histories[chat] = histories[chat] + tokens(draw, draw.randint(20, 50))
            made.append(Turn(chat, number, at[chat], histories[chat]))
            at[chat] = (at[chat] + draw.randint(1, engines - 1)) % engines
    return made


def tokens(draw: random.Random, count: int) -> list[int]:
    """Draw tokens, none of them special."""
    return [draw.randrange(1000, 40_000) for _ in range(count)]


@dataclass(slots=True)
class Chats:
    """What a system made of the chats."""

    first_ms: list[float] = field(default_factory=list)
    """Of each turn."""
    later_ms: list[float] = field(default_factory=list)
    """Of each turn but a chat's first one."""
    computed: int = 0
    prompt: int = 0

    def take(self, told: Generated, number: int) -> None:
        """Add a turn."""
        took = 1e3 * told.first_token_s
        self.first_ms.append(took)
        if number:
            self.later_ms.append(took)
        self.computed += told.prompt - told.cached
        self.prompt += told.prompt


Node = dict[int, "Node"]
"""What follows a token."""


def ideal(script: Sequence[Turn]) -> int:
    """Count the tokens that no system can take from a cache: those that no earlier prompt has.

    The last token of a prompt is computed in any case; here every prompt ends with new ones.

    >>> ideal([Turn(0, 0, 0, [1, 2, 3]), Turn(1, 0, 0, [1, 2, 4]), Turn(0, 1, 1, [1, 2, 3, 5])])
    5
    """
    seen: Node = {}
    computed = 0
    for turn in script:
        node = seen
        for token in turn.prompt:
            computed += token not in node
            node = node.setdefault(token, {})
    return computed


def play(
    systems: Mapping[str, Sequence[Vllm]], script: Sequence[Turn], say: Say
) -> dict[str, Chats]:
    """Let all systems answer each turn, one after the other, in an order that changes."""
    found = {name: Chats() for name in systems}
    names = list(systems)
    for number, turn in enumerate(script):
        if number % 10 == 0:
            say.progress(f"chats: turn {number + 1} of {len(script)}")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            engine = systems[name][turn.engine]
            found[name].take(engine.generate([turn.prompt], 2)[0], turn.number)
    return found
