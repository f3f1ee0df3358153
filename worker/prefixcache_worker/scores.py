"""How likely a model finds a text: each of its tokens, by the logits behind the one before.

```
prompt   a    b    c    d
logits   └─►b └─►c └─►d └─► the answer's first token
told     none -1.2 -0.3 -4.1
```
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from prefixcache_worker.sampling import Logprobs


def score(logits: Tensor, tokens: Sequence[int], num_top: int) -> tuple[Logprobs, ...]:
    """Give the log-probability of each row's token, and of the row's `num_top` most likely ones.

    Args:
        logits: float32 `[rows, vocab]`, as the model gave them.
        tokens: that came next.
        num_top: from 0 on; those that are impossible are left out.
    """
    totals = logits.logsumexp(-1).double()[:, None]
    own = logits.gather(1, torch.tensor(tokens)[:, None]).double() - totals
    values, best = logits.topk(min(num_top, logits.shape[1]))
    likely = (values.double() - totals).tolist()
    return tuple(
        Logprobs(logprob, tuple(pair for pair in zip(row, its, strict=True) if pair[1] > -inf))
        for [logprob], row, its in zip(own.tolist(), best.tolist(), likely, strict=True)
    )
