"""Answers that are held to a grammar, of tiny random models, which would never keep to one."""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.errors import CacheError, InvalidRequest, Unsupported
from prefixcache_worker.engine import Engine
from prefixcache_worker.grammar import MOST_LEVELS, read_grammar
from prefixcache_worker.model import Model
from prefixcache_worker.request import Failed, Finished, Request, Started, Token
from prefixcache_worker.sampling import Sampling
from worker.zoo import Service, answers, engine_at, finished, random_tokens, talker

pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")

PROMPT = random_tokens(41)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["one", "two", "another one"]},
        "likes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "likes"],
    "additionalProperties": False,
}
SEEDED = Sampling(1.0, seed=7)
HOW = {
    "greedy": Sampling(),
    "seeded": SEEDED,
    "narrow": Sampling(1.2, top_p=0.8, seed=2, top_k=7, min_p=0.01),
    "penalised": Sampling(
        0.7, seed=5, frequency_penalty=1.0, repetition_penalty=1.3, logit_bias=((90, 100.0),)
    ),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return talker()


def held(schema: Any, **more: Any) -> dict[str, Any]:
    return {"grammar": read_grammar({"schema": schema, **more})}


def calling(trigger: str = "<tool_call>", *, several: bool = True, text: bool = False) -> Any:
    each = [
        {"begin": f'{{"name": "{name}", "arguments": ', "schema": schema, "end": "}"}
        for name, schema in (("f", {"const": {"a": 1}}), ("fly", {"const": {}}))
    ]
    more = {"between": "\n</tool_call>\n<tool_call>\n"} if several else {}
    calls = {"trigger": trigger, "open": "\n", "close": "\n</tool_call>", "each": each, **more}
    return {"grammar": read_grammar({"calls": calls, "text": text})}


@pytest.mark.parametrize("how", HOW)
def test_an_answer_is_of_the_schema_however_its_tokens_are_chosen(model: Model, how: str) -> None:
    request = Request("a", PROMPT, 120, HOW[how], **held(PERSON))
    answer = answers(Engine(model, None, None), request)["a"]
    assert answer.reason == "stop"
    jsonschema.validate(json.loads(answer.text), PERSON)


def made_up(draw: random.Random, depth: int = 0) -> Any:
    """A schema of the parts that are enforced."""
    kinds = ["string", "integer", "number", "enum", "const", "null", "boolean"]
    kinds += ["object", "array", "anyOf", "ref"] if depth < 3 else []
    match draw.choice(kinds):
        case "string":
            ways: list[dict[str, Any]] = [
                {"maxLength": draw.randint(0, 5)},
                {"minLength": 1, "maxLength": 3},
                {"pattern": r"^[a-c]{1,3}-\d$"},
                {"format": draw.choice(["date", "uuid", "ipv4"])},
            ]
            return {"type": "string", **draw.choice(ways)}
        case "integer":
            least = draw.randint(-200, 100)
            return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 300)}
        case "number":
            return {"type": "number", "exclusiveMinimum": -2, "maximum": draw.randint(0, 9)}
        case "enum":
            return {"enum": draw.sample(["a", "ab", 'q"\\', "é\n", 1, 12, 1.5, None, True], 4)}
        case "const":
            return {"const": draw.choice([{"a": [1, {"b": ""}]}, [], "true", -3])}
        case "object":
            names = draw.sample(["a", "ab", "true", 'x"y', "ü", "n"], draw.randint(0, 4))
            more: Any = draw.choice([False, False, {"type": "null"}])
            return {
                "type": "object",
                "properties": {name: made_up(draw, depth + 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": more,
            }
        case "array":
            found: dict[str, Any] = {"type": "array", "items": made_up(draw, depth + 1)}
            if draw.random() < 0.5:
                found["prefixItems"] = [made_up(draw, depth + 1)]
            return found | {"minItems": draw.randint(0, 2), "maxItems": draw.randint(2, 3)}
        case "anyOf":
            return {"anyOf": [made_up(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
        case "ref":
            return {
                "$defs": {"it": made_up(draw, depth + 1)},
                "type": "array",
                "items": {"$ref": f"#{'/items' * depth}/$defs/it"} if not depth else {},
                "maxItems": 1,
            }
        case kind:
            return {"type": kind}


@pytest.mark.slow
def test_every_finished_answer_is_of_its_schema(model: Model) -> None:
    """And is the same whether what must follow is asked of the model or not."""
    engine = Engine(model, None, None, max_batch=8)
    num_whole = 0
    for seed in range(60):
        draw = random.Random(seed)
        schema = made_up(draw)
        how = Sampling(draw.choice([0.0, 0.7, 1.5]), seed=seed)
        request = Request("quick", PROMPT[: seed % 7 + 3], 150, how, **held(schema))
        done = answers(engine, request, replace(request, id="asked", logprobs=0))
        quick, asked = done["quick"], done["asked"]
        assert quick.tokens == asked.tokens, (seed, schema)
        if quick.reason == "stop":
            num_whole += 1
            jsonschema.validate(json.loads(quick.text), schema)
    assert num_whole > 40


def test_what_must_follow_is_not_asked_of_the_model(model: Model) -> None:
    schema = {"const": {"a rather long name": ["and what", "must follow", "it"], "b": True}}
    steps = []
    for more in ({}, {"logprobs": 0}):
        engine = Engine(model, None, None)
        engine.submit(Request("a", PROMPT, 200, **held(schema), **more))
        count = 0
        told: list[Any] = []
        while not engine.idle:
            told += engine.step()
            count += 1
        [done] = finished(told).values()
        assert json.loads(done.text) == schema["const"]
        # Each of its tokens is told, and text by text they are the answer.
        tokens = [event for event in told if isinstance(event, Token)]
        assert [event.token for event in tokens] == list(done.tokens)
        assert "".join(event.text for event in tokens) == done.text
        steps.append(count)
    assert steps[0] * 5 < steps[1]


def test_its_logprobs_are_the_model_s_own(model: Model) -> None:
    engine = Engine(model, None, None)
    engine.submit(Request("a", PROMPT, 60, SEEDED, logprobs=3, **held(PERSON)))
    first = next(event for event in engine.run() if isinstance(event, Token))
    free = Request("b", PROMPT, 1, SEEDED, logprobs=3)
    engine.submit(free)
    [told] = [event for event in engine.run() if isinstance(event, Token) and event.id == "b"]
    assert first.logprobs is not None
    assert told.logprobs is not None
    assert first.logprobs.top == told.logprobs.top
    assert first.logprobs.logprob < first.logprobs.top[0][1]  # "{" is not what it would have said


def test_calls_are_of_what_may_be_called(model: Model) -> None:
    engine = Engine(model, None, None)
    ways = {'{"name": "f", "arguments": {"a": 1}}', '{"name": "fly", "arguments": {}}'}
    for seed in range(6):
        one = Request("one", PROMPT, 200, Sampling(1.0, seed=seed), **calling(several=False))
        text = answers(engine, one)["one"].text
        assert text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>") in ways
        more = Request("more", PROMPT, 200, Sampling(1.0, seed=seed), **calling())
        told = answers(engine, more)["more"]
        found = told.text.removeprefix("<tool_call>\n").split("\n</tool_call>\n<tool_call>\n")
        assert set(found[:-1]) <= ways
        if told.reason == "stop":
            assert found[-1].removesuffix("\n</tool_call>") in ways


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "choices",
    [["yes", "no"], ["a", "ab", "abc"], ['"<|', "\\n", "é 語\n", "<tool_call>x"], ["x" * 512]],
)
def test_an_answer_is_one_of_its_choices(model: Model, how: str, choices: list[str]) -> None:
    grammar = read_grammar({"choices": choices})
    request = Request("a", PROMPT, 600, HOW[how], grammar=grammar)
    [one] = answers(Engine(model, None, None), request).values()
    assert one.text in choices
    assert one.reason == "stop"


def test_a_text_is_free_up_to_the_trigger_and_held_behind_it(model: Model) -> None:
    """The trigger is a token here, which is made likely."""
    trigger = model.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    engine = Engine(model, None, None)
    seen = set()
    for seed in range(12):
        how = Sampling(1.0, seed=seed, logit_bias=((trigger, 4.0),))
        request = Request(
            "a", PROMPT, 150, how, **calling("[TOOL_CALLS]", text=True, several=False)
        )
        done = answers(engine, request)["a"]
        calls = done.tokens.count(trigger)
        assert calls <= 1
        if calls and done.reason == "stop":
            at = done.tokens.index(trigger)
            rest = model.tokenizer.decode(done.tokens[at + 1 :])
            assert rest.startswith('\n{"name": "f')
            assert rest.endswith("}\n</tool_call>")
        seen.add((bool(calls), done.reason))
    assert (True, "stop") in seen


def test_the_end_waits_for_min_tokens_if_it_can(model: Model) -> None:
    engine = Engine(model, None, None)
    # A number may always go on; a text of two letters may not.
    number = replace(SEEDED, min_tokens=30)
    done = answers(engine, Request("a", PROMPT, 60, number, **held({"type": "integer"})))["a"]
    assert len(done.tokens) >= 30
    done = answers(engine, Request("b", PROMPT, 60, number, **held({"const": "ab"})))["b"]
    assert (done.text, done.reason) == ('"ab"', "stop")
    (end,) = model.stop_ids
    endless = Request("c", PROMPT, 40, SEEDED, stop_ids=(), **held({"type": "integer"}))
    done = answers(engine, endless)["c"]
    assert end not in done.tokens
    assert done.reason == "length"


def test_drafts_change_nothing_of_an_answer(model: Model) -> None:
    request = Request("a", PROMPT, 80, SEEDED, **held(PERSON))
    want = answers(Engine(model, None, None), request)["a"]
    assert answers(Engine(model, None, None, drafts=7), request)["a"].tokens == want.tokens


@pytest.mark.parametrize("how", ["greedy", "seeded", "penalised"])
def test_lost_at_any_token_it_goes_on_as_if_nothing_had_been(
    model: Model, service: Service, client: Client, how: str
) -> None:
    request = Request("a", PROMPT, 120, HOW[how], **held(PERSON))
    want = answers(Engine(model, None, None), request)["a"]
    other = engine_at(client, model)
    for count in range(0, len(want.tokens) + 1, 1 + (how != "seeded")):
        again = replace(request, generated=want.tokens[:count])
        done = answers(other, again)["a"]
        assert (done.tokens, done.text, done.reason) == (want.tokens, want.text, want.reason)
    other.close()


def test_what_is_of_another_answer_is_refused(model: Model) -> None:
    engine = Engine(model, None, None)
    brace, digit = model.tokenizer.encode("{1", add_special_tokens=False)
    with pytest.raises(InvalidRequest, match=f"token 2 of 2 generated ones, {digit}, does not fit"):
        engine.submit(Request("a", PROMPT, 9, generated=[brace, digit], **held(PERSON)))
    assert engine.idle


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nothing"}, "grammar: Invalid type: nothing"),
        ({"type": "string", "not": {}}, 'grammar: Unimplemented keys: ["not"]'),
        ({"enum": []}, "grammar: Unsatisfiable schema"),
        ({"pattern": "(?=a)b", "type": "string"}, "grammar: regex parse error"),
        ({"$ref": "http://127.0.0.1/x"}, "grammar: Resource 'http://127.0.0.1/x' is not present"),
        ({"minimum": -1e29, "multipleOf": 0.01, "type": "number"}, "grammar: "),
        (
            {"allOf": [{"anyOf": [{"maxLength": n}, {"minLength": n}]} for n in range(30)]},
            "grammar",
        ),
    ],
)
def test_what_cannot_be_compiled_is_told(model: Model, schema: Any, said: str) -> None:
    engine = Engine(model, None, None)
    with pytest.raises(CacheError) as told:
        engine.submit(Request("a", PROMPT, 9, **held(schema)))
    assert said in str(told.value)
    assert len(str(told.value)) < 500
    assert engine.idle


def test_lenient_schemas_say_what_is_left_out(model: Model) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
    engine = Engine(model, None, None)
    engine.submit(Request("a", PROMPT, 20, SEEDED, **held(schema, lenient=True)))
    begun = next(event for event in engine.run() if isinstance(event, Started))
    assert begun.left_out == (
        'parts of a schema that are not enforced: Unimplemented keys: ["uniqueItems"]',
    )


def test_a_grammar_that_takes_too_much_ends_its_answer_and_nothing_else(model: Model) -> None:
    wide = {"properties": {f"p{n}": {"type": "null"} for n in range(1500)}, "type": "object"}
    engine = Engine(model, None, None)
    engine.submit(Request("wide", PROMPT, 20, SEEDED, **held(wide)))
    engine.submit(Request("other", PROMPT, 20, SEEDED))
    events = list(engine.run())
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.id, failed.error) == ("wide", "InvalidRequest")
    assert failed.message.startswith("grammar: it cannot be followed any further")
    assert [event.id for event in events if isinstance(event, Finished)] == ["other"]
    assert engine.idle
    want = answers(engine, Request("other", PROMPT, 20, SEEDED))["other"]
    assert want.tokens == next(e for e in events if isinstance(e, Finished)).tokens


def test_as_many_levels_as_there_may_be_fit_on_a_small_stack(model: Model) -> None:
    """Of a thread where the machine bounds no stack: 2 MiB.  One that is full ends the process."""
    parts: dict[str, Any] = {"d0": {"type": "null"}}
    for number in range((MOST_LEVELS - 3) // 3):
        following = {"n": {"$ref": f"#/$defs/d{number}"}}
        parts[f"d{number + 1}"] = {"type": "object", "properties": following, "required": ["n"]}
    schema = {"$defs": parts, "$ref": f"#/$defs/{list(parts)[-1]}"}
    found: list[Any] = []

    def compile_it() -> None:
        found.append(model.grammars.constraint(read_grammar({"schema": schema})))
        found[0].prepare()

    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(target=compile_it)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join(PATIENCE_S)
    assert found[0].fits


def test_a_model_without_a_fitting_tokenizer_says_so(tiny: Model) -> None:
    with pytest.raises(Unsupported, match="grammar: this model has no tokenizer"):
        Engine(tiny, None, None).submit(Request("a", PROMPT, 9, **held({})))


def test_without_the_library_it_is_said_what_to_install(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = replace(model)
    with pytest.raises(Unsupported, match="needs llguidance, which is not installed"):
        Engine(fresh, None, None).submit(Request("a", PROMPT, 9, **held({})))
    # What needs none goes on.
    assert answers(Engine(fresh, None, None), Request("b", PROMPT, 3))["b"].reason == "length"
