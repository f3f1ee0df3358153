"""Mutants that are no faults: nothing that anybody may rely on becomes different.  Why, for each.

`file: Class.method: before  ->  after`, as `mutation.run` prints one that survived.
"""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
