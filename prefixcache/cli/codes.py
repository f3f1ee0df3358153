"""What the exit code of a command says."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
EXIT_NEGATIVE: Final = 1
"""A negative answer: nothing is stored, something is wrong, it may not be."""
EXIT_USAGE: Final = 2
EXIT_NO_SERVER: Final = 3
EXIT_REFUSED: Final = 4
"""`serve` cannot have what it needs from the machine: memory, an address, a folder."""
EXIT_FAILED: Final = 5
"""Nobody foresaw it, or what was to be told could not be written."""
EXIT_INTERRUPTED: Final = 130
