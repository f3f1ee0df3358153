"""vLLM's inside, where ours takes hold of it, is what it was when somebody read it."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

from engines.vllm_process import PYTHON, needs_vllm, vllm_environment
from service.service_process import ROOT

FOLDER = Path(__file__).parent
READ = FOLDER / "vllm_hooks.json"


@needs_vllm
def test_every_hook_is_the_one_that_was_read() -> None:
    run = subprocess.run(
        [PYTHON, str(FOLDER / "vllm_hooks.py")],
        env=vllm_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    there = json.loads(run.stdout[run.stdout.index("{") :])
    read = json.loads(READ.read_text())
    changed = [
        f"{name}: {hook['signature']} became {(there['hooks'].get(name) or {}).get('signature')}"
        for name, hook in read["hooks"].items()
        if there["hooks"].get(name) != hook
    ]
    assert there["hooks"].keys() == read["hooks"].keys()
    assert not changed, (
        f"vLLM {there['version']} is not as {read['version']} was, where ours takes hold of it; "
        "read what changed, adapt, then write vllm_hooks.json anew:\n" + "\n".join(changed)
    )


STEADY = {
    "vllm.config.set_current_vllm_config",
    "vllm.platforms.current_platform",
    "vllm.usage.usage_lib.UsageContext",
    "vllm.utils.argparse_utils.FlexibleArgumentParser",
    "vllm.version.__version__",
}
"""What is imported and has nothing to be read: a name, a switch, a parser of arguments."""
BASES = {
    "LeasedKVCacheManager": "vllm.v1.core.kv_cache_manager.KVCacheManager",
    "Leasing": "vllm.v1.core.sched.scheduler.Scheduler",
    "PoolMemory": "vllm.v1.worker.gpu_worker.Worker",
    "CPUWorker": "vllm.v1.worker.cpu_worker.CPUWorker",
}
OWN = {
    *("of", "ask", "is_ready", "settle", "drop", "change_to", "bytes_of_pool"),
    *("_blocks", "_take_out", "_map", "_move"),
    *("_make_room", "_is_to_join", "_is_under_way", "_plan_move", "_moved"),
    *("_preempt_last", "_preempt_lost"),
}
"""Methods of those classes that are nobody's but ours."""


def test_whatever_is_taken_from_vllm_is_among_the_hooks() -> None:
    read = set(json.loads(READ.read_text())["hooks"])
    whole = {name for name in read if name.rpartition(".")[2][0].isupper()}
    missing = []
    for path in sorted((ROOT / "worker/prefixcache_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                for one in node.names:
                    name = f"{node.module}.{one.name}"
                    if name not in STEADY and not any(hook.startswith(name) for hook in read):
                        missing.append(name)
            elif isinstance(node, ast.ClassDef) and (base := BASES.get(node.name)) is not None:
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                names = {f"{base}.{method}" for method in methods - OWN}
                missing += [] if base in whole else sorted(names - read)
    assert not missing


def test_each_hook_was_there_when_it_was_read() -> None:
    read = json.loads(READ.read_text())
    assert len(read["hooks"]) > 60
    assert not [name for name, hook in read["hooks"].items() if hook is None]
