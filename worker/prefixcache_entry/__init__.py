"""Where `prefixcache` begins: a Ctrl-C while everything is imported ends it without a traceback.

Beside `prefixcache`, not in it: to import anything of that takes longer than all of this.
"""

from __future__ import annotations

import _signal  # what `signal` is made of; that would import for some milliseconds, too


def main() -> None:
    """Import the command line, and run it."""
    before = _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from prefixcache.cli.main import main as run

    _signal.signal(_signal.SIGINT, before)
    run()
