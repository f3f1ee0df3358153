"""What `prefixcache up` says of itself: a line for people, or, with `--json`, one for programs.

```
w1 (pid 4101) is ready after 6.2 s
{"event":"worker_ready","at":1795998443.2,"worker":"w1","pid":4101,"seconds":6.2,"message":...}
```
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache.texts import escape

EVENTS: Final = {
    "starting": "where requests will be answered, and by what",
    "service": "the service is there; is_ours: it was started here, and ends with this",
    "service_ended": "it has ended by itself, and is started again",
    "service_failed": "it could not be started again; retry_s",
    "loading": "workers are still loading; seconds",
    "worker_ready": "it gets requests; pid, seconds",
    "worker_failed": "it could not be started; retry_s",
    "worker_ended": "it has ended, and another one takes its place; pid, exit_code",
    "worker_drained": "it is being replaced; pid",
    "worker_stopped": "a signal has stopped it: its answers go on elsewhere; pid",
    "worker_stuck": "it makes no step: its answers go on elsewhere; pid",
    "worker_back": "it goes on, and gets requests again; pid",
    "worker_killed": "it did not come back; pid",
    "renewing": "the workers are being replaced already",
    "renewed": "all workers are new",
    "ready": "requests are answered; url, model, workers",
    "ending": "nothing new is begun; requests",
    "unfinished": "requests that did not finish in time, and are told so; requests",
    "ended": "no process is left",
    "failed": "it cannot go on, or could not begin",
}
"""All that may be said."""


class Notice:
    """One thing that is said.

    Args:
        event: of `EVENTS`.
        message: for people.
        fields: for programs; those of a worker name it as `worker`.
    """

    def __init__(self, event: str, message: str, **fields: Any) -> None:
        assert event in EVENTS
        self.event = event
        self.message = message
        self.fields = fields

    def line(self) -> str:
        """Write it for programs."""
        told = {"event": self.event, "at": round(time.time(), 3), **self.fields}
        return json_text(told | {"message": self.message}, separators=(",", ":"))


Say = Callable[[Notice], None]


def say_to_people(notice: Notice) -> None:
    """Write a line on stderr; what a failed process wrote keeps its lines."""
    if not notice.message:
        return
    text = "\n".join(map(escape, notice.message.split("\n")))
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def say_to_programs(notice: Notice) -> None:
    """Write a line of JSON on stdout."""
    with suppress(OSError, ValueError):
        sys.stdout.write(f"{notice.line()}\n")
        sys.stdout.flush()
