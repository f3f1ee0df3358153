"""A proxy before a Valkey server that lies: what passes back is not always what the server said.

```
$8320 … bytes      a bit of it flipped │ another object in its place │ cut short │ "there is none"
:1  :0             the other of the two
any answer         in its midst the line is cut │ it comes late │ it never comes (`mute`)
```
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from random import Random

from chaos.proxy import Proxy

LIED, DENIED = 0.5, 0.1
"""Share of the objects that are others, and of the other answers that are lies, while it lies."""
LATE_S = (0.0, 0.0, 0.02, 0.2)
"""How late answers come, while it is slow."""
CUT = 0.02
"""Share of the answers in which the line is cut, while lines are cut."""


class Liar(Proxy):
    """Passes on what is asked; what comes back as its mood is.

    Args:
        listen: path of the socket that is used.
        target: path of the server's.
        random: Chooses.
    """

    def __init__(self, listen: Path, target: Path, random: Random) -> None:
        self.mood = ""
        """`lies`, `slow` or `cuts`; nothing: all is passed on as it is."""
        self.told: Counter[str] = Counter()
        """How often it did what."""
        self._random = random
        self._other = b""
        super().__init__(listen, target)

    @property
    def address(self) -> str:
        """Where it is, as `serve --remote` takes it."""
        return f"valkey+unix://{self._listen}"

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n")
                body = b""
                if head.startswith(b"$") and head != b"$-1\r\n":
                    body = await reader.readexactly(int(head[1:]) + 2)
                await self._speaks.wait()
                if self.mood == "slow":
                    await asyncio.sleep(self._random.choice(LATE_S))
                answer = head + body
                if self.mood == "lies" and self._random.random() < (LIED if body else DENIED):
                    answer = self._lie(head, body[:-2]) if body else self._deny(head)
                elif self.mood == "cuts" and self._random.random() < CUT:
                    self.told["cut off"] += 1
                    writer.write(answer[: len(answer) // 2])
                    await writer.drain()
                    writer.transport.abort()
                    return
                self.told["answers"] += 1
                self._other = body[:-2] or self._other
                writer.write(answer)
                await writer.drain()

    def _deny(self, head: bytes) -> bytes:
        """Say the opposite of what is there and what is not."""
        turned = {b":0\r\n": b":1\r\n", b":1\r\n": b":0\r\n"}.get(head, head)
        self.told["denied"] += turned != head
        return turned

    def _lie(self, head: bytes, body: bytes) -> bytes:
        """Give something else for an object."""
        kind = self._random.choice(("flipped", "another's", "truncated", "withheld"))
        self.told[kind] += 1
        if kind == "withheld":
            return b"$-1\r\n"
        if kind == "flipped":
            at, bit = self._random.randrange(len(body)), 1 << self._random.randrange(8)
            body = body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :]
        elif kind == "another's":
            body = self._other or body
        else:
            body = body[: self._random.randrange(len(body))]
        return b"$%d\r\n%b\r\n" % (len(body), body)
