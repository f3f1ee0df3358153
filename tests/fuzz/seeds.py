"""Inputs to begin from: what each target takes for good."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fuzz import strangers
from fuzz.odd import toml
from prefixcache.service.persistence.manifest import Manifest
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb


def _batch() -> bytes:
    batch = pb.OpBatch()
    acquire = batch.ops.add(id=1).acquire
    acquire.tokens, acquire.reserve, acquire.request_id = pack(range(9)), 4, "r"
    for number, lease in enumerate((1, 2, 3), 2):
        commit = batch.ops.add(id=number).commit
        commit.lease, commit.num_tokens, commit.new_tokens = lease, 9 + lease, pack([7] * lease)
    batch.ops.add(id=6).extend.lease = 1
    batch.ops[-1].extend.num_tokens = 20
    batch.ops.add(id=7).fork.lease = 1
    batch.ops[-1].fork.count = 2
    batch.ops.add(id=8).truncate.lease = 1
    batch.ops[-1].truncate.num_tokens = 3
    batch.ops.add(id=9).lookup.tokens = pack(range(6))
    batch.ops.add(id=10).explain.tokens = pack(range(6))
    batch.ops.add(id=11).release.lease = 1
    batch.ops.add(id=12).snapshot.SetInParent()
    batch.ops.add(id=13).renew.SetInParent()
    for number, policy in enumerate((pb.Again(first=2), pb.Again(share=0.5)), 14):
        moved = batch.ops.add(id=number).acquire
        moved.tokens = pack([7, *range(9), *[number] * number])
        moved.segments.CopyFrom(policy)
    return batch.SerializeToString()


def _results() -> bytes:
    results = pb.OpResults()
    grant = results.results.add(id=1).acquire.grant
    grant.lease, grant.block_table, grant.num_cached = 1, pack([0, 1]), 3
    grant.copies.add(src=1, dst=2, num_tokens=3)
    grant.segments.add(start=5, source=4, blocks=pack([7, 8]), num_again=2)
    grant.approximate = True
    results.results.add(id=2).error.kind = "PoolExhausted"
    results.results.add(id=3).explain.spans.add(start=0, end=3, fate=pb.FATE_HIT)
    results.results.add(id=4).snapshot.num_blocks = 3
    return results.SerializeToString()


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest"
        manifest = Manifest(path)
        manifest.begin({"format": 1, "layout": "1x1x2:float32"})
        manifest.write([(0, Namespace("m"))], [], [], [], [])
        manifest.close()
        return path.read_bytes()


def _lines(form: int) -> bytes:
    return b"\n".join(map(strangers.json_line, strangers.LINES[form][1]))


def seeds(target: str) -> list[bytes]:
    """Give some good inputs of a target."""
    jsonl = b"\n".join(_lines(form) for form in range(len(strangers.LINES)))
    changes = [bytes([1, where, 3 * where % 256]) for where in range(4)]
    return {
        "messages": [_batch()],
        "answers": [_results()],
        "rows": [bytes(range(1, 120)), bytes([3, 4, 0] + [5] * 90)],
        "manifest": [_manifest()],
        "states": [bytes([1, 4, 0, 0, 0, 3]), bytes([1, 7, 11, 65, 9, 8, 1, 12, 23])],
        "folders": [
            *(
                bytes([5 * way + file, 2 * way % 4, 7, 255, 9])
                for way in range(3)
                for file in range(4)
            ),
            bytes([10, 2, 40, 1, 0]),
        ],
        "stores": [
            b"\x00:1\r\n",
            b"\x01:0\r\n",
            b"\x06+OK\r\n-OOM no room\r\n",
            b"\x03$8\r\n01234567\r\n",
            b"\x0b$8\r\n01234567\r\n$3\r\nabc\r\n$-1\r\n",
            b"\x07-WRONGTYPE it is a list\r\n$-1\r\n",
        ],
        "traces": [
            *(bytes([32, form]) + _lines(form) for form in range(len(strangers.LINES))),
            *(bytes([33 + 2 * form % 32, form, *changes[form % 4]]) for form in range(12)),
            bytes([8, 0]) + jsonl,
        ],
        "conversations": [bytes([1 + 2 * file]) + change for file in (0, 1) for change in changes],
        "prompts": [
            bytes([2 * at + 1]) + changes[at % 4] for at in range(len(strangers.Prompts.GOOD))
        ],
        "logged": [bytes([128 + 7 * at]) + changes[at % 4] for at in range(7)],
        "workers": [bytes([129 + at]) + changes[at] for at in range(3)],
        "identities": [b"\0" + toml(strangers.IDENTITIES).encode(), *changes],
        "configs": [bytes([2 * at + 1]) + changes[at % 4] for at in range(5)],
        "texts": ["mistral-7b@ü".encode(), b"s\xff", "a\x1b[2J\u202e".encode()],
        "settings": [b"9" * 400 + b"GiB", b"2GiB", b"30x3x64:bfloat16"],
    }[target]
