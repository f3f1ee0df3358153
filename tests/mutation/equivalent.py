"""Mutants that are no faults: nothing that anybody may rely on becomes different.  Why, for each.

`file: Class.method: before  ->  after`, as `mutation.run` prints one that survived.
"""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "history.py: IdleClock.note: half = self._most // 2  ->  half = self._most // 3": (
        "how many readings go at once is nobody's promise; their bytes stay within the budget"
    ),
    "ledger.py: settle: stored < left  ->  stored <= left": (
        "of equals nothing is left that ghosts could be counted in"
    ),
}
