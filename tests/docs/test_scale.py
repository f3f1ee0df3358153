"""docs/scale.md: what it shows of grpc's ring_hash does what it says, with this grpcio."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S
from service.service_process import ROOT, environment

PAGE = (ROOT / "docs" / "scale.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
STORY = """
import sys
from concurrent import futures

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, Namespace, WorkerId

SPACE, ME = Namespace("m"), WorkerId(1)


class Machine(grpc.GenericRpcHandler):
    '''Answers with its number, and how much of the prompt it had to compute.'''

    def __init__(self, number):
        self.number, self.cache = number, PrefixCache(4096, 16)
        self.cache.attach(ME, SPACE, now=0.0)
        self.server = grpc.server(futures.ThreadPoolExecutor(1))
        self.server.add_generic_rpc_handlers([self])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, tokens, context):
        grant = self.cache.acquire(ME, SPACE, tokens, now=0.0)
        assert isinstance(grant, Grant)
        self.cache.commit(ME, grant.lease, len(tokens) // 4, now=0.0)
        self.cache.release(ME, grant.lease, now=0.0)
        return f"{self.number} {len(tokens) // 4 - grant.num_cached}".encode()


def ask(call, prompt):
    metadata = [("prefix-key", prefix_key("m", prompt))] if WITH_KEY else []
    where, computed = call(pack(prompt), metadata=metadata, timeout=60).decode().split()
    return int(where), int(computed)


WITH_KEY = sys.argv[1] == "key"
servers = [Machine(number) for number in range(4)]
channel = machines([f"127.0.0.1:{one.port}" for one in servers])
call = channel.unary_unary("/chat/Ask")
prompts = [[number] * 512 + [turn] * 16 for turn in range(3) for number in range(100, 160)]
went = [ask(call, one) for one in prompts]
places = [{where for where, _ in went[number::60]} for number in range(60)]
print(max(map(len, places)), len({where for where, _ in went}))
print(sum(computed for _, computed in went[60:]) // 120)
servers[2].server.stop(None).wait()
again = [ask(call, one)[0] for one in prompts[:60]]
print(all(now == before for now, (before, _) in zip(again, went) if before != 2))
print(2 in again, len(set(again)))
channel.close()
for one in servers:
    one.server.stop(None).wait()
"""


def told(tmp_path: Path, way: str) -> list[str]:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLE + STORY)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, way],
        env=environment(), capture_output=True, text=True, timeout=2 * PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_requests_with_one_key_go_to_one_machine_and_only_those_of_a_dead_one_move(
    tmp_path: Path,
) -> None:
    places, computed, others_stay, left = told(tmp_path, "key")
    assert places == "1 4", "each key at one machine, and all machines have some"
    assert computed == "16", "of a prompt that was seen before, what is new in it"
    assert others_stay == "True"
    assert left == "False 3"


def test_without_a_key_they_go_anywhere(tmp_path: Path) -> None:
    places, computed, *_ = told(tmp_path, "none")
    assert int(places.split()[0]) > 1
    assert int(computed) > 100
