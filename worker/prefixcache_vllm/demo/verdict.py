"""What must have held, one line each, and the last line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from prefixcache.texts import many
from prefixcache_vllm.demo import ladder
from prefixcache_vllm.demo.runner import Outcome, Rest, told_rest
from prefixcache_worker.demo.compare import Verdict

MOST_OVER_PERCENT: Final = 2.0
"""Prompt tokens that may be computed beyond the ideal.  A request that was granted before another
committed the same tokens computes them again; nothing else does."""


@dataclass(frozen=True, slots=True)
class Held:
    """One promise, and whether it held."""

    name: str
    held: bool
    seen: str


def judge(outcome: Outcome, figures: dict[str, Any], *, may_be_late: bool = False) -> list[Held]:
    """Say what held.

    Args:
        outcome: what was seen.
        figures: of `report.figures`.
        may_be_late: whether the kill may have come after the prefill: a toy model is too fast for
            a busy machine.  Then nobody had to take over, and the line says so.
    """
    run, seen = outcome.shared, outcome.outage
    rungs = [rung for rungs in outcome.ladders for rung in rungs]
    found = [rung for rung in rungs if rung.kind != ladder.COLD]
    death = run.death
    over = figures["tokens_over_ideal_percent"]
    later = seen.again[1] if len(seen.again) > 1 else None
    return [
        Held(
            "answers are those of vLLM alone",
            outcome.verdict.identical,
            _compared(outcome.verdict),
        ),
        Held(
            "what another engine computed is reused to the token",
            bool(found) and all(rung.is_exact for rung in found),
            f"{sum(rung.is_exact for rung in found)} of {many(len(found), 'request')}",
        ),
        Held(
            "shared prefixes are computed once",
            over <= MOST_OVER_PERCENT,
            f"{figures['tokens_computed']:,} tokens computed, {figures['tokens_ideal']:,} are the "
            f"ideal: {over:+.2f} %",
        ),
        Held(
            "an engine killed in mid-prefill: the waiting one takes over",
            death is not None
            and (death.takeover_ms is not None if death.in_prefill else may_be_late),
            "nobody was killed"
            if death is None
            else f"{death.takeover_worker}, {death.takeover_ms:,.0f} ms after the kill"
            if death.takeover_ms is not None
            else "nobody took over"
            if death.in_prefill
            else "killed too late to meet it in mid-prefill: nobody had to",
        ),
        Held(
            "the service killed: what runs goes on",
            seen.went_on,
            f"{seen.answered_before} tokens before, "
            f"{0 if seen.running is None else len(seen.running.answer)} in the end",
        ),
        Held(
            "without a service a new request is answered",
            seen.meanwhile is not None and bool(seen.meanwhile.answer),
            "in spare blocks",
        ),
        Held(
            "engines join another service by themselves, and share through it",
            later is not None and later.ledger.reused > later.num_system // 2,
            "not asked"
            if later is None
            else f"{later.ledger.reused:,} of {len(later.prompt):,} tokens were another's",
        ),
        Held(
            "answers without the service, and after it, are those of vLLM alone",
            outcome.outage_verdict.identical,
            _compared(outcome.outage_verdict),
        ),
        *(_rest(rest) for rest in outcome.rests),
        Held(
            "no process, shared memory or file is left",
            not outcome.left,
            ", ".join(outcome.left) or "nothing is left",
        ),
    ]


def last_line(promises: Sequence[Held], figures: dict[str, Any]) -> str:
    """Sum it all up."""
    broken = [promise.name for promise in promises if not promise.held]
    if broken:
        return f"FAILED: {len(broken)} of {len(promises)} did not hold: {'; '.join(broken)}"
    found = figures["first_tokens"][ladder.OTHERS]["of_cold"]
    return (
        f"{many(figures['workers'], 'vLLM engine')}, one cache: {figures['requests']} requests, "
        f"{figures['tokens_computed']:,} of {figures['tokens_sent']:,} prompt tokens computed, "
        f"another engine's prefix in {found:.2f} of a cold first token, every answer that of vLLM "
        f"alone; all {len(promises)} held"
    )


def as_json(promises: Sequence[Held]) -> list[dict[str, Any]]:
    """Give them as a report has them."""
    return [asdict(promise) for promise in promises]


def _compared(verdict: Verdict) -> str:
    wrong = sum(not difference.tie for difference in verdict.differences)
    said = f"{many(verdict.num_compared, 'answer')}, {many(verdict.num_tokens, 'token')}"
    if verdict.numerical_ties:
        said += f", {many(verdict.numerical_ties, 'numerical tie')}"
    return said + (f", {many(wrong, 'difference')}" if wrong else "")


def _rest(rest: Rest) -> Held:
    return Held("nothing is kept by who has ended", rest.is_clean, told_rest(rest))
