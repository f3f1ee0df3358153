"""The page in a real browser: what it shows of a killed worker, by keyboard, and on a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.core.cache import PrefixCache
from prefixcache.core.introspect import STATES
from prefixcache.service.http.http_server import ASSETS
from prefixcache.types import Namespace, WorkerId, pack
from prefixcache_bench.reports.photograph import browser
from service.http.scraped import FLAGS, get, url_of
from service.service_process import LAYOUT, ServiceProcess, environment, eventually, running, sizes

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="this machine has no chromium and chromedriver (Debian: chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("p")
    flags = [*sizes(64, 4), *FLAGS, "--ttl", "30"]
    with running(f"unix:{folder}/s.sock", *flags) as service:
        with prefixcache.connect(service.target) as client:
            session = client.attach("model", LAYOUT, name="earlier")
            for number in range(4):
                prompt = [*range(40), *range(1000 * number, 1000 * number + 20)]
                with session.acquire(prompt) as lease:
                    lease.commit(len(prompt))
        yield service


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium drives the browser; it is in the dev extra")
    driver = browser(1200, 900, tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def test_everything_a_browser_needs_is_local_and_small(service: ServiceProcess) -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        status, text, _ = get(f"{url_of(service)}/{path.relative_to(ASSETS)}")
        assert status == 200
        if path.suffix in (".html", ".css", ".js") and "vendor" not in path.parts:
            assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    libraries = [path for path in files if path.parent.name == "vendor" and path.suffix == ".js"]
    licences = [path for path in files if path.name.startswith("LICENSE.")]
    assert len(libraries) == len(licences) == 3
    assert "no-store" in get(url_of(service) + "/")[2]["cache-control"]


@pytest.mark.parametrize("path", ["/../config.py", "/%2e%2e/config.py", "/vendor/../../page.py"])
def test_nothing_else_of_the_disk_is_served(service: ServiceProcess, path: str) -> None:
    assert get(url_of(service) + path)[0] == 404


def events(service: ServiceProcess, wanted: set[str]) -> dict[str, Any]:
    """Read the stream until one event of each wanted kind was there."""
    found: dict[str, Any] = {}
    with urllib.request.urlopen(url_of(service) + "/live", timeout=PATIENCE_S) as stream:  # noqa: S310
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream:
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                found[name] = json.loads(value)
                if wanted <= set(found):
                    break
    return found


def test_the_stream_tells_numbers_that_agree_and_no_tokens(service: ServiceProcess) -> None:
    told = events(service, {"state", "tree", "blocks"})
    pool = told["state"]["pool"]
    assert pool["free"] + pool["private"] + pool["indexed"] + pool["quarantined"] == 64
    assert sum(told["state"]["ledger"].values()) == 4 * 60
    (tree,) = told["tree"]["namespaces"]
    tokens = sum(branch["tokens"] for branch in tree["branches"])
    assert tokens == tree["branches"][0]["below"][1] == 40 + 4 * 20
    assert all("ids" not in branch for branch in tree["branches"])
    cells = told["blocks"]["cells"]
    assert len(cells) == 64
    assert cells.count(str(STATES.index("cached"))) == pool["evictable"]
    history = json.loads(get(url_of(service) + "/history")[1])
    assert len({len(column) for column in history.values()}) == 1


def test_two_viewers_see_the_same_and_one_that_leaves_is_forgotten(service: ServiceProcess) -> None:
    url = url_of(service) + "/live"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as slow:  # noqa: S310 - never read from
        assert events(service, {"state"})["state"]["service"]["draining"] is False
        assert slow.status == 200
    assert events(service, {"state"})["state"]["pool"]["num_blocks"] == 64


def test_token_ids_are_shown_where_that_was_asked_for(tmp_path: Path) -> None:
    flags = [*sizes(64, 4), *FLAGS, "--http-tokens"]
    with running(f"unix:{tmp_path}/s.sock", *flags) as service:
        with prefixcache.connect(service.target) as client:
            client.attach("model", LAYOUT).acquire(range(7, 20)).commit(13)
        told = events(service, {"tree"})
    assert told["tree"]["namespaces"][0]["branches"][1]["ids"][:3] == [7, 8, 9]


def test_the_map_of_the_pool_is_exact_where_a_cell_is_a_block() -> None:
    cache, me, space = PrefixCache(16, 4), WorkerId("w"), Namespace("m")
    cache.attach(me, space, now=0.0)
    lease = cache.acquire(me, space, pack(range(16)), reserve=8, now=0.0)
    cache.commit(me, lease.lease, 8, now=0.0)

    def drawn(cells: int = 16) -> list[str]:
        steps = cache.block_map(cells)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return [STATES[code] for code in done.value]

    assert [drawn()[block] for block in lease.block_table] == ["leased"] * 2 + ["private"] * 4
    cache.release(me, lease.lease, now=1.0)
    assert drawn().count("cached") == 2
    assert drawn().count("free") == 14
    assert len(drawn(5)) == 4  # four blocks a cell
    assert drawn(1) == ["free"]


# ------------------------------------------------------------------------ in a real browser


def texts(driver: Any, css: str) -> list[str]:
    return list(
        driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css
        )
    )


def press(driver: Any, *keys: str) -> None:
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


@needs_chromium
def test_a_worker_is_killed_and_the_page_shows_it(service: ServiceProcess, driver: Any) -> None:
    driver.get(url_of(service))
    victim = subprocess.Popen(
        [sys.executable, "-m", "service.victim", service.target, "60", "50"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        assert victim.stdout is not None
        lease = victim.stdout.readline().split()[1]
        row = "#workers tr[data-worker=victim] "
        shows(driver, lambda: texts(driver, row + ".pill") == ["attached"])
        shows(driver, lambda: f"#{lease}" in texts(driver, "#leases td"))
        shows(driver, lambda: str(victim.pid) in texts(driver, row + "td"))
        victim.kill()
        shows(driver, lambda: texts(driver, row + ".pill") == ["died"])
        shows(driver, lambda: f"#{lease}" not in texts(driver, "#leases td"))
        assert texts(driver, row + ".pill[data-state=died]") == ["died"]
    finally:
        victim.kill()
        victim.wait()
        assert victim.stdin is not None
        assert victim.stdout is not None
        victim.stdin.close()
        victim.stdout.close()


def shows(driver: Any, check: Callable[[], bool]) -> None:
    eventually(check)
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


@needs_chromium
def test_the_tree_is_walked_and_zoomed_by_keyboard(service: ServiceProcess, driver: Any) -> None:
    driver.get(url_of(service))
    shows(driver, lambda: len(texts(driver, "#icicle g.run")) >= 5)
    driver.execute_script("document.querySelector('#icicle g.run').focus()")
    press(driver, "\ue015")  # down
    assert "tokens 0 to 40 of the prompt" in tip(driver)
    press(driver, "\ue015")
    assert "tokens 40 to 60 of the prompt" in tip(driver)
    press(driver, "\ue014", "\ue013")  # right, up
    assert "tokens 0 to 40 of the prompt" in tip(driver)
    press(driver, "\ue007")  # enter
    shows(driver, lambda: len(texts(driver, "#crumbs button")) == 2)
    assert texts(driver, "#crumbs [aria-current]") == ["40 tokens"]
    press(driver, "\ue00c")  # escape
    shows(driver, lambda: not texts(driver, "#crumbs button"))


def tip(driver: Any) -> str:
    return str(driver.execute_script("return document.getElementById('tip').innerText"))


@needs_chromium
def test_nothing_is_fetched_from_elsewhere_and_the_page_lives(
    service: ServiceProcess, driver: Any
) -> None:
    driver.get(url_of(service))
    shows(driver, lambda: texts(driver, "#status") == ["live"])
    fetched = driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)"
    )
    assert set(fetched) == {url_of(service)}
    assert "100.0" not in texts(driver, "#tile-use b")[0]
    drawn = "return document.querySelector('#ledger canvas').width * {}"
    assert driver.execute_script(drawn.format("1")) > 0
    size = driver.execute_script("return document.getElementById('pool-map').height")
    assert size > 10


@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_phone_shows_it_without_scrolling_sideways_in_both_schemes(
    service: ServiceProcess, driver: Any, scheme: str
) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        driver.get(url_of(service))
        shows(driver, lambda: len(texts(driver, "#icicle g.run")) >= 3)
        wide = "return [document.documentElement.scrollWidth, innerWidth]"
        scrolled, inner = driver.execute_script(wide)
        assert scrolled <= inner == 390
        ground = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        brightness = sum(driver.execute_script(ground))
        assert (brightness < 150) == (scheme == "dark")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_chromium
def test_the_page_says_when_the_service_is_gone(driver: Any, tmp_path: Path) -> None:
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *FLAGS) as service:
        driver.get(url_of(service))
        shows(driver, lambda: texts(driver, "#status") == ["live"])
        assert service.stop() == 0
        eventually(lambda: texts(driver, "#status") == ["connection lost, trying again"])
