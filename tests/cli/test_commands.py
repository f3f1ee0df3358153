"""The command line: answers for people and for programs, exit codes, plug-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import prefixcache
from prefixcache.client import Session
from prefixcache.errors import InvalidRequest
from prefixcache.extras import how_to_install
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.types import Layout
from service.service_process import (
    LAYOUT,
    ServiceProcess,
    command,
    environment,
    eventually,
    running,
    sizes,
)


@dataclass
class Told:
    code: int
    out: str
    err: str


def run(*arguments: str, given: str = "", **extra: str) -> Told:
    told = subprocess.run(
        command(*arguments),
        input=given,
        capture_output=True,
        text=True,
        env=environment() | {"COLUMNS": "200"} | extra,
        check=False,
    )
    assert "Traceback" not in told.stderr
    return Told(told.returncode, told.stdout, told.stderr)


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{sockets}/commands.sock", *sizes(64, 4)) as service:
        yield service


@pytest.fixture
def session(service: ServiceProcess) -> Iterator[Session]:
    """A service that stores tokens 0 to 9 of model `tiny`."""
    with prefixcache.connect(service.target) as client:
        for namespace in client.snapshot().namespaces:
            client.reset(namespace)
        session = client.attach("tiny", LAYOUT, name="ann")
        with session.acquire(list(range(10))) as lease:
            lease.commit(10)
        yield session


@pytest.fixture
def at(service: ServiceProcess) -> list[str]:
    return ["--connect", service.target]


def test_stat_shows_pool_workers_leases_and_tokens(session: Session, at: list[str]) -> None:
    lease = session.acquire(list(range(12)))
    told = run("stat", "--once", *at)
    assert told.code == 0
    assert "64 blocks of 4 · 1x1x4:float32" in told.out
    assert "ann" in told.out
    assert f"{lease.id} " in told.out
    told = run("stat", "--json", *at)
    fields = json.loads(told.out)
    blocks = [fields[name] for name in ("free", "private", "indexed", "quarantined")]
    assert sum(blocks) == fields["num_blocks"] == 64
    assert fields["ledger"]["total"] == sum(
        tokens for fate, tokens in fields["ledger"].items() if fate != "total"
    )
    assert fields["leases"][0]["worker"] == "ann"
    assert fields["service"]["pool"]["layout"] == "1x1x4:float32"


def test_a_salt_is_never_shown(service: ServiceProcess, at: list[str]) -> None:
    with prefixcache.connect(service.target) as client:
        session = client.attach("tiny", LAYOUT, salt="s3cret")
        session.acquire([1, 2, 3])
        for told in (run("stat", "--once", *at), run("stat", "--json", *at)):
            assert "s3cret" not in told.out
            assert "salted" in told.out
        client.reset(prefixcache.Namespace("tiny", salt="s3cret"))


@pytest.mark.parametrize("source", ["arguments", "stdin", "file", "dash"])
def test_lookup_reads_tokens_from_everywhere(
    session: Session, at: list[str], source: str, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("[0, 1, 2, 3,\n4, 5, 99]")
    how = {
        "arguments": (["0", "1", "2", "3", "4", "5", "99"], ""),
        "stdin": ([], "0 1 2 3 4 5 99"),
        "dash": (["--file", "-"], "0,1,2,3,4,5,99"),
        "file": (["--file", str(tmp_path / "tokens")], ""),
    }
    arguments, given = how[source]
    told = run("lookup", *arguments, "--model", "tiny", "--json", *at, given=given)
    fields = json.loads(told.out)
    assert (told.code, fields["num_tokens"], fields["num_hit"], fields["num_partial"]) == (
        0,
        7,
        4,
        2,
    )


def test_explain_names_the_token_where_a_prompt_parts(session: Session, at: list[str]) -> None:
    told = run("explain", "0", "1", "2", "3", "4", "77", "78", "--model", "tiny", *at)
    assert told.code == 0
    assert "at token 5" in told.out
    assert "stored  5 6 7 8 9" in told.out
    told = run("explain", "0", "1", "2", "3", "4", "77", "--model", "tiny", "--json", *at)
    fields = json.loads(told.out)
    assert (fields["parted_at"], fields["stored_next"][:2]) == (5, [5, 6])
    assert fields["ledger"]["total"] == 6


def test_a_negative_answer_has_exit_code_1(session: Session, at: list[str]) -> None:
    assert run("lookup", "55", "56", "--model", "tiny", *at).code == 1
    assert run("explain", "55", "56", "--model", "tiny", *at).code == 1
    assert run("reset", "--model", "nobody", *at).code == 1


def test_reset_says_what_it_did(session: Session, at: list[str]) -> None:
    session.pin(list(range(8)), ttl_s=60.0)
    lease = session.acquire(list(range(9)))
    told = run("reset", "--model", "tiny", *at)
    assert (told.code, told.out) == (
        0,
        "tiny: 3 blocks (up to 12 tokens) forgotten, 1 pin ended; 2 blocks still held by 1 lease\n",
    )
    lease.release()
    assert session.lookup(list(range(10))).num_hit == 0


def test_pin_and_unpin_say_what_they_did_in_blocks_and_tokens(
    session: Session, at: list[str]
) -> None:
    prompt = [str(token) for token in range(10)]
    told = run("pin", *prompt, "--ttl", "30m", "--model", "tiny", *at)
    assert (told.code, told.out.splitlines()) == (
        0,
        [
            "tiny: 2 blocks (8 of 10 tokens) pinned for 30 m, 2 of them new, 0 leased now",
            "pinned in all: 2 of at most 16 blocks",
        ],
    )
    told = run("pin", "--list", *at)
    assert told.out.splitlines()[1].split()[:3] == ["tiny", "8", "2"]
    told = run("unpin", *prompt[:8], "--model", "tiny", "--json", *at)
    fields = json.loads(told.out)
    assert (told.code, fields["num_pins"], fields["num_blocks"], fields["num_tokens"]) == (
        0,
        1,
        2,
        8,
    )
    assert run("unpin", "--all", "--model", "tiny", *at).code == 1
    assert run("pin", "--list", *at).code == 1
    told = run("pin", "77", "--model", "tiny", *at)
    assert told.code == 1
    assert "nothing was pinned" in told.out


def test_quota_shows_and_sets_what_a_namespace_or_a_tenant_may_hold(
    session: Session, at: list[str]
) -> None:
    lease = session.acquire(list(range(12)))
    told = run("quota", "--model", "tiny", "--max", "9", *at)
    assert told.code == 0
    assert told.out.splitlines()[1].split() == ["tiny", "3", "12", "9", "4", "0"], told.out
    told = run("quota", "--tenant", "acme", "--share", "5", "--json", *at)
    assert json.loads(told.out)["quotas"][0]["guaranteed"] == 5
    assert len(run("quota", *at).out.splitlines()) == 3
    assert run("quota", "--model", "tiny", "--max", "none", *at).code == 0
    assert run("quota", "--tenant", "acme", "--share", "0", *at).code == 0
    told = run("quota", *at)
    assert (told.code, told.out) == (1, "no quotas: every namespace may hold the whole pool\n")
    lease.release()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pin", "1", "--ttl", "soon"], "'soon'"),
        (["quota", "--max", "7"], "--tenant or --model"),
        (["quota", "--tenant", "a", "--max", "many"], "'many'"),
        (["quota", "--tenant", "a", "--max", "5", "--connect", "x"], "host:port"),
        (["lookup", "1", "one", "--model", "tiny"], "'one'"),
        (["lookup", "-f", "/nonexistent"], "/nonexistent"),
        (["lookup", str(2**32), "--model", "tiny"], "from 0 to 4,294,967,295"),
        (["lookup", "1", "--model", "tiny", "--connect", "nowhere"], "host:port"),
        (["nosuch"], "nosuch"),
        (["stat", "--nosuch"], "nosuch"),
    ],
)
def test_wrong_usage_has_exit_code_2_and_one_line(arguments: list[str], text: str) -> None:
    told = run(*arguments)
    assert told.code == 2
    assert text in told.err


@pytest.mark.parametrize("verb", ["stat", "lookup", "explain", "reset", "pin", "unpin", "quota"])
def test_no_server_has_exit_code_3_and_the_command_that_starts_one(
    verb: str, tmp_path: Path
) -> None:
    tokens = ["1", "2"] if verb in ("lookup", "explain", "pin", "unpin") else []
    tokens += ["--tenant", "a"] if verb == "quota" else []
    told = run(verb, *tokens, "--connect", f"{tmp_path}/none.sock")
    assert told.code == 3
    assert f"prefixcache serve --memory 2GiB --listen unix:{tmp_path}/none.sock" in told.err


def test_the_environment_names_the_service(session: Session, service: ServiceProcess) -> None:
    assert run("stat", "--once", PREFIXCACHE_TARGET=service.target).code == 0


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    here = {"PREFIXCACHE_BLOCK_SIZE": "64", "PREFIXCACHE_MEMORY": "1MiB"}
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    try:
        from prefixcache.config import load

        settings = load({"block_size": 32})
        assert (settings.block_size, settings.memory) == (32, 2**20)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def plug_in(folder: Path, code: str) -> dict[str, str]:
    """Install a package with a command `extra-command` into `folder`."""
    info = folder / "fancy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fancy\nVersion: 1.0\nProvides-Extra: shine\n"
        "Requires-Dist: glitter-wax>=2; extra == 'shine'\n"
    )
    (info / "entry_points.txt").write_text("[prefixcache.commands]\nshine = fancy.cli:shine\n")
    (folder / "fancy").mkdir()
    (folder / "fancy" / "__init__.py").write_text("")
    (folder / "fancy" / "cli.py").write_text(code)
    return {"PYTHONPATH": f"{environment()['PYTHONPATH']}{os.pathsep}{folder}"}


def test_a_plug_in_is_listed_without_being_imported_and_runs_when_called(tmp_path: Path) -> None:
    environment = plug_in(
        tmp_path,
        "import sys\nsys.stderr.write('imported')\n"
        "def shine(times: int = 1) -> None:\n    '''Polish the blocks.'''\n"
        "    print('*' * times)\n",
    )
    told = run("--help", **environment)
    assert told.code == 0
    assert "Polish the blocks." in told.out
    assert "imported" not in told.err
    told = run("shine", "--times", "3", **environment)
    assert (told.code, told.out, told.err) == (0, "***\n", "imported")


@pytest.mark.parametrize("where", ["at import", "in the command"])
def test_a_plug_in_without_its_extra_says_what_to_install(tmp_path: Path, where: str) -> None:
    early, late = "import glitter\n", "    import glitter\n"
    code = f"def shine() -> None:\n    '''Polish.'''\n{late if where != 'at import' else ''}"
    environment = plug_in(tmp_path, (early if where == "at import" else "") + code)
    told = run("shine", **environment)
    assert told.code == 2
    assert "glitter" in told.err
    assert "pip install 'glitter-wax>=2'" in told.err


def test_what_is_to_be_installed_is_named_and_never_an_extra_of_ours() -> None:
    assert how_to_install("tracing").startswith("pip install 'opentelemetry-api>=")
    assert "'torch>=" in how_to_install("demo"), "what an extra takes from another is resolved"
    assert how_to_install("none", module="zmq") == "install the package that provides zmq"
    for told in map(how_to_install, ("text", "worker", "demo", "events", "experiments")):
        assert "prefixcache" not in told


def test_the_kernels_without_torch_say_so_in_one_line() -> None:
    code = "import sys; sys.modules['torch'] = None; import prefixcache_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ModuleNotFoundError: prefixcache_kernels needs torch, which is not installed: "
        "pip install 'torch>="
    )


def test_a_worker_that_dies_leaves_the_list(service: ServiceProcess, at: list[str]) -> None:
    with prefixcache.connect(service.target) as client:
        client.attach("tiny", LAYOUT, name="bob")
        assert json.loads(run("stat", "--json", *at).out)["service"]["sessions"] == 1
    eventually(lambda: json.loads(run("stat", "--json", *at).out)["service"]["sessions"] == 0)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, Layout(12, 12, 64, "float32")),
        (
            {
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "hidden_size": 1024,
                "head_dim": 128,
                "dtype": "bfloat16",
            },
            Layout(28, 8, 128, "bfloat16"),
        ),
        (
            {
                "dtype": "float16",
                "text_config": {
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "hidden_size": 64,
                },
            },
            Layout(2, 4, 16, "float16"),
        ),
    ],
)
def test_the_layout_of_a_model_is_read_from_its_config(
    tmp_path: Path, config: dict[str, object], layout: Layout
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_layout(tmp_path) == layout
    assert read_layout(tmp_path, "float32").dtype == "float32"


@pytest.mark.parametrize("text", ["[1]", "{", '{"n_layer": 2}', '{"n_layer": 0, "n_head": 1}'])
def test_a_config_that_does_not_tell_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        read_layout(tmp_path)
