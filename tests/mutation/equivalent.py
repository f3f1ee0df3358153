"""Mutants that are no faults: nothing that anybody may rely on becomes different.  Why, for each.

`file: Class.method: before  ->  after`, as `mutation.run` prints one that survived.
"""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "history.py: IdleClock.note: half = self._most // 2  ->  half = self._most // 3": (
        "how many readings go at once is nobody's promise; their bytes stay within the budget"
    ),
    "node.py: common_prefix: step = 256  ->  step = 257": (
        "how far it looks at once is a matter of speed: the first byte that differs is the same"
    ),
    "lease.py: LeaseTable.__init__: self._next = 0  ->  self._next = 1": (
        "numbers of leases are only told apart"
    ),
    "policies/lru_list.py: LruList.enter: len(order) > 2 * len(counts) + _SPARE"
    "  ->  len(order) >= 2 * len(counts) + _SPARE": "it tidies up one use earlier",
    "lease.py: : renewed_until: float = 0.0  ->  renewed_until: float = 1.0": (
        "who attaches renews at once: no lease is ever measured against it"
    ),
    "eviction.py: : block_bytes = 4  ->  block_bytes = 5": "the tree sets it before any hook",
    "policies/w_tinylfu.py: WTinyLfu.__init__: self._stamp = 0  ->  self._stamp = 1": (
        "only a leaf that was used is moved by it, and the first use sets it"
    ),
    "policies/cost.py: CostAware.__init__: self._level = 0.0  ->  self._level = 1.0": (
        "every level is one higher: keys are only compared, and what was never used stays first"
    ),
    "bulk_load.py: load: for age, (run, cuts) in enumerate(zip(ordered, _cuts(ordered, followers),"
    " strict=True), 1):  ->  for age, (run, cuts) in enumerate(zip(ordered, _cuts(ordered,"
    " followers), strict=True), 2):": "ages are only compared",
    "inflight.py: Inflight.find: for prompt, _, lease in below[max(0, at - 1):at + 1]:  ->  "
    "for prompt, _, lease in below[max(0, at - 2):at + 1]:": (
        "it looks at one more, which never shares more than its neighbour"
    ),
    "node.py: common_prefix: high - low > _WORD  ->  high - low >= _WORD": (
        "how far it looks at once is a matter of speed: the first byte that differs is the same"
    ),
    "kv_events.py: Replay.__init__: self._steps = 0  ->  self._steps = 1": (
        "only the first pause comes one step earlier"
    ),
    "ledger.py: settle: stored < left  ->  stored <= left": (
        "of equals nothing is left that ghosts could be counted in"
    ),
}
