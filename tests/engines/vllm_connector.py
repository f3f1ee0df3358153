"""The scheduler's side of the connector, over a simulated service: run by vLLM's Python.

    python vllm_connector.py

Requests are matched, admitted and planned by hand, as vLLM's scheduler does it, and the worker's
side copies between pages of memory.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

import prefixcache_vllm.connector as ours
from engines.simulated import TTL_S, Machine, Session
from prefixcache_vllm.connector import Copied, Copies, SchedulerSide, copy_pages, pages_of

SIZE, NUM_BLOCKS = 32, 40


class Patches:
    """Puts things in their places for good."""

    def setattr(self, name: str, value: object) -> None:
        """Put something in the place of what a dotted name says."""
        module, _, attribute = name.rpartition(".")
        setattr(import_module(module), attribute, value)


class Link:
    """In the place of the scheduler's: the session that is there."""

    group = "g"
    session: Session

    def __init__(self, *_: Any, make: Any, **__: Any) -> None:
        self.make = make

    def join(self) -> Any:
        """Attach."""
        return self.make(self.session)

    def look(self) -> None:
        """Find nothing."""

    def take(self) -> None:
        """Find nothing."""


class Stage:
    """A service, and an engine's side of the connector."""

    def __init__(self) -> None:
        self.machine = Machine(Patches(), NUM_BLOCKS, SIZE)
        ours.time = SimpleNamespace(monotonic=lambda: self.machine.now)  # type: ignore[assignment]
        self.session = Link.session = self.machine.attach("connector")
        ours.Link = Link  # type: ignore[assignment, misc]
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32)
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=1024),
            additional_config={},
            kv_transfer_config=None,
        )
        cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
        self.side = SchedulerSide(config, cache)
        self.blocks: dict[str, list[int]] = {}

    def request(self, name: str, tokens: list[int]) -> Any:
        """A request as vLLM's scheduler has it."""
        self.blocks[name] = [100 * len(self.blocks) + at for at in range(-(-len(tokens) // SIZE))]
        return SimpleNamespace(
            request_id=name,
            all_token_ids=tokens,
            num_tokens=len(tokens),
            num_computed_tokens=0,
            max_tokens=8,
            cache_salt=None,
            lora_request=None,
            mm_features=None,
            prompt_embeds=None,
            pooling_params=None,
        )

    def match(self, request: Any, num_computed: int = 0) -> int:
        """What can be copied in, once the service has answered."""
        for _ in range(3):
            found = self.side.match(request, num_computed)
            if found is not None:
                return found
            self.machine.deliver(self.session)
        raise AssertionError("never known")

    def plan(self, *requests: Any, counts: tuple[int, ...]) -> Copies:
        """The copies of a step that computes so many tokens of requests."""
        for request, count in zip(requests, counts, strict=True):
            request.num_computed_tokens = request.num_tokens - count
        state = SimpleNamespace(resolve_block_ids=lambda name: (self.blocks[name],))
        return self.side.plan(
            SimpleNamespace(
                total_num_scheduled_tokens=sum(counts),
                num_scheduled_tokens={
                    one.request_id: count for one, count in zip(requests, counts, strict=True)
                },
                kv_connector_block_state=state,
            )
        )

    def compute(self, name: str, tokens: list[int]) -> list[int]:
        """Compute a prompt, save it, and end; give the pages where it is."""
        request = self.request(name, tokens)
        assert self.match(request) == 0
        plan = self.plan(request, counts=(len(tokens),))
        assert len(plan.saves) == len(tokens) // SIZE
        self.side.copied(Copied(plan.step))
        self.side.finish(name)
        self.machine.deliver(self.session)
        return [page for _, page in plan.saves]


def of_a_prompt_that_is_there_one_token_is_left() -> None:
    """To the token, and read from where it was computed; what vLLM has itself is not copied."""
    stage = Stage()
    whole, more = list(range(8 * SIZE)), list(range(8 * SIZE + 5))
    pages = stage.compute("first", whole)
    for name, tokens, own, matched, count in (
        ("same", whole, 0, 255, 8),
        ("mostly its own", whole, 7 * SIZE, 31, 1),
        ("goes on", more, 0, 256, 8),
        ("goes on, its own", more, 8 * SIZE, 0, 0),
        ("shorter", whole[:110], 0, 109, 4),
        ("another end", [*whole[:150], *[7] * 50], 0, 150, 5),
        ("too few to copy", whole[:100], 0, 96, 3),
    ):
        request = stage.request(name, tokens)
        assert stage.match(request, own) == matched, name
        stage.side.admit(request, stage.blocks[name], matched)
        plan = stage.plan(request, counts=(len(tokens) - own - matched,))
        there = zip(pages[own // SIZE :][:count], stage.blocks[name][own // SIZE :], strict=False)
        assert plan.loads == list(there), name
        # What it fills is saved to a page of its own.
        assert not {page for _, page in plan.saves} & set(pages)
        assert plan.until > stage.machine.now
        stage.side.copied(Copied(plan.step))
        stage.side.finish(name)
        stage.machine.deliver(stage.session)
    stage.machine.check_idle()


def who_is_preempted_reads_what_it_has_saved_itself() -> None:
    """The page that it went on with is its own from then on."""
    stage = Stage()
    pages = stage.compute("first", list(range(8 * SIZE)))
    request = stage.request("again", [*range(150), *[7] * 50])
    assert stage.match(request) == 150
    stage.side.admit(request, stage.blocks["again"], 150)
    plan = stage.plan(request, counts=(50,))
    assert plan.loads[4][0] == pages[4]
    saved = [page for _, page in plan.saves]
    assert len(saved) == 2
    for turn in range(2):  # before the step is acknowledged, and after it
        assert stage.match(request) == (150, 6 * SIZE)[turn]
        stage.side.admit(request, stage.blocks["again"], (150, 6 * SIZE)[turn])
        loads = stage.plan(request, counts=(1,)).loads
        assert [page for page, _ in loads] == pages[:4] + ([pages[4]], saved)[turn]
        stage.side.copied(Copied(plan.step))
    stage.side.copied(Copied(stage.side._step))
    stage.side.finish("again")
    stage.machine.deliver(stage.session)
    stage.machine.check_idle()


def what_was_lost_after_it_was_granted_is_not_read() -> None:
    """The engine is stopped between the answer and the step that copies."""
    stage = Stage()
    tokens = list(range(8 * SIZE))
    stage.compute("first", tokens)
    request = stage.request("again", tokens)
    assert stage.match(request) == 255
    stage.machine.pass_time(2 * TTL_S, silent=stage.session)
    assert stage.match(request) == 255  # nothing has told it
    stage.side.admit(request, stage.blocks["again"], 255)
    plan = stage.plan(request, counts=(1,))
    assert plan.loads
    assert plan.until < stage.machine.now, "copied in from what may be another's"
    stage.side.copied(Copied(plan.step))
    assert stage.match(request) == 0
    stage.side.finish("again")
    stage.machine.deliver(stage.session)
    stage.machine.check_idle()


def pages_are_copied_where_they_belong() -> None:
    """In runs and by themselves; nothing else is touched."""
    memory = torch.zeros(3 * 4 * 10 * 16, dtype=torch.bfloat16)
    layers = [memory[at * 640 : (at + 1) * 640].view(10, 4, 16) for at in range(3)]
    own = pages_of(layers, 128)
    assert own.shape == (3, 10, 128)
    pool = torch.arange(3 * 20, dtype=torch.uint8).view(3, 20, 1).expand(3, 20, 128).contiguous()
    copy_pages(pool, own, [(4, 1), (5, 2), (9, 0), (6, 3)])
    assert own[:, :, 0].tolist() == [
        [20 * layer + 9, 20 * layer + 4, 20 * layer + 5, 20 * layer + 6, *[0] * 6]
        for layer in range(3)
    ]
    assert layers[1].view(torch.uint8)[2].unique().tolist() == [25]
    copy_pages(own, pool, [(3, 19)])
    assert pool[:, 19].unique(dim=1).flatten().tolist() == [6, 26, 46]


def main() -> None:
    """Run all."""
    for case in (
        of_a_prompt_that_is_there_one_token_is_left,
        who_is_preempted_reads_what_it_has_saved_itself,
        what_was_lost_after_it_was_granted_is_not_read,
        pages_are_copied_where_they_belong,
    ):
        case()
        sys.stdout.write(f"{case.__name__}\n")


if __name__ == "__main__":
    main()
