"""Seeded workloads: the same options give the same trace, to the last token, on every machine.

| kind     | who asks                                        | what is shared                 |
|----------|-------------------------------------------------|--------------------------------|
| chats    | users, several turns each                       | a few system prompts, the past |
| few-shot | one-turn questions                              | the same examples before each  |
| agents   | a task that hands its context to several agents | the context; each one's past   |
| rag      | questions with a few documents, in any order    | documents, but as a prefix only|
| tree     | one problem, samples that branch                | the path to the branch         |

Token ids are drawn uniformly from a vocabulary: what matters to a prefix cache is which prefixes
are equal, not what they say.  Lengths are drawn from a log-normal distribution around the mean
that is asked for (`spread` is its sigma), as measured chats are long-tailed; popularity (of system
prompts, examples, documents) is Zipf's.  Arrivals: `poisson` (exponential gaps), `uniform` (equal
gaps), or `bursts` (groups of ten at the same moment, Poisson between groups).
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace
from prefixcache_bench.experiments.traces import Request, Trace

_BURST = 10
_POSITIVE = (
    *("count", "rate", "turns", "prefixes", "prefix_tokens", "question_tokens", "answer_tokens"),
    *("documents", "document_tokens", "picked", "fan_out"),
)
_MOST = (
    dict.fromkeys(("count", "turns", "prefixes", "documents", "picked", "fan_out"), 10_000_000)
    | dict.fromkeys(
        ("prefix_tokens", "question_tokens", "answer_tokens", "document_tokens"), 10_000_000
    )
    | {"rate": 10**9, "think_s": 10**9, "popularity": 20, "spread": 10}
)
"""Beyond these no machine holds the trace, or no number the weights."""


class Kind(StrEnum):
    """The workloads that can be generated."""

    CHATS = "chats"
    FEW_SHOT = "few-shot"
    AGENTS = "agents"
    RAG = "rag"
    TREE = "tree"


class Arrival(StrEnum):
    """When the conversations begin."""

    POISSON = "poisson"
    UNIFORM = "uniform"
    BURSTS = "bursts"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and arrivals; each workload uses those that concern it."""

    count: int = 200
    """Chats, questions, tasks or problems."""
    seed: int = 0
    arrival: Arrival = Arrival.POISSON
    rate: float = 1.0
    """Of them, per second."""
    think_s: float = 20.0
    """Mean pause between an answer and the next turn."""
    turns: int = 4
    """Mean turns of a chat or an agent; depth of a tree."""
    prefixes: int = 4
    """System prompts, sets of examples, or tools."""
    prefix_tokens: int = 800
    """Mean length of each of them; of a task's context; of a problem."""
    question_tokens: int = 60
    answer_tokens: int = 200
    documents: int = 100
    """Documents there are (rag)."""
    document_tokens: int = 400
    picked: int = 4
    """Documents of a question (rag)."""
    fan_out: int = 4
    """Agents of a task; branches of a tree's node."""
    popularity: float = 1.0
    """Zipf's exponent; 0: all equally popular."""
    spread: float = 0.6
    """Sigma of the logarithm of lengths; 0: all as long as the mean."""
    vocabulary: int = 50_000


def generate(kind: Kind, shape: Shape) -> Trace:
    """Make a trace.

    Raises:
        InvalidRequest: a size is out of range.
    """
    for name in _POSITIVE:
        if getattr(shape, name) <= 0:
            raise InvalidRequest(f"{name} must be more than 0, not {getattr(shape, name)}")
    for name, most in _MOST.items():
        if not getattr(shape, name) <= most:  # nor is NaN
            raise InvalidRequest(f"{name} must be at most {most:,}, not {getattr(shape, name):,}")
    if not 2 <= shape.vocabulary < 2**31:
        raise InvalidRequest(f"a vocabulary of {shape.vocabulary} ids is not from 2 to 2^31")
    draw = _Draw(shape)
    requests = [request for began in draw.arrivals() for request in _KINDS[kind](draw, began)]
    requests.sort(key=lambda request: request.t)
    return Trace(f"{kind.value}-{shape.seed}", requests)


class _Draw:
    """All randomness of one trace."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.random = random.Random(shape.seed)
        self.space = Namespace("generated")
        self._prefixes = [self.text(shape.prefix_tokens) for _ in range(shape.prefixes)]
        self._documents: list[bytes] = []

    def arrivals(self) -> Iterator[float]:
        """Give when each conversation begins."""
        shape, now = self.shape, 0.0
        for number in range(shape.count):
            yield now
            match shape.arrival:
                case Arrival.POISSON:
                    now += self.random.expovariate(shape.rate)
                case Arrival.UNIFORM:
                    now += 1 / shape.rate
                case Arrival.BURSTS if (number + 1) % _BURST == 0:
                    now += self.random.expovariate(shape.rate / _BURST)

    def text(self, mean_tokens: int) -> bytes:
        """Draw a text of about that many tokens."""
        sigma = self.shape.spread
        length = mean_tokens * math.exp(self.random.gauss(0.0, sigma) - sigma * sigma / 2)
        ids = self.random.choices(range(self.shape.vocabulary), k=max(1, round(length)))
        return array("I", ids).tobytes()

    def question(self) -> bytes:
        return self.text(self.shape.question_tokens)

    def answer(self) -> bytes:
        return self.text(self.shape.answer_tokens)

    def prefix(self) -> bytes:
        """Pick a system prompt, by popularity."""
        return self._prefixes[self._popular(len(self._prefixes), 1)[0]]

    def documents(self) -> list[bytes]:
        """Pick documents, by popularity, in any order."""
        shape = self.shape
        if not self._documents:
            self._documents = [self.text(shape.document_tokens) for _ in range(shape.documents)]
        return [self._documents[at] for at in self._popular(shape.documents, shape.picked)]

    def turns(self) -> int:
        """Draw a number of turns around the mean, at least one."""
        mean = self.shape.turns
        going_on = 1 - 1 / mean
        turns = 1
        while turns < 20 * mean and self.random.random() < going_on:
            turns += 1
        return turns

    def pause(self) -> float:
        mean = self.shape.think_s
        return self.random.expovariate(1 / mean) if mean > 0 else 0.0

    def request(self, t: float, prompt: bytes, answer: bytes) -> Request:
        tokens = len(prompt) // 4
        return Request(t, self.space, prompt + answer, tokens, tokens)

    def _popular(self, size: int, count: int) -> list[int]:
        """Draw different numbers below `size`, small ones more often."""
        exponent = self.shape.popularity
        keys = [
            (self.random.expovariate(1.0) * (rank + 1) ** exponent, rank) for rank in range(size)
        ]
        chosen = [rank for _, rank in sorted(keys)[:count]]
        self.random.shuffle(chosen)
        return chosen


def _chats(draw: _Draw, t: float) -> Iterator[Request]:
    past = draw.prefix()
    for _ in range(draw.turns()):
        past += draw.question()
        answer = draw.answer()
        yield draw.request(t, past, answer)
        past += answer
        t += draw.pause()


def _few_shot(draw: _Draw, t: float) -> Iterator[Request]:
    yield draw.request(t, draw.prefix() + draw.question(), draw.answer())


def _agents(draw: _Draw, t: float) -> Iterator[Request]:
    """A task: one plan, then agents that go on from it in turns of their own."""
    context = draw.prefix() + draw.text(draw.shape.prefix_tokens)
    plan = draw.answer()
    yield draw.request(t, context, plan)
    for _ in range(draw.shape.fan_out):
        past, now = context + plan, t + draw.pause() / 10
        for _ in range(draw.turns()):
            past += draw.question()
            answer = draw.answer()
            yield draw.request(now, past, answer)
            past += answer
            now += draw.pause() / 10


def _rag(draw: _Draw, t: float) -> Iterator[Request]:
    found = b"".join(draw.documents())
    yield draw.request(t, draw.prefix() + found + draw.question(), draw.answer())


def _tree(draw: _Draw, t: float) -> Iterator[Request]:
    """A problem: every thought is continued by several, down to the depth asked for."""
    shape = draw.shape
    level = [draw.prefix() + draw.question()]
    for _ in range(shape.turns):
        following = []
        for path in level:
            for _ in range(shape.fan_out):
                thought = draw.answer()
                yield draw.request(t, path, thought)
                following.append(path + thought)
        # As in beam search over thoughts: as many go on as there are branches.
        level = draw.random.sample(following, min(len(following), shape.fan_out))
        t += draw.pause() / 10


_KINDS: dict[Kind, Callable[[_Draw, float], Iterator[Request]]] = {
    Kind.CHATS: _chats,
    Kind.FEW_SHOT: _few_shot,
    Kind.AGENTS: _agents,
    Kind.RAG: _rag,
    Kind.TREE: _tree,
}
