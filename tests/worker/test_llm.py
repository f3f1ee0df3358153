"""`LLM`: what it gives is what the model alone gives, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcache
from certificate_file import write
from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, ServiceUnavailable, Unsupported
from prefixcache_worker import (
    LLM,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.own_service import OwnService
from prefixcache_worker.request import Request
from prefixcache_worker.sampling_params import _NOT_HELD, _NOT_HERE, _NOT_OF_BEAMS
from service.service_process import ROOT, eventually
from worker.zoo import Service, answers, random_tokens, save, talker

PROMPT = random_tokens(40, seed=2)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PRINTED = re.compile(r"^print\(.*\)  # (.*)$", re.M)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return Model.load(folder)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        service = Service(Path(folder), "4MiB")
        service.start()
        yield service
        service.stop()


@pytest.fixture(scope="module")
def llm(model: Model, service: Service) -> Iterator[LLM]:
    with LLM(model, connect=service.target, chunk=64) as made:
        yield made


def alone(model: Model, prompt: list[int], count: int, **more: Any) -> tuple[int, ...]:
    return answers(Engine(model, None, None), Request("a", prompt, count, **more))["a"].tokens


def test_prompts_of_every_kind_are_answered_in_their_order(llm: LLM, model: Model) -> None:
    named = {"prompt_token_ids": PROMPT[:9], "prompt": "as it was written"}
    prompts: list[Any] = ["w5 w6 w7", {"prompt": "w8"}, {"prompt_token_ids": PROMPT}, named]
    tokens = [[5, 6, 7], [8], PROMPT, PROMPT[:9]]
    told = llm.generate(prompts, GREEDY)
    assert [one.prompt_token_ids for one in told] == tokens
    assert [one.prompt for one in told] == ["w5 w6 w7", "w8", None, "as it was written"]
    for one, prompt in zip(told, tokens, strict=True):
        [answer] = one.outputs
        assert answer.token_ids == alone(model, prompt, 8)
        assert answer.text == model.tokenizer.decode(list(answer.token_ids))
        assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "length", None)
        assert (answer.logprobs, answer.cumulative_logprob, one.prompt_logprobs) == (None,) * 3
    [single] = llm.generate(PROMPT, GREEDY)
    assert single.outputs[0].token_ids == alone(model, PROMPT, 8)
    assert single.num_cached_tokens == len(PROMPT) - 1  # the call before has computed it
    assert llm.generate([]) == []
    assert len(llm.generate("w5")[0].outputs[0].token_ids) == 16  # vLLM's default


def test_another_process_s_prompts_are_found_and_salted_ones_are_not(
    llm: LLM, model: Model, service: Service
) -> None:
    prompt = random_tokens(50, seed=8)
    llm.generate(prompt, GREEDY)
    with LLM(model, connect=service.target) as other:
        [told] = other.generate(prompt, GREEDY)
        assert told.num_cached_tokens == 49
        [salted] = other.generate({"prompt_token_ids": prompt, "cache_salt": "mine"}, GREEDY)
        assert salted.num_cached_tokens == 0
        assert salted.outputs == told.outputs


def test_several_answers_come_with_their_log_probabilities(llm: LLM, model: Model) -> None:
    how = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1)
    [told] = llm.generate(PROMPT, how)
    assert [one.index for one in told.outputs] == [0, 1, 2]
    assert len({one.token_ids for one in told.outputs}) == 3
    for one in told.outputs:
        assert one.logprobs is not None
        own = [found[token] for token, found in zip(one.token_ids, one.logprobs, strict=True)]
        assert one.cumulative_logprob == pytest.approx(sum(single.logprob for single in own))
        for found in one.logprobs:
            assert {entry.rank for entry in found.values()} >= {1, 2}
            best = max(found.items(), key=lambda item: item[1].logprob)
            assert best[1].rank == 1
            assert best[1].decoded_token == model.tokenizer.decode([best[0]])
    assert told.prompt_logprobs is not None
    assert told.prompt_logprobs[0] is None
    for token, found in zip(PROMPT[1:], told.prompt_logprobs[1:], strict=True):
        assert found is not None
        assert token in found
    assert llm.generate(PROMPT, how)[0].outputs == told.outputs  # by its seed


def test_one_says_what_ended_an_answer(llm: LLM, model: Model) -> None:
    tokens = alone(model, PROMPT, 8)
    by_token = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[tokens[3]])
    by_text = SamplingParams(temperature=0, max_tokens=8, stop=["no", f"w{tokens[2]}"])
    first, second = (one.outputs[0] for one in llm.generate([PROMPT, PROMPT], [by_token, by_text]))
    assert first.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (first.finish_reason, first.stop_reason) == ("stop", tokens[3])
    assert (second.finish_reason, second.stop_reason) == ("stop", f"w{tokens[2]}")
    assert f"w{tokens[2]}" not in second.text
    all_of_it = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [whole] = llm.generate(random_tokens(250), all_of_it)
    assert len(whole.outputs[0].token_ids) == model.max_tokens - 250


def test_a_chat_is_its_template_s_prompt(llm: LLM, model: Model) -> None:
    chat = [{"role": "user", "content": "w5 w6"}]
    told = llm.chat([chat, chat[:1]], GREEDY)
    assert [one.prompt_token_ids for one in told] == [model.chat(chat)] * 2
    [one] = llm.chat(chat, GREEDY, add_generation_prompt=False)
    assert one.prompt_token_ids == [0, 5, 6]
    with pytest.raises(Unsupported, match="tools that the template does not show"):
        llm.chat(chat, GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])


def test_beams_are_the_engine_s(llm: LLM, model: Model) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True, length_penalty=0.5)
    found, _ = llm.beam_search(["w5 w6", "w7"], params)
    asked = Request("a", [5, 6], 6, stop_ids=(), n=3, beams=BeamSearch(3, 0.5))
    want = answers(Engine(model, None, None), asked)["a"].beams or ()
    assert [one.tokens for one in found.sequences] == [[5, 6, *beam.tokens] for beam in want]
    for one, beam in zip(found.sequences, want, strict=True):
        assert one.score == pytest.approx(beam.score, rel=1e-5)
        assert one.cum_logprob == pytest.approx(beam.score * 6**0.5, rel=1e-5)
        assert one.text == model.tokenizer.decode(one.tokens)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_tokens": 0}, "0 new ones"),
        ({"n": 129}, "n is 129"),
        ({"logprobs": 21}, "21 most likely"),
        ({"logit_bias": {97: 1.0}}, "logit_bias"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"top_k": -5}, "top_k -5"),
    ],
)
def test_what_can_never_be_served_is_refused_and_leaves_nothing(
    llm: LLM, how: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidRequest, match="neither prompt nor prompt_token_ids"):
        llm.generate({"cache_salt": "mine"})
    with pytest.raises(InvalidRequest, match="whole numbers"):
        llm.generate({"prompt_token_ids": [5, 6.5]})
    with pytest.raises(InvalidRequest, match=why):
        llm.generate(["w5", "w6"], SamplingParams(**how))
    assert llm.engine.idle
    with pytest.raises(InvalidRequest, match="leaves no room"):
        llm.generate(["w5", random_tokens(300)], GREEDY)
    assert llm.engine.idle
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sampling_params"):
        llm.generate(["w5", "w6"], [GREEDY])


@pytest.mark.parametrize(
    "name",
    sorted(_NOT_HERE),
)
def test_what_has_no_effect_is_refused_by_name(name: str, model: Model) -> None:
    with pytest.raises(Unsupported, match=name):
        SamplingParams(**{name: 3})
    default, _ = _NOT_HERE[name]
    SamplingParams(**{name: default})
    with pytest.raises(TypeError, match="no_such"):
        SamplingParams(no_such=1)  # type: ignore[call-arg]
    for of_beams in _NOT_OF_BEAMS:
        with pytest.raises(Unsupported, match=of_beams):
            BeamSearchParams(beam_width=2, max_tokens=4, **{of_beams: 3})
    with pytest.raises(Unsupported, match="tensor_parallel_size"):
        LLM(model, tensor_parallel_size=2)
    with pytest.raises(ServiceUnavailable):
        LLM(model, connect="unix:/tmp/nobody-listens-here.sock")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"weights": "int8"}, "weights"),
        ({"weights": "packed", "threads": 2, "dtype": "float32"}, "dtype, threads, weights"),
        ({"memory": "4MiB"}, "memory"),
        ({"segments": "."}, "segments"),
    ],
    ids=str,
)
def test_what_is_settled_by_what_is_there_is_refused(
    model: Model, service: Service, given: dict[str, Any], named: str
) -> None:
    """A model that is loaded has its weights, and a service that answers its pool."""
    with pytest.raises(InvalidRequest, match=f"^{named}"):
        LLM(model, connect=service.target, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"segments": True}, "segments is True; it takes the file"),
        ({"segments": False}, "segments is False"),
        ({"segments": ""}, "segments is ''"),
        ({"segments": ["a"]}, r"segments is \['a'\]"),
        ({"segments": "no/such/file"}, "neither file nor folder 'no/such/file'"),
        ({"segments": "a\0b"}, "neither file nor folder"),
        ({"segments": "~nobody-there/c"}, "no such home"),
        ({"memory": ""}, "memory is ''"),
        ({"memory": 4096}, "memory is 4096; it takes a size"),
        ({"memory": True}, "memory is True"),
    ],
)
def test_what_no_service_could_be_started_with_is_refused_before_anything_is_loaded(
    given: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        LLM("no-such-model", **given)


STORED = random_tokens(97, seed=31)
MOVED = [9, *STORED[20:90], 2, 3]
CERTIFIED = {"deviation 100%": ((0.0, 0.5), (0.0, 0.9)), "first 5": ((0.004, 0.1), (0.9, 0.2))}


def test_one_asks_for_tokens_at_other_places_and_is_told(model: Model, folder: Path) -> None:
    """All of what is moved is computed again by this certificate: so the answer is exact, too."""
    certificate = write(folder, model=model.name, measured=CERTIFIED)
    own = f"unix:{folder}/none.sock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFIXCACHE_TARGET", own)
        made = LLM(model, memory="4MiB", segments=certificate)
    with made as llm:
        assert llm.service_pid
        llm.generate(STORED, GREEDY)
        how = SamplingParams(temperature=0, max_tokens=8, segments=True)
        [moved] = llm.generate(MOVED, how)
        assert moved.approximate
        assert (moved.num_cached_tokens, moved.num_approximate_tokens) == (0, 0)
        answer = moved.outputs[0].token_ids
        assert answer == alone(model, MOVED, 8)
        [turn] = llm.generate([*MOVED, *answer, 7], how)
        assert turn.approximate
        assert turn.num_approximate_tokens > len(MOVED)
        [exact] = llm.generate(MOVED, GREEDY)
        assert (exact.approximate, exact.num_cached_tokens) == (False, 0)
        with pytest.raises(InvalidRequest, match="do not go with prompt_logprobs"):
            SamplingParams(segments=True, prompt_logprobs=1)


def test_segments_that_no_certificate_allows_end_the_call_by_name(llm: LLM) -> None:
    with pytest.raises(Unsupported, match="no certificate there allows them"):
        llm.generate("w5", SamplingParams(segments=True))
    with pytest.raises(InvalidRequest, match="it takes True or False"):
        SamplingParams(segments="no")  # type: ignore[arg-type]
    assert llm.engine.idle


def python(code: str, folder: Path) -> subprocess.Popen[str]:
    told = {"PREFIXCACHE_TARGET": f"unix:{folder}/none.sock", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_the_package_brings_no_torch_before_it_is_asked_for(folder: Path) -> None:
    code = (
        "import sys, prefixcache_worker\n"
        "from prefixcache_worker import SamplingParams\n"
        "SamplingParams(); print('torch' in sys.modules)"
    )
    out, err = python(code, folder).communicate(timeout=PATIENCE_S)
    assert out == "False\n", err


def test_ctrl_c_ends_a_call_and_leaves_no_process(folder: Path) -> None:
    path = folder / "model"
    save(path)
    code = f"""
import sys
from prefixcache_worker import LLM, SamplingParams
with LLM({str(path)!r}, dtype="float32", memory="4MiB") as llm:
    try:
        print(llm.service_pid)
        llm.generate(["w5 w6"] * 60, SamplingParams(max_tokens=200, ignore_eos=True))
    except KeyboardInterrupt:
        print("interrupted", llm.engine.idle)
        print(len(llm.generate("w5 w6")[0].outputs[0].token_ids))
"""
    process = python(code, folder)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    eventually(lambda: bool(prefixcache_children(pid)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=2 * PATIENCE_S)
    assert out.splitlines() == ["interrupted True", "16"], err
    assert process.returncode == 0
    eventually(lambda: is_gone(pid))


def test_a_service_of_its_own_outlives_the_thread_that_began_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        own = pool.submit(OwnService, "--layout", "1x1x8:float32", "--memory", "1MiB").result()
    try:
        for _ in range(20):  # told to end, it would end in this time
            prefixcache.connect(own.target).close()
            time.sleep(0.05)
    finally:
        own.stop()


def test_what_came_through_a_fork_answers_nothing_and_ends_nothing(folder: Path) -> None:
    path = folder / "model"
    save(path)
    code = f"""
import os, sys
from pathlib import Path
from prefixcache_worker import LLM, SamplingParams
llm = LLM({str(path)!r}, dtype="float32", memory="4MiB")
llm.generate([5, 6, 7, 8])
if not (child := os.fork()):
    try:
        llm.generate([5, 6, 7, 8])
    except Exception as error:
        print(error, flush=True)
    sys.exit(0)  # as any program ends, with all that it does then
print(os.waitpid(child, 0)[1])
print(llm.generate([5, 6, 7, 8])[0].num_cached_tokens, llm.engine.sharing)
llm.close()
"""
    process = python(code, folder)
    out, err = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, err
    first, *rest = out.splitlines()
    assert "came through fork" in first, err
    assert rest == ["0", "3 True"]


def prefixcache_children(pid: int) -> str:
    """The command line of a process, once it runs the service."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


@pytest.mark.usefixtures("demo_folder")
def test_the_page_s_examples_run_and_print_what_they_say(folder: Path) -> None:
    page = (ROOT / "docs" / "llm.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M))
    expected = PRINTED.findall(code)
    assert len(expected) == 7
    out, err = python(code, folder).communicate(timeout=2 * PATIENCE_S)
    assert out.splitlines() == expected, err


def test_who_is_closed_has_nothing_any_more(model: Model, service: Service) -> None:
    made = LLM(model, connect=service.target)
    made.generate("w5 w6", GREEDY)
    made.close()
    made.close()
    with pytest.raises(InvalidRequest, match="this LLM is closed"):
        made.generate("w5 w6", GREEDY)
    with prefixcache.connect(service.target) as client:
        eventually(lambda: client.snapshot().leases == ())


def test_answers_have_the_form_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")
    choices = StructuredOutputsParams(choice=["yes", "no"])
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema["additionalProperties"] = False
    forms = [choices, *(StructuredOutputsParams(json=one) for one in (schema, json.dumps(schema)))]
    how = [SamplingParams(seed=5, max_tokens=64, structured_outputs=one) for one in forms]
    own = Service(tmp_path, "1MiB")
    own.start()
    with LLM(talker(), connect=own.target) as llm:
        told = llm.generate([PROMPT] * len(how), how)
        texts = [one.outputs[0].text for one in told]
        assert texts[0] in ("yes", "no")
        assert texts[1:] == ['{"a": 1}'] * 2
        assert {one.outputs[0].finish_reason for one in told} == {"stop"}
        unknown = StructuredOutputsParams(json={"type": "string", "format": "no-such"})
        with pytest.raises(InvalidRequest, match="no-such"):
            llm.generate([PROMPT], SamplingParams(structured_outputs=unknown))
        assert llm.engine.idle
    own.stop()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "one of json, choice, json_object: none"),
        ({"json_object": False}, "one of json, choice, json_object: none"),
        ({"json": {}, "choice": ["a"]}, "one of json, choice, json_object: json, choice"),
        ({"json": "{"}, "json is none"),
        ({"json": '{"a": 1, "a": 2}'}, "json is none"),
        ({"json": "[" * 100_000}, "json is none"),
        ({"json": "7"}, "it takes a JSON schema"),
        ({"choice": "yes"}, "choice is a text; it takes several"),
        ({"choice": []}, "a list of 0"),
        ({"choice": ["a", 5]}, "choices.1 is 5"),
    ],
)
def test_a_form_that_is_none_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize("name", sorted(_NOT_HELD))
def test_forms_that_are_not_held_to_are_refused_by_name(name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        StructuredOutputsParams(choice=["a"], **{name: "x"})
    with pytest.raises(InvalidRequest, match="it takes StructuredOutputsParams"):
        SamplingParams(structured_outputs={"choice": ["a"]})  # type: ignore[arg-type]
