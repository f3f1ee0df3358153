"""What `LLM` gives, by the names that vLLM's users know.  No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found a token."""

    logprob: float
    rank: int | None
    """1 is the most likely one; None: it is not among those that were asked for."""
    decoded_token: str | None


TokenLogprobs = dict[int, Logprob]
"""By token: the one that is there, and the most likely ones."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """An answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """With the token that ends it, if one does."""
    cumulative_logprob: float | None
    """The sum of its tokens' log-probabilities; None: `logprobs` was not asked for."""
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    """`stop` or `length`."""
    stop_reason: int | str | None = None
    """Which of `stop` and `stop_token_ids` ended it; None: the model's own end, or its length."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to a prompt."""

    request_id: str
    prompt: str | None
    """None: it was given as tokens."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """Of each token; the first has none."""
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    """Of the prompt: what was found in the pool, or computed by another one meanwhile."""
    num_approximate_tokens: int = 0
    """Of the prompt: what was taken from segments, and not computed again.  Not in the above."""
    approximate: bool = False
    """Whether an answer was computed over segments: it may be another than a full prefill's."""


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """A text that was found."""

    tokens: list[int]
    """With the prompt's."""
    text: str
    """Likewise."""
    cum_logprob: float
    score: float
    """That, divided by the answer's length to the power of `length_penalty`."""
    finish_reason: str


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The texts that were found, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)
