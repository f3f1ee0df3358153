"""How far blended answers are from those of a full prefill, by policy; and what is good enough.

```
full prefill      prompt ──────────► a n s w e r          greedy
blended           exact moved new ─► the same answer, read: logits before each of its tokens
                                     KL(full || blended), the most likely token
```
As long as the most likely token is that of the full prefill, the blended answer is the same one: so
one reading of it tells whether a greedy answer stays the same, and until where.

**The threshold** is for the mean of the divergence over the answers' positions, and a policy
reaches it when it does so with every kind of text: a mean over all would hide that one kind is
ruined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache import user_folders
from prefixcache.certificates import FORMAT
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.plain_json import json_text
from prefixcache.private_files import own_folder
from prefixcache.types import unpack
from prefixcache_kernels.rotary import Rotary
from prefixcache_worker import smollm2
from prefixcache_worker.model import Model
from prefixcache_worker.segments.blend import BLOCK_SIZE, Blend, angles_of
from prefixcache_worker.segments.moved import POLICIES, Policy, find
from prefixcache_worker.segments.texts import Text, Texts

LEAST: Final = 2 * BLOCK_SIZE - 1
"""Tokens of a run that always holds a whole block, wherever it begins: shorter ones may be found,
or not."""
THRESHOLD: Final = 0.01
"""Nats per token."""
_NOTHING: Final = 1e-6
"""Largest divergence that rounding explains, in nats, where everything was computed again."""

Step = Callable[[Text, Policy], None]


def load(source: str, threads: int = 1) -> tuple[Model, tuple[Rotary, ...]]:
    """Load a model in float32, with the angles of each layer, and hold it to them.

    Raises:
        Unsupported: it runs on no paged memory, or its keys cannot be moved; the message says why.
        NotFound: nothing can be loaded from there.
    """
    from transformers import AutoConfig

    if source == smollm2.NAME:
        source = str(smollm2.folder())
    model = Model.load(source, threads=threads)
    return model, angles_of(AutoConfig.from_pretrained(source), model)


def certify(
    model: Model,
    angles: Sequence[Rotary],
    texts: Texts,
    *,
    threshold: float = THRESHOLD,
    num_answer: int = 24,
    on_step: Step = lambda text, policy: None,
) -> dict[str, Any]:
    """Run all texts through a model with every policy; give the certificate.  Changes nothing.

    Minutes for a small model on a CPU: of each text, all that is stored, a full prefill, and about
    four more of what is computed again.

    Args:
        model: in float32.
        angles: of each layer.
        texts: what is compared on.
        threshold: see above, in nats per token.
        num_answer: tokens of an answer, at most.
        on_step: told after each policy of a text.

    Raises:
        InvalidRequest: a text has nothing to move, or is too long for the model.
        Unsupported: a blend in which everything was computed again differs from a full prefill.
    """
    rows = []
    for text in texts.all:
        rows += _compare(model, angles, text, num_answer, on_step)
    kinds = list(dict.fromkeys(text.kind for text in texts.all))
    policies = []
    for policy in POLICIES:
        mine = [row for row in rows if row["policy"] == str(policy)]
        by_kind = {
            kind: _summary([row for row in mine if row["kind"] == kind], threshold)
            for kind in kinds
        }
        whole = _summary(mine, threshold)
        whole["reaches"] = all(one["reaches"] for one in by_kind.values())
        policies.append({"policy": str(policy), **whole, "kinds": by_kind})
    return {
        "format": FORMAT,
        "model": model.name,
        "dtype": model.layout.dtype,
        "network": model.kind,
        "texts": texts.digest,
        "num_texts": len(texts.all),
        "least_run": LEAST,
        "threshold_kl": threshold,
        "reached_by": reached_by(policies),
        "policies": policies,
        "rows": [{key: one for key, one in row.items() if key != "kl"} for row in rows],
    }


def reached_by(policies: Sequence[dict[str, Any]]) -> list[str]:
    """Give the policies that reach the threshold and spare work with every kind of text.

    The cheapest first: by what is computed again of the kind of which it spares least.
    """
    cost = {
        one["policy"]: max(of["again_share"] for of in one["kinds"].values()) for one in policies
    }
    reaching = [one["policy"] for one in policies if one["reaches"] and cost[one["policy"]] < 1]
    return sorted(reaching, key=cost.__getitem__)


def _compare(
    model: Model, angles: Sequence[Rotary], text: Text, num_answer: int, on_step: Step
) -> list[dict[str, Any]]:
    """Run one text with every policy."""
    where = f"text {text.name!r} ({text.kind})"
    stored = [unpack(model.prompt(one).tokens).tolist() for one in text.stored]
    prompt = unpack(model.prompt(text.asked).tokens).tolist()
    found = find(prompt, stored, LEAST)
    moved = found.positions
    if not moved:
        raise InvalidRequest(
            f"{where} has no run of {LEAST} tokens that is stored elsewhere: it would show nothing"
        )
    blend = Blend(model, angles, stored, prompt, found, num_answer)
    want = blend.logits.double().log_softmax(-1)
    rows = []
    for policy in POLICIES:
        again = policy.again(found, blend.deviation)
        kl, same = divergence(want, blend.blended(again).double().log_softmax(-1))
        if policy.kind == "all" and float(kl.max()) > _NOTHING:
            raise Unsupported(
                f"{where}: with everything computed again the answer is {float(kl.max()):.1e} nats "
                "from that of a full prefill; this model's keys cannot be put together"
            )
        num_same = int(same.long().cumprod(0).sum())
        rows.append(
            {
                "kind": text.kind,
                "name": text.name,
                "policy": str(policy),
                "prompt_tokens": len(prompt),
                "exact_tokens": found.num_exact,
                "moved_tokens": len(moved),
                "again_share": policy.share(len(again), len(moved), model.layout.num_layers),
                "kl": kl,
                "kl_mean": float(kl.mean()),
                "kl_max": float(kl.max()),
                "answer_tokens": len(kl),
                "same_best_tokens": int(same.sum()),
                "same_first_tokens": num_same,
            }
        )
        on_step(text, policy)
    return rows


def divergence(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Compare log-probabilities `[T, vocab]`: KL in nats, and whether the likeliest is the same."""
    apart = (want.exp() * (want - got)).sum(-1).clamp(min=0)
    return apart, want.argmax(-1) == got.argmax(-1)


def _summary(rows: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Add up the texts of one policy: over all positions of all answers."""
    kl = torch.cat([row["kl"] for row in rows])
    moved = sum(row["moved_tokens"] for row in rows)
    again = sum(row["again_share"] * row["moved_tokens"] for row in rows)
    mean = float(kl.mean())
    return {
        "again_share": again / moved,
        "kl_mean": mean,
        "kl_p95": float(kl.quantile(0.95)),
        "kl_max": float(kl.max()),
        "kl_worst_text": max(row["kl_mean"] for row in rows),
        "same_best_share": sum(row["same_best_tokens"] for row in rows) / len(kl),
        "same_answers": sum(row["same_first_tokens"] == row["answer_tokens"] for row in rows),
        "num_answers": len(rows),
        "reaches": mean <= threshold,
    }


def place_of(name: str) -> Path:
    """Give the file in which the certificate of a model is kept.

    Raises:
        InvalidRequest: this user has no home.
    """
    return user_folders.state() / "prefixcache" / "segments" / f"{name.replace('/', '--')}.json"


def keep(certificate: dict[str, Any], path: Path | None = None) -> Path:
    """Write a certificate, in one piece; an earlier one is replaced.  Gives the file.

    Raises:
        InvalidRequest: it cannot be written.
    """
    file = path or place_of(certificate["model"])
    try:
        if path is None:
            own_folder(file.parent)
        fresh = file.with_name(f"{file.name}.new")
        fresh.write_text(json_text(certificate, indent=1) + "\n", encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        raise InvalidRequest(f"cannot write {file}: {error.strerror}") from None
    return file


def lines_of(certificate: dict[str, Any]) -> list[str]:
    """Write a certificate for people."""
    policies, limit = certificate["policies"], certificate["threshold_kl"]
    kinds = list(policies[0]["kinds"])
    answers = policies[0]["num_answers"]
    tokens = sum(row["answer_tokens"] for row in certificate["rows"]) // len(policies)
    lines = [
        f"{certificate['model']}, {certificate['dtype']}: {answers} texts, {tokens} tokens of "
        "answers; KL in nats per token",
        "",
        f"{'policy':<15}{'computed again':>14}{'KL mean':>10}{'p95':>8}{'max':>8}"
        f"{'worst text':>12}{'same best token':>17}{'same answers':>14}",
        *(
            f"{one['policy']:<15}{one['again_share']:>12.0%}  {one['kl_mean']:>10.4f}"
            f"{one['kl_p95']:>8.3f}{one['kl_max']:>8.3f}{one['kl_worst_text']:>12.4f}"
            f"{one['same_best_share']:>17.1%}{one['same_answers']:>8} of {answers:<3}"
            for one in policies
        ),
        "",
        f"{'KL mean by kind':<15}" + "".join(f"  {kind:>12}" for kind in kinds),
        *(
            f"{one['policy']:<15}"
            + "".join(f"  {_marked(of):>{max(12, len(kind))}}" for kind, of in one["kinds"].items())
            for one in policies
        ),
        f"{'':<15}(in brackets: above {limit:g})",
        "",
    ]
    reached = certificate["reached_by"]
    if reached:
        lines.append(f"KL of at most {limit:g} with every kind of text: {', '.join(reached)}")
    else:
        lines.append(
            f"no policy that spares work stays at a KL of {limit:g} with every kind of text: "
            "refused"
        )
    for kind in kinds:
        of = {one["policy"]: one["kinds"][kind] for one in policies}
        spared = [name for name in of if of[name]["reaches"] and of[name]["again_share"] < 1]
        best = min(spared, key=lambda name: of[name]["again_share"], default=None)
        lines.append(
            f"  {kind}: "
            + (f"{best}, {of[best]['again_share']:.0%} computed again" if best else "only all")
        )
    return lines


def _marked(summary: dict[str, Any]) -> str:
    mean = f"{summary['kl_mean']:.4f}"
    return f" {mean} " if summary["reaches"] else f"({mean})"
