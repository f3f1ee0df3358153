"""`langchain-openai`."""

import openai
import telling
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from telling import CITY, LONG, MODEL, QUESTION, URL, doing, must, must_raise

telling.about("langchain-openai", "langchain-core")
place = {"model": MODEL, "base_url": URL, "api_key": "none", "max_retries": 0, "temperature": 0}
chat = ChatOpenAI(max_tokens=24, **place)
roomy = ChatOpenAI(max_tokens=80, **place)


@tool
def double(number: int) -> int:
    """Double a number."""
    return 2 * number


with doing("chat"):
    told = chat.invoke(QUESTION)
    must(told.content)
    must(told.usage_metadata["output_tokens"] > 0)
    again = chat.invoke([("system", "Be brief."), ("user", QUESTION)])
    must(again.usage_metadata["input_token_details"]["cache_read"] >= 0)

with doing("stream"):
    parts = list(chat.stream(QUESTION, stream_usage=True))
    must("".join(one.content for one in parts) == told.content)

with doing("batch"):
    must([one.content for one in chat.batch([QUESTION] * 3)] == [told.content] * 3)

with doing("completions"):
    must(OpenAI(max_tokens=8, **place).invoke("Once upon a time"))

with doing("structured"):
    schema = {"title": "city", "description": "A city.", **CITY}
    made = roomy.with_structured_output(schema, method="json_schema").invoke(QUESTION)
    must(made["city"] in CITY["properties"]["city"]["enum"])

with doing("tools"):
    asked = roomy.bind_tools([double], tool_choice="double")
    (call,) = asked.invoke("Double 7.").tool_calls
    must(call["name"] == "double")
    must(isinstance(call["args"]["number"], int))

with doing("responses"):
    told_too = ChatOpenAI(max_tokens=24, use_responses_api=True, **place).invoke(QUESTION)
    must(told_too.text == told.content, told_too.content)

with doing("errors"):
    must_raise(openai.NotFoundError, lambda: ChatOpenAI(**place | {"model": "nope"}).invoke("x"))

with doing("abort"), telling.leaving():
    stream = ChatOpenAI(max_tokens=1000, **place).stream(LONG)
    next(stream)
    stream.close()
