"""`pydantic-ai`."""

import asyncio
from typing import Literal

import pydantic
import telling
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from telling import LONG, MODEL, QUESTION, URL, doing, must, must_raise

telling.about("pydantic-ai-slim")


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Oslo"]
    is_capital: bool


provider = OpenAIProvider(base_url=URL, api_key="none")
model = OpenAIChatModel(MODEL, provider=provider)
short = {"max_tokens": 24, "temperature": 0}

with doing("chat"):
    told = Agent(model, instructions="Be brief.", model_settings=short).run_sync(QUESTION)
    must(told.output)
    must(told.usage.output_tokens > 0)

with doing("stream"):

    async def stream() -> str:
        agent = Agent(model, instructions="Be brief.", model_settings=short)
        async with agent.run_stream(QUESTION) as result:
            return "".join([part async for part in result.stream_text(delta=True)])

    must(asyncio.run(stream()) == told.output)

with doing("structured"):
    roomy = {"max_tokens": 80, "temperature": 0}
    agent = Agent(model, output_type=NativeOutput(City), model_settings=roomy)
    must(isinstance(agent.run_sync(QUESTION).output, City))

with doing("tools"):
    # What it calls a tool is how it asks for a structure: `tool_choice` is "required".
    agent = Agent(model, output_type=City, model_settings=roomy)
    must(isinstance(agent.run_sync(QUESTION).output, City))

with doing("responses"):
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings=short)
    must(agent.run_sync(QUESTION).output)

with doing("errors"):
    nobody = Agent(OpenAIChatModel("nope", provider=provider))
    must(must_raise(ModelHTTPError, lambda: nobody.run_sync("x")).status_code == 404)

with doing("abort"), telling.leaving():

    async def leave() -> None:
        mine = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
        agent = Agent(mine, model_settings={"max_tokens": 1000})
        task = asyncio.create_task(agent.run(LONG))
        while not telling.meter("answers_running"):
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.5)  # a connection is closed by its loop

    asyncio.run(leave())
