"""API keys: who may ask, and whose prompts are kept apart.

```
# keys.txt, mode 600: a key, and its tenant if there are several
pfx-4f1c0e9a7b2d8c36e5a1    research
pfx-93b7d20c5e6f18a4b0c9    support
```
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest
from prefixcache.private_files import check_secret
from prefixcache.texts import check_text
from prefixcache_serving.refusals import Refused

_LONGEST: Final = 1 << 20
_SHORTEST_KEY: Final = 16
_LONGEST_KEY: Final = 512


class Keys:
    """The keys of a file.  What is kept are digests.

    Args:
        path: the file; None: nobody is asked.

    Raises:
        InvalidRequest: others can read it, or a line of it is none.
    """

    def __init__(self, path: Path | None) -> None:
        self._tenants: list[tuple[bytes, str]] = []
        self.is_open = path is None
        """Whether anybody may ask."""
        if path is not None:
            check_secret(path, "--api-keys")
            self._read(read_file(path, _LONGEST), path)

    @property
    def tenants(self) -> set[str]:
        """All who may ask; with an open door, one without a name."""
        return {tenant for _, tenant in self._tenants} or {""}

    def tenant(self, authorization: str) -> str:
        """Say whose a request is.  Takes equally long whatever the key; O(keys).

        Raises:
            Refused: 401; it is nobody's.
        """
        if self.is_open:
            return ""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise Refused(
                "no API key, or a wrong one: send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return found[0]

    def _read(self, data: bytes, path: Path) -> None:
        seen: set[bytes] = set()
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            where = f"--api-keys {path}, line {number}"
            if len(words) > 2:
                raise InvalidRequest(f"{where}: it takes a key and, perhaps, its tenant")
            key, tenant = words[0], words[1] if len(words) == 2 else ""
            is_key = key.isascii() and key.isprintable()
            if not is_key or not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
                raise InvalidRequest(
                    f"{where}: a key has {_SHORTEST_KEY} to {_LONGEST_KEY} printable ASCII signs; "
                    "make one with: openssl rand -hex 24"
                )
            check_text(tenant, f"{where}: the tenant")
            if (digest := _digest(key)) in seen:
                raise InvalidRequest(f"{where}: the key is there twice")
            seen.add(digest)
            self._tenants.append((digest, tenant))
        if not self._tenants:
            raise InvalidRequest(f"--api-keys {path} holds no key: nobody could ask")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
