"""Pools of their own: who is in another trust domain gets another pool, and can map no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefixcache
from prefixcache.pool import map_pool
from prefixcache.types import Namespace
from service.auth.keys import TOKENS, digest, identities
from service.http.scraped import free_port, get, url_of
from service.service_process import LAYOUT, ServiceProcess, running, sizes

MORE = f"""
[[domain]]
name = "vault"
memory = "{32 * 4 * LAYOUT.token_bytes}"

[[identity]]
name = "vault-serving"
tenant = "acme"
domain = "vault"
token_sha256 = "{digest("boss")}"
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("d")
    path = identities(folder)
    head, _, _ = path.read_text().rpartition("[[identity]]")  # without the operator
    path.write_text(head + MORE)
    target = f"unix:{folder}/d.sock"
    flags = ("--identities", str(path), "--http", f"127.0.0.1:{free_port()}")
    with running(target, *sizes(64, 4), *flags) as service:
        yield service


def test_each_domain_has_a_pool_a_tree_and_quotas_of_its_own(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target, token=TOKENS["acme"]) as outside,
        prefixcache.connect(service.target, token=TOKENS["boss"]) as inside,
    ):
        here, there = outside.attach("tiny", LAYOUT), inside.attach("tiny", LAYOUT)
        assert (here.pool.num_blocks, there.pool.num_blocks) == (64, 32)
        assert here.pool.name != there.pool.name
        assert here.pool.epoch != there.pool.epoch
        with here.acquire(list(range(12))) as lease:
            lease.commit(12)
        # The same tenant and model, and still: what one pool holds, the other does not.
        assert inside.lookup(Namespace("tiny"), list(range(12))).num_hit == 0
        lease = there.acquire([1] * 4 * 32)
        assert outside.snapshot().free >= 60
        with map_pool(here.pool) as mine, map_pool(there.pool) as theirs:
            mine[here.pool.offset : here.pool.offset + 4] = b"mine"
            assert theirs[there.pool.offset : there.pool.offset + 4] != b"mine"
        lease.release()
        for pool in (here.pool, there.pool):
            assert Path(pool.name).stat().st_mode & 0o777 == 0o600


def test_the_start_says_plainly_who_can_read_what(service: ServiceProcess) -> None:
    told = "\n".join(service.lines)
    assert "2 pools, one for each trust domain: whoever may map one can read every prompt" in told
    assert "domain vault: " in told
    assert "= 32 blocks of 4 = 128 tokens" in told


def test_a_service_with_one_pool_says_so_too(tmp_path: Path) -> None:
    with running(f"unix:{tmp_path}/one.sock", *sizes(8, 4)) as service:
        told = "\n".join(service.lines)
    assert "one pool, one trust domain: whoever may map it can read every prompt's keys" in told


def test_metrics_tell_the_domains_apart(service: ServiceProcess) -> None:
    _, text, _ = get(url_of(service) + "/metrics")
    for domain, num_blocks in (("", 64), ("vault", 32)):
        states = re.findall(
            rf'^prefixcache_pool_blocks{{domain="{domain}",state="\w+"}} ([0-9.]+)$', text, re.M
        )
        assert sum(map(float, states)) == num_blocks
    assert text.count("# TYPE prefixcache_pool_blocks gauge") == 1
    assert 'prefixcache_verb_duration_seconds_count{domain="vault",verb="acquire"} 1.0' in text
    assert "\nprocess_resident_memory_bytes " in text
