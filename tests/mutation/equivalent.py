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
    "ledger.py: settle: stored < left  ->  stored <= left": (
        "of equals nothing is left that ghosts could be counted in"
    ),
}
