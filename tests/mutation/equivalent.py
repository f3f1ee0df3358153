"""Mutants that are no faults: nothing that anybody may rely on becomes different.  Why, for each.

`file: Class.method: before  ->  after`, as `mutation.run` prints one that survived.
"""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "history.py: IdleClock.note: half = self._most // 2  ->  half = self._most // 3": (
        "how many readings go at once is nobody's promise; their bytes stay within the budget"
    ),
    "node.py: common_prefix: step = 256  ->  step = 257": (
        "how far it looks at once is a matter of speed: the first byte that differs is the same"
    ),
    "lease.py: LeaseTable.__init__: self._next = 0  ->  self._next = 1": (
        "numbers of leases are only told apart"
    ),
    "policies/lru_list.py: LruList.enter: len(order) > 2 * len(counts) + _SPARE"
    "  ->  len(order) >= 2 * len(counts) + _SPARE": "it tidies up one use earlier",
    "lease.py: : renewed_until: float = 0.0  ->  renewed_until: float = 1.0": (
        "who attaches renews at once: no lease is ever measured against it"
    ),
    "eviction.py: : block_bytes = 4  ->  block_bytes = 5": "the tree sets it before any hook",
    "policies/w_tinylfu.py: WTinyLfu.__init__: self._stamp = 0  ->  self._stamp = 1": (
        "only a leaf that was used is moved by it, and the first use sets it"
    ),
    "policies/cost.py: CostAware.__init__: self._level = 0.0  ->  self._level = 1.0": (
        "every level is one higher: keys are only compared, and what was never used stays first"
    ),
    "bulk_load.py: load: for age, (run, cuts) in enumerate(zip(ordered, _cuts(ordered, followers),"
    " strict=True), 1):  ->  for age, (run, cuts) in enumerate(zip(ordered, _cuts(ordered,"
    " followers), strict=True), 2):": "ages are only compared",
    "inflight.py: Inflight.find: for prompt, _, lease in below[max(0, at - 1):at + 1]:  ->  "
    "for prompt, _, lease in below[max(0, at - 2):at + 1]:": (
        "it looks at one more, which never shares more than its neighbour"
    ),
    "node.py: common_prefix: high - low > _WORD  ->  high - low >= _WORD": (
        "how far it looks at once is a matter of speed: the first byte that differs is the same"
    ),
    "kv_events.py: Replay.__init__: self._steps = 0  ->  self._steps = 1": (
        "only the first pause comes one step earlier"
    ),
    "account.py: Account.retire: sums.num_blocks += sign * root.num_blocks"
    "  ->  sums.num_blocks -= sign * root.num_blocks": (
        "of these two only the sum of both is told, and that stays"
    ),
    "bulk_load.py: _count_followers: followers[blocks[goes_on & (followers[blocks] > 0)]] += 1"
    "  ->  followers[blocks[goes_on & (followers[blocks] > 0)]] += 2": (
        "it is only asked whether there is none, one, or several"
    ),
    "cache.py: PrefixCache.observe: IndexListeners(tree.listener, listener)"
    "  ->  IndexListeners(listener, tree.listener)": "who hears first is nobody's promise",
    "ghosts.py: Ghosts.adopt_children: joined <= _MERGED_UNTIL"
    "  ->  joined < _MERGED_UNTIL": "a chain that is one block longer or shorter knows the same",
    "history.py: RequestLog.add: if size > most >> 1 or size + self.prompt_bytes > most or "
    "len(records) > _MOST_REQUESTS:  ->  if size > most >> 2 or size + self.prompt_bytes > most or "
    "len(records) > _MOST_REQUESTS:": "it looks more often whether something has to go",
    "inflight.py: Inflight.find: for prompt, _, lease in below[max(0, at - 1):at + 1]:  ->  "
    "for prompt, _, lease in below[max(0, at - 1):at + 2]:": (
        "it looks at one more, which never shares more than its neighbour"
    ),
    "node.py: Children.nearest: same > most  ->  same >= most": (
        "which one of two that share as much is nobody's promise"
    ),
    "node.py: Root.__init__: self.num_changes = 0  ->  self.num_changes = 1": (
        "it is only compared with what it was"
    ),
    "node.py: Root.__init__: super().__init__(b'', array('i'), None, 0)"
    "  ->  super().__init__(b'', array('i'), None, 1)": "a root has no age: it is never evicted",
    "policies/lfu.py: Lfu.key: return ((node.mark or 0) << 64) + node.last_used"
    "  ->  return ((node.mark or 0) << 65) + node.last_used": "any shift beyond the clock will do",
    "policies/s3fifo.py: S3Fifo.__init__: self._stamp = 0  ->  self._stamp = 1": (
        "only what was used is moved by it, and the first use sets it"
    ),
    "policies/two_queue.py: TwoQueue.__init__: self._num_out = 0  ->  self._num_out = 1": (
        "a clock, of which only differences count"
    ),
    "policies/two_queue.py: : _IN, _MAIN, _OUT = (0, 1, 2)  ->  _IN, _MAIN, _OUT = (0, 1, 3)": (
        "the number of a kind that has no lane is only told apart"
    ),
    "wait_queue.py: WaitQueue._go_on_calling: if not heap or (indexed is not None and "
    "heap[0][0] > indexed):  ->  if not heap or (indexed is not None and heap[0][1] > indexed):": (
        "who is called too early is tried, and waits on"
    ),
    "shares.py: Shares.__init__: self._kept = 0  ->  self._kept = 1": (
        "it is asked for known tenants alone, and whoever makes them known sets it"
    ),
    "policies/w_tinylfu.py: WTinyLfu.__init__: self._epoch = 0  ->  self._epoch = 1": (
        "a clock, of which only differences count"
    ),
    "policies/hazard.py: AgeGrid.age: if cell < 0:  ->  if cell < 1:": (
        "the first cell is that of the youngest age: nothing grows older into it"
    ),
    "bulk_load.py: _is_superfluous: len(node.tokens) >= tree.block_bytes"
    "  ->  len(node.tokens) > tree.block_bytes": "no two whole blocks below a run are the same",
    "introspect.py: block_map: cells = np.concatenate([painted, np.full(short, len(STATES), "
    "np.uint8)]).reshape(-1, each)  ->  cells = np.concatenate([painted, np.full(short, "
    "len(STATES), np.uint8)]).reshape(-2, each)": "numpy takes each negative size for the open one",
    "ledger.py: settle: stored < left  ->  stored <= left": (
        "of equals nothing is left that ghosts could be counted in"
    ),
    "block_pool.py: LastTenant._number: self._last += 1  ->  self._last += 2": (
        "numbers of tenants are only told apart"
    ),
    "block_manager.py: BlockManager.plan: def plan(self, match: Match, num_blocks: int, "
    "account: Account, min_partial: int=0) -> tuple[int, BlockId | None]:  ->  def plan(self, "
    "match: Match, num_blocks: int, account: Account, min_partial: int=1) -> "
    "tuple[int, BlockId | None]:": "what is there in part is at least one token",
    "cache.py: PrefixCache.__init__: if not 1 <= block_size <= 1024 or block_size & block_size - 1:"
    "  ->  if not 1 <= block_size <= 1025 or block_size & block_size - 1:": (
        "1,025 is no power of two"
    ),
    "introspect.py: Walk._branches: one.kept = {}  ->  removed": (
        "when memory is given back is a matter of speed"
    ),
    "introspect.py: Walk._is_pause: self._steps += 1  ->  self._steps -= 1": (
        "it counts down, and pauses as often"
    ),
    "account.py: Account.retire: sums.num_blocks += sign * root.num_blocks  ->  removed": (
        "of these two only the sum of both is told, and that stays"
    ),
    "inflight.py: Inflight.add: root.num_changes += 1  ->  root.num_changes += 2": (
        "it is only asked whether it has changed"
    ),
    "invariants.py: _Walk.run: if self._is_due(1 + len(lease.table) // _BLOCKS_IN_ONE_GO):"
    "  ->  if self._is_due(2 + len(lease.table) // _BLOCKS_IN_ONE_GO):": (
        "when it pauses is a matter of speed"
    ),
    "kv_events.py: Replay._walk: self._steps = 0  ->  self._steps = 1": (
        "it pauses one step earlier"
    ),
    "lease.py: Lease.__init__: self.committed = 0  ->  self.committed = 1": (
        "whoever opens a lease says at once what it has"
    ),
    "policies/hazard.py: LruReference.compare: self._behind > max(_BEHIND * self._seen, 2 * run)"
    "  ->  self._behind >= max(_BEHIND * self._seen, 2 * run)": (
        "which of the two leads at the very threshold is nobody's promise"
    ),
    "policies/w_tinylfu.py: : num_lanes: ClassVar[int] = 3  ->  num_lanes: ClassVar[int] = 4": (
        "a lane that nobody enters"
    ),
}
