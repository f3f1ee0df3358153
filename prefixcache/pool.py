"""The pool's memory: created by the service, mapped by every worker.  No torch here.

The file starts with one page that says what it is, so that a worker refuses a pool of another life:

```
bytes   0 ─────── 8 ────── 16 ─────────────── 4096 ───────────────────────────────── end
        magic     epoch     zero               [layer][key|value][block][slot][head][dim]
```

The owner keeps an exclusive `flock` on the file while it lives.  The kernel drops it however the
owner dies, so the next start can tell a dead owner's file from a living one's and removes it.
"""
