"""vLLM's schedulers, with leased blocks.

    --scheduler-cls prefixcache_vllm.scheduler.LeaseScheduler

A waiting request asks the service for its blocks; until they are granted the scheduler passes on to
the next.  After each step one message tells the service what was written, what is given back and
what room will be needed; nobody waits for its answer.  A lease that is lost drops the output of the
step that ran under it, and the request is computed again.

**When the service is lost**, and one answers again, the engine joins it by itself:

```
look      a thread attaches, and leases spare blocks; steps go on, if the service is dead
move      an empty step: nothing is computed, the worker puts the new pool's memory below its views
change    all requests are preempted, and computed again in what the new service lends
```
If the worker cannot move, nothing has changed, and another service is looked for.
"""

from __future__ import annotations

import logging
import time
from itertools import islice
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from prefixcache.client import Session
from prefixcache.errors import Unsupported
from prefixcache_vllm.joining import check_room
from prefixcache_vllm.leases import Bounds, Leases, Room
from prefixcache_vllm.link import Link
from prefixcache_vllm.manager import LeasedKVCacheManager
from prefixcache_vllm.moving import Move, answer_of
from prefixcache_vllm.options import Options

log = logging.getLogger("vllm.prefixcache")

PAUSE_S = 0.005
"""How long a step with nothing to compute waits for a lease before it looks for new requests."""


class Leasing:
    """Mixed into a scheduler of vLLM's."""

    kv_cache_manager: LeasedKVCacheManager

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        is_async = isinstance(self, AsyncScheduler)
        if bool(vllm_config.scheduler_config.async_scheduling) != is_async:
            raise Unsupported(
                f"{type(self).__name__} is not for this engine: with --async-scheduling, which may "
                "be vLLM's default, LeaseAsyncScheduler plans, with --no-async-scheduling "
                "LeaseScheduler; `prefixcache vllm` chooses"
            )
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)  # type: ignore[call-arg]
        options = Options.of(vllm_config)
        bounds = Bounds(
            max_tokens=vllm_config.model_config.max_model_len,
            reserve=options.reserve,
            ahead=options.ahead,
            window=options.window,
            wait_s=options.wait_s,
            spare_blocks=options.spare_blocks,
        )

        def make(session: Session) -> Leases:
            check_room(session.pool, bounds.max_tokens, bounds.spare_blocks)
            return Leases(session, bounds)

        self._link = Link(vllm_config, kv_cache_config, "engine", in_place=True, make=make)
        self.leases = self._link.join()
        self._found: Leases | None = None
        """What another service lends, until the worker has moved there."""
        self.kv_cache_manager = LeasedKVCacheManager.of(self.kv_cache_manager, self.leases)
        # Blocks that are let go of may be lent to another process at once, and no stream orders its
        # writes behind ours: they are given back when the last step that writes there has ended.
        self.defer_block_free = vllm_config.max_concurrent_batches > 1
        log.info(
            "prefixcache: leasing from %d blocks of %d tokens",
            self.leases.session.pool.num_blocks,
            self.leases.session.pool.block_size,
        )

    def add_request(self, request: Any) -> None:
        """Queue a request, and ask for its blocks at once if few are before it."""
        super().add_request(request)  # type: ignore[misc]
        if self.leases.has_window and request.status == RequestStatus.WAITING:
            self.kv_cache_manager.ask(request)
            self.leases.flush()

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        if not super()._handle_blocked_waiting_request(request):  # type: ignore[misc]
            return False
        if request.num_stale_output_tokens and not request.drop_stale_output:
            return False  # its blocks may not be asked for before it knows all of its tokens
        manager = self.kv_cache_manager
        if request.request_id not in self.leases.held and not self.leases.has_window:
            return False
        if manager.is_ready(request):
            return True
        refused = manager.ask(request).refused
        if refused is not None:
            log.warning("prefixcache: %s cannot be served: %s", request.request_id, refused)
            # vLLM ends what is named here as a request that failed.
            self.grammar_compile_error_reqs.add(request.request_id)  # type: ignore[attr-defined]
        return False

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step: only requests whose leases stand take part."""
        self._preempt_lost(drop_output=False)
        if not self.leases.session.alive and self._is_to_join():
            return self._plan_move(*args, **kwargs)
        may_compute = self._make_room()
        self.leases.flush()
        if self.running and not may_compute:  # type: ignore[attr-defined]
            self.leases.pause_for_room(PAUSE_S)
        elif not self.running and self.waiting:  # type: ignore[attr-defined]
            # vLLM would ask again every millisecond, each time with an empty step for its workers,
            # which spin for it: they would slow down who computes what everybody waits for.
            first = islice(self.waiting, self.leases.bounds.window)  # type: ignore[attr-defined]
            self.leases.pause([request.request_id for request in first], PAUSE_S)
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.leases.flush()
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take a step's tokens in, and tell the service what it wrote."""
        if (answer := answer_of(model_runner_output)) is not None and self._found is not None:
            self._moved(answer)
        # What a step read or wrote after a lease's deadline may be another's.
        self._preempt_lost(drop_output=True)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(name)  # type: ignore[attr-defined]
            if request is not None and request.status == RequestStatus.RUNNING:
                self.kv_cache_manager.settle(request)
        self.leases.flush()
        return outputs

    def _make_room(self) -> bool:
        """Have requests sit out whose room has not come yet; tell whether any other runs.

        Where it does not come in time the last request gives way, as in vLLM: not to the one that
        needs its blocks, but to the service, which lends them to whoever waits longest.
        """
        running: list[Any] = self.running  # type: ignore[attr-defined]
        may_compute = False
        for request in list(running):
            if request.status != RequestStatus.RUNNING:
                continue  # it has given way
            need = request.num_tokens_with_spec + request.num_output_placeholders
            room = self.leases.room(request.request_id, need)
            if room is Room.MISSING and not self.leases.is_alone:
                self._preempt_last()
                if request.status != RequestStatus.RUNNING:
                    continue
                room = self.leases.room(request.request_id, need)
            if room is Room.COMING:
                # vLLM leaves it out of the step that comes, and not of the next.
                request.next_decode_eligible_step = self.current_step + 2  # type: ignore[attr-defined]
            else:
                may_compute = True
        return may_compute

    # -------------------------------------------------------------------------- another service

    def _is_to_join(self) -> bool:
        """Whether another session is there, so that nothing is computed any more before it is ours.

        What steps under way write to is not given up.
        """
        leases = self.leases
        if not leases.is_alone and not self._is_under_way():
            leases.let_go()
            leases.flush()
        if self._found is not None and not self._found.session.alive:
            self._found = None
        if self._found is None and not self._is_under_way():
            self._link.look()
            self._found = self._link.take()
        leases.never_joins = self._link.refusal
        return self._found is not None

    def _is_under_way(self) -> bool:
        requests = self.requests.values()  # type: ignore[attr-defined]
        return bool(
            self.deferred_frees  # type: ignore[attr-defined]
            or any(request.num_in_flight_tokens for request in requests)
        )

    def _plan_move(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step without tokens, in which the worker moves to the pool that was found."""
        is_under_way = self._is_under_way()
        before, self._pause_state = self._pause_state, PauseState.PAUSED_ALL  # type: ignore[has-type]
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._pause_state = before
        if not is_under_way and self._found is not None:
            output.kv_connector_metadata = Move(self._found.session.pool, self._link.group)
        return output

    def _moved(self, answer: str) -> None:
        """Compute in what another service lends, if the worker has moved there: begin all again."""
        found, self._found = self._found, None
        assert found is not None
        if answer:
            log.warning("prefixcache: the worker cannot move to the pool that answers: %s", answer)
            found.session.close()
            return
        running: list[Any] = self.running  # type: ignore[attr-defined]
        for request in list(reversed(running)):
            running.remove(request)
            self._preempt_request(request, time.monotonic())  # type: ignore[attr-defined]
        former = self.leases
        self.kv_cache_manager.change_to(found)
        self.leases = found
        former.session.close()
        log.warning(
            "prefixcache: joined the service again; %d requests are computed again",
            len(self.waiting),  # type: ignore[attr-defined]
        )

    def _preempt_last(self) -> None:
        running: list[Any] = self.running  # type: ignore[attr-defined]
        if self.policy == SchedulingPolicy.PRIORITY:  # type: ignore[attr-defined]
            last = max(running, key=lambda one: (one.priority, one.arrival_time))
        else:
            last = running[-1]
        if self._request_blocks_can_be_freed(last):  # type: ignore[attr-defined]
            running.remove(last)
            self._preempt_request(last, time.monotonic())  # type: ignore[attr-defined]

    def _preempt_lost(self, *, drop_output: bool) -> None:
        for name in self.leases.lost():
            request = self.requests.get(name)  # type: ignore[attr-defined]
            if request is None or request not in self.running:  # type: ignore[attr-defined]
                self.kv_cache_manager.drop(name)
                continue
            # vLLM frees its blocks, and late if a step that is under way may write to them: given
            # back at once, they could be another's by then.
            log.info("prefixcache: %s lost its lease and is computed again", name)
            self.running.remove(request)  # type: ignore[attr-defined]
            self._preempt_request(  # type: ignore[attr-defined]
                request, time.monotonic(), drop_stale_output=drop_output
            )

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """End requests from outside, and give their blocks back."""
        result = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        self.leases.flush()
        return result

    def shutdown(self) -> None:
        """Leave the service."""
        self._link.close()
        super().shutdown()  # type: ignore[misc]


class LeaseScheduler(Leasing, Scheduler):
    """One step at a time."""


class LeaseAsyncScheduler(Leasing, AsyncScheduler):
    """The next step is planned while one runs."""
