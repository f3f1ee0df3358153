"""Beam search: of all texts that go on from a prompt, the few that are the likeliest as a whole.

```
lanes    the -1.2   the sun -1.9   ──►  step: each lane's likeliest next tokens, all in one list
         a   -1.6   the sea -2.4        the best `width` that do not end go on
                                        of the best `width`, those that end are finished
moves    lane 0 ──┬─► goes on in its place        who has several next tokens is forked, who has
                  └─► a fork, in lane 2's place   none is released
lane 2 ── released
```
A text's score is the sum of its tokens' log-probabilities, divided by its length to the power of
`length_penalty`.  Lengths and the end of the search are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor

from prefixcache_worker.beam_search import Beam, BeamSearch
from prefixcache_worker.job import Job, finished
from prefixcache_worker.reads import KvReads
from prefixcache_worker.request import Finished
from prefixcache_worker.store import Claim, Fork, Store


class Move(NamedTuple):
    """How a text goes on."""

    lane: int
    token: int
    total: float


class _Finished(NamedTuple):
    score: float
    tokens: tuple[int, ...]
    reason: str


class Beams:
    """One search: the lanes that go on, and what is finished.

    Args:
        how: it searches.
        first: the lane that computes the prompt.
        num_answers: of the finished texts, how many are told.
    """

    def __init__(self, how: BeamSearch, first: Job, num_answers: int) -> None:
        self.how = how
        self.num_answers = num_answers
        self.first = first
        self.lanes: list[Job] = [first]
        """That compute now, each with a text of its own; the likeliest one need not be first."""
        self._made = [first]
        """All that there ever were: whose text has ended goes on with another one."""
        self._forks: dict[int, tuple[Job, list[tuple[Job, list[int]]]]] = {}
        """Who is forked in this step, and who goes on from that, with which tokens."""
        self._totals = [0.0]
        """Log-probability of each lane's text."""
        self._best: list[_Finished] = []
        """The best finished texts, best first."""

    @property
    def num_missing(self) -> int:
        """Lanes that are still to come."""
        return self.how.width - len(self.lanes)

    @property
    def store(self) -> Store | None:
        """Where the lanes have their blocks."""
        return next((lane.store for lane in self.lanes if lane.store is not None), None)

    def begin_again(self) -> Job:
        """Forget all that was found; give the lane that computes the prompt."""
        first = self.first
        first.tokens = list(first.request.tokens)
        self.lanes, self._totals, self._best = [first], [0.0], []
        self._forks.clear()
        return first

    def step(self, logits: Tensor) -> list[Move]:
        """Find how the texts go on, best first; none does: the search is over.

        O(lanes * vocabulary), and then O(lanes * (width + tokens that end a text)).

        Args:
            logits: float32 `[lanes, vocab]`, behind each lane's text.
        """
        how, first = self.how, self.first
        length = self.lanes[0].num_generated + 1
        is_last = length == first.max_new_tokens
        ranked = self._ranked(logits)
        self._finish(
            [move for move in ranked[: how.width] if is_last or move.token in first.stop_ids],
            length,
        )
        moves = [] if is_last else [m for m in ranked if m.token not in first.stop_ids]
        if not moves or not self._may_improve(moves[0].total, length):
            return []
        return moves[: how.width]

    def go_on(self, moves: Sequence[Move]) -> list[Job]:
        """Let the lanes' texts go on; give the lanes whose own text does not: to be released.

        Whose text has several ways to go on takes the best one itself.  Each other one is a fork:
        it takes the place of a lane whose text has ended, as far as there are any.
        """
        lanes = self.lanes
        texts = [[*lanes[move.lane].tokens, move.token] for move in moves]
        kept = {move.lane for move in moves}
        ended = [lane for at, lane in enumerate(lanes) if at not in kept]
        places = [lane for lane in self._made if not any(lane is lanes[at] for at in kept)]
        seen: set[int] = set()
        self.lanes = []
        for move, text in zip(moves, texts, strict=True):
            parent = lanes[move.lane]
            if move.lane not in seen:
                seen.add(move.lane)
                parent.tokens = text
                self.lanes.append(parent)
                continue
            child = places.pop(0) if places else self._new_lane()
            parent.is_forked = True
            self._forks.setdefault(id(parent), (parent, []))[1].append((child, text))
            self.lanes.append(child)
        self._totals = [move.total for move in moves]
        return ended

    def due_forks(self) -> list[Fork]:
        """Say what the store should be asked for now."""
        return [
            Fork(parent.claim, len(children))
            for parent, children in self._forks.values()
            if parent.claim is not None
        ]

    def take(self, fork: Fork, claims: Sequence[Claim]) -> bool:
        """Let lanes go on with the claims of a fork.

        False: it was refused, or the search has begun anew; the claims are to be released.
        """
        for parent, children in self._forks.values():
            if parent.claim is not fork.claim:
                continue
            parent.is_forked = False
            del self._forks[id(parent)]
            if len(claims) < len(children):
                return False
            for (child, text), claim in zip(children, claims, strict=True):
                child.go_on_from(parent, claim, text)
            return True
        return False

    def finished(self, tokenizer: Any) -> Finished:
        """Tell what was found."""
        best = self._best[: self.num_answers]
        beams = tuple(
            Beam(one.tokens, _text(tokenizer, one), one.reason, one.score) for one in best
        )
        reads = sum((lane.kv_reads for lane in self._made), KvReads())
        return replace(
            finished(self.first),
            tokens=beams[0].tokens,
            text=beams[0].text,
            reason=beams[0].reason,
            beams=beams,
            num_computed=sum(lane.num_computed for lane in self._made),
            kv_read_bytes=round(reads.read_bytes),
            kv_alone_bytes=reads.alone_bytes,
        )

    @property
    def _is_full(self) -> bool:
        return len(self._best) == self.how.width

    def _new_lane(self) -> Job:
        first = self.first
        made = Job(first.request, first.stream, first.stop_ids, first.max_new_tokens)
        self._made.append(made)
        return made

    def _ranked(self, logits: Tensor) -> list[Move]:
        """Give what may come next over all lanes, best first.

        Of each lane as many as can be among the best `width` that go on.
        """
        count = min(self.how.width + len(self.first.stop_ids), logits.shape[1])
        values, tokens = logits.topk(count)
        shares = values.double() - logits.double().logsumexp(-1, keepdim=True)
        moves = [
            Move(lane, token, total + share)
            for lane, (total, its_tokens, its_shares) in enumerate(
                zip(self._totals, tokens.tolist(), shares.tolist(), strict=True)
            )
            for token, share in zip(its_tokens, its_shares, strict=True)
            if isfinite(share)
        ]
        return sorted(moves, key=lambda move: -move.total)

    def _finish(self, ending: Sequence[Move], length: int) -> None:
        """Take texts that end here, and keep the best ones."""
        for lane, token, total in ending:
            job = self.lanes[lane]
            answer = (*job.tokens[job.num_prompt :], token)
            reason = "stop" if token in job.stop_ids else "length"
            score = total / length**self.how.length_penalty
            self._best.append(_Finished(score, answer, reason))
        self._best.sort(key=lambda one: -one.score)
        del self._best[self.how.width :]

    def _may_improve(self, best: float, length: int) -> bool:
        """Tell whether the search goes on: the likeliest lane may come to a better end."""
        if not self._is_full:
            return True
        how = self.how
        if how.early_stopping is True:
            return False
        if how.early_stopping == "never" and how.length_penalty > 0:
            length = self.first.max_new_tokens
        return bool(best / length**how.length_penalty > self._best[-1].score)


def _text(tokenizer: Any, found: _Finished) -> str:
    if tokenizer is None:
        return ""
    tokens = found.tokens[:-1] if found.reason == "stop" else found.tokens
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
