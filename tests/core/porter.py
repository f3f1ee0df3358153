"""A machine with a tier below the pool: a porter who copies blocks in his own time, or fails to."""

from __future__ import annotations

from typing import NamedTuple

from core.follower import Ears, Follower
from core.oracle import Holding, Tokens
from core.rules import NAMES, Draw, Rules
from core.world import LeaseView, Shape, World
from prefixcache.core.hauls import PORTER, Haul, Hauls
from prefixcache.types import TOKEN_BYTES, unpack


class Slot(NamedTuple):
    """What lies in a slot: the bytes of a block, and what was written beside them."""

    stamp: int
    tokens: bytes
    holdings: tuple[Holding | None, ...]


class TieredWorld(World):
    """A world whose cache has a tier, and what that tier really holds."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.slots: dict[int, Slot] = {}
        self.queue: list[Haul] = []
        """What the porter has still to do."""
        self.cache.set_porter(is_there=True, now=self.now)
        self.follower, self.late = Follower(self.cache), Follower(self.cache, late=True)
        """Who hears where all lies, from the start and from some later moment on."""
        self.num_heard = 0
        ears = Ears(lambda: (self.follower, self.late))
        self.cache.observe(ears, below=ears)

    @property
    def hauls(self) -> Hauls:
        hauls = self.cache._lessor.hauls
        assert hauls is not None
        return hauls

    def sync(self) -> None:
        """Take in which restores there are: their leases are leases like any other."""
        living = {(PORTER, one.lease.id): one for one in self.hauls.restores.values()}
        for key in [key for key in self.leases if key[0] == PORTER and key not in living]:
            del self.leases[key]
        for key, restore in living.items():
            lease = restore.lease
            valid = lease.committed
            flying = len(lease.flight or b"") // TOKEN_BYTES
            tokens = tuple(unpack(lease.prefix(lease.num_tokens * TOKEN_BYTES)))
            before = self.leases.get(key)
            root = before.root if before else self.root(lease.namespace)
            self.leases[key] = LeaseView(
                lease.id,
                PORTER,
                lease.namespace,
                root,
                tokens,
                list(lease.table),
                valid,
                max(valid, flying),
                float("inf"),
                float("inf"),
            )
            if before is None:
                self.count("restores begun")

    def settle(self) -> None:
        self.sync()
        super().settle()

    def verify(self) -> None:
        super().verify()
        self.verify_places()

    def verify_places(self) -> None:
        """Who follows what is told knows where all lies.

        After every call: what a tier gives up may be on its way back.
        """
        self.follower.verify()
        self.late.verify()
        if not self.late.go_on():
            self.count("told late")
            self.num_heard += 1
            if self.num_heard % 8 == 0:
                self.late = Follower(self.cache, late=True)

    # ------------------------------------------------------------------ what the porter does

    def pump(self) -> None:
        """Give the porter what he is to do next."""
        self.log.append(f"cache.hauls(now={self.now})")
        self.queue += self.cache.hauls(now=self.now)
        self.verify_places()

    def carry(self, num_done: int) -> None:
        """Do the first haul in the queue, or only the first `num_done` blocks of it.

        Of every other one it is asked first whether it is for nothing.
        """
        haul = self.queue.pop(0)
        if haul.id % 2 and self.cache.spare(haul.id):
            self.log.append(f"cache.spare({haul.id})")
            self.count("spared")
            self.verify_places()
            return
        size, good = self.shape.block_size, 0
        width = size * TOKEN_BYTES
        for at, slot in enumerate(haul.slots):
            tokens = haul.tokens[at * width : (at + 1) * width]
            stamp = haul.stamps[at]
            if at >= num_done:
                break
            if haul.sources:
                if haul.id in self.hauls._moves and haul.sources[at] in self.slots:
                    self.slots[slot] = self.slots[haul.sources[at]]
                    good += 1
                    self.count("moved on")
                continue
            if not haul.is_up:
                if haul.id not in self.hauls._down:
                    continue
                block = self.hauls._down[haul.id].blocks[at : at + 1] or haul.blocks[at : at + 1]
                held = tuple(self.memory.read(block[0], offset) for offset in range(size))
                self.slots[slot] = Slot(stamp, tokens, held)
                good += 1
                continue
            found = self.slots.get(slot)
            is_good = found is not None and (found.stamp, found.tokens) == (stamp, tokens)
            for offset in range(size):
                holding = found.holdings[offset] if found is not None and is_good else None
                self.memory.write(haul.blocks[at], offset, holding)
            if not is_good:
                self.count("spoilt")
                break
            good += 1
        self.log.append(f"cache.hauled({haul.id}, {good}, 0.001, now={self.now})")
        self.cache.hauled(haul.id, good, 0.001, now=self.now)
        self.verify_places()
        self.count("restored" if haul.is_up and good else "sunk" if good else "failed")
        self.sync()


class TieredRules(Rules):
    """The rules of the machine, and those of the porter."""

    world: TieredWorld

    def __init__(self, world: TieredWorld, draw: Draw) -> None:
        super().__init__(world, draw)
        self.asks_below = False

    def lease(self) -> LeaseView | None:
        mine = [view for view in self.world.leases.values() if view.worker != PORTER]
        return self.choose(mine) if mine else None

    def call(self, line, verb):  # type: ignore[no-untyped-def]
        answer = super().call(line, verb)
        self.world.sync()
        return answer

    def prompt(self) -> Tokens:
        """At times one of which something lies below."""
        below = self.world.hauls.tier.holdings.all_ghosts()
        if not below or not (self.asks_below or self.chance(30)):
            return super().prompt()
        node, parts = self.choose(below), []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        tokens = tuple(unpack(b"".join(reversed(parts))))
        most = self.world.shape.num_blocks * self.world.shape.block_size
        return (*tokens, *self.some_tokens(3), 0)[:most]

    def come_back(self) -> None:
        """Leases end, the oldest blocks go down, and somebody asks for what lies there."""
        while self.lease() is not None and not self.chance(10):
            self.release()
            self.world.verify()
        self.pump()
        while self.world.queue and not self.chance(10):
            self.carry()
            self.world.verify()
        self.asks_below = True
        for _ in range(1 + self.draw.below(2)):
            self.acquire()
            self.world.verify()
        self.asks_below = False

    def pump(self) -> None:
        self.world.pump()

    def carry(self) -> None:
        """The porter ends a haul, as a rule a whole one."""
        world = self.world
        if world.queue:
            most = len(world.queue[0].slots)
            world.carry(self.draw.below(most) if self.chance(12) else most)

    def spoil(self) -> None:
        """Something else lies in a slot than was written there."""
        world = self.world
        if world.slots and self.chance(60):
            slot = self.choose(sorted(world.slots))
            other = self.choose(sorted(world.slots))
            world.slots[slot] = world.slots[other]._replace(stamp=world.slots[other].stamp)
            if slot == other:
                del world.slots[slot]

    def lose(self) -> None:
        """The porter dies, in the middle of what he does; another one comes."""
        world = self.world
        if not self.chance(20):
            return
        for haul in world.queue[:1]:
            if haul.is_up:  # he had begun
                for offset in range(world.shape.block_size):
                    world.memory.write(haul.blocks[0], offset, None)
        late = world.queue
        world.queue = []
        world.log.append(f"cache.set_porter(is_there=False, now={world.now})")
        world.cache.set_porter(is_there=False, now=world.now)
        world.verify()
        for haul in late:  # what he said last comes too late
            world.cache.hauled(haul.id, len(haul.slots), 0.0, now=world.now)
        world.verify()
        world.log.append(f"cache.set_porter(is_there=True, now={world.now})")
        world.cache.set_porter(is_there=True, now=world.now)
        world.count("lost")

    def hurry(self) -> None:
        """A little time passes: who waits for a restore waits no longer."""
        world = self.world
        due = world.hauls.next_due()
        if due is not None and self.chance(40):
            world.now = max(world.now, due + 0.001)
            self.expire()
            world.count("late")

    def hold(self) -> None:
        """The disk fails, or was told to be written to no more for a moment."""
        world = self.world
        if self.chance(30):
            world.log.append(f"cache.hold_disk(until={world.now + 5.0})")
            world.cache.hold_disk(until=world.now + 5.0)
            world.count("held")

    def drain(self) -> None:
        world = self.world
        world.pump()
        while world.queue:
            world.carry(len(world.queue[0].slots))
            world.verify()
        world.cache.set_porter(is_there=False, now=world.now)
        world.verify()
        assert not world.snapshot().leaving
        super().drain()


_OFTEN = ["come_back"] * 30 + ["commit"] * 30 + ["pump"] * 20 + ["carry"] * 30
TIERED = [*NAMES, *_OFTEN, *["spoil"] * 24, *["lose"] * 4, *["hurry"] * 20, *["hold"] * 4]
"""The names of all rules, each as often as it is to be run."""
