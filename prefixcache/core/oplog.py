"""The log of operations: what is needed to play the same life again in another cache.

A cache with a log puts one entry into it for each step that another cache would take too, in order.
Waiting, refusals, renewals and room are left out: what counts is which prompts were granted, which
tokens were computed when, and when leases ended, for whatever reason.

| entry | lease | number | data | namespace |
|---|---|---|---|---|
| granted | the new lease | tokens of its prompt that were reused | the prompt | its |
| committed | the lease | tokens that are committed now | new tokens | – |
| ended | the lease | 0 | – | – |
| forked | the child | the parent | – | – |
| truncated | the lease | tokens that are left | – | – |
| reset | 0 | 0 | – | which |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from prefixcache.types import Namespace

GRANTED: Final = 0
COMMITTED: Final = 1
ENDED: Final = 2
FORKED: Final = 3
TRUNCATED: Final = 4
RESET: Final = 5

Entry: TypeAlias = "tuple[int, int, int, bytes, Namespace | None]"
"""Kind, lease, number, data, namespace."""

Put: TypeAlias = "Callable[[Entry], object]"
"""Takes an entry; must be as quick as `deque.append`."""
