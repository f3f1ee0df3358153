"""The benchmark of vLLM on one pool: what its engines are, and what its table says."""

from __future__ import annotations

from typing import Any

import pytest

from prefixcache_bench.speed import vllm
from prefixcache_vllm.demo.servers import Model, Server
from prefixcache_vllm.demo.stream import Piece


def test_only_vllm_alone_and_connectors_have_a_cache_of_their_own() -> None:
    found = vllm.commands(Model("py", "/m"), "unix:/s")
    assert "--no-enable-prefix-caching" not in found["alone"]
    assert found["in-1"] == found["in-2"]
    assert "--kv-cache-memory-bytes" not in found["in-1"]
    assert found["copy-1"][-4:] == ["--mode", "connector", *vllm.OWN_CACHE]


def test_first_tokens_are_medians_against_a_cold_one_of_the_same_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = {"alone": [2.0, 0.2], "in-1": [3.0, 0.1], "in-2": [0.5]}
    monkeypatch.setattr(vllm, "KINDS", {"alone": ("alone",), "in place": ("in-1", "in-2")})
    calls: dict[str, int] = {}

    def first_token(server: Any, prompt: list[int]) -> tuple[float, int]:
        count = calls[server] = calls.get(server, -1) + 1
        return took[server][count % len(took[server])], len(prompt) - 1

    monkeypatch.setattr(vllm, "first_token_s", first_token)
    rates = {"alone": 10.0, "in-1": 9.0}
    monkeypatch.setattr(vllm, "decode_tokens_per_s", lambda server, prompts: rates[server])
    monkeypatch.setattr(vllm, "memory_bytes", lambda pid: 5 * 10**6)
    servers: Any = {name: _Named(name) for name in took}
    found = vllm.measure(servers, 3)
    rows = {(row["kind"], row["what"], row["tokens"]): row for row in found["first_token"]}
    assert rows["in place", vllm.OTHERS, 1000]["of_cold"] == 0.25
    assert rows["alone", vllm.OWN, 256]["cached"] == [255]
    assert [row["of_alone"] for row in found["decode"]] == [1, 0.9, 1, 0.9]
    assert "0.25" in vllm.table(found)


class _Named(str):
    """A server that is only its name."""

    pid = 0


def test_decoding_counts_from_when_all_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 1000))
    monkeypatch.setattr(vllm.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(vllm.stream, "ask", lambda *asked: iter([Piece((1,))] * 5))
    server: Any = Server.__new__(Server)
    server.port = 1
    assert vllm.decode_tokens_per_s(server, [[1]]) == 1.0  # 4 tokens in 4 s after the first


def test_requests_that_follow_each_other_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.stream, "ask", lambda *asked: iter([Piece((1,))]))
    server: Any = Server.__new__(Server)
    server.port = 1
    with pytest.raises(SystemExit, match="side by side"):
        vllm.decode_tokens_per_s(server, [[1], [2]])
