"""`instructor`."""

from typing import Literal

import instructor
import openai
import pydantic
import telling
from telling import MODEL, QUESTION, URL, doing, must, must_raise

telling.about("instructor")


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Oslo"]
    is_capital: bool


base = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
terms = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 80,
    "temperature": 0,
    "max_retries": 0,
}

for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    with doing(f"structured by {mode.name.lower()}"):
        client = instructor.from_openai(base, mode=mode)
        city, whole = client.chat.completions.create_with_completion(response_model=City, **terms)
        must(isinstance(city, City))
        must(whole.usage.completion_tokens > 0)

with doing("stream"):
    client = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
    parts = list(client.chat.completions.create_partial(response_model=City, **terms))
    must(parts[-1].city, parts[-1:])

with doing("errors"):
    must_raise(
        Exception,
        lambda: client.chat.completions.create(response_model=City, **terms | {"model": "nope"}),
    )
