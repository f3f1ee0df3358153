"""What an engine is told before it takes its first request."""

from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache.errors import Unsupported
from prefixcache.types import Layout, PoolHandle
from prefixcache_vllm.joining import check_both, check_room

POOL = PoolHandle("shm", "/p", 33, 32, Layout(planes=2, page_bytes=64, format="x"), 1, 0, 1)
"""32 blocks that are lent."""


def test_a_longest_request_that_would_never_have_room_is_refused_with_the_numbers() -> None:
    check_room(POOL, 28 * 32, spare_blocks=4)
    with pytest.raises(Unsupported, match=r"897 needs 29 blocks of 32 tokens.* lends 28 beside 4 "):
        check_room(POOL, 28 * 32 + 1, spare_blocks=4)


OURS = "prefixcache_vllm.scheduler.LeaseScheduler", "prefixcache_vllm.worker.CPUWorker"


@pytest.mark.parametrize(
    ("scheduler", "worker", "missing"),
    [
        (OURS[0], "auto", "--worker-cls prefixcache_vllm.worker.CPUWorker"),
        (OURS[0], "collections.OrderedDict", "--worker-cls is collections.OrderedDict"),
        (None, OURS[1], "--scheduler-cls prefixcache_vllm.scheduler.LeaseScheduler"),
        (dict, OURS[1], "--scheduler-cls is <class 'dict'>"),
    ],
)
def test_an_engine_of_which_one_half_is_not_ours_is_refused(
    scheduler: Any, worker: Any, missing: str
) -> None:
    """It would compute in blocks that others hold, or read what it does not have."""

    def engine(scheduler: Any, worker: Any) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
            parallel_config=SimpleNamespace(worker_cls=worker),
        )

    derived = type(
        "Own", (type("LeaseScheduler", (), {"__module__": OURS[0].rpartition(".")[0]}),), {}
    )
    check_both(engine(OURS[0], OURS[1]))
    check_both(engine(derived, OURS[1]))
    with pytest.raises(Unsupported, match=missing):
        check_both(engine(scheduler, worker))
