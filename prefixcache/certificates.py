"""Certificates: what `prefixcache verify-segments` found out, and whose segments that allows.

```
certificate of a model   policy         KL by kind of text            at a threshold of 0.01
                         none           0.002  0.134  0.018  0.198    refused: 0.198
                         deviation 70%  0.001  0.008  0.000  0.005    allowed
```
A policy is allowed where its mean divergence is within the threshold with every kind of text, by
the numbers of the certificate: with which threshold that was made does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Final

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.plain_json import TwiceNamed, once_each
from prefixcache.types import Again, Layout, Namespace, shown

FORMAT: Final = "prefixcache segments 1"
_MOST_BYTES: Final = 16 << 20
_MOST_FILES: Final = 1000
_NAME: Final = re.compile(r"none|first (\d{1,6})|deviation (\d{1,3})%")
"""Of a policy that spares work; `all` does not."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one policy does to the answers of a model."""

    again: Again
    cost: float
    """Share of moved tokens' work that is done again, with the kind of text that spares least."""
    worst_kind: str
    worst_kl: float
    """Mean divergence with that kind of text, the worst, in nats per token."""

    def is_within(self, threshold: float) -> bool:
        """Whether it may be used."""
        return self.cost < 1 and self.worst_kl <= threshold


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured of one model."""

    model: str
    """Its name, with the digest of its weights."""
    dtype: str
    policies: tuple[Measured, ...]

    @classmethod
    def read(cls, file: Path) -> Certificate:
        """Read what `verify-segments` wrote.

        Raises:
            InvalidRequest: it cannot be read, or is no certificate; the message names the file.
        """
        data = read_file(file, _MOST_BYTES)
        try:
            value = json.loads(data, object_pairs_hook=once_each)
        except (ValueError, RecursionError, TwiceNamed) as error:
            raise InvalidRequest(f"{file} is no JSON: {error}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InvalidRequest(
                f"{file} is no certificate: prefixcache verify-segments MODEL writes one"
            )
        try:
            policies = [_measured(one) for one in value["policies"]]
            model, dtype = value["model"], value["dtype"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"{file} is no whole certificate: {shown(error)}") from None
        if not (isinstance(model, str) and model and isinstance(dtype, str)):
            raise InvalidRequest(f"{file} names no model and element type")
        return cls(model, dtype, tuple([one for one in policies if one is not None]))

    def cheapest(self, threshold: float) -> Again | None:
        """Give the policy that spares most of those that may be used; None: none may."""
        within = [one for one in self.policies if one.is_within(threshold)]
        return min(within, key=lambda one: one.cost).again if within else None

    def refuse_beyond(self, again: Again, threshold: float) -> None:
        """Check that a policy may be used.

        Raises:
            Unsupported: the certificate does not speak of it, or its divergence is larger.
        """
        known = {one.again: one for one in self.policies}
        found = known.get(again)
        if found is not None and found.is_within(threshold):
            return
        allowed = [str(one.again) for one in self.policies if one.is_within(threshold)]
        advice = f"allowed: {', '.join(allowed) or 'none'}"
        if found is None:
            raise Unsupported(
                f"the certificate of {self.model!r} says nothing of {str(again)!r}; {advice}"
            )
        raise Unsupported(
            f"segments of {self.model!r} by {str(again)!r}: "
            f"a divergence of {found.worst_kl:.4f} nats per token with {found.worst_kind!r}, "
            f"{threshold:g} allowed (--segments-threshold), and {found.cost:.0%} computed again; "
            f"{advice}"
        )


class Certificates:
    """Those of a service, by model.

    Args:
        known: by name of the model.
        threshold: nats per token.
    """

    def __init__(self, known: Mapping[str, Certificate], threshold: float) -> None:
        self._known = known
        self._threshold = threshold

    @classmethod
    def read(cls, place: Path, threshold: float) -> Certificates:
        """Read a certificate, or all of a folder (`*.json`).

        Raises:
            InvalidRequest: there is none, one cannot be read, two are of one model, or not one
                allows anything at this threshold: the message says by how much the best misses it.
        """
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not files or len(files) > _MOST_FILES:
            raise InvalidRequest(
                f"--segments {place}: {len(files):,} certificates in this folder; 1 to "
                f"{_MOST_FILES:,} are read. prefixcache verify-segments MODEL writes one."
            )
        known: dict[str, Certificate] = {}
        for file in files:
            one = Certificate.read(file)
            if one.model in known:
                raise InvalidRequest(f"--segments {place}: two certificates of {one.model!r}")
            known[one.model] = one
        if not any(one.cheapest(threshold) for one in known.values()):
            missed = [
                (measured.worst_kl, one.model, measured)
                for one in known.values()
                for measured in one.policies
                if measured.cost < 1
            ]
            best = min(missed, key=lambda row: row[:2], default=None)
            why = (
                "they name no policy that spares work"
                if best is None
                else (
                    f"the best is {str(best[2].again)!r} of {best[1]!r} with {best[0]:.4f} "
                    f"({best[2].worst_kind})"
                )
            )
            raise InvalidRequest(
                f"--segments {place}: no certificate reaches a divergence of {threshold:g} nats "
                f"per token (--segments-threshold): {why}"
            )
        return cls(known, threshold)

    def __str__(self) -> str:
        """Say what is allowed of which model, the cheapest policy with its divergence."""
        told = []
        for model, one in self._known.items():
            again = one.cheapest(self._threshold)
            worst = [each.worst_kl for each in one.policies if each.again == again]
            told.append(f"{model} by {again}, {worst[0]:.4f} nats" if worst else f"{model} none")
        return f"{'; '.join(told)} (at most {self._threshold:g})"

    def cheapest(self, namespace: Namespace, layout: Layout) -> Again | None:
        """Give the policy that spares most of those allowed in a namespace; None: none is."""
        known = self._known.get(namespace.model)
        if known is None or self._differs(known, namespace, layout):
            return None
        return known.cheapest(self._threshold)

    def refuse_beyond(self, namespace: Namespace, layout: Layout, again: Again) -> None:
        """Check that a request of a namespace may take segments by a policy.

        Raises:
            Unsupported: it may not; the message says why, with the numbers.
        """
        known = self._known.get(namespace.model)
        if known is None:
            raise Unsupported(
                f"segments of {namespace.model!r}: no certificate here is of this model, by that "
                "digest (prefixcache verify-segments makes one, serve --segments reads it)"
            )
        if why := self._differs(known, namespace, layout):
            raise Unsupported(f"segments of {namespace.model!r}: {why}")
        known.refuse_beyond(again, self._threshold)

    def _differs(self, known: Certificate, namespace: Namespace, layout: Layout) -> str:
        """Say why a certificate does not speak for a namespace; empty: it does."""
        if namespace.adapter:
            return f"its certificate is not of adapter {namespace.adapter!r}"
        if not layout.is_ours:
            return f"its certificate is not of pages in the format {layout.format}"
        if layout.dtype != known.dtype:
            return f"its certificate is of {known.dtype}, the pool holds {layout.dtype}"
        return ""


def _measured(value: Any) -> Measured | None:
    """Read a policy; None: one that spares nothing by its very name."""
    name = value["policy"]
    if name == "all":
        return None
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"policy {shown(name)}")
    first, share = found.groups()
    kinds = {
        str(kind): (float(of["kl_mean"]), float(of["again_share"]))
        for kind, of in value["kinds"].items()
    }
    if not kinds or not all(0 <= kl < inf and cost >= 0 for kl, cost in kinds.values()):
        raise ValueError(f"kinds of {shown(name)}")
    worst = max(kinds, key=lambda kind: kinds[kind][0])
    return Measured(
        Again(int(first or 0), int(share or 0) / 100),
        max(cost for _, cost in kinds.values()),
        worst,
        kinds[worst][0],
    )
