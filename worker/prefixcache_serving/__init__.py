"""An OpenAI-compatible server of several workers on one pool, whose answers survive a worker.

```
clients ──HTTP──► front (asyncio, no torch)     tokens, templates, routing, text, usage, takeover
                    │ one pipe per worker        lines of `prefixcache worker`
                  w1   w2   w3                   each leases in the pool by itself
                    └────┴────┴──► prefixcache serve ──► one pool
```
`prefixcache up` starts what is missing and keeps it running.
"""
