"""Several answers to one prompt: the first one's lane computes it, the others find it.

```
lane 0   prompt ──► committed ──► answer 0
lane 1              └ asked ────► all but a token is found ──► answer 1
lane 2              └ asked ────► all but a token is found ──► answer 2
```
Without a service each computes it: a pool of its own shares nothing between requests.
"""

from __future__ import annotations

from dataclasses import replace

from prefixcache_worker.request import Request


def lanes_of(request: Request) -> list[Request]:
    """Give a request for each of its answers; each draws other numbers.

    Log-probabilities of the prompt are told once.
    """
    if request.n == 1 or request.beams is not None:
        return [request]
    how = request.sampling
    return [
        replace(
            request,
            sampling=replace(how, sample=how.sample + lane),
            prompt_logprobs=None if lane else request.prompt_logprobs,
        )
        for lane in range(request.n)
    ]
