"""The demo with real processes and a real service, but a worker without a model."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from patience import PATIENCE_S

HERE = Path(__file__).parent
POOLS = "/dev/shm/prefixcache-"  # noqa: S108 - where the service keeps them
MARK = "PREFIXCACHE_DEMO_TEST"


class Demo:
    """A demo process, and what the processes that it started left behind."""

    def __init__(self, folder, num_workers, *arguments):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TMPDIR": str(folder),
            MARK: self.mark,
        }
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fake_demo.py", str(num_workers), folder / "out", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pools = set()

    def alive(self):
        """Processes with this test's mark, the demo itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    marked = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                    # A zombie waits for a parent that reaps it; it is not a process any more.
                    dead = " Z " in (entry / "stat").read_text()
                except OSError:
                    continue
                if marked and not dead:
                    found.append(int(entry.name))
        return found

    def look_for_pools(self):
        for pid in self.alive():
            try:
                maps = Path(f"/proc/{pid}/fd").iterdir()
                paths = {os.readlink(link) for link in maps}  # noqa: PTH115 - may not exist
            except OSError:
                continue
            self.pools |= {path for path in paths if path.startswith(POOLS)}

    def until(self, condition, timeout_s=PATIENCE_S):
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.process.poll() not in (None, -signal.SIGKILL):
                self.process.kill()
                pytest.fail(f"{self.process.poll()}: {self.process.communicate()[0]}")
            time.sleep(0.02)
            self.look_for_pools()

    def end(self, timeout_s=PATIENCE_S):
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def assert_nothing_is_left(self):
        deadline = time.monotonic() + PATIENCE_S
        while self.alive():
            assert time.monotonic() < deadline, self.alive()
            time.sleep(0.02)
        assert not [path for path in self.pools if Path(path).exists()]


@pytest.fixture
def start(tmp_path):
    started = []

    def start(num_workers, *arguments):
        started.append(Demo(tmp_path, num_workers, *arguments))
        return started[-1]

    yield start
    for demo in started:
        demo.process.kill()
        demo.process.wait()
        demo.process.stdout.close()


def test_a_run_shares_survives_a_kill_and_proves_that_answers_are_identical(start):
    demo = start(3)
    demo.until(lambda: demo.pools)
    code, output = demo.end()
    assert code == 0, output
    assert "killed with SIGKILL in mid-prefill" in output
    report = json.loads((demo.folder / "out" / "demo.json").read_text())
    assert report["identical"]
    assert report["requests"] == 18
    assert abs(report["tokens_over_ideal_percent"]) < 1
    # What the cache holds in the end is what a count of the sequences says.
    assert report["pool_blocks_used"] == report["pool_blocks_expected"]
    assert report["pool_blocks_leaked"] == 0
    assert report["tokens_separate_caches"] > 1.5 * report["tokens_computed"]
    assert report["separate_caches_bytes"] > report["pool_bytes_used"]
    death = report["killed_worker"]
    assert death["worker"] == "w3"
    sentence = report["sentence"]
    assert sentence["worker"] != sentence["heir"]
    assert sentence["survived"]
    assert 1 <= sentence["num_again"] <= sentence["block_size"] + 1
    assert 0 < sentence["num_before"] < sentence["num_tokens"]
    assert f"{sentence['num_again']} computed again" in output
    below = report["below"]
    assert below["kept"]
    first, *others = below["passes"]
    assert first["num_restored"] == 0
    assert all(one["num_restored"] > 0 for one in others[:2]), "again, and after a restart"
    assert len(others) == 3, "and on another machine"
    assert below["num_compared"] == 4 * len({line["assistant"] for line in report["per_request"]})
    assert "came back from below it" in output
    assert death["leases"] >= 1
    assert death["blocks_returned"] > 0
    assert death["takeover_ms"] is not None
    assert "travel-lake/1" in [attempt["request"] for attempt in death["attempts"]]
    beside = report["decode_kv_side_by_side"]
    assert 0 < beside["decode_kv_bytes_read"] < beside["decode_kv_bytes_per_sequence"]
    assert 0 < report["decode_kv_bytes_read"] < report["decode_kv_bytes_per_sequence"]
    fates = {line["fate"] for line in report["per_request"]}
    assert fates == {"cold", "warm", "joined", "takeover"}
    assert "w3" in {line["worker"] for line in report["per_request"]}
    for line in report["per_request"]:
        parts = ("hit", "partial", "joined", "cold", "evicted", "granularity")
        assert sum(line[part] for part in parts) == line["prompt_tokens"]
    assert (demo.folder / "out" / "demo.png").stat().st_size > 20_000
    demo.assert_nothing_is_left()
    assert [path.name for path in demo.folder.iterdir()] == ["out"]


def test_a_worker_that_is_too_fast_to_be_met_in_mid_prefill_is_killed_all_the_same(start):
    demo = start(2, "--swift", "--plain")
    code, output = demo.end()
    assert code == 0, output
    assert "too late to meet it in mid-prefill" in output
    death = json.loads((demo.folder / "out" / "demo.json").read_text())["killed_worker"]
    assert death["in_prefill"] is False
    assert death["takeover_ms"] is None


def test_one_worker_alone_is_not_killed(start):
    demo = start(1, "--plain")
    code, output = demo.end()
    assert code == 0, output
    report = json.loads((demo.folder / "out" / "demo.json").read_text())
    assert report["identical"]
    assert report["killed_worker"] is None


def test_a_cache_that_changes_an_answer_fails_the_demo_loudly(start):
    demo = start(2, "--broken", "--plain")
    code, output = demo.end()
    assert code == 1
    assert "NOT the answer of a model without a cache" in output
    assert "FAILED" in output
    assert not json.loads((demo.folder / "out" / "demo.json").read_text())["identical"]
    demo.assert_nothing_is_left()


def test_numerical_ties_are_shown_counted_and_the_rest_of_the_answer_is_still_compared(start):
    demo = start(2, "--tie", "--plain")
    code, output = demo.end()
    assert code == 0, output
    report = json.loads((demo.folder / "out" / "demo.json").read_text())
    cached = sum(line["computed"] < line["prompt_tokens"] for line in report["per_request"])
    assert report["numerical_ties"] == cached > 0
    assert report["identical"]
    assert output.count("a numerical tie") >= cached
    assert {difference["position"] for difference in report["differences"]} == {2}


@pytest.mark.parametrize("blurred", [False, True])
def test_where_bits_are_compared_the_last_one_of_a_logit_counts(start, blurred):
    demo = start(2, "--bits", "--plain", *["--blurred"] * blurred)
    code, output = demo.end()
    assert code == int(blurred), output
    report = json.loads((demo.folder / "out" / "demo.json").read_text())
    assert (report["compared"], report["identical"]) == ("bits", not blurred)
    assert report["numerical_ties"] == 0
    if blurred:
        assert "NOT the bits of a model without a cache" in output
        assert all(difference["only_bits"] for difference in report["differences"])
    else:
        assert "bit for bit" in output


@pytest.mark.parametrize(
    ("number", "after_s"),
    [(signal.SIGINT, 0), (signal.SIGINT, 1.2), (signal.SIGTERM, 0.6), (signal.SIGHUP, 0.6)],
)
def test_an_interrupt_ends_all_processes_and_removes_the_pool(start, number, after_s):
    demo = start(3)
    demo.until(lambda: demo.pools and len(demo.alive()) == 5)
    time.sleep(after_s)
    demo.process.send_signal(number)
    code, output = demo.end()
    assert code == 128 + number, output
    assert "stopped; no process was left behind" in output
    demo.assert_nothing_is_left()


def test_a_killed_demo_takes_its_processes_with_it(start):
    demo = start(3)
    demo.until(lambda: demo.pools and len(demo.alive()) == 5)
    demo.process.kill()
    demo.assert_nothing_is_left()


def test_a_worker_that_ends_by_itself_fails_the_demo_with_its_last_words(start):
    demo = start(2, "--fragile")
    code, output = demo.end()
    assert code == 1
    assert "ended by itself" in output
    assert "no more" in output
    demo.assert_nothing_is_left()


def test_a_worker_that_does_not_start_fails_the_demo_with_its_last_words(start):
    demo = start(2, "--stillborn")
    code, output = demo.end()
    assert code == 1
    assert "did not start" in output
    assert "no model here" in output
    demo.assert_nothing_is_left()
