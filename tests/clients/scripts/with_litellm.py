"""`litellm`."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no list of prices from the network

import litellm
import telling
from telling import CITY, LONG, MODEL, QUESTION, URL, doing, must, must_raise

telling.about("litellm")
litellm.suppress_debug_info = True
messages = [{"role": "user", "content": QUESTION}]
place = {"api_base": URL, "api_key": "none", "num_retries": 0, "timeout": 120}
short = {"messages": messages, "max_tokens": 24, "temperature": 0, **place}

with doing("chat"):
    told = [litellm.completion(f"{kind}/{MODEL}", **short) for kind in ("openai", "hosted_vllm")]
    texts = [one.choices[0].message.content for one in told]
    must(texts[0] and texts[0] == texts[1], texts)
    must(told[1].usage.prompt_tokens_details.cached_tokens == told[1].usage.prompt_tokens - 1)

with doing("stream"):
    chunks = list(
        litellm.completion(
            f"openai/{MODEL}", stream=True, stream_options={"include_usage": True}, **short
        )
    )
    must("".join(one.delta.content or "" for chunk in chunks for one in chunk.choices) == texts[0])
    must(litellm.stream_chunk_builder(chunks, messages=messages).usage.completion_tokens > 0)

with doing("structured"):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    told = litellm.completion(f"openai/{MODEL}", response_format=form, **short | {"max_tokens": 80})
    must(json.loads(told.choices[0].message.content)["city"] in CITY["properties"]["city"]["enum"])

with doing("tools"):
    tool = {"type": "function", "function": {"name": "find_city", "parameters": CITY}}
    told = litellm.completion(
        f"openai/{MODEL}", tools=[tool], tool_choice="required", **short | {"max_tokens": 80}
    )
    call, *_ = told.choices[0].message.tool_calls
    must(set(json.loads(call.function.arguments)) == set(CITY["required"]))

with doing("responses"):
    told = litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, max_output_tokens=24, temperature=0, **place
    )
    must(told.output[0].content[0].text == texts[0])

with doing("errors"):
    must_raise(litellm.NotFoundError, lambda: litellm.completion("openai/nope", **short))
    must_raise(
        litellm.BadRequestError,
        lambda: litellm.completion(f"openai/{MODEL}", extra_body={"foo": 1}, **short),
    )

with doing("abort"), telling.leaving():
    long = [{"role": "user", "content": LONG}]
    stream = litellm.completion(
        f"openai/{MODEL}", **short | {"messages": long, "max_tokens": 1000}, stream=True
    )
    next(iter(stream))
    stream.completion_stream.close()
