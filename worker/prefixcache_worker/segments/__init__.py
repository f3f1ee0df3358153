"""Moved segments: stored keys and values of the same tokens at another place, and what that costs.

```
texts.json ──► texts      stored prompts, and one that has much of them elsewhere
moved                     which of its tokens are stored where; which of those to compute again
blend                     that prompt in full, and put together from what is stored
certificate               how far the one is from the other, by policy; what reaches the threshold
command                   `prefixcache verify-segments`
```
"""
