"""A cell of real cores: what the router knows is what they hold, and all tokens are counted."""

from __future__ import annotations

import json
from array import array

import pytest

from core.follower import Follower
from prefixcache_bench.experiments import cell as cells
from prefixcache_bench.experiments.cell import WAYS, Cell, Index, Node, Remote, Ring, Seen, chain_of

SMALL = Cell(nodes=4, chats=60, pool=512, host=600, remote=1000, prompts=8)
REQUESTS = SMALL.requests()
CHAINS = [chain_of(request.tokens) for request in REQUESTS]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, bool], Seen]:
    ways = [(way, has_remote) for has_remote in (False, True) for way in WAYS]
    return {
        (way, has_remote): cells.run(SMALL, REQUESTS, CHAINS, way, has_remote=has_remote)
        for way, has_remote in ways
    }


def test_every_token_is_counted_once(seen: dict[tuple[str, bool], Seen]) -> None:
    for one in seen.values():
        assert one.tokens == sum(request.prompt for request in REQUESTS)
        assert one.pool + one.host + one.remote + one.computed == one.tokens
        assert min(one.pool, one.computed) > 0
        assert bool(one.remote) == one.has_remote
        assert len(one.first_s) == len(REQUESTS)


def test_who_knows_more_computes_less(seen: dict[tuple[str, bool], Seen]) -> None:
    computed = {way: seen[way, False].computed for way in WAYS}
    assert computed["by events"] < computed["anywhere"]
    assert computed["by a key"] < computed["anywhere"]
    for way in WAYS:
        assert seen[way, True].computed < computed[way]


def test_the_index_is_what_the_nodes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force, after all requests and the loss of a node."""
    nodes: list[Node] = []
    made = Node.__init__

    def keep(self: Node, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        nodes.append(self)

    monkeypatch.setattr(Node, "__init__", keep)
    forgotten: list[int] = []
    forget = Index.forget
    monkeypatch.setattr(
        Index, "forget", lambda self, one: (forgotten.append(one), forget(self, one))
    )
    cells.run(SMALL, REQUESTS, CHAINS, "by events", has_remote=False)
    assert len(forgotten) == 1
    expected: dict[int, int] = {}
    for node in nodes:
        if node.number not in forgotten:
            for _, tokens in Follower(node.cache).truth().values():
                one = chain_of(array("I", tokens).tobytes())[-1]
                expected[one] = expected.get(one, 0) | 1 << node.number
    assert nodes[0].index.nodes == expected
    assert any(node.cache.counts(now=0.0).restored for node in nodes)


def test_an_index_gives_how_much_each_node_has() -> None:
    index = Index()
    for node, blocks in ((0, [1, 2, 3]), (1, [1, 2]), (3, [2, 3]), (70, [1, 2, 3, 4])):
        for one in blocks:
            index.put(one, node)
    assert index.matched([1, 2, 3, 9]) == {0: 3, 1: 2, 70: 3}
    assert index.matched([1, 2, 3, 4]) == {0: 3, 1: 2, 70: 4}
    assert index.matched([9]) == {}
    assert index.matched([]) == {}
    index.forget(70)
    assert index.matched([1, 2, 3, 4]) == {0: 3, 1: 2}


def test_of_a_ring_only_the_keys_of_who_left_move() -> None:
    keys = [bytes([at]) * 4 for at in range(200)]
    before, after = Ring([0, 1, 2, 3]), Ring([0, 1, 3])
    for key in keys:
        assert before.node(key) == after.node(key) or before.node(key) == 2
    assert len({before.node(key) for key in keys}) == 4


def test_remote_gives_whole_objects_behind_what_is_there() -> None:
    remote = Remote(64)
    chain = list(range(100, 140))
    remote.put(chain)
    assert remote.matched(chain, 0) == 32
    assert remote.matched(chain, 20) == 32
    assert remote.matched(chain, 35) == 35
    assert remote.matched([1, *chain], 0) == 0
    for first in (1000, 2000):
        remote.put(list(range(first, first + 32)))
    assert remote.matched(chain, 0) == 0, "the oldest have gone"


def test_the_command_says_the_same_in_json_and_refuses_what_is_no_cell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--nodes", "2", "--chats", "10", "--seed", "3"]
    assert cells.main(flags) == 0
    shown = capsys.readouterr().out
    assert cells.main([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["way"] for one in told["ways"]] == [*WAYS, *WAYS]
    first = told["ways"][0]
    assert f"{100 * first['computed'] / first['tokens']:8.1f}" in shown
    for wrong in (["--nodes", "1"], ["--nodes", "1001"], ["--pool", "100"], ["--chats", "0"]):
        with pytest.raises(SystemExit):
            cells.main(wrong)
        assert wrong[1].lstrip("-") in capsys.readouterr().err.replace(",", "")
