"""`stat`, `top` and `doctor`: rows, marks, screen, findings; and what all commands share."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

import prefixcache
from cli.running import At, call, run
from patience import PATIENCE_S
from prefixcache import core_build
from prefixcache.cli import checks
from prefixcache.cli.checks import WRONG
from prefixcache.cli.plugins import OWN, summary
from prefixcache.cli.status import read
from prefixcache.cli.top_screen import Screen
from prefixcache.client import Inbox, Session
from prefixcache.outline import Order
from prefixcache.pool import PoolFile
from prefixcache.types import Checked, Counts
from service.service_process import LAYOUT, command, environment

HEAVY = (
    *("google", "grpc", "jinja2", "numpy", "pydantic", "rich", "tokenizers", "torch"),
    "transformers",
)
COMMANDS = sorted(OWN)


@pytest.fixture
def session(at: At) -> Iterator[Session]:
    """Tokens 0 to 9 are stored; a lease holds 12."""
    with prefixcache.connect(at.target) as client:
        session = client.attach("tiny", LAYOUT, name="ann")
        with session.acquire(list(range(10))) as lease:
            lease.commit(10)
        session.acquire(list(range(12)))
        yield session


# ----------------------------------------------------------------------------------------- stat


def test_stat_prints_a_row_an_interval_and_the_head_again_after_twenty(
    session: Session, at: At
) -> None:
    lines = at.call("stat", "--count", "21", "--interval", "0.05").out.splitlines()
    assert len(lines) == 21 + 2
    assert lines[0] == lines[21]
    assert lines[0].split()[:3] == ["req/s", "tok/s", "hit"]
    assert len(lines[1].split()) == len(lines[0].split())


@pytest.mark.parametrize("width", [40, 80])
def test_rows_fit_the_terminal(session: Session, at: At, width: int) -> None:
    lines = at.call("stat", "-n", "1", COLUMNS=str(width)).out.splitlines()
    assert max(map(len, lines)) <= width


def test_rows_as_json_are_one_object_a_line(session: Session, at: At) -> None:
    lines = at.call("stat", "-n", "2", "-i", "0.05", "--json").out.splitlines()
    first, second = map(json.loads, lines)
    assert first["requests"] >= 2
    assert second["requests"] == 0
    assert first["leases"] == 1


def test_since_a_mark_only_this_run_counts(session: Session, at: At, tmp_path: Path) -> None:
    home = {"XDG_STATE_HOME": str(tmp_path)}
    assert at.call("stat", "--mark", "before", **home).code == 0
    session.acquire([*range(10), 50, 51])
    fields = at.call("stat", "--since", "before", "--json", **home).fields
    assert fields["requests"] == 1
    assert fields["ledger"]["total"] == 12
    assert fields["reused"] == 10 / 12
    told = at.call("stat", "--since", "before", **home)
    assert "1 request, 12 tokens" in told.out
    assert "83.33% reused" in told.out
    told = at.call("stat", "--since", "nosuch", **home)
    assert (told.code, "--mark nosuch" in told.err) == (1, True)
    assert at.call("stat", "--mark", "a/b", **home).code == 2
    mark = tmp_path / "prefixcache" / "marks" / "before.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"pid": 1}))
    assert "restarted" in at.call("stat", "--since", "before", **home).err


# ------------------------------------------------------------------------------------------ top


def test_top_shows_pool_ledger_prefixes_leases_flights_and_workers(
    session: Session, at: At
) -> None:
    told = at.call("top", "--once")
    assert "q ends" not in told.out  # nobody reads a key there
    for text in ("pool", "cached", "tokens", "acquire", "hottest prefixes", "leases: 1", "ann"):
        assert text in told.out, text
    assert "being computed: 1" in told.out
    fields = at.call("top", "--once", "--json").fields
    assert sum(fields["blocks"].values()) == fields["num_blocks"] == 64
    assert fields["prefixes"][0]["text"].startswith("0 1 2")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 16), (120, 50)])
def test_the_screen_fits_every_terminal(session: Session, at: At, width: int, height: int) -> None:
    with prefixcache.connect(at.target) as client:
        screen = Screen(None, Order.HEAT)
        screen.take(read(client), time.monotonic())
        screen.outline = client.outline()
        lines = screen.render(width, height).renderables
    assert len(lines) <= height
    assert max(cell_len(str(line)) for line in lines) <= width


def test_top_draws_a_screen_as_a_picture(session: Session, at: At, tmp_path: Path) -> None:
    assert at.call("top", "--svg", str(tmp_path / "top.svg")).code == 0
    assert "hottest" in (tmp_path / "top.svg").read_text()


def test_top_falls_back_to_lines_in_a_pipe_and_ends_cleanly_with_ctrl_c(
    session: Session, at: At
) -> None:
    process = subprocess.Popen(
        command("top", "--connect", at.target, "-i", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().split()[0] == "req/s"
    err = "it did not end"
    for _ in range(24):  # Python drops an interrupt that falls into a destructor: press again
        process.send_signal(2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=PATIENCE_S / 24)
            break
    assert (process.returncode, err) == (0, "")


# --------------------------------------------------------------------------------------- doctor


def test_doctor_says_that_all_is_well_or_what_to_do(session: Session, at: At) -> None:
    told = at.call("doctor")
    assert "Every invariant of the index holds" in told.out
    assert "too few to say anything" in told.out or "were reused" in told.out
    fields = at.call("doctor", "--json").fields
    assert {one["look"] for one in fields["findings"]} >= {
        *("versions", "invariants", "sizes", "ledger", "workers", "clocks", "memory"),
    }
    assert all(one["level"] in ("ok", "note", "wrong") for one in fields["findings"])
    assert (told.code == 1) == (fields["wrong"] > 0)


def test_a_worker_that_lives_and_makes_no_step_is_named(session: Session, at: At) -> None:
    def told(after_s: str) -> list[str]:
        found = at.call("doctor", "--json", "--stalled-after", after_s).fields["findings"]
        return [one["text"] for one in found if one["look"] == "progress" and one["level"] == WRONG]

    session.renew()
    assert told("0") == []  # tells nothing
    session.report(3)
    session.renew()  # signs of life go on, steps do not
    (text,) = told("0")
    assert str(session.attachment.worker) in text
    assert "3 requests in hand" in text
    assert at.call("doctor", "--stalled-after", "0").code == 1
    assert told("3600") == []  # slow, not stuck
    assert "3 in hand, last step" in at.call("stat", "--once").out
    assert "3 in hand, last step" in at.call("top", "--once").out
    session.report(0)
    session.renew()
    assert told("0") == []  # idle


def test_a_worker_that_takes_nothing_is_seen_wherever_workers_are_shown(
    session: Session, at: At
) -> None:
    session.watch_inbox(lambda: Inbox(2, 99.0))
    session.renew()
    found = at.call("doctor", "--json", "--stalled-after", "0").fields["findings"]
    (text,) = [one["text"] for one in found if one["look"] == "progress" and one["level"] == WRONG]
    assert "2 requests before it" in text
    assert "2 untaken, the oldest for" in at.call("stat", "--once").out
    assert "2 untaken, the oldest for" in at.call("top", "--once").out
    workers = at.call("stat", "--json").fields["workers"]
    (told,) = [one for one in workers if one["state"] == "attached"]
    assert told["untaken"] == 2
    assert told["oldest_untaken_s"] > 0
    assert told["uncommitted_s"] > 0  # it holds a lease, and computes nothing
    session.watch_inbox(Inbox)
    session.renew()


def test_what_the_core_runs_as_is_told_and_one_of_other_sources_is_wrong(at: At) -> None:
    kind = core_build.kind()
    assert f"the service's core is {kind}." in " ".join(at.call("doctor").out.split())
    assert re.search(rf"^core +{kind}$", at.call("stat", "--once").out, re.MULTILINE)
    assert at.call("stat", "--json").fields["service"]["core"] == kind
    with prefixcache.connect(at.target) as client:
        now = read(client)
    assert list(checks.core(now)) == []
    now.info.core = core_build.STALE
    (stale,) = checks.core(now)
    assert stale.level == WRONG
    assert "make compiled" in stale.advice


def test_who_went_silent_is_wrong_only_while_blocks_are_in_quarantine_for_it() -> None:
    lost = SimpleNamespace(worker="w-1", pid=7, state="lost", since_s=1.0)
    found = {}
    for quarantined in (0, 4):
        now: Any = SimpleNamespace(snapshot=Counts(quarantined=quarantined), workers=[lost])
        (found[quarantined],) = checks.workers(now)
    assert (found[0].level, found[4].level) == ("note", "wrong")
    assert "w-1 (pid 7) went silent, and holds no block" in found[0].text
    assert found[4].text.startswith("4 blocks are in quarantine because of w-1 (pid 7)")
    (none,) = checks.workers(SimpleNamespace(snapshot=Counts(), workers=[]))  # type: ignore[arg-type]
    assert none.level == "ok"


def test_a_broken_invariant_and_a_stopped_clock_are_wrong() -> None:
    (broken,) = checks.invariants(Checked(3, "block 7 is indexed twice\nroot\n└─ 7"))
    assert broken.level == "wrong"
    assert "block 7" in broken.text
    (partly,) = checks.invariants(Checked(100_000, left_out=("pins: too many",)))
    assert (partly.level, "pins" in partly.text, "--deep" in partly.advice) == ("ok", True, True)
    fast, stopped = checks.clocks(checks.Times((0.001, 0.002), 1.0, 9.0))
    assert (fast.level, stopped.level) == ("ok", "wrong")


def test_pool_files_of_the_dead_are_found_and_left_alone(tmp_path: Path) -> None:
    pool = PoolFile.create(LAYOUT, 4, 4, directory=tmp_path)
    assert PoolFile.stale(tmp_path) == []
    script = (
        "import sys; from pathlib import Path; from prefixcache.pool import PoolFile; "
        "from prefixcache.types import Layout; import os; "
        f"PoolFile.create(Layout(1, 1, 4, 'float32'), 4, 4, directory=Path({str(tmp_path)!r})); "
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
    (dead,) = PoolFile.stale(tmp_path)
    assert dead.exists()
    pool.close()


# ---------------------------------------------------------------------------------- all commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    told = call(name, "--help")
    assert told.code == 0
    said = " ".join(told.out.split()).partition(f"Usage: prefixcache {name}")[2]
    assert "prefixcache " in said, f"no example in the help of {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_docstrings_say(name: str) -> None:
    said = OWN[name].load().__doc__
    assert summary(OWN[name]) == said.partition("\n")[0]


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        pytest.param([name for name in COMMANDS if name != "serve"], set(), id="all but serve"),
        # Its flags and their help are the fields of its settings, said once.
        pytest.param(["serve"], {"pydantic"}, id="serve"),
    ],
)
def test_help_loads_nothing_heavy(names: list[str], needed: set[str]) -> None:
    script = (
        "import sys, io, contextlib\n"
        "from prefixcache.cli.main import main\n"
        f"for name in {names!r}:\n"
        "    sys.argv = ['prefixcache', name, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "print('\\n'.join(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    loaded = {line.partition(".")[0] for line in told.stdout.splitlines()}
    assert loaded & set(HEAVY) == needed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    told = run(_PREFIXCACHE_COMPLETE=f"source_{shell}")  # what --install-completion puts in place
    assert told.code == 0
    assert "_PREFIXCACHE_COMPLETE" in told.out.upper()
    assert "--show-completion" in call("--help").out
    if shell == "bash":
        asked = {"COMP_WORDS": "prefixcache ex", "COMP_CWORD": "1"}
        told = run(_PREFIXCACHE_COMPLETE="complete_bash", **asked)
        assert "explain" in told.out


@pytest.mark.parametrize("name", ["top", "tree", "doctor", "explain"])
def test_no_server_has_exit_code_3_and_the_command_that_starts_one(
    name: str, tmp_path: Path
) -> None:
    told = call(name, "--connect", f"{tmp_path}/none.sock", given="1 2")
    assert told.code == 3
    assert f"prefixcache serve --memory 2GiB --listen unix:{tmp_path}/none.sock" in told.err


def test_colour_is_left_out_where_it_is_not_wanted(session: Session, at: At) -> None:
    told = at.run("top", "--once", NO_COLOR="1", FORCE_COLOR="1")
    assert "\x1b[3" not in told.out


def test_stat_tells_apart_what_the_index_takes_and_what_is_remembered_for_people(at: At) -> None:
    told = at.call("stat", "--once", "--json").fields
    assert told["max_history_bytes"] == 1 << 20
    assert 0 <= told["history_bytes"] <= told["max_history_bytes"]
    assert told["index_bytes"] >= 0
    line = next(line for line in at.call("stat", "--once").out.splitlines() if "history" in line)
    assert line.split()[:2] == ["memory", "index"]
    assert line.endswith("of 1 MiB")
