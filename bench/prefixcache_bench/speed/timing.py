"""Can one tenant tell from timing what another has cached?  It must not be able to.

```
tenant a stores half of the prompts      tenant b asks for all of them, in random order, each once
                                         AUC: how well the time of an answer tells the halves apart
                                         0.5 is not at all
```
The same is measured for another salt of the same tenant, and, to see that the probe can see
anything, for the same namespace.

    python -m prefixcache_bench.speed.timing [--probes 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from time import perf_counter_ns

import numpy as np

import prefixcache
from prefixcache.client import Session
from prefixcache.config import parse_layout
from prefixcache.plain_json import json_text
from prefixcache.types import pack
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = "2x2x16:float32"
TOKENS = 512
LOWEST, HIGHEST = 0.45, 0.55


def auc(low: list[int], high: list[int]) -> float:
    """Give the chance that a random one of `high` is above a random one of `low`; ties are half.

    >>> auc([1, 2], [3, 4]), auc([1, 2], [1, 2])
    (1.0, 0.5)
    """
    order = np.sort(np.array(low))
    above = np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")
    return float(above.mean()) / (2 * len(low))


def store(session: Session, prompts: list[bytes]) -> None:
    """Commit prompts."""
    for prompt in prompts:
        with session.acquire(prompt) as lease:
            lease.commit(TOKENS)


def probe(session: Session, prompts: list[bytes], order: list[int]) -> dict[int, int]:
    """Ask for each prompt once; give the ns until the answer."""
    took: dict[int, int] = {}
    for index in order:
        began = perf_counter_ns()
        lease = session.acquire(prompts[index])
        took[index] = perf_counter_ns() - began
        lease.release()
    return took


def measure(num_probes: int, seed: int = 7) -> dict[str, float]:
    """Run everything; give the AUC for foreign prompts, for own ones, and with the same salt."""
    random = Random(seed)
    prompts = [pack([random.randrange(50_000) for _ in range(TOKENS)]) for _ in range(num_probes)]
    half = num_probes // 2
    warm, cold = range(half), range(half, num_probes)
    order = list(range(num_probes))
    random.shuffle(order)
    layout = parse_layout(LAYOUT)
    memory = str((4 * num_probes + 100) * TOKENS * layout.token_bytes)
    found: dict[str, float] = {}
    with (
        served("--memory", memory, layout=LAYOUT) as (target, _),
        prefixcache.connect(target) as client,
    ):
        one = client.attach("model", layout, tenant="one")
        two = client.attach("model", layout, tenant="two")
        salted = client.attach("model", layout, tenant="one", salt="another")
        same = client.attach("model", layout, tenant="one")
        store(one, [prompts[index] for index in warm])
        probe(two, [pack([9])], [0] * 50)
        for name, session in (("another tenant", two), ("another salt", salted)):
            took = probe(session, prompts, order)
            found[name] = auc([took[i] for i in warm], [took[i] for i in cold])
        took = probe(same, prompts, order)
        found["the same namespace"] = auc([took[i] for i in warm], [took[i] for i in cold])
    return found


def main() -> None:
    """Measure, print, and say whether it is as promised by the exit code."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.speed.timing", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--probes", type=int, default=2000, help="prompts, half of them stored")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    found = measure(options.probes)
    print(f"{options.probes:,} probes of {TOKENS} tokens; AUC of the time until the answer")
    for name, value in found.items():
        promise = "" if name == "the same namespace" else f"   promised {LOWEST} to {HIGHEST}"
        print(f"  asked from {name:<20} {value:.3f}{promise}")
    if options.json:
        options.json.write_text(json_text({"probes": options.probes, "auc": found}, indent=2))
    worst = [value for name, value in found.items() if name != "the same namespace"]
    raise SystemExit(0 if all(LOWEST <= value <= HIGHEST for value in worst) else 1)


if __name__ == "__main__":
    with ending_in_order():
        main()
