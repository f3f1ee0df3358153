"""How long tests wait for what must happen: a bound on hanging, never on slowness."""

from __future__ import annotations

from typing import Final

PATIENCE_S: Final = 120.0
"""A test that passes never waits as long, on whatever machine; one that hangs ends after it."""
