"""Write docs/experiments.md: each question with the command that answers it, run on real traces.

    python -m prefixcache_bench.reports.experiments [--traces DIR] [--out docs] [--resume]
    python -m prefixcache_bench.reports.experiments --only tiers-chats,tiers-hashed

Without a folder of traces (PREFIXCACHE_TRACES), the questions are asked of generated workloads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixcache_bench.commands.curve import curve
from prefixcache_bench.commands.generate import generate
from prefixcache_bench.commands.memory import memory
from prefixcache_bench.commands.replay import replay
from prefixcache_bench.commands.sweep import sweep
from prefixcache_bench.reports.provenance import provenance

_COMMANDS: dict[str, Callable[..., None]] = {
    "sweep": sweep,
    "replay": replay,
    "curve": curve,
    "memory": memory,
    "generate": generate,
}
_CHATS, _HASHED = "CHATS", "HASHED"


@dataclass(frozen=True)
class Question:
    """A heading, what is said before and after, and the command between."""

    title: str
    before: str
    command: str
    """With CHATS or HASHED where the trace stands, and PICTURE for where pictures go."""
    after: str
    picture: str


QUESTIONS = (
    Question(
        "Which block size?",
        "Real multi-turn chats, cut into tokens. Rows are block sizes, columns amounts of memory, "
        "as shares of the distinct tokens of the trace; the last column is the ceiling that no "
        "memory exceeds. `partial off` shares whole blocks only, as most engines do; `tails` is "
        "what the service does by default.",
        "sweep CHATS --block-size 1,4,16,64,256 --capacity 4.5%,6%,10%,25%,inf "
        "--partial off,tails -o PICTURE",
        "**Answer.** With whole blocks only, every doubling beyond 16 costs, because each prompt "
        "loses half a block on average where it parts from what is stored. With tails and enough "
        "memory the block size no longer matters for reuse: choose it for the kernel. With very "
        "little memory large blocks lose in either mode, and tails lose most: a tail occupies a "
        "whole block however little is in it.",
        "block-size",
    ),
    Question(
        "How much memory?",
        "One pass gives the hit rate at *every* capacity, exactly. Name a model, and the axis has "
        "bytes.",
        "curve CHATS --block-size 16,256 --layout llama-3.1-8b -o PICTURE",
        "**Answer.** At the knee: where it bends, the next doubling of memory begins to buy less. "
        "The marks below and above it say what a given share of the ceiling costs.",
        "memory-chats",
    ),
    Question(
        "How much memory, for long contexts?",
        "The same question for a trace of a chat service of which only block hashes are known "
        "(512 tokens each): block sizes cannot go below that, everything else works.",
        "curve HASHED --capacity 1000b,10000b,100000b --layout llama-3.1-8b -o PICTURE",
        "**Answer.** Two kinds of reuse show as two steps. A small one is there with hardly any "
        "memory (a common system prompt); the large one needs the chats of the last tens of "
        "minutes to stay, which is terabytes for this model: a case for tiers below device memory.",
        "memory-hashed",
    ),
    Question(
        "Is a tier below worth it for my chats?",
        "The pool, and below it memory of the host to which what is evicted goes "
        "([tiers](tiers.md)), at two speeds of copying: by the cache that serves, with its "
        "decisions, on a virtual clock. One engine computes one request after the other; the first "
        "token's time is from when it begins with that.",
        "sweep CHATS --block-size 16 --capacity 1%,2%,4.5% --host 0,2%,4.5%,10% "
        "--host-speed 200k,5k --prefill 10000 --partial tails -o PICTURE",
        "**Answer.** Yes, where chats come back after others have pushed them out, and copying "
        "is much quicker than computing. A pool and a tier find together what one pool of both "
        "sizes would, but for what is kept free; so buy as much below as the knee of *How much "
        "memory?* lacks. A tier that takes longer than computing is declined: it brings "
        "nothing, and costs the first token next to nothing. *dropped* are blocks that went "
        "without a copy, since room was needed sooner, or since they were partly filled.",
        "tiers-chats",
    ),
    Question(
        "… and for long contexts?",
        "The same of the trace of block hashes, for an 8B model that computes 10,000 tokens a "
        "second: a token has 128 KiB, so that these are 1.2 GiB of KV a second. Memory of the "
        "host is copied at 20 GiB a second, and a disk below it, or alone, at 4 or at 1 GiB a "
        "second.",
        "sweep HASHED --block-size 512 --capacity 1000b,10000b --host 0,9000b --disk 0,40000b "
        "--layout llama-3.1-8b --host-speed 20GiB/s --disk-speed 4GiB/s,1GiB/s --prefill 10000 "
        "--partial off -o PICTURE",
        "**Answer.** It depends on how fast it is: what has to be beaten is what computing "
        "yields, here 1.2 GiB a second. Memory of the host is a dozen times as fast, and a disk "
        "of 4 GiB a second three times. One of 1 GiB a second is not worth it for this model, "
        "and the service finds out by itself; for a larger one, which computes fewer tokens a "
        "second, it would be another matter. Below memory it even takes a little of what that "
        "brings: one porter copies to both, and who waits for him waits for a piece of the slow "
        "one. Requests are long beside the smaller pool: as much of it is kept free as they take "
        "at once, up to half of it, so that what they push out finds its way down and little is "
        "dropped.",
        "tiers-hashed",
    ),
    Question(
        "Is partial reuse worth it?",
        "The three modes side by side, where it matters: large blocks.",
        "sweep CHATS --block-size 16,64,256 --capacity 5%,10%,25%,inf "
        "--partial off,blocks,tails -o PICTURE",
        "**Answer.** For large blocks and enough memory, yes: `blocks` (copy the first part of a "
        "full block) recovers a part of the loss and costs nothing; `tails` recovers all of it. "
        "When memory is so tight that most of what is stored is evicted before it is used again, "
        "prefer `blocks`: tails take blocks away from others.",
        "partial",
    ),
    Question(
        "Which policy?",
        "Every registered policy, on the block-hash trace, at the capacities that published "
        "simulations use.",
        "sweep HASHED --block-size 512 --capacity 1000b,5000b,10000b,30000b,50000b,inf "
        "--policy POLICIES --partial off -o PICTURE",
        "**Answer.** With memory for the whole working set they all meet at the ceiling; the less "
        "memory, the more they differ. `hazard`, which learns when which kind of block comes back, "
        "is ahead up to 30,000 blocks, most where memory holds less than a think time of traffic. "
        "Policies by frequency are a good filter in little memory and fail beyond. LRU is the "
        "default. [Policies](policies.md) has all workloads, the bounds, and what was tried.",
        "policy",
    ),
    Question(
        "Where do the other tokens go?",
        "The ledger gives every prompt token one fate, also over time: *cold* was never seen, "
        "*evicted* was there once and had to go, *granularity* is stored but shorter than what "
        "can be shared.",
        "replay HASHED --block-size 512 --capacity 10000b --partial off --windows 10 "
        "--picture PICTURE",
        "**Answer.** What is *evicted* could be bought with memory or a better policy; what is "
        "*cold* cannot. The first minutes are cold whatever one does: do not judge a cache by "
        "them.",
        "ledger",
    ),
    Question(
        "What is the memory used for?",
        "A saturated server without any sharing between requests, by accounting alone: contiguous "
        "reservations against paged blocks, with the service's own block pool; and what `fork` "
        "saves when a prompt has several answers. Beside it the figures that the paper on paged "
        "attention published for its own traces and model.",
        "memory CHATS --block-size 1,2,4,8,16,32,64,128,256 --picture PICTURE",
        "**Answer.** Paging turns a third of the memory into nearly all of it; blocks of up to 16 "
        "waste next to nothing. In beam search which beam goes on is drawn, not computed, so "
        "these savings depend on the draw more than the others do.",
        "use",
    ),
)


def main() -> None:
    """Ask all questions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default=os.environ.get("PREFIXCACHE_TRACES", ""))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of sweeps that are there already"
    )
    parser.add_argument(
        "--only", metavar="LIST", help="ask these questions alone, by their pictures' names"
    )
    asked = parser.parse_args()
    pictures = asked.out / "experiments"
    pictures.mkdir(parents=True, exist_ok=True)
    places = dict(_places(asked.traces, pictures))
    if asked.only is not None:
        _renew(asked.out / "experiments.md", asked.only.split(","), places, pictures)
        return
    head = provenance()
    parts = [_INTRODUCTION.strip()]
    if not asked.traces:
        parts.append("*Made from generated workloads, not from real traces.*")
    for question in QUESTIONS:
        print(question.title, file=sys.stderr, flush=True)
        parts.append(_ask(question, places, pictures, resume=asked.resume))
    parts.append(_REFERENCE.strip())
    kept = " Rows of sweeps that were there already were kept." if asked.resume else ""
    parts.append(
        f"---\n\nMade by `make experiments` at {head['time']} from commit {head['commit']}, "
        f"on {head['machine']}.{kept}"
    )
    (asked.out / "experiments.md").write_text("\n\n".join(parts) + "\n")


def _renew(
    page: Path, names: list[str], places: dict[str, tuple[str, str]], pictures: Path
) -> None:
    """Ask some questions anew, and put what they answer in their places on a page."""
    known = {question.picture: number for number, question in enumerate(QUESTIONS)}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"no question has the picture {unknown[0]!r}; there are: {', '.join(known)}"
        )
    for name in names:
        question, head = QUESTIONS[known[name]], provenance()
        print(question.title, file=sys.stderr, flush=True)
        made = f"Made from commit {head['commit']}, on {head['machine']}."
        section = f"{_ask(question, places, pictures)}\n\n{made}\n\n"
        text = page.read_text()
        later = [one.title for one in QUESTIONS[known[name] :]]
        titles = [f"## {title}\n" for title in (*later, "What is counted, exactly")]
        begin = min(text.index(title) for title in titles if title in text)
        end = begin
        if text.startswith(titles[0], begin):
            end = text.index("\n## ", begin) + 1
        page.write_text(text[:begin] + section + text[end:])


def _places(folder: str, pictures: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Give what stands for each trace: what is run, and what is shown."""
    from prefixcache.core.policies import POLICIES

    policies = ",".join(POLICIES)
    yield "POLICIES", (policies, policies)
    if folder:
        yield _CHATS, (f"{shlex.quote(folder)} --name sharegpt", "traces --name sharegpt")
        name = "mooncake_conversation.jsonl.gz"
        yield _HASHED, (shlex.quote(str(Path(folder) / name)), f"traces/{name}")
        return
    made = pictures / "chats.jsonl"
    _run(
        "generate",
        ["chats", "--count", "400", "--packed", "--force", "-o", str(made)],
        "generate chats",
    )
    yield _CHATS, (str(made), "chats.jsonl")
    yield _HASHED, (str(made), "chats.jsonl")


def _ask(
    question: Question,
    places: dict[str, tuple[str, str]],
    pictures: Path,
    *,
    resume: bool = False,
) -> str:
    run = shown = question.command
    for name, (real, label) in places.items():
        run, shown = run.replace(name, real), shown.replace(name, label)
    run = run.replace("PICTURE", str(pictures / question.picture))
    shown = shown.replace("PICTURE", question.picture)
    name, *arguments = shlex.split(run)
    if resume and name == "sweep":
        arguments.append("--resume")
    output = _run(name, [*arguments, "--force"], shown)
    picture = f"![{question.title}](experiments/{question.picture}.png)"
    block = f"```console\n$ prefixcache {shown}\n{output}\n```"
    before, after = (textwrap.fill(text, 100) for text in (question.before, question.after))
    return f"## {question.title}\n\n{before}\n\n{block}\n\n{picture}\n\n{after}"


def _run(name: str, arguments: list[str], shown: str) -> str:
    """Run a command of `prefixcache` in this process; give what it prints, but for file names."""
    import typer

    app = typer.Typer()
    app.command(name)(_COMMANDS[name])
    command: Any = typer.main.get_command(app)
    said = io.StringIO()
    before = sys.argv
    # Results name the command as it is shown, not where this machine keeps its traces.
    sys.argv = ["prefixcache", *shlex.split(shown)]
    try:
        with contextlib.redirect_stdout(said):
            command.main(arguments, standalone_mode=False)
    finally:
        sys.argv = before
    lines = [line.rstrip() for line in said.getvalue().splitlines() if line[:6] != "wrote "]
    return "\n".join(lines).strip("\n")


_INTRODUCTION = """
# Experiments

How large should a block be, how much memory is enough, which policy? The answers depend on the
workload, so ask them of your own. The experiments replay a trace through the very cache that
serves (`prefixcache.core`, not a model of it), on a virtual clock.

**Your own chats, in two commands.** A file of chats or requests as servers
log them ([any form](#forms-of-traces)) is enough:

```console
$ pip install '.[experiments]'    # in a checkout
$ prefixcache sweep chats.jsonl
```

The last lines of the answer say, for every amount of memory, how large a block may be; the picture
is `sweep.png`. Text is cut into tokens by tiktoken, which needs no network; for your model's own
tokens add `--tokenizer path/to/model`. The first line of the file tells its form; `--format` says
it where that is not enough. Below, the same questions are asked of real traces, with the command,
what it prints, and its picture.
"""

_REFERENCE = """
## What is counted, exactly

* Requests are replayed one at a time, in order: look up the prompt, then store what exists after
  the request (prompt and answer: the *sequence*). No concurrency, no time-outs.
* **Stored** are the sequence's whole blocks, each below the one before it, so that a block is known
  by all tokens up to its end; with `tails` also its last, partly filled block, which occupies a
  whole one. A sequence of more blocks than the capacity is cut to the first that fit.
* **Hits** are the leading whole blocks of the sequence that are stored. Of the tokens after them,
  as many as a block has, the **part** is what the best block stored at that place begins with
  (`blocks`: full blocks only, since there are no others; `tails`: tails too). The best shares most
  leading tokens. If several do, it is the last of those that come before in the order of their
  packed bytes (token ids as little-endian uint32), else the first of those that do not.
* A part is copied before anything is written, and the block it comes from keeps its memory until
  the request ends. So a sequence that stores as many blocks as the capacity copies nothing: its
  part is 0. Otherwise that block counts as used now, if the part is half of what it holds or more.
  If it is the oldest all the same and is evicted to make room, it is no longer stored, and its
  memory is not room: another block goes too.
* **Room** is made first: while stored blocks, an evicted block that is copied from, and the
  sequence's new blocks exceed the capacity, the least recently used block goes that has none below
  it and is not among the hits. Then the new blocks are stored. A new block that begins with a
  stored tail of the same place replaces it; a new tail that a stored block of the same place begins
  with is not stored, nor is one that was copied whole, even if the block it came from is gone. All
  this happens after the room was made. At the end the sequence's blocks count as used, the last one
  least recently. A block of which less than half was copied, or that covers a tail, does not.
* The figures are of the prompt: the first tokens of what the sequence reused, at most all but the
  prompt's last token, which is computed for its logits. Whole blocks of it are hits, the rest part.
* `hit_rate` = tokens in whole blocks that hit / prompt tokens, over all requests, cold start
  included. `hit_rate_partial` adds parts of blocks; with `--partial off` it is what they would have
  given.
* Capacity is what may stay stored, in tokens (rounded down to blocks), in blocks (`10000b`), or as
  bytes of a model (`2GiB` with `--layout`), or as a share of the distinct tokens of the trace
  (`25%`).
* In a block-hash trace a word is a block; nothing has to be computed, since only what was looked up
  is known. `block_prefix` and `token_prefix` count leading hit blocks and their tokens.
* The ledger's percentages add up to 100.000. *Cold* is what was never seen; but under a policy that
  learns from what it evicted (`2q`, `arc`, `hazard`, `s3fifo`, `w-tinylfu`), which must not
  remember more here than when it serves, it is also what has been forgotten.

With `--partial off`, LRU equals independent simulators to every printed digit, on token traces and
on block-hash traces, at 1 to 512 tokens per block; so does LFU where it is simulated without a tree
(`--policy lfu-flat`; [why the tree's own differs](policies.md)); `prefixcache curve` equals replays
at every capacity; `tails` with infinite memory gives, at every block size, exactly what blocks of
one token give. With every mode of partial reuse and any capacity, hits and parts under LRU are
those of the rule above, to the last token: a thousand drawn configurations in every run of the
tests (`tests/experiments/naive_pool.py` is the rule in 80 lines; `PREFIXCACHE_CONFIGURATIONS` draws
more). Tests say so: against brute force always, and against the references where
`PREFIXCACHE_TRACES` names a folder that has them (with `PREFIXCACHE_SOAK` set, row by row).

A sweep runs on all cores. Ctrl-C keeps the rows that are finished, and `--resume` goes on. Where
the memory holds all that the trace ever stores, nothing is evicted and the result is that of
infinite memory; such rows are not replayed again and are marked `same_as_infinite` in the CSV.

## Forms of traces

* `jsonl`: `{"t": 0.5, "namespace": "m", "tokens": [1, 2, 3], "prompt": 2}`. `tokens` may be base64
  of packed uint32; `prompt` (default: all) says how many of them were sent, the others were
  generated; `namespace` is a name or `[model, adapter, tenant, salt]`. `prompt_token_ids`,
  `input_ids` and `token_ids` are other names of `tokens`, which may also be a list of prompts.
  Without `namespace`, `model`, the adapter and `cache_salt` are it.
* `chat`: logged requests and chats, as JSON lines or as one JSON array, also one that breaks off:
  OpenAI's `messages`, Anthropic's, Responses' `input`, completions' `prompt`, `text` or `inputs`
  (a text, ids, or a list of either), ShareGPT's and other data sets' `conversations` or
  `conversation` (`from`, `value` or `role`, `content`), a batch's lines with any of these below
  `body`, `request` or `params`, a tracer's below `input`; messages, tools and options also as JSON
  text. `--tokenizer` is `tiktoken`, `tiktoken:ENCODING` or the folder of a Hugging Face tokenizer.
  Times are seconds or ISO dates in `t`, `timestamp` or `created`. What has none gets one, is
  counted and said: `--rate` chats a second, `--think` seconds before each next turn.
* `kvtrace`: `NAME.convs.jsonl.gz` (tokens, or a skeleton of common prefixes) and
  `NAME.requests.jsonl.gz` in one folder; `--system one|four` puts system prompts before them.
* `mooncake`: `{"timestamp": 27482, "input_length": 700, "output_length": 52, "hash_ids": [46,
  47]}`, 512 tokens a hash, times in ms; with `chat_id` (Bailian) 16 tokens, times in seconds.
  Without `timestamp` a line needs a `session_id`, and follows the line before of its session after
  `delay` ms. Ids are whole numbers of any size, or texts. `--hash-block TOKENS` says what a hash
  stands for where the form does not.
* `agentic`: `delta-hash-v1`, a header, then `t_ms, trace, i, input_length, keep, tail`.

All may be compressed with gzip, and all but `kvtrace` may come from stdin (`-`). Text is UTF-8,
with or without a byte order mark. Nothing is guessed in silence:

* A line that cannot be read is reported with its number, left out, and counted; the share left out
  stands beside every figure (`left_out` in JSON), and **the exit code is 1 if it is more than
  half** of the file. A null or empty field is as good as absent; a time that is not finite is no
  time.
* Whether block hashes are of so many tokens is tried against all lines (`ceil(input_length /
  tokens)` hashes each): if another power of two fits more lines, the file is refused, and the
  message names it.
* A line has at most 32 MiB, a trace 10 million lines and 2^30 tokens in all its requests; a gzip
  file may unpack to 16 GiB, a JSON array to 1 GiB; what does not end within 1 GiB is not read on.

## What of a logged request counts for sharing

| of the request | in the replay |
|---|---|
| `model`, adapter, `cache_salt` or `extra_key` | the namespace; without `model` the file's name |
| `tools`, `functions`, then `documents` | first in the prompt, as JSON |
| `system`, `instructions`, system messages | the first messages, wherever they are logged |
| text, results of tools, `tool_calls` | tokens in their place; calls as JSON |
| images, recordings, videos, files | 256 tokens each, equal for equal content only; told |
| … that stand beside the messages | where a part has none of its own, else before the first words |
| … without content anywhere | the record is refused |
| answers | each was a request, if the last message is one; not with `continue_final_message` |
| thoughts, earlier turns or responses named by id, `chat_template_kwargs` | not counted; told |
| a field that is not known, beside the prompt or in a message | not read; told by its name |

What is told stands on stderr and beside every figure: how many requests have it. A replay lays
messages out as ChatML, whatever the model; `explain` and the worker write a chat with
the model's own template.

## Workloads to generate

`prefixcache generate KIND` writes `jsonl`. The same seed and options give the same trace.

| kind | who asks | what is shared |
|---|---|---|
| `chats` | users, several turns each | one of a few system prompts, the past |
| `few-shot` | one-turn questions | the same examples before each |
| `agents` | a task that hands its context to several agents | the context; each one's own past |
| `rag` | questions with a few documents, in any order | documents, but only as a prefix |
| `tree` | one problem, samples that branch | the path to the branch |

`--count`, `--rate`, `--arrival poisson|uniform|bursts`, `--think` and the mean sizes are options;
lengths are log-normal around their mean (`--spread`), popularity is Zipf's (`--popularity`).
"""


if __name__ == "__main__":
    main()
