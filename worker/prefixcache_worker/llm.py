"""A model in this process, on the machine's pool: prompts in, answers out, as vLLM's users know it.

```
LLM ── Model ── Engine ──► the service that answers, or one of its own
generate, chat, beam_search:  prompts ──► requests ──► steps until all are answered ──► outputs
```
What one call, or any other process on that service, has computed costs the next one nothing.
"""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast
from weakref import finalize

from rich.console import Console
from rich.progress import Progress

import prefixcache
from prefixcache import errors
from prefixcache.client.address import default_target
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable, Unsupported
from prefixcache.prompts.logged_request import read_logged
from prefixcache.types import Ledger, unpack
from prefixcache.user_folders import expand
from prefixcache_worker import smollm2
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)
from prefixcache_worker.own_service import OwnService
from prefixcache_worker.process import joiner
from prefixcache_worker.request import Event, Failed, Finished, Request, Scored, Started, Token
from prefixcache_worker.sampling import Logprobs, Sampling
from prefixcache_worker.sampling_params import BeamSearchParams, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or an object with `prompt` or `prompt_token_ids`, and perhaps `cache_salt`."""

_MEMORY: Final = "2GiB"
_BAR_AFTER_S: Final = 1.0
_PROMPT_KEYS: Final = {"prompt", "prompt_token_ids", "cache_salt"}
_HARMLESS_LOSSES: Final = {"messages that the template does not show in full", "thoughts"}
"""What templates leave out by design, of earlier turns."""
_numbers = count(1)


class LLM:
    """A model that answers prompts, and shares what it computes.  For one thread at a time.

    A context manager; `close`, the end of the process and a Ctrl-C leave no process and no lease.
    What came through a fork answers nothing: it is its parent's.

    Args:
        model: folder, hub id or `smollm2`; or one that is loaded, with which `dtype`, `threads` and
            `weights` are refused.
        connect: address of the service; None: this machine's, and if none answers, one of its own.
        dtype: `float32` or `bfloat16`; `auto` is bfloat16.  Must be the pool's.
        threads: of torch; None: 1.
        memory: of the pool of a service of its own, 2GiB by default; refused if one answers.
        segments: certificates for a service of its own, a file or a folder, without which no
            request gets segments there; refused if one answers.
        chunk: tokens computed a step, at most.
        max_batch: sequences computed at a time.
        drafts: most tokens a step that are looked up and tried for an answer.
        weights: `packed` in a file that all processes of this user map, `int8` likewise in eight
            bits, or `private`.  None: `packed`.
        invariant: every bit of an answer is the same in any company, cached or not.
        others: none; what vLLM takes and has no effect here is refused by name.

    Raises:
        NotFound, Unsupported: as `Model.load`.
        ServiceUnavailable: nobody answers at `connect`.
        InvalidRequest: what is given has no effect beside the model or the service that are there.
    """

    def __init__(
        self,
        model: str | Path | Model = smollm2.NAME,
        *,
        connect: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        memory: str | None = None,
        segments: str | Path | None = None,
        chunk: int = 256,
        max_batch: int = 16,
        drafts: int = 0,
        weights: str | None = None,
        invariant: bool = False,
        **others: Any,
    ) -> None:
        if others:
            raise Unsupported(f"{', '.join(sorted(others))}: has no effect here")
        own: OwnService | None = None
        target = default_target() if connect is None else connect
        # What cannot be had is said before anything is loaded.
        _check_own(memory, segments)
        if isinstance(model, Model):
            given = {"dtype": dtype != "auto", "threads": threads, "weights": weights}
            if idle := [name for name, value in given.items() if value not in (None, False)]:
                raise InvalidRequest(
                    f"{', '.join(idle)}: without effect on a model that is loaded; load it so"
                )
        _look(target, must_answer=connect is not None, memory=memory, segments=segments)
        if isinstance(model, Model):
            self.model = model
        else:
            self.model = Model.load(
                model,
                dtype="bfloat16" if dtype == "auto" else dtype,
                threads=1 if threads is None else threads,
                weights=weights or "packed",
            )
        if invariant:
            self.model = self.model.made_invariant()
        try:
            client = prefixcache.connect(target)
        except ServiceUnavailable:
            if connect is not None:
                raise
            layout = str(self.model.layout)
            certified = () if segments is None else ("--segments", str(_file_of(segments)))
            own = OwnService("--layout", layout, "--memory", memory or _MEMORY, *certified)
            client = prefixcache.connect(own.target)
        try:
            join = joiner(client, self.model, "llm")
            session, pool = join()
            self.engine = Engine(
                self.model,
                pool,
                session,
                chunk=chunk,
                max_batch=max_batch,
                join=join,
                drafts=drafts,
            )
        except BaseException:
            client.close()
            if own is not None:
                own.stop()
            raise
        self.service_pid = 0 if own is None else own.pid
        """Of a service of its own; 0: another one's is used."""
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._close = finalize(self, _close, self.engine, client, own, self._pid)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all blocks back, and end a service of its own.  Idempotent."""
        self._close()

    def get_tokenizer(self) -> Any:
        """Give the model's tokenizer."""
        return self.model.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, in their order.  Computed side by side, `max_batch` at a time.

        Args:
            prompts: one, or several.
            sampling_params: for all of them, or one for each.
            use_tqdm: draw a progress bar on a terminal, once it takes longer than a second.

        Raises:
            InvalidRequest: a prompt or a parameter can never be served, which ends the others, too;
                or this is closed, or came through a fork.
            Unsupported: segments, which the service does not give to this model.
        """
        asked = [self._prompt(one) for one in _listed(prompts)]
        return self._answer(asked, _each(sampling_params, len(asked)), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer chats, by the model's template.

        Args:
            messages: of one chat, or a list of chats.
            sampling_params: as `generate`.
            use_tqdm: as `generate`.
            add_generation_prompt: begin an answer.
            continue_final_message: go on with the last message.
            tools: that the template shows.
            chat_template_kwargs: options of the template.

        Raises:
            InvalidRequest: as `generate`, or they are no messages.
            Unsupported: the model has no template, or it cannot show everything; or as `generate`.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        more: dict[str, Any] = {}
        if tools:
            more["tools"] = list(tools)
        if chat_template_kwargs:
            more["chat_template_kwargs"] = dict(chat_template_kwargs)
        if continue_final_message:
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        elif not add_generation_prompt:
            more["add_generation_prompt"] = False
        asked = []
        for chat in chats:
            (logged,) = read_logged({"messages": list(chat), **more})
            made = self.model.prompt(logged)
            if lost := sorted(set(made.left_out) - _HARMLESS_LOSSES):
                raise Unsupported(f"this model cannot be shown everything: {', '.join(lost)}")
            asked.append(_Asked(unpack(made.tokens).tolist(), None, None))
        return self._answer(asked, _each(sampling_params, len(asked)), use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = True,
    ) -> list[BeamSearchOutput]:
        """Search the likeliest answers to each prompt, as a whole.

        Raises:
            InvalidRequest: as `generate`; or more beams than `max_batch`.
        """
        asked = [self._prompt(one) for one in _listed(prompts)]
        how = BeamSearch(params.beam_width, params.length_penalty, params.early_stopping)
        requests = [
            Request(
                f"llm-{next(_numbers)}",
                one.tokens,
                params.max_tokens,
                stop_ids=() if params.ignore_eos else None,
                n=params.beam_width,
                beams=how,
                salt=one.salt,
            )
            for one in asked
        ]
        told = self._run(requests, use_tqdm=use_tqdm)
        return [
            BeamSearchOutput(
                [
                    self._sequence(one.tokens, beam.tokens, beam.score, beam.reason, how)
                    for beam in told[request.id].done[0].beams or ()
                ]
            )
            for one, request in zip(asked, requests, strict=True)
        ]

    # ------------------------------------------------------------------------------------- inside

    def _prompt(self, prompt: Prompt) -> _Asked:
        salt = None
        if isinstance(prompt, Mapping):
            if unknown := set(prompt) - _PROMPT_KEYS:
                raise Unsupported(f"a prompt with {', '.join(sorted(unknown))}: has no effect here")
            salt, text = prompt.get("cache_salt"), prompt.get("prompt")
            tokens = prompt.get("prompt_token_ids")
            if tokens is not None:
                return _Asked(_whole(tokens), text, salt)  # the text only names them, as in vLLM
            if text is None:
                raise InvalidRequest("a prompt has neither prompt nor prompt_token_ids")
            prompt = cast("Prompt", text)
        if isinstance(prompt, str):
            return _Asked(self.model.encode(prompt), prompt, salt)
        return _Asked(_whole(cast("Sequence[int]", prompt)), None, salt)

    def _answer(
        self, asked: Sequence[_Asked], params: Sequence[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        requests = [self._request(one, how) for one, how in zip(asked, params, strict=True)]
        told = self._run(requests, use_tqdm=use_tqdm)
        return [
            self._output(one, how, request, told[request.id])
            for one, how, request in zip(asked, params, requests, strict=True)
        ]

    def _request(self, asked: _Asked, how: SamplingParams) -> Request:
        room = self.model.max_tokens - len(asked.tokens) if self.model.max_tokens else 2**31 - 1
        stop_ids = None
        if how.ignore_eos or how.stop_token_ids:
            own = () if how.ignore_eos else self.model.stop_ids
            stop_ids = (*own, *(how.stop_token_ids or ()))
        return Request(
            id=f"llm-{next(_numbers)}",
            tokens=asked.tokens,
            max_new_tokens=max(1, room) if how.max_tokens is None else how.max_tokens,
            sampling=Sampling(
                temperature=how.temperature,
                top_p=how.top_p,
                seed=how.seed,
                top_k=0 if how.top_k == -1 else how.top_k,
                min_p=how.min_p,
                presence_penalty=how.presence_penalty,
                frequency_penalty=how.frequency_penalty,
                repetition_penalty=how.repetition_penalty,
                logit_bias=tuple((how.logit_bias or {}).items()),
                min_tokens=how.min_tokens,
            ),
            stop_ids=stop_ids,
            stop_strings=how.stops,
            logprobs=how.logprobs,
            prompt_logprobs=how.prompt_logprobs,
            n=how.n,
            grammar=None if how.structured_outputs is None else how.structured_outputs.made,
            salt=asked.salt,
            segments=how.segments,
        )

    def _run(self, requests: Sequence[Request], *, use_tqdm: bool) -> dict[str, _Told]:
        """Submit all, and step until they are answered; whatever ends it early leaves nothing."""
        if os.getpid() != self._pid:
            raise InvalidRequest(
                f"this LLM belongs to process {self._pid} and came through fork: make one here"
            )
        if not self._close.alive:
            raise InvalidRequest("this LLM is closed: make another one")
        told = {request.id: _Told() for request in requests}
        engine = self.engine
        with self._lock, _Interrupts(engine) as interrupts:
            try:
                for request in requests:
                    engine.submit(request)
                num_answers = sum(1 if request.beams else request.n for request in requests)
                with _Bar(num_answers, shown=use_tqdm) as bar:
                    while not engine.idle:
                        for event in engine.step():
                            _take(event, told)
                            bar.advance(isinstance(event, Finished))
                        interrupts.check()
                        if engine.stalled and not engine.idle:
                            engine.wait(_BAR_AFTER_S)
            except BaseException:
                for request in requests:
                    engine.cancel(request.id)
                for _ in engine.run():
                    pass
                raise
        return told

    def _output(
        self, asked: _Asked, how: SamplingParams, request: Request, told: _Told
    ) -> RequestOutput:
        scores: list[TokenLogprobs | None] | None = None
        if how.prompt_logprobs is not None:
            pairs = zip(asked.tokens[1:], told.scores, strict=True)
            scores = [None, *(self._logprobs(token, one) for token, one in pairs)]
        outputs = []
        for index, done in sorted(told.done.items()):
            found = told.logprobs.get(index, [])
            outputs.append(
                CompletionOutput(
                    index=index,
                    text=done.text,
                    token_ids=done.tokens,
                    cumulative_logprob=(
                        sum(one.logprob for one in found) if how.logprobs is not None else None
                    ),
                    logprobs=(
                        [
                            self._logprobs(token, one)
                            for token, one in zip(done.tokens, found, strict=True)
                        ]
                        if how.logprobs is not None
                        else None
                    ),
                    finish_reason=done.reason,
                    stop_reason=self._stop_reason(how, done),
                )
            )
        ledger = told.ledger
        return RequestOutput(
            request_id=request.id,
            prompt=asked.text,
            prompt_token_ids=asked.tokens,
            prompt_logprobs=scores,
            outputs=outputs,
            num_cached_tokens=ledger.hit + ledger.partial + ledger.joined,
            num_approximate_tokens=ledger.approximate,
            approximate=any(done.approximate for done in told.done.values()),
        )

    def _logprobs(self, token: int, found: Logprobs) -> TokenLogprobs:
        ranks = {one: rank for rank, (one, _) in enumerate(found.top, 1)}
        values = {token: found.logprob} | dict(found.top)
        return {
            one: Logprob(value, ranks.get(one), self._decode([one], shows_special=True))
            for one, value in values.items()
        }

    def _stop_reason(self, how: SamplingParams, done: Finished) -> int | str | None:
        """Tell which of the stops it was: a token, or the text that comes first."""
        if done.reason != "stop":
            return None
        last = done.tokens[-1]
        if last in (how.stop_token_ids or ()):
            return last
        text = self._decode(done.tokens) or ""
        places = [(text.find(stop, len(done.text)), stop) for stop in how.stops]
        found = [(place, stop) for place, stop in places if place >= 0]
        return min(found)[1] if found else None

    def _sequence(
        self, prompt: list[int], answer: tuple[int, ...], score: float, reason: str, how: BeamSearch
    ) -> BeamSearchSequence:
        tokens = [*prompt, *answer]
        total = score * len(answer) ** how.length_penalty
        return BeamSearchSequence(tokens, self._decode(tokens) or "", total, score, reason)

    def _decode(self, tokens: Sequence[int], *, shows_special: bool = False) -> str | None:
        if self.model.tokenizer is None:
            return None
        skips = not shows_special
        return str(self.model.tokenizer.decode(list(tokens), skip_special_tokens=skips))


@dataclass(frozen=True, slots=True)
class _Asked:
    tokens: list[int]
    text: str | None
    salt: str | None


@dataclass(slots=True)
class _Told:
    """What the engine told of a request."""

    ledger: Ledger = field(default_factory=Ledger)
    scores: list[Logprobs] = field(default_factory=list)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    """Of each answer."""
    done: dict[int, Finished] = field(default_factory=dict)


def _take(event: Event, told: dict[str, _Told]) -> None:
    if isinstance(event, Failed):
        kind = getattr(errors, event.error, CacheError)
        raise cast("type[CacheError]", kind)(event.message)
    if not isinstance(event, Started | Scored | Token | Finished) or event.id not in told:
        return
    one = told[event.id]
    if isinstance(event, Scored):
        one.scores.extend(event.logprobs)
        return
    sample = event.sample or 0
    if isinstance(event, Started):
        if not sample:  # the others find what that one has computed
            one.ledger = event.ledger
    elif isinstance(event, Token):
        if event.logprobs is not None:
            one.logprobs.setdefault(sample, []).append(event.logprobs)
    else:
        one.done[sample] = event


def _check_own(memory: str | None, segments: str | Path | None) -> None:
    """Refuse what no service of its own could be started with.

    Raises:
        InvalidRequest: as said.
    """
    if memory is not None and not (isinstance(memory, str) and memory.strip()):
        raise InvalidRequest(f"memory is {memory!r}; it takes a size, for example '2GiB'")
    if segments is None:
        return
    if not (isinstance(segments, str | Path) and str(segments).strip()):
        raise InvalidRequest(
            f"segments is {segments!r}; it takes the file of a certificate, or a folder of them. "
            "Requests ask for segments with SamplingParams(segments=True)"
        )
    if not os.path.lexists(_file_of(segments)):
        raise InvalidRequest(f"segments: there is neither file nor folder {str(segments)!a}")


def _file_of(segments: str | Path) -> Path:
    return expand(Path(segments)).absolute()


def _look(
    target: str, *, must_answer: bool, memory: str | None, segments: str | Path | None
) -> None:
    """See whether a service answers, and refuse what is another one's to say if it does.

    Raises:
        ServiceUnavailable: none does, and one must.
        InvalidRequest: one does, so none of its own is started.
    """
    try:
        prefixcache.connect(target).close()
    except ServiceUnavailable:
        if must_answer:
            raise
        return
    given = {"memory": memory, "segments": segments}
    if idle := [name for name, value in given.items() if value is not None]:
        raise InvalidRequest(
            f"{', '.join(idle)}: of a service of its own; one answers at {target} already: leave "
            "out what it has been started with"
        )


def _whole(tokens: Sequence[int]) -> list[int]:
    """Give token ids as Python's own numbers; half a token is none."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as fault:
        raise InvalidRequest(f"token ids are whole numbers: {fault}") from None


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Give the prompts as a list, also if there is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    given = list(prompts)
    if given and isinstance(given[0], Integral):
        return [cast("Sequence[int]", given)]
    return cast("list[Prompt]", given)


def _each(
    params: SamplingParams | Sequence[SamplingParams] | None, num: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        # Without a seed each prompt has numbers of its own, as has each call.
        return [replace(params) for _ in range(num)]
    if len(params) != num:
        raise InvalidRequest(f"{num} prompts and {len(params)} sampling_params; one for each")
    return list(params)


class _Interrupts:
    """Lets a Ctrl-C wait until a step is done, so that none is left half done.

    A second one does not wait.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._came = False
        self._is_ours = False

    def __enter__(self) -> _Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_ours = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self._came:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True
        self._engine.wake()


class _Bar:
    """A progress bar on a terminal, once something takes long."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = total
        self._began = time.monotonic()
        self._num_done = 0
        self._console = Console(file=sys.stderr)
        self._shown = shown and self._console.is_terminal
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, is_done: bool) -> None:
        """Note an event, and whether it ended an answer."""
        self._num_done += is_done
        if not self._shown or time.monotonic() - self._began < _BAR_AFTER_S:
            return
        if self._bar is None:
            self._bar = Progress(console=self._console, transient=True)
            self._task = self._bar.add_task("answers", total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._num_done)


def _close(
    engine: Engine, client: prefixcache.client.Client, own: OwnService | None, pid: int
) -> None:
    if os.getpid() != pid:  # what ends is a fork: all of this is its parent's
        return
    try:
        engine.close()
        client.close()
    finally:
        if own is not None:
            own.stop()
