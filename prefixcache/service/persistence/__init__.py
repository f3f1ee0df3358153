"""What outlives the service: the pool, a stamp per block, and a manifest of what is in them.

```
DIR/pool       keys and values, mapped by the workers          memory, written by the workers
DIR/stamps     one word per block: may it be believed?         memory, written at once
DIR/manifest   which prefix is where, with checksums           SQLite, a few batches a second
```

The manifest may be behind, but never wrong: an entry counts only if the stamp of its block is the
one that it names, and if the checksum over tokens, place and bytes is right.
"""
