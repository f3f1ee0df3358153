"""`openai-agents`, which asks `/v1/responses` unless it is told otherwise."""

import asyncio
from typing import Annotated, Literal

import agents
import openai
import pydantic
import telling
from telling import LONG, MODEL, QUESTION, URL, doing, must

telling.about("openai-agents")
agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
agents.set_default_openai_client(client, use_for_tracing=False)


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Oslo"]
    is_capital: bool


@agents.function_tool
def double(number: Annotated[int, pydantic.Field(ge=0, le=99)]) -> int:
    """Double a number."""
    return 2 * number


def agent(room: int = 24, **more: object) -> agents.Agent:
    """Make an agent with room for so many tokens."""
    settings = agents.ModelSettings(max_tokens=room, temperature=0, **more.pop("settings", {}))
    return agents.Agent(
        name="guide", instructions="Be brief.", model=MODEL, model_settings=settings, **more
    )


async def main() -> None:
    """Do what its users do."""
    with doing("chat"):
        told = await agents.Runner.run(agent(), QUESTION)
        must(told.final_output)
        usage = told.context_wrapper.usage
        must(usage.output_tokens > 0)

    with doing("several turns"):
        more = [*told.to_input_list(), {"role": "user", "content": "And of Italy?"}]
        must((await agents.Runner.run(agent(), more)).final_output)

    with doing("stream"):
        stream = agents.Runner.run_streamed(agent(), QUESTION)
        kinds = [
            event.data.type
            async for event in stream.stream_events()
            if event.type == "raw_response_event"
        ]
        must("response.output_text.delta" in kinds, kinds)
        must(stream.final_output == told.final_output)

    with doing("structured"):
        made = await agents.Runner.run(agent(80, output_type=City), QUESTION)
        must(isinstance(made.final_output, City))

    with doing("tools"):
        called = await agents.Runner.run(
            agent(
                80,
                tools=[double],
                tool_use_behavior="stop_on_first_tool",
                settings={"tool_choice": "required", "parallel_tool_calls": False},
            ),
            "Double 7.",
        )
        must(int(called.final_output) % 2 == 0, called.final_output)

    with doing("chat completions"):
        chat = agents.OpenAIChatCompletionsModel(model=MODEL, openai_client=client)
        guide = agent()
        guide.model = chat
        must((await agents.Runner.run(guide, QUESTION)).final_output == told.final_output)

    with doing("errors"):
        guide = agent()
        guide.model = "nope"
        try:
            await agents.Runner.run(guide, QUESTION)
        except openai.NotFoundError as error:
            must(error.code == "model_not_found")
        else:
            must(False, "no error")

    with doing("abort"), telling.leaving():
        stream = agents.Runner.run_streamed(agent(1000), LONG)
        async for event in stream.stream_events():
            if event.type == "raw_response_event" and "delta" in event.data.type:
                stream.cancel()
                break
        await asyncio.sleep(1)


asyncio.run(main())
