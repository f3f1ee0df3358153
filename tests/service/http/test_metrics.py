"""Metrics: what they add up to, how they are named, how many there are, and who may read them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import prefixcache
from patience import PATIENCE_S
from prefixcache.core.ledger import MOST_SERIES, OTHER
from prefixcache.errors import InvalidRequest
from prefixcache.service.http.http_server import HttpServer
from prefixcache.service.observe.latency import LatencyHistograms, empty_row, quantile
from service.below import slots
from service.http.scraped import DOCS, FLAGS, drive, free_port, get, url_of
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("m")
    with running(f"unix:{folder}/s.sock", *sizes(64, 4), *FLAGS) as service:
        service.sent = drive(service.target)  # type: ignore[attr-defined]
        yield service


def scrape(service: ServiceProcess) -> tuple[str, Samples]:
    status, text, headers = get(url_of(service) + "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return text, samples


def only(samples: Samples, name: str, **labels: str) -> float:
    (value,) = [v for key, v in samples[name].items() if labels.items() <= dict(key).items()]
    return value


def test_the_fates_sum_to_the_prompt_tokens_that_were_sent(service: ServiceProcess) -> None:
    _, samples = scrape(service)
    tokens = samples["prefixcache_prompt_tokens_total"]
    assert sum(tokens.values()) == service.sent  # type: ignore[attr-defined]
    with prefixcache.connect(service.target) as client:
        ledger = client.snapshot().ledger
    for fate in ("hit", "partial", "joined", "cold", "evicted", "granularity"):
        counted = sum(v for key, v in tokens.items() if ("fate", fate) in key)
        assert counted == getattr(ledger, fate) > 0 or fate == "granularity"
    assert only(samples, "prefixcache_flights_saved_total", tenant="acme") == 2
    assert samples["prefixcache_wait_duration_seconds_count"][frozenset()] == 2
    assert 0.1 <= samples["prefixcache_wait_duration_seconds_sum"][frozenset()] < 60


def test_the_states_sum_to_the_pool_and_what_eviction_took_is_told(service: ServiceProcess) -> None:
    _, samples = scrape(service)
    assert sum(samples["prefixcache_pool_blocks"].values()) == 64
    assert only(samples, "prefixcache_pool_size_bytes") == 64 * 4 * LAYOUT.token_bytes
    assert only(samples, "prefixcache_smallest_hit_tokens") == 1
    assert only(samples, "prefixcache_evicted_blocks_total") > 100
    eventually(lambda: "prefixcache_eviction_age_seconds" in scrape(service)[1])
    assert 0 <= only(scrape(service)[1], "prefixcache_eviction_age_seconds") < 60
    assert only(samples, "prefixcache_refused_total", error="PoolExhausted") == 1


def test_what_each_tenant_has_below_the_pool_is_told(tmp_path: Path) -> None:
    flags = (*sizes(64, 4), *FLAGS, "--host", slots(100), "--partial", "off")
    with (
        running(f"unix:{tmp_path}/s.sock", *flags) as service,
        prefixcache.connect(service.target) as client,
    ):
        eventually(lambda: "porter at work" in service.log())
        for tenant, num_chats in (("acme", 15), ("poets", 25)):
            with client.attach("tiny", LAYOUT, tenant=tenant) as session:
                for number in range(num_chats):
                    with session.acquire([*range(100 * number, 100 * number + 21)]) as lease:
                        lease.commit(20)
                    eventually(lambda: client.snapshot().leaving == 0)
        _, samples = scrape(service)
        told = samples["prefixcache_tenant_tier_blocks"]
        held = {
            dict(key)["tenant"]: value for key, value in told.items() if ("tier", "host") in key
        }
        assert set(held) == {"acme", "poets"}
        assert all(held.values())
        assert sum(held.values()) == only(samples, "prefixcache_tier_blocks", tier="host")
        assert not sum(value for key, value in told.items() if ("tier", "disk") in key)


def test_every_operation_is_in_its_verbs_histogram(service: ServiceProcess) -> None:
    _, samples = scrape(service)
    name = "prefixcache_verb_duration_seconds"
    granted = sum(samples["prefixcache_requests_total"].values())
    refused = only(samples, "prefixcache_refused_total", verb="acquire")
    assert only(samples, f"{name}_count", verb="acquire") == granted + refused
    buckets = [
        (float(dict(key)["le"]), value)
        for key, value in samples[f"{name}_bucket"].items()
        if ("verb", "acquire") in key
    ]
    counts = [value for _, value in sorted(buckets)]
    assert counts == sorted(counts)
    assert counts[-1] == granted + refused
    assert 0 < only(samples, f"{name}_sum", verb="acquire") < 5


def test_names_and_units_follow_the_conventions(service: ServiceProcess) -> None:
    text, _ = scrape(service)
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"(prefixcache|process)_[a-z0-9_]+", family.name)
        assert family.documentation.endswith((".", "'.")) or family.name.startswith("process_")
        assert family.documentation
        assert not family.name.endswith("_total")  # the parser takes it off a counter, only
        assert family.type in ("counter", "gauge", "histogram")
        unit = re.search(r"_(milli|micro|nano|kilo|mega|ms|us|ns|kb|mb|minutes)", family.name)
        assert unit is None, family.name
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
    if promtool := shutil.which("promtool"):
        told = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True
        )
        assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_many_namespaces_do_not_make_many_series(tmp_path: Path) -> None:
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *FLAGS) as service:
        with prefixcache.connect(service.target) as client:
            for number in range(MOST_SERIES + 20):
                with client.attach(f"m{number}", LAYOUT) as session:
                    session.acquire([1, 2, 3]).release()
        text, samples = scrape(service)
    assert len(samples["prefixcache_requests_total"]) == MOST_SERIES + 1
    assert only(samples, "prefixcache_requests_total", model=OTHER.model) == 20
    assert only(samples, "prefixcache_namespaces") == MOST_SERIES + 20
    assert text.count("\n") < 1000


def test_a_quantile_is_within_a_factor_of_two() -> None:
    row = empty_row()
    assert quantile(row, 0.5) is None
    for ns in range(1, 100_000, 7):
        LatencyHistograms.took(row, ns)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        found = quantile(row, share)
        assert found is not None
        assert 0.5 <= found * 1e9 / (share * 100_000) <= 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1:1", ""])
def test_a_foreign_name_for_this_machine_is_not_answered(
    service: ServiceProcess, host: str
) -> None:
    assert get(url_of(service) + "/metrics", {"Host": host})[0] in (400, 421)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_questions_are_answered(service: ServiceProcess, method: str) -> None:
    assert get(url_of(service) + "/metrics", method=method)[0] == 405


def test_browsers_are_told_to_be_careful(service: ServiceProcess) -> None:
    _, _, headers = get(url_of(service) + "/metrics")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("address", ["0.0.0.0:9", "10.0.0.1:9", "unix:/x.sock", "example.org:9"])
def test_it_listens_on_loopback_or_not_at_all(address: str) -> None:
    with pytest.raises(InvalidRequest):
        HttpServer(address, None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------ dashboard and alerts


def expressions() -> list[tuple[str, str]]:
    """Every query of the dashboard and of the alerts, with what it belongs to."""
    dashboard = json.loads((DOCS / "dashboard.json").read_text())
    found = [
        (panel["title"], target["expr"].replace("$job", "prefixcache"))
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    found += [(rule["alert"], rule["expr"]) for rule in alerts()]
    return [(title, re.sub(r"\$__rate_interval", "1m", query)) for title, query in found]


def alerts() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the alert rules")
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def test_every_query_names_only_metrics_and_labels_that_are_served(
    service: ServiceProcess,
) -> None:
    eventually(lambda: "prefixcache_eviction_age_seconds" in scrape(service)[1])
    _, samples = scrape(service)
    target = {"job", "instance"}
    for title, query in expressions():
        words = re.sub(r'"[^"]*"', '""', query)
        names = set(re.findall(r"\b(?:prefixcache|process)_[a-z_]+", words))
        assert names or query.startswith("up{"), title
        assert names <= set(samples), title
        labels = {label for name in names for key in samples[name] for label, _ in key} | target
        used = set(re.findall(r"([a-z_]+)\s*(?:=~|!=|=)\s*\"", words))
        for listed in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", words):
            used |= {label.strip() for label in listed.split(",")}
        assert used <= labels, (title, used - labels)


def test_every_alert_says_what_to_do() -> None:
    for rule in alerts():
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith((".", "--json."))
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "rules", str(DOCS / "alerts.yaml")], check=True)


PROMETHEUS = """
global: {scrape_interval: 200ms}
rule_files: [%s]
scrape_configs:
  - job_name: prefixcache
    static_configs: [{targets: ["%s"]}]
"""


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="this machine has no prometheus (Debian: prometheus)"
)
def test_a_real_prometheus_answers_every_panel(service: ServiceProcess, tmp_path: Path) -> None:
    target = url_of(service).removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    config.write_text(PROMETHEUS % (DOCS / "alerts.yaml", target))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            *("prometheus", f"--config.file={config}", f"--web.listen-address={address}"),
            *(f"--storage.tsdb.path={tmp_path}/data", "--log.level=error"),
        ]
    )

    def ask(query: str) -> list[Any]:
        found = get(f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        answer = json.loads(found[1])
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def scraped() -> bool:
        try:
            return bool(ask('count_over_time(up{job="prefixcache"}[1m]) > 4'))
        except (OSError, ValueError):  # not yet up
            return False

    try:
        eventually(scraped)
        service.sent += drive(service.target, rounds=3)  # type: ignore[attr-defined]
        eventually(
            lambda: ask("sum(prefixcache_prompt_tokens_total)")[0]["value"][1] == str(service.sent)  # type: ignore[attr-defined]
        )
        for title, query in expressions():
            answer = ask(query)
            if title.startswith("Prefixcache"):  # an alert: nothing is wrong for long enough
                continue
            assert answer, f"{title}: {query} has no answer"
            # A verb that nobody used within the minute has no quantile.
            assert any(series["value"][1] != "NaN" for series in answer), f"{title}: {query}"
        rules = json.loads(get(f"http://{address}/api/v1/rules")[1])["data"]["groups"][0]["rules"]
        assert all(rule["health"] in ("ok", "unknown") for rule in rules)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_a_snapshot_tells_what_the_verbs_and_the_workers_do(service: ServiceProcess) -> None:
    from prefixcache.v1 import prefixcache_pb2 as pb

    with prefixcache.connect(service.target) as client:
        told = client.call("snapshot", pb.SnapshotRequest())
    verbs = {info.verb: info for info in told.verbs}
    assert verbs["acquire"].count > verbs["acquire"].refused > 0
    assert verbs["commit"].per_s > 0
    assert 0 < verbs["acquire"].p50_s <= verbs["acquire"].p99_s < 5
    assert told.flights_saved >= 2
    states = {info.worker: info.state for info in told.workers}
    assert {states[name] for name in ("one", "two", "other")} == {"left"}
