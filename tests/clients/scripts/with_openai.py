"""`openai` for Python."""

import openai
import pydantic
import telling
from telling import CITY, LONG, MODEL, QUESTION, URL, doing, must, must_raise


class City(pydantic.BaseModel):
    """The same as `CITY`."""

    city: str = pydantic.Field(json_schema_extra={"enum": CITY["properties"]["city"]["enum"]})
    country: str = pydantic.Field(json_schema_extra={"enum": CITY["properties"]["country"]["enum"]})
    is_capital: bool


client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
messages = [{"role": "user", "content": QUESTION}]
short = {"model": MODEL, "max_tokens": 24, "temperature": 0}
tool = {"type": "function", "function": {"name": "find_city", "parameters": CITY, "strict": True}}
telling.about("openai")

with doing("models"):
    must(client.models.list().data[0].id == MODEL)
    must(client.models.retrieve(MODEL).id == MODEL)

with doing("chat"):
    whole = client.chat.completions.create(messages=messages, **short)
    must(whole.choices[0].message.content)
    again = client.chat.completions.create(messages=messages, **short)
    must(again.choices[0].message.content == whole.choices[0].message.content)
    must(
        again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1,
        again.usage,
    )

with doing("stream"):
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **short
        )
    )
    text = "".join(one.delta.content or "" for chunk in chunks for one in chunk.choices)
    must(text == whole.choices[0].message.content, text)
    must(chunks[-1].usage.completion_tokens == whole.usage.completion_tokens)

with doing("n, seed, stop, logprobs"):
    terms = {"model": MODEL, "max_tokens": 12, "n": 3, "seed": 5, "stop": [".", "\n"]}
    drawn = [
        client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **terms)
        for _ in range(2)
    ]
    texts = [[one.message.content for one in answer.choices] for answer in drawn]
    must(texts[0] == texts[1], texts)
    must("." not in "".join(texts[0]))
    must(len(drawn[0].choices[0].logprobs.content[0].top_logprobs) == 3)

with doing("completions"):
    told = client.completions.create(prompt="Once upon a time", logprobs=2, **short)
    must(told.choices[0].text)
    must(len(told.choices[0].logprobs.tokens) == told.usage.completion_tokens)

with doing("structured"):
    parsed = client.chat.completions.parse(
        messages=messages, response_format=City, model=MODEL, max_tokens=80, temperature=0
    )
    must(parsed.choices[0].message.parsed.city in CITY["properties"]["city"]["enum"])

with doing("tools"):
    terms = {"model": MODEL, "messages": messages, "tools": [tool], "max_tokens": 80}
    one = {"tool_choice": "required", "parallel_tool_calls": False}
    called = client.chat.completions.create(temperature=0, **terms, **one)
    (call,) = called.choices[0].message.tool_calls
    must(call.function.name == "find_city")
    must(City.model_validate_json(call.function.arguments))
    must(called.choices[0].finish_reason == "tool_calls", called.choices[0].finish_reason)

with doing("responses"):
    terms = {"model": MODEL, "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(input=QUESTION, **terms)
    must(whole.output_text)
    events = list(client.responses.create(input=QUESTION, stream=True, **terms))
    must(events[-1].response.output_text == whole.output_text)
    must(events[-1].response.usage.input_tokens_details.cached_tokens > 0)

with doing("errors"):
    error = must_raise(
        openai.NotFoundError,
        lambda: client.chat.completions.create(model="nope", messages=messages),
    )
    must(error.code == "model_not_found")
    error = must_raise(
        openai.BadRequestError,
        lambda: client.chat.completions.create(messages=messages, extra_body={"foo": 1}, **short),
    )
    must(error.param == "foo")
    error = must_raise(
        openai.BadRequestError,
        lambda: client.responses.create(model=MODEL, input=QUESTION, store=True),
    )
    must(error.param == "store")

with doing("abort"), telling.leaving():
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": LONG}],
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
