"""What was seen of one run: each request, its fate, its times; and the death of a worker.

All times are seconds of the demo's own clock since the run began, taken when a line was written to
or read from a worker, so that they contain everything a client would wait for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixcache.types import Ledger
from prefixcache_worker.demo.ideal import Sequenced


class Fate(enum.StrEnum):
    """How a request as a whole began."""

    COLD = "cold"
    """It computed (most of) its system prompt itself."""
    JOINED = "joined"
    """It waited for a prefix that another worker was computing, and read it in place."""
    WARM = "warm"
    """Its system prompt was there."""
    TAKEOVER = "takeover"
    """It waited for a worker that died, and computed the rest of the prefix itself."""


@dataclass(frozen=True, slots=True)
class TopTwo:
    """The two best tokens at one step of an answer, with their logits."""

    best: int
    best_logit: float
    second: int
    second_logit: float
    others: tuple[tuple[int, float], ...] = ()
    """Those behind them with their logits, as far as they are told, best first."""

    def logit(self, token: int) -> float | None:
        """Give a token's logit; None if it is not told."""
        known = ((self.best, self.best_logit), (self.second, self.second_logit), *self.others)
        return next((logit for one, logit in known if one == token), None)


@dataclass(slots=True)
class Request:
    """One turn of one chat, from the moment it is sent."""

    id: str
    chat: str
    turn: int
    assistant: str
    prompt: tuple[int, ...]
    num_system: int
    """Tokens of the prompt that belong to the system prompt and its frame."""
    worker: str = ""
    sent_s: float = 0.0
    granted_s: float | None = None
    first_s: float | None = None
    done_s: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    num_computed: int = 0
    """Prompt tokens that were computed for it."""
    kv_read_bytes: int = 0
    """Keys and values that decoding its answer read; what several sequences read once, divided."""
    kv_alone_bytes: int = 0
    """What that would have been had each sequence of a step read its own."""
    answer: list[int] = field(default_factory=list)
    text: str = ""
    logits: list[TopTwo] = field(default_factory=list)
    took_over: bool = False
    alone: bool = False
    """Sent while no other request was running: its times are undisturbed."""
    beside: bool = False
    """Answered beside others with the same system prompt, by the same worker."""

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from sending the request to its first token."""
        if self.first_s is None:
            raise ValueError(f"request {self.id} has no first token yet")
        return (self.first_s - self.sent_s) * 1e3

    @property
    def fate(self) -> Fate:
        """How the request began, as one word."""
        if self.took_over:
            return Fate.TAKEOVER
        if self.ledger.joined:
            return Fate.JOINED
        return Fate.WARM if self.ledger.reused >= 0.9 * self.num_system else Fate.COLD

    @property
    def sequenced(self) -> Sequenced:
        """The request as the tokens that it left behind."""
        return Sequenced(self.prompt, tuple(self.answer))


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that died with its worker; the same turn was then sent to another one."""

    request: str
    worker: str
    sent_s: float
    died_s: float
    num_prompt: int
    num_kept: int
    """Prompt tokens that it had computed and committed: others go on using them."""
    num_lost: int
    """Prompt tokens that it had computed, or was computing, and that nobody could use: at most."""
    num_answered: int
    """Tokens of the answer that it had already given."""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker killed with SIGKILL, as the service's snapshots saw it."""

    worker: str
    pid: int
    at_s: float
    in_prefill: bool
    """Whether it was computing a prefix for which another worker waited."""
    leases: int
    """Leases it held at that moment; none of them is left afterwards."""
    blocks_returned: int
    """Blocks that only it could use and that are free again."""
    blocks_kept: int
    """Blocks of its leases that hold committed tokens and stay cached for the others."""
    returned_ms: float
    """From the kill to the first snapshot in which it holds no lease."""
    takeover_ms: float | None
    """From the kill to the moment when a waiting worker was granted the prefix."""
    takeover_worker: str
    takeover_request: str
    attempts: tuple[Attempt, ...] = ()
    """Filled when all that died with it has been answered by others."""


@dataclass(slots=True)
class Run:
    """One pass over the chats, shared or not."""

    shared: bool
    requests: list[Request] = field(default_factory=list)
    """In the order in which they were sent."""
    workers: list[str] = field(default_factory=list)
    death: Death | None = None
    seconds: float = 0.0
    num_blocks: int = 0
    block_size: int = 16
    block_bytes: int = 0
    layout: str = ""
    """Of a page, as `prefixcache serve --layout` takes it."""
    blocks_used: int = 0
    """Blocks that hold something when the last request has ended."""
    blocks_leaked: int = 0
    """Blocks that are still private or quarantined when all have ended; 0 if all is well."""

    def fated(self, *fates: Fate) -> list[Request]:
        """Give the requests with one of `fates`."""
        return [request for request in self.requests if request.fate in fates]


def prompt_tokens(requests: Sequence[Request]) -> int:
    """Sum the prompts' lengths."""
    return sum(len(request.prompt) for request in requests)
