"""A worker process whose engine hangs: it computes nothing while a file is there.

python -m worker.hung FILE MODEL ADDRESS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from prefixcache_worker.forward import Forward
from prefixcache_worker.model import Model
from prefixcache_worker.process import WorkerProcess


def main(file: str, model: str, address: str) -> None:
    whole = Forward.run

    def run(*given: Any) -> Any:
        while Path(file).exists():
            time.sleep(0.01)
        return whole(*given)

    Forward.run = run  # type: ignore[method-assign]
    WorkerProcess(Model.load(model, dtype="float32", threads=1), address, name="hung").run()


if __name__ == "__main__":
    main(*sys.argv[1:])
