"""`lm-eval`: chat generation, and multiple choice by the log-probabilities of its prompts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import telling
from telling import MODEL, URL, doing, must

telling.about("lm-eval")
TOKENIZER = sys.argv[3]
home = tempfile.TemporaryDirectory()
ROWS = [
    {"question": "The capital of France is", "choices": [" Paris", " Lima", " Cairo"], "gold": 0},
    {"question": "Two and two is", "choices": [" seventeen", " four", " blue"], "gold": 1},
    {"question": "The sun is a", "choices": [" fish", " spoon", " star"], "gold": 2},
    {"question": "Water is made of hydrogen and", "choices": [" oxygen", " paper"], "gold": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
"""
TASKS = {
    "generate": """
output_type: generate_until
doc_to_text: "Complete: {{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
""",
}


def evaluate(task: str, kind: str, path: str, *words: str) -> dict[str, Any]:
    """Run it from the command line, as its users do; give its results, and what it logged."""
    folder = Path(home.name)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    named = f"task: {task}\n" + COMMON.format(rows=rows) + TASKS[task]
    (folder / f"{task}.yaml").write_text(named)
    arguments = f"model={MODEL},base_url={URL}{path},num_concurrent=2,max_retries=1"
    told = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "lm-eval"), "run", "--model", kind),
            *("--model_args", arguments + ",tokenizer=" + TOKENIZER),
            *("--tasks", task, "--include_path", str(folder)),
            *("--output_path", str(folder / f"out-{task}"), "--log_samples", *words),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    must(told.returncode == 0, told.stderr[-1500:])
    (results,) = (folder / f"out-{task}").rglob("results_*.json")
    (samples,) = (folder / f"out-{task}").rglob("samples_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())["results"][task]
    return found | {"rows": [json.loads(line) for line in samples.read_text().splitlines()]}


with doing("chat generation"):
    told = evaluate(
        "generate", "local-chat-completions", "/chat/completions", "--apply_chat_template"
    )
    must(len(told["rows"]) == len(ROWS))
    must(all(row["resps"][0][0] for row in told["rows"]), told["rows"])

with doing("multiple choice"):
    told = evaluate("choose", "local-completions", "/completions")
    # A server that ignores `echo` would have every choice at 0, and every answer right.
    logprobs = [float(one[0][0]) for row in told["rows"] for one in row["resps"]]
    must(all(one < -0.01 for one in logprobs) and len(set(logprobs)) == len(logprobs), logprobs)
    must(told["acc,none"] >= 0.75, told["acc,none"])
home.cleanup()
