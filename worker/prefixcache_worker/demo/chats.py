"""The demo's workload: six assistants and 24 chats, written for this project, in `chats.json`.

The assistants' system prompts are what the workers share; the chats are spread unevenly over them,
as real traffic is.  Every chat has three turns; only what the user says is stored, the answers are
the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

QUICK_CHATS = (
    "bicycle-return",
    "bicycle-puncture",
    "bicycle-family-rental",
    "travel-lake",
    "travel-dog",
    "travel-missed",
    "cooking-first-soup",
    "cooking-salty-sauce",
    "plain-rent",
)
QUICK_TURNS = 2


@dataclass(frozen=True, slots=True)
class Assistant:
    """A system prompt that many chats share."""

    name: str
    title: str
    system: str


@dataclass(frozen=True, slots=True)
class Chat:
    """What one user says, turn by turn, to one assistant."""

    id: str
    assistant: Assistant
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """The assistants by name, and all chats in the order in which they begin."""

    assistants: Mapping[str, Assistant]
    chats: tuple[Chat, ...]

    @property
    def num_requests(self) -> int:
        """Turns of all chats together."""
        return sum(len(chat.turns) for chat in self.chats)

    def quick(self) -> Workload:
        """Give the short workload: 9 of the chats, 2 turns each.  Changes nothing."""
        chats = {chat.id: chat for chat in self.chats}
        short = tuple(
            Chat(name, chats[name].assistant, chats[name].turns[:QUICK_TURNS])
            for name in QUICK_CHATS
        )
        names = {chat.assistant.name for chat in short}
        return Workload({name: self.assistants[name] for name in sorted(names)}, short)


def load() -> Workload:
    """Read the chats that are shipped with the package.  About a millisecond.

    >>> workload = load()
    >>> len(workload.assistants), len(workload.chats), workload.num_requests
    (6, 24, 72)
    """
    text = resources.files(__package__).joinpath("chats.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assistants = {
        name: Assistant(name, prompt["title"], "\n".join(prompt["system"]))
        for name, prompt in stored["prompts"].items()
    }
    chats = tuple(
        Chat(chat["id"], assistants[chat["prompt"]], tuple(chat["turns"]))
        for chat in stored["chats"]
    )
    return Workload(assistants, chats)
