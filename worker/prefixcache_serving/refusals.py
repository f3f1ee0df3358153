"""What a client is told when it gets no answer, in OpenAI's words.

```
{"error": {"message": ..., "type": ..., "param": the field or null, "code": ... or null}}
400  the request can never be answered as it is      408  the body did not come
401  no key, or one that is none                     413  the body is too long
404  no such path, no such model                     415  the body is not JSON in UTF-8
405  another method                                  421  a host name that is not served here
429  the queue is full: come again after so long     500  given up, a fault of ours
                                                     503  no worker, or going down
```
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from prefixcache.errors import CacheError, InvalidRequest, PoolExhausted, Unsupported


class Refused(CacheError):
    """A request that is not answered.

    Args:
        message: what, how much, what to do.
        param: the field that it is about.
        code: OpenAI's short word for it, or ours.
        status: of HTTP.
        kind: OpenAI's `type`; by default what goes with the status.
        retry_after_s: when to come again; 0: not said.
    """

    code: ClassVar[str] = "INVALID_ARGUMENT"
    _KINDS: ClassVar[dict[int, str]] = {
        401: "authentication_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "server_error",
    }

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.word = code
        self.status = status
        self.kind = self._KINDS.get(status, "invalid_request_error")
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """Give the body of the answer."""
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.word}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """Give the headers that go with it."""
        headers = {}
        if self.retry_after_s > 0:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def refusal_of(error: CacheError, param: str | None = None) -> Refused:
    """Turn another error of ours into what a client is told."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InvalidRequest | Unsupported):
        return Refused(str(error), param=param, code="invalid_value")
    if isinstance(error, PoolExhausted):
        return Refused(str(error), status=429, retry_after_s=max(1.0, error.retry_after_s))
    return Refused(str(error), status=503, retry_after_s=1.0)
