"""What moved tokens are worth: counted by hand, and against a naive count."""

from __future__ import annotations

import random

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, pack
from prefixcache_bench.experiments import elsewhere
from prefixcache_bench.experiments.elsewhere import Worth, dated, worth
from prefixcache_bench.experiments.traces import Request, Trace

HERE = Namespace("m")
ONE, OTHER = list(range(100, 120)), list(range(200, 217))


def trace(*prompts: list[int], space: Namespace = HERE) -> Trace:
    requests = [
        Request(float(at), space, pack(prompt), len(prompt), len(prompt))
        for at, prompt in enumerate(prompts)
    ]
    return Trace("made", requests)


def test_documents_in_another_order_are_moved() -> None:
    found = worth(trace([*ONE, *OTHER, 1], [*OTHER, *ONE, 2]), block_size=4)
    # Stored at 20 to 36, in blocks from 20, 24, 28, 32; and 0 to 19.
    assert found == Worth(prompt=76, exact=0, moved=16 + 20, ideal=37)


def test_what_is_exact_is_not_moved_and_the_last_token_is_computed() -> None:
    found = worth(trace([*ONE, 1], [*ONE, 1], [*ONE, 2]), block_size=4)
    assert found == Worth(prompt=63, exact=40, moved=0, ideal=0)


def test_a_date_in_front_moves_everything_behind_it() -> None:
    plain = trace(*[[*ONE, *OTHER, at] for at in range(4)])
    assert worth(plain, block_size=4).exact == 3 * 37
    moved = worth(dated(plain, every=2, length=3), block_size=4)
    assert moved.prompt == plain.prompt_tokens + 4 * 3
    assert moved.exact == 2 * 40  # the second of each day
    assert moved.moved == 36
    assert moved.ideal == 37


def test_the_ideal_is_what_a_naive_count_says() -> None:
    generator = random.Random(3)
    for size in (1, 2, 4):
        prompts = [[generator.randrange(3) for _ in range(25)] for _ in range(12)]
        ideal = moved = 0
        for at, prompt in enumerate(prompts):
            alone = worth(trace(*prompts[: at + 1]), size)
            before = worth(trace(*prompts[:at]), size) if at else Worth(0, 0, 0, 0)
            exact = alone.exact - before.exact
            runs = {tuple(one[i : i + size]) for one in prompts[:at] for i in range(26 - size)}
            covered = set()
            for i in range(exact, 24 - size + 1):
                if tuple(prompt[i : i + size]) in runs:
                    covered |= set(range(i, i + size))
            ideal += len(covered)
            moved += alone.moved - before.moved
            assert alone.ideal == ideal
            assert moved <= ideal


def test_hashes_of_blocks_cannot_be_asked() -> None:
    with pytest.raises(InvalidRequest, match="has hashes of blocks"):
        worth(Trace("hashed", trace(ONE).requests, unit=512))


def test_the_table_says_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert elsewhere.main(["--quick"]) == 0
    told = capsys.readouterr().out
    assert "questions over documents" in told
    assert Worth(100, 50, 40, 50).row("x").split() == ["x", "100", "50", "20.0%", "76.8%", "0.0%"]
