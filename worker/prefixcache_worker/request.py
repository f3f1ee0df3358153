"""What is asked of a worker, and what it tells.

```
Request ──► Started ──► Scored, ... ──► Token, Token, ... ──► Finished
       │                └ if asked for                 │
       └───────────────────────────────────────────────┴──► Failed
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prefixcache.errors import InvalidRequest
from prefixcache.types import Ledger
from prefixcache_worker.beam_search import Beam, BeamSearch
from prefixcache_worker.grammar import Grammar
from prefixcache_worker.sampling import Logprobs, Sampling, TopTwo

MOST_SAMPLES: Final = 128
"""Answers to one request."""

MOST_LOGPROBS: Final = 20
"""Of the most likely tokens of a step."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued."""

    id: str
    tokens: Sequence[int]
    """The prompt's token ids; at least one."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end the answer; None: the model's own."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer; none of them is ever shown."""
    wait_s: float = 30.0
    """How long to wait for a prefix that another worker is computing; 0: compute it as well."""
    waits_for_quota: bool = True
    """Whether it waits while its tenant may not hold more blocks; False: then it has failed, and
    who sent it is told when to come again."""
    log_logits: bool = False
    """Tell the two best logits of every step."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of so many of the most likely ones; None: not."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, for which all of it is computed, whatever is cached."""
    left_out: tuple[str, ...] = ()
    """What of the request is not in the prompt, for example tools that the template does not
    show."""
    salt: str | None = None
    """Keeps its prefix apart: what is behind another salt, or behind none, is not shared."""
    n: int = 1
    """How many answers are told: as many samples, or the best of so many beams."""
    beams: BeamSearch | None = None
    """Search for the likeliest answers as a whole; None: choose token by token."""
    grammar: Grammar | None = None
    """What the answer is held to."""
    segments: bool = False
    """Whether what is stored of its prompt at other places may be used, approximately."""
    generated: Sequence[int] = ()
    """The answer's first tokens, where another worker has begun it: it goes on behind them, as if
    nothing had been."""

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        if not self.tokens or self.max_new_tokens < least or self.wait_s < 0:
            raise InvalidRequest(
                f"request {self.id!r}: {len(self.tokens)} prompt tokens, {self.max_new_tokens} new "
                f"ones, waiting {self.wait_s} s; at least 1, {least} and 0 make sense"
            )
        for told in (self.logprobs, self.prompt_logprobs):
            if told is not None and not 0 <= told <= MOST_LOGPROBS:
                raise InvalidRequest(
                    f"request {self.id!r}: the {told} most likely tokens; from 0 to "
                    f"{MOST_LOGPROBS} can be told"
                )
        if self.sampling.min_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"request {self.id!r}: min_tokens is {self.sampling.min_tokens}, and its answer "
                f"may have {self.max_new_tokens}"
            )
        if not 1 <= self.n <= MOST_SAMPLES:
            raise InvalidRequest(f"request {self.id!r}: n is {self.n}; from 1 to {MOST_SAMPLES}")
        if self.n > 1 and self.generated:
            raise InvalidRequest(
                f"request {self.id!r}: n is {self.n}, and what is generated is of one answer"
            )
        if "" in self.stop_strings:
            raise InvalidRequest(
                f"request {self.id!r}: stop holds an empty text, which is everywhere: leave it out"
            )
        if self.segments and self.prompt_logprobs is not None:
            raise InvalidRequest(
                f"request {self.id!r}: segments do not go with prompt_logprobs, for which all of "
                "the prompt is computed"
            )
        if self.beams is not None:
            self._check_beams(self.beams.width)
        if len(self.generated) > self.max_new_tokens:
            raise InvalidRequest(
                f"request {self.id!r}: {len(self.generated)} tokens are generated, more than the "
                f"{self.max_new_tokens} that its answer may have"
            )

    def _check_beams(self, width: int) -> None:
        if self.n > width:
            raise InvalidRequest(
                f"request {self.id!r}: n is {self.n}, and beams {width}: no more are found"
            )
        beside = {
            "sampling": self.sampling != Sampling(),
            "stop": bool(self.stop_strings),
            "logprobs": self.logprobs is not None,
            "prompt_logprobs": self.prompt_logprobs is not None,
            "log_logits": self.log_logits,
            "grammar": self.grammar is not None,
            "generated": bool(self.generated),
        }
        if found := [name for name, is_asked in beside.items() if is_asked]:
            raise InvalidRequest(
                f"request {self.id!r}: {found[0]} does not go with beams, which take the "
                "likeliest texts as a whole"
            )


@dataclass(frozen=True, slots=True)
class Started:
    """A request holds its blocks; what is not cached will be computed."""

    id: str
    ledger: Ledger
    num_prompt: int
    num_cached: int
    """Tokens whose keys and values are there: of the prompt, and of what was generated before."""
    num_to_compute: int
    shared: bool
    """Whether its blocks are in the shared pool."""
    waited_s: float
    """From submission until now."""
    max_new_tokens: int | None = None
    """Tokens that the answer may have; blocks are reserved for as many."""
    left_out: tuple[str, ...] | None = None
    """What of the request is not in the prompt; None: nothing."""
    seed: int | None = None
    """By which its tokens are drawn; None: the most likely ones are taken."""
    sample: int | None = None
    """Which of several answers it is of; None: there is one."""
    approximate: bool | None = None
    """True: it has segments in its prompt, so its answer may be another than a full prefill's."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of the prompt were computed, as far as their log-probabilities are asked for."""

    id: str
    start: int
    """Place in the prompt of the first that is told; the very first token has none."""
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A token was generated."""

    id: str
    token: int
    text: str
    """What can be shown because of it; perhaps nothing yet."""
    top: TopTwo | None = None
    logprobs: Logprobs | None = None
    sample: int | None = None
    """Which of several answers it is of; None: there is one."""


@dataclass(frozen=True, slots=True)
class Searched:
    """A beam search has come a token further."""

    id: str
    num_tokens: int
    """Of each text that goes on."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is answered."""

    id: str
    tokens: tuple[int, ...]
    """The whole answer, also what another worker began; with a stop token, if that was the
    reason."""
    text: str
    reason: str
    """`stop` (token or string), `length`, or `cancelled`."""
    ttft_s: float
    """From submission to the first token."""
    total_s: float
    num_prompt: int
    num_computed: int
    """Tokens that ran through the model for it, generated ones included."""
    num_restarts: int
    """How often its blocks were lost and it began again."""
    kv_read_bytes: int = 0
    """Keys and values that its decode steps read; what several sequences read once, divided."""
    kv_alone_bytes: int = 0
    """What they would have read without sharing."""
    sample: int | None = None
    """Which of several answers it is; None: there is one."""
    beams: tuple[Beam, ...] | None = None
    """The likeliest texts, best first, of which the first is the answer; None: not searched."""
    approximate: bool | None = None
    """True: some of it was computed over segments."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request cannot be answered."""

    id: str
    error: str
    message: str
    sample: int | None = None
    """Which of several answers cannot be given; None: there is one, or none of them can."""
    retry_after_s: float | None = None
    """When it can perhaps; None: never as it is."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The service is gone; the worker goes on with a pool of its own."""

    message: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The worker shares a pool (again)."""

    worker: str
    num_blocks: int
    block_size: int


Event = Started | Scored | Token | Searched | Finished | Failed | Alone | Joined


def to_json(event: Event) -> dict[str, Any]:
    """Turn an event into the object that `prefixcache worker` writes on a line.

    Times become milliseconds; the two best logits become `[[token, logit], [token, logit]]`, and
    so do the most likely tokens.

    >>> to_json(Token("a", 7, "x"))
    {'event': 'token', 'id': 'a', 'token': 7, 'text': 'x'}
    """
    out: dict[str, Any] = {"event": type(event).__name__.lower()}
    for item in dataclasses.fields(event):
        value = getattr(event, item.name)
        if item.name.endswith("_s") and value is not None:
            out[f"{item.name[:-2]}_ms"] = round(value * 1e3, 3)
        elif isinstance(value, TopTwo):
            out["top"] = [list(pair) for pair in zip(value.tokens, value.logits, strict=True)]
        elif isinstance(value, Logprobs):
            out["logprob"] = value.logprob
            out["top_logprobs"] = [list(pair) for pair in value.top]
        elif isinstance(event, Scored) and item.name == "logprobs":
            out["logprobs"] = [one.logprob for one in event.logprobs]
            out["top_logprobs"] = [[list(pair) for pair in one.top] for one in event.logprobs]
        elif isinstance(event, Finished) and item.name == "beams" and value is not None:
            out["beams"] = [dataclasses.asdict(beam) for beam in event.beams or ()]
        elif isinstance(value, Ledger):
            out["ledger"] = value._asdict()
        elif value is not None:
            out[item.name] = value
    return out
