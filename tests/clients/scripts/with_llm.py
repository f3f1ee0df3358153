"""`llm`, from the command line, as its users have it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import telling
from telling import CITY, MODEL, QUESTION, URL, doing, must

telling.about("llm")
home = tempfile.TemporaryDirectory()
models = Path(home.name) / "extra-openai-models.yaml"
models.write_text(
    f"- model_id: here\n  model_name: {MODEL}\n  api_base: {URL}\n"
    "  supports_schema: true\n  supports_tools: true\n"
    f"- model_id: nobody\n  model_name: nope\n  api_base: {URL}\n"
)


def llm(*words: str, code: int = 0) -> str:
    """Run it; give what it wrote, also what is wrong if it is to fail."""
    told = subprocess.run(
        [str(Path(sys.executable).parent / "llm"), *words],
        env=os.environ | {"LLM_USER_PATH": home.name, "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    must(told.returncode == code, told.stderr)
    return told.stdout if code == 0 else told.stderr


short = ("-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "24")

with doing("chat"):
    whole = llm(*short, "--no-stream", QUESTION)
    must(whole.strip())

with doing("stream"):
    must(llm(*short, QUESTION) == whole)

with doing("conversation"):
    must(llm(*short, "--continue", "And of Italy?").strip())

with doing("usage in its log"):
    logged = json.loads(llm("logs", "list", "--json", "-n", "0"))
    must(all(one["input_tokens"] for one in logged), logged)
    details = [json.loads(one["token_details"] or "{}") for one in logged]
    must(any(one.get("prompt_tokens_details", {}).get("cached_tokens") for one in details), details)

with doing("structured"):
    roomy = ("-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "80")
    told = json.loads(llm(*roomy, "--schema", json.dumps(CITY), QUESTION))
    must(told["city"] in CITY["properties"]["city"]["enum"])

with doing("errors"):
    must("nope" in llm("-m", "nobody", "x", code=1))
home.cleanup()
