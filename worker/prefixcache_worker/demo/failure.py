"""What can go wrong in the demo itself, beside a wrong answer and a process that fails.

```
DemoError
├── RequestFailed   a worker refused a request, or no worker is left
├── CrashMissed     there was nothing to kill, or the dead worker's leases have not ended
└── WorkerDied      the worker ended before it had answered; the request is sent again
```
"""

from __future__ import annotations


class DemoError(Exception):
    """Base of the demo's own failures."""


class RequestFailed(DemoError):
    """A worker refused a request or could not finish it."""


class CrashMissed(DemoError):
    """There was nothing to kill, or the service did not take back what the dead worker held."""


class WorkerDied(DemoError):
    """The worker ended before it had answered."""
