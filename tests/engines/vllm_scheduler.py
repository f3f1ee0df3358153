"""vLLM's own schedulers over leases, with a runner that computes nothing: run by vLLM's Python.

    python vllm_scheduler.py MODEL_FOLDER SEED

Two engines on one simulated service.  The asynchronous scheduler plans a step while the one before
it is still under way; a step writes to memory when it ends, so that blocks which are given back too
soon, or told to others too soon, are read wrongly by somebody.  Sessions break, services die and
others come with other memory, to which a runner moves when it is told to, or cannot.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

import prefixcache_vllm.scheduler as ours
from engines.simulated import TTL_S, Machine, Session, alone, answer_to
from prefixcache_vllm.moving import asked_of, with_answer

SIZE, NUM_BLOCKS = 32, 40


class Patches:
    """Puts things in their places for good."""

    def setattr(self, name: str, value: object) -> None:
        """Put something in the place of what a dotted name says."""
        module, _, attribute = name.rpartition(".")
        setattr(import_module(module), attribute, value)


class Runner:
    """Executes steps in order, each when it is waited for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.num_checked = 0

    def execute(self, step: SchedulerOutput, is_valid: Any) -> ModelRunnerOutput:
        """Write what the step computes; read everything before it, where that is still its own."""
        memory = self.machine.memory
        for copy in step.kv_cache_block_copies or ():
            memory.copy(copy.src_block_id, copy.dst_block_id, SIZE)
        computed: dict[str, int] = {}
        for new in step.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.blocks[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for at, name in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[at]
            if name in cached.resumed_req_ids:
                self.blocks[name] = list(fresh[0])
                self.tokens[name] = list(cached.all_token_ids[name])
            elif fresh is not None:
                self.blocks[name] += fresh[0]
            computed[name] = cached.num_computed_tokens[at]
        names = list(step.num_scheduled_tokens)
        sampled = []
        for name in names:
            start, count = computed[name], step.num_scheduled_tokens[name]
            tokens, table = self.tokens[name], self.blocks[name]
            for position in range(start, start + count):
                slot = table[position // SIZE], position % SIZE
                memory.write(*slot, ("", tuple(tokens[: position + 1])))
            if is_valid(name):
                wrong = memory.wrong(table, "", tuple(tokens[: start + count]))
                assert not wrong, f"{name}: {wrong}"
                self.num_checked += 1
            if start + count == len(tokens):
                sampled.append([answer_to(tokens)])
                tokens.append(sampled[-1][0])
            else:
                sampled.append([])
        index = {name: at for at, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled)


class Stage:
    """The service that there is now, or the dead one."""

    def __init__(self) -> None:
        self.machine = Machine(Patches(), NUM_BLOCKS, SIZE)

    def restart(self) -> None:
        """Let another service come, with memory of its own."""
        former = self.machine
        self.machine = Machine(Patches(), NUM_BLOCKS, SIZE)
        self.machine.now = former.now


class Link:
    """In the place of the scheduler's: it looks at the stage."""

    refusal = group = ""
    stage: Stage

    def __init__(self, *_: Any, make: Any, **__: Any) -> None:
        self.make = make
        self.looks = False

    def join(self) -> Any:
        """Attach to the service."""
        return self.make(self.stage.machine.attach("engine"))

    def look(self) -> None:
        """Look for a service from now on."""
        self.looks = True

    def take(self) -> Any:
        """Give what a service lends, if there is one."""
        if not self.looks or self.stage.machine.is_abandoned:
            return None
        self.looks = False
        return self.join()


class Engine:
    """One scheduler and its runner, with as many steps under way as it may have."""

    def __init__(self, stage: Stage, folder: str, draw: random.Random, *, is_async: bool) -> None:
        self.stage, self.draw = stage, draw
        self.num_moved = self.num_failed = 0
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            block_size=SIZE,
            max_model_len=512,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            enable_prefix_caching=False,
            enforce_eager=True,
            dtype="float32",
            additional_config={"prefixcache": {"reserve": 40, "ahead": 16, "window": 3}},
        )
        config = arguments.create_engine_config()
        config.scheduler_config.async_scheduling = is_async
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=64, dtype=_float32())
        page = spec.page_size_bytes
        cache = KVCacheConfig(
            num_blocks=NUM_BLOCKS,
            kv_cache_tensors=[KVCacheTensor(page * NUM_BLOCKS, ["l"], page * NUM_BLOCKS, page)],
            kv_cache_groups=[KVCacheGroupSpec(["l"], spec)],
            kv_cache_layout="LBHNC",
        )
        Link.stage = stage
        ours.Link = Link  # type: ignore[assignment, misc]
        made = ours.LeaseAsyncScheduler if is_async else ours.LeaseScheduler
        grammar = SimpleNamespace(accept_tokens=lambda request, tokens: True)
        self.scheduler: Any = made(config, cache, grammar, block_size=SIZE)
        self.runner = Runner(stage.machine)
        self.under_way: deque[SchedulerOutput] = deque()
        self.most_under_way = 2 if is_async else 1
        self.requests: dict[str, Request] = {}
        self.prompts: dict[str, tuple[list[int], int]] = {}

    @property
    def session(self) -> Session:
        """The scheduler's."""
        return self.scheduler.leases.session  # type: ignore[no-any-return]

    def add(self, name: str, prompt: list[int], num_new: int) -> None:
        """Take a request."""
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        request = Request(name, prompt, params, None)
        self.requests[name], self.prompts[name] = request, (prompt, num_new)
        self.scheduler.add_request(request)

    def plan(self) -> None:
        """Plan a step, if one more may be under way."""
        if len(self.under_way) < self.most_under_way:
            step = self.scheduler.schedule()
            if step.total_num_scheduled_tokens:
                self.under_way.append(step)
            else:
                empty = ModelRunnerOutput(req_ids=[], req_id_to_index={})
                if asked_of(step) is not None:
                    empty = self._moved(empty)
                self.scheduler.update_from_output(step, empty)
                self._end_requests()

    def end_step(self, *, aborted: str = "") -> None:
        """Let the oldest step that is under way end; before its output is taken in, abort one."""
        if self.under_way:
            step = self.under_way.popleft()
            output = self.runner.execute(step, self._may_read)
            if aborted:
                self._abort(aborted)
            self.scheduler.update_from_output(step, output)
            self._end_requests()

    def _end_requests(self) -> None:
        for name in [one for one, request in self.requests.items() if request.is_finished()]:
            request = self.requests.pop(name)
            prompt, num_new = self.prompts.pop(name)
            if request.status == RequestStatus.FINISHED_ERROR:
                self.num_failed += 1  # there was no service, and no room without one
                continue
            got = list(request.all_token_ids)
            assert got == alone(prompt, num_new), f"{name}: {got[len(prompt) :]}"

    def _moved(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Move to the memory of the service that was found, mostly."""
        assert not self.under_way, "a step would write to what is put in the place of its memory"
        if self.draw.random() < 0.3:
            return with_answer(output, "no")  # type: ignore[no-any-return]
        self.runner.machine = self.scheduler._found.session.machine
        self.num_moved += 1
        return with_answer(output, "")  # type: ignore[no-any-return]

    def _may_read(self, name: str) -> bool:
        """Whether what it reads counts: it runs, under a lease that stands."""
        leases, request = self.scheduler.leases, self.scheduler.requests.get(name)
        held = leases.held.get(name)
        if request is None or held is None or request.num_stale_output_tokens:
            return False
        return not leases._is_over(held)

    def abort(self, name: str) -> None:
        """End a request from outside.

        vLLM does so when a step has ended.  The synchronous scheduler relies on that: no step is
        under way then, so what a request held is given back at once.
        """
        if self.under_way and self.most_under_way == 1:
            self.end_step(aborted=name)
        else:
            self._abort(name)

    def _abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        del self.requests[name], self.prompts[name]


def _deliver(engine: Engine) -> None:
    """Let the service, if it lives, hear an engine, and be heard."""
    machine = engine.session.machine
    if not machine.is_abandoned:
        machine.deliver(engine.session)


def _float32() -> Any:
    import torch

    return torch.float32


def run(folder: str, seed: int, *, is_async: bool) -> dict[str, int]:
    """Do anything in any order, then everything to its end."""
    draw = random.Random(seed)
    stage = Stage()
    engines = [Engine(stage, folder, draw, is_async=is_async) for at in range(2)]
    prompts: list[list[int]] = [[draw.randrange(3, 500) for _ in range(200)] for _ in range(3)]
    for turn in range(1500):
        engine = draw.choice(engines)
        machine = stage.machine
        match draw.choices(
            ["add", "plan", "end", "deliver", "wait", "stop", "abort", "cut", "die", "back"],
            [40, 300, 300, 250, 20, 10, 10, 3, 3, 15],
        )[0]:
            case "add" if turn < 1000 and len(engine.requests) < 8:
                shared = draw.choice(prompts)[: draw.randrange(1, 200)]
                own = [draw.randrange(3, 500) for _ in range(draw.randrange(1, 60))]
                engine.add(f"r{turn}", shared + own, draw.randrange(1, 80))
            case "plan":
                engine.plan()
            case "end":
                engine.end_step()
            case "deliver":
                _deliver(engine)
            case "wait":
                machine.pass_time(draw.random())
            case "stop":
                machine.pass_time(TTL_S * 1.5, silent=engine.session)
                # It wakes, plans its next step, and only then ends what was under way; meanwhile
                # the other one uses what it can get.
                engine.plan()
                _deliver(engine)
                other = engines[engines[0] is engine]
                for at in range(3):
                    other.add(f"s{turn}-{at}", [draw.randrange(3, 500) for _ in range(200)], 4)
                for _ in range(8):
                    other.plan()
                    _deliver(other)
                    other.end_step()
                    _deliver(other)
            case "abort" if engine.requests:
                engine.abort(draw.choice(sorted(engine.requests)))
            case "cut" if engine.session.alive and engine.session.machine is machine:
                machine.cut(engine.session)
            case "die" if not machine.is_abandoned:
                machine.die()
            case "back" if machine.is_abandoned:
                stage.restart()
        stage.machine.cache.check()
    if stage.machine.is_abandoned:
        stage.restart()
    for _ in range(4000):
        if not any(engine.requests for engine in engines):
            break
        for engine in engines:
            engine.plan()
            _deliver(engine)
            engine.end_step()
            _deliver(engine)
        stage.machine.pass_time(0.05)
    for engine in engines:
        assert not engine.requests, f"never ended: {sorted(engine.requests)}"
        while engine.under_way:
            engine.end_step()
        engine.scheduler.leases.flush()
        _deliver(engine)
        if not engine.session.alive:
            engine.session.close()  # nobody came who would have had it join
    stage.machine.check_idle()
    counts = [engine.scheduler.leases.counts for engine in engines]
    return {
        "checked": sum(engine.runner.num_checked for engine in engines),
        "reused": sum(one.reused_tokens for one in counts),
        "lost": sum(one.lost for one in counts),
        "granted": sum(one.granted for one in counts),
        "moved": sum(engine.num_moved for engine in engines),
        "failed": sum(engine.num_failed for engine in engines),
    }


def main() -> None:
    """Run both kinds of scheduler."""
    folder, *seeds = sys.argv[1:]
    for seed in map(int, seeds):
        for is_async in (False, True):
            told = run(folder, seed, is_async=is_async)
            sys.stdout.write(f"{seed} {'async' if is_async else 'sync'} {told}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
