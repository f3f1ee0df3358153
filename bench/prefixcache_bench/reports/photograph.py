"""Photographs of the live pages: a real service, real worker processes, a real browser.

`python -m prefixcache_bench.reports.photograph` starts `prefixcache serve --http`, three worker
processes that lease and commit the prompts of generated chats, few-shot and agent requests without
computing them, kills one of the workers, and takes pictures in headless Chromium: light, dark, and
as wide as a telephone.  Then it starts `prefixcache up` with three workers of the demo's model,
asks them, kills one, and takes pictures of its lanes when an answer has moved.  Needs Debian's
chromium and chromium-driver, and selenium.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefixcache
from prefixcache.errors import CacheError, PoolExhausted
from prefixcache.types import Layout, unpack
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.speed.endpoint import endpoint

LAYOUT = Layout(30, 3, 64, "bfloat16")
PLACE = Path(__file__).resolve().parents[3] / "docs" / "operations"
SHOTS = (
    ("page-light", 1440, 1500, "light"),
    ("page-dark", 1440, 1500, "dark"),
    ("page-phone", 412, 1900, "dark"),
)
LANES = (("lanes-light", 1200, 900, "light"),)
BROWSER = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
"""What lets Chromium run where there is no screen, as root, without talking to anybody."""


def browser(width: int, height: int, profile: Path) -> Any:
    """Start a headless Chromium of the system.

    Raises:
        CacheError: there is none.
    """
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise CacheError("no chromium and chromedriver here (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*BROWSER, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def work(target: str, name: str, seed: int) -> None:
    """Be a worker that computes nothing: lease, commit bit by bit, generate, release."""
    mixes = ((Kind.CHATS, "assistant"), (Kind.FEW_SHOT, "grader"), (Kind.AGENTS, "agent"))
    with prefixcache.connect(target) as client:
        sessions = {model: client.attach(model, LAYOUT, name=name) for _, model in mixes[:1]}
        for kind, model in mixes[1:]:
            sessions[model] = client.attach(model, LAYOUT, name=f"{name}/{kind}")
        streams = [
            (sessions[model], iter(generate(kind, Shape(seed=seed)).requests))
            for kind, model in mixes
        ]
        held: list[Any] = []
        while streams:
            for stream in list(streams):
                session, requests = stream
                request = next(requests, None)
                if request is None:
                    streams.remove(stream)
                    continue
                prompt = unpack(request.tokens[: request.prompt * 4])
                try:
                    lease = session.acquire(prompt, wait_s=0.2)
                except PoolExhausted:
                    time.sleep(0.05)
                    continue
                for part in (0.4, 0.7, 1.0):
                    done = max(lease.num_cached, int(len(prompt) * part))
                    lease.commit(done)
                    time.sleep(0.02)
                generated = unpack(request.tokens[request.prompt * 4 :])
                if generated:
                    with contextlib.suppress(PoolExhausted):
                        lease.extend(len(prompt) + len(generated))
                        lease.commit(len(prompt) + len(generated), generated)
                held.append(lease)
                if len(held) > 4:
                    held.pop(0).release()


def photograph(place: Path, seconds: float) -> None:
    """Run it all and write the pictures."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/service.sock"
        flags = ["--memory", "2GiB", "--layout", str(LAYOUT), "--pool", "none"]
        flags += ["--shadow", "policy=slru,block_size=32", "--shadow", "memory=4GiB"]
        command = [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target]
        service = subprocess.Popen(
            [*command, *flags, "--http", "127.0.0.1:0", "--log-level", "error"],
            stdout=subprocess.PIPE,
            text=True,
        )
        workers: list[subprocess.Popen[bytes]] = []
        try:
            url = _url(service)
            script = [
                sys.executable,
                "-m",
                "prefixcache_bench.reports.photograph",
                "--work",
                target,
            ]
            workers += [
                subprocess.Popen([*script, name, str(seed)])
                for name, seed in (("gpu-0", 0), ("gpu-1", 0), ("gpu-2", 1), ("gpu-3", 1))
            ]
            time.sleep(seconds)
            workers[-1].kill()
            time.sleep(2)
            for name, width, height, theme in SHOTS:
                shot = place / f"{name}.png"
                driver = browser(width, height, Path(folder) / name)
                try:
                    driver.get(f"{url}/?theme={theme}")
                    time.sleep(5)
                    if width < 600:  # Chromium makes no window that narrow
                        driver.execute_cdp_cmd(
                            "Emulation.setDeviceMetricsOverride",
                            {
                                "width": width,
                                "height": height,
                                "deviceScaleFactor": 2,
                                "mobile": True,
                            },
                        )
                        time.sleep(3)
                    driver.save_screenshot(str(shot))
                finally:
                    driver.quit()
                print(f"{shot.name}: {shot.stat().st_size / 1000:.0f} kB")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            service.kill()
            service.wait()


QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse and a fox.",
    "Name ten rivers of Europe, each with a sentence.",
    "How do I clean a bicycle chain?",
    "What should I see in Lisbon in two days?",
)


def photograph_lanes(place: Path, shots: Sequence[tuple[str, int, int, str]] = LANES) -> None:
    """Take pictures of the front's page while an answer goes on elsewhere."""
    with endpoint("--workers", "3", "--memory", "1GiB") as up, contextlib.ExitStack() as stack:
        for name, width, height, theme in shots:
            up.wait_ready()
            profile = stack.enter_context(tempfile.TemporaryDirectory())
            driver = browser(width, height, Path(profile))
            try:
                driver.get(f"http://127.0.0.1:{up.port}/?theme={theme}")
                for question in QUESTIONS:
                    stack.callback(up.send(_told(question)).close)
                driver.execute_script(
                    "document.getElementById('prompt').value = arguments[0];"
                    "document.getElementById('most').value = 200;"
                    "document.getElementById('send').click()",
                    "Tell me about the history of the bicycle.",
                )
                _until(driver, "return document.getElementById('answer').textContent.length > 250")
                busiest = max(up.workers(), key=lambda one: int(one["running"]))
                os.kill(int(busiest["pid"]), signal.SIGKILL)
                _until(driver, "return document.querySelector('.chip.moved') !== null")
                time.sleep(1)
                shot = place / f"{name}.png"
                driver.save_screenshot(str(shot))
                print(f"{shot.name}: {shot.stat().st_size / 1000:.0f} kB")
            finally:
                driver.quit()


def _told(question: str) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": question, "max_tokens": 400, "ignore_eos": True}


def _until(driver: Any, script: str) -> None:
    deadline = time.monotonic() + 120
    while not driver.execute_script(script):
        if time.monotonic() > deadline:
            raise CacheError(f"the page does not come to: {script}")
        time.sleep(0.05)


def _url(service: subprocess.Popen[str]) -> str:
    assert service.stdout is not None
    for line in service.stdout:
        if line.startswith("page at "):
            return line.split()[2].rstrip("/")
    raise CacheError("the service did not start")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PLACE, help="folder for the pictures")
    parser.add_argument("--seconds", type=float, default=25, help="load before the pictures")
    parser.add_argument("--only", choices=("page", "lanes"), help="the service's, or the front's")
    parser.add_argument("--work", nargs=3, metavar=("TARGET", "NAME", "SEED"))
    arguments = parser.parse_args()
    if arguments.work:
        target, name, seed = arguments.work
        work(target, name, int(seed))
        return
    os.environ.setdefault("SE_AVOID_STATS", "true")
    if arguments.only != "lanes":
        photograph(arguments.out, arguments.seconds)
    if arguments.only != "page":
        photograph_lanes(arguments.out)


if __name__ == "__main__":
    main()
