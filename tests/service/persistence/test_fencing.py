"""A worker that was stopped wakes after its lease has ended, in the middle of writing."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import prefixcache
from chaos.pattern import prompt
from patience import PATIENCE_S
from service.persistence.test_restart import BLOCKS, SIZE, Reader, scribbler
from service.service_process import eventually, running, sizes


def test_late_writes_land_in_nobodys_block_and_a_late_commit_is_refused(tmp_path: Path) -> None:
    with (
        running(f"unix:{tmp_path}/s", *sizes(BLOCKS, SIZE), "--ttl", "1") as service,
        prefixcache.connect(service.target) as client,
        scribbler(service.target) as late,
    ):
        assert late.stdout is not None
        assert late.stdin is not None
        private = int(late.stdout.readline())
        late.send_signal(signal.SIGSTOP)
        eventually(lambda: not client.snapshot().leases)
        assert client.snapshot().quarantined == private
        reader = Reader(client)
        chats = [prompt((seed, 60)) for seed in range(200, 230)]  # more than the whole pool
        for chat in chats[:15]:
            reader.store(chat)
        late.send_signal(signal.SIGCONT)
        for chat in chats[15:]:  # every block that can be lent is, while it writes
            reader.store(chat)
        time.sleep(0.3)
        assert sum(reader.read(chat) for chat in chats) > 500
        assert client.snapshot().quarantined == private
        late.stdin.close()
        assert late.stdout.readline().strip() == "LeaseExpired FAILED_PRECONDITION"
        assert late.wait(PATIENCE_S) == 0
        eventually(lambda: client.snapshot().quarantined == 0)
