"""`inspect-ai`: an evaluation of three questions, and one that is scored by the model itself."""

import os
import tempfile

import telling
from telling import MODEL, URL, doing, must

os.environ |= {"HERE_BASE_URL": URL, "HERE_API_KEY": "none", "INSPECT_DISPLAY": "none"}

import inspect_ai
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes, model_graded_qa
from inspect_ai.solver import generate

telling.about("inspect-ai")
asked = [
    Sample(input="What is the capital of France?", target="Paris"),
    Sample(input="What is two and two?", target="4"),
    Sample(input="Which animal barks?", target="dog"),
]
terms = GenerateConfig(max_tokens=32, temperature=0, max_retries=0)
logs = tempfile.TemporaryDirectory()


def evaluate(task: inspect_ai.Task, kind: str = "openai-api/here") -> inspect_ai.log.EvalLog:
    """Run an evaluation."""
    (log,) = inspect_ai.eval(task, model=f"{kind}/{MODEL}", log_dir=logs.name)
    must(log.status == "success", log.error)
    return log


with doing("chat"):
    log = evaluate(
        inspect_ai.Task(dataset=asked, solver=generate(), scorer=includes(), config=terms)
    )
    must(len(log.samples) == 3)
    must(all(one.output.completion for one in log.samples))

with doing("cached tokens"):
    log = evaluate(
        inspect_ai.Task(dataset=asked, solver=generate(), scorer=includes(), config=terms)
    )
    (usage,) = log.stats.model_usage.values()
    must(usage.input_tokens_cache_read > 0, usage)

with doing("graded by the model"):
    graded = model_graded_qa(model=f"openai-api/here/{MODEL}")
    log = evaluate(
        inspect_ai.Task(dataset=asked[:1], solver=generate(), scorer=graded, config=terms)
    )
    must(log.samples[0].scores)
logs.cleanup()
