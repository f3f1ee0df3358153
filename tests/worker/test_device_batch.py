"""The batch that stays on the device: the same as one packed anew, and only changes travel."""

from __future__ import annotations

from array import array
from dataclasses import fields

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels import GroupPlan
from prefixcache_kernels.groups import FREE
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.device_batch import DeviceBatch

SIZE = 4
PREFIX = [50, 51, 52, 53, 54]


def piece(start: int, count: int, table: list[int] | array[int], *, logits: bool = True) -> Piece:
    return Piece(list(range(start, start + count)), start, table, logits=logits)


def chats(count: int, *, start: int = 22) -> list[Piece]:
    """Decoding sequences behind a common prefix of five blocks."""
    return [piece(start, 1, array("i", [*PREFIX, 10 + n, 30 + n])) for n in range(count)]


def following(pieces: list[Piece]) -> list[Piece]:
    """The next step of decoding sequences."""
    return [piece(p.start + 1, 1, p.block_table) for p in pieces]


def equal(got: Batch, want: Batch) -> None:
    """Every tensor is the same, beyond the padding of the tables."""
    assert [f.name for f in fields(Batch)][-1] == "groups"
    for field in fields(Batch)[:-1]:
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert a.dtype == b.dtype, field.name
        if field.name == "block_tables":
            blocks = -(-want.context_lens // SIZE)
            for row, num in enumerate(blocks.tolist()):
                assert a[row, :num].tolist() == b[row, :num].tolist()
        else:
            assert torch.equal(a, b), field.name


def packed(batch: DeviceBatch, owners: list[str], pieces: list[Piece]) -> Batch:
    """Pack, and compare with a batch that is packed anew in the same order."""
    got, order = batch.pack(owners, pieces)
    assert sorted(order) == list(range(len(pieces)))
    equal(got, Batch.pack([pieces[at] for at in order], SIZE))
    assert got.groups.positions == tuple(range(len(pieces)))
    limits = [pieces[at].start // SIZE for at in order]
    fresh = GroupPlan.build(Batch.pack([pieces[at] for at in order], SIZE).block_tables, limits)
    assert got.groups.saved_blocks == fresh.saved_blocks
    return got


def test_whoever_shares_is_a_slice_of_the_batch() -> None:
    batch = DeviceBatch(8, 7, SIZE, FREE)
    strangers = [piece(9, 1, array("i", [1, 2, 3])), piece(9, 1, array("i", [4, 5, 6]))]
    a, b, c = chats(3)
    got = packed(batch, list("xaybc"), [strangers[0], a, strangers[1], b, c])
    [run] = got.groups.runs
    assert (run.blocks, run.end - run.start) == (5, 3)
    rows = got.block_tables[run.start : run.end, :5]
    assert rows.tolist() == [PREFIX] * 3


def test_a_decode_step_moves_its_tokens_and_nothing_else() -> None:
    batch = DeviceBatch(8, 9, SIZE, FREE)
    owners, pieces = list("abcd"), chats(4)
    packed(batch, owners, pieces)
    places = [t.data_ptr() for t in (batch.tables, batch.lengths, batch.plan.packed)]
    plan = batch.plan.packed.clone()
    before, plans = batch.num_bytes, batch.num_plans
    for _ in range(5):  # across the edge of a block
        pieces = following(pieces)
        packed(batch, owners, pieces)
    assert batch.num_bytes - before == 5 * 4 * 8
    assert batch.num_plans == plans
    assert torch.equal(batch.plan.packed, plan)
    assert places == [t.data_ptr() for t in (batch.tables, batch.lengths, batch.plan.packed)]
    assert batch.lengths.tolist() == [28] * 4 + [0] * 4


def test_a_new_block_moves_four_bytes() -> None:
    batch = DeviceBatch(8, 9, SIZE, FREE)
    owners, pieces = list("ab"), chats(2)
    packed(batch, owners, pieces)
    for grow in (lambda t: t.append(77), lambda t: array("i", [*t, 78])):  # in place, or anew
        first, second = following(pieces)
        table = first.block_table
        assert isinstance(table, array)
        first = piece(first.start, 1, grow(table) or table)
        before, plans = batch.num_bytes, batch.num_plans
        pieces = [first, second]
        packed(batch, owners, pieces)
        assert batch.num_bytes - before == 4 + 2 * 8
        assert batch.num_plans == plans


def test_rows_close_up_on_the_device_when_one_leaves() -> None:
    batch = DeviceBatch(4, 7, SIZE, FREE)
    pieces = chats(4)
    packed(batch, list("abcd"), pieces)
    batch.keep(list("abd"))
    before = batch.num_bytes
    pieces = following([pieces[0], pieces[1], pieces[3]])
    packed(batch, list("abd"), pieces)
    plan = batch.plan.packed.numel() * 4
    assert batch.num_bytes - before == plan + 3 * 8  # neither tables nor lengths
    assert batch.lengths.tolist() == [24] * 3 + [0]
    assert batch.plan.run_blocks.tolist()[:2] == [5, 0]


def test_a_changed_block_is_seen() -> None:
    """Copy-on-write puts another block in the place of a shared one."""
    batch = DeviceBatch(4, 7, SIZE, FREE)
    pieces = chats(2)
    assert packed(batch, list("ab"), pieces).groups.runs[0].blocks == 5
    first, second = following(pieces)
    table = array("i", first.block_table)
    table[3] = 99
    pieces = [piece(first.start, 1, table), second]
    assert packed(batch, list("ab"), pieces).groups.runs[0].blocks == 3


def test_sequences_that_wait_keep_their_rows() -> None:
    batch = DeviceBatch(4, 7, SIZE, FREE)
    pieces = chats(3)
    packed(batch, list("abc"), pieces)
    later = following(pieces)
    packed(batch, list("ca"), [later[2], later[0]])
    got = packed(batch, list("abc"), [following(later)[0], later[1], following(later)[2]])
    assert got.groups.runs[0].end == 3


def test_there_is_room_for_so_many() -> None:
    batch = DeviceBatch(2, 7, SIZE, FREE)
    with pytest.raises(InvalidRequest, match="more than 2 sequences"):
        batch.pack(list("abc"), chats(3))
    with pytest.raises(InvalidRequest, match="a table of 9 blocks; there is room for 7"):
        DeviceBatch(2, 7, SIZE, FREE).pack("a", [piece(0, 1, list(range(9)))])


class Steps(RuleBasedStateMachine):
    """Sequences come, fork, prefill, decode, grow and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = DeviceBatch(6, 40, SIZE, FREE)
        self.tables: dict[str, array[int]] = {}
        self.lengths: dict[str, int] = {}
        self.count = 0
        self.packs = 0

    def fresh(self, num: int) -> list[int]:
        self.count += num
        return list(range(self.count - num, self.count))

    def room(self) -> bool:
        return len(self.tables) < 6

    @precondition(room)
    @rule(blocks=st.integers(1, 4), cached=st.integers(0, 3))
    def join(self, blocks: int, cached: int) -> None:
        name = f"s{self.count}"
        self.tables[name] = array("i", self.fresh(blocks))
        self.lengths[name] = min(cached * SIZE, blocks * SIZE - 1)

    @precondition(lambda self: self.tables and self.room())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tables)))
        whole = self.lengths[parent] // SIZE
        name = f"s{self.count}"
        self.tables[name] = self.tables[parent][:whole] + array("i", self.fresh(2))
        self.lengths[name] = self.lengths[parent]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        del self.tables[name], self.lengths[name]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        names = data.draw(
            st.just(sorted(self.tables)) | st.lists(st.sampled_from(sorted(self.tables)),
                                                    min_size=1, unique=True)
        )  # fmt: skip
        pieces = []
        for name in names:
            count = data.draw(st.sampled_from([1, 1, 1, 5, 12]))
            missing = -(-(self.lengths[name] + count) // SIZE) - len(self.tables[name])
            if missing > 0 and data.draw(st.booleans()):
                self.tables[name].extend(self.fresh(missing))
            elif missing > 0:
                self.tables[name] = self.tables[name] + array("i", self.fresh(missing))
            logits = data.draw(st.booleans())
            pieces.append(piece(self.lengths[name], count, self.tables[name], logits=logits))
            self.lengths[name] += count
            if len(self.tables[name]) > 36:
                return
        self.batch.keep(list(self.tables))
        got, order = self.batch.pack(names, pieces)
        self.packs += 1
        pieces = [pieces[at] for at in order]
        fresh = Batch.pack(pieces, SIZE)
        equal(got, fresh)
        limits = [p.start // SIZE if len(p.tokens) <= 8 else 0 for p in pieces]
        assert got.groups.saved_blocks == GroupPlan.build(fresh.block_tables, limits).saved_blocks
        read: dict[int, list[int]] = {}
        for position in range(len(pieces)):
            read[position] = []
            for run in got.groups.runs:
                if run.start <= position < run.end:
                    part = got.block_tables[run.row, run.first : run.first + run.blocks]
                    read[position] += part.tolist()
            own = got.groups.own[position]
            assert read[position] == list(pieces[position].block_table[:own])

    @invariant()
    def host_and_device_agree(self) -> None:
        seats = self.batch._seats
        assert [seat.row for seat in seats] == list(range(len(seats)))
        for seat in seats:
            row = self.batch.tables[seat.row, : seat.width].tolist()
            assert row == self.batch._sent[seat.row, : seat.width].tolist()


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=25, stateful_step_count=15)


def test_no_step_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read back: no `.item()`, `.tolist()`, `nonzero` or comparison of tensors."""
    batch = DeviceBatch(8, 9, SIZE, FREE)
    owners, pieces = list("abcd"), chats(4)
    batch.pack(owners, pieces)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a step read from the device")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, never)
    batch.pack(owners, following(pieces))
