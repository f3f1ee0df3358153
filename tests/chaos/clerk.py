"""A caller of a real worker process in a storm: honest lines, and odd ones among them.

Arguments: target, seed, log, tenant, folder of the model, file of the answers.  Runs until SIGTERM,
starts the worker again when it was killed, and ends by closing the worker's input.

Each odd line must be answered by one `failed` of its own name (or of none, if it has none), and by
nothing else; each honest one by exactly what a worker without any service answers.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from chaos.universe import TOKENS
from service.service_process import environment

PATIENCE_S = 120.0
"""Longer than any fault lasts: a worker that is silent for so long takes nothing any more."""

TOO_LONG = (32 << 20) + 1
LINES_AT_ONCE = 12
KILLED = 0.03
"""Share of the rounds of lines in which the worker is killed."""

CALL = {"id": "1", "type": "function", "function": {"name": "w4", "arguments": '{"w5": null}'}}
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "w7 w8 w9"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": "w3"}, {"role": "assistant", "content": None}],
    [
        {"role": "user", "content": [{"type": "text", "text": "w3 w4"}, {"type": "text"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "w5", "tool_call_id": "1"},
    ],
    [{"role": "somebody", "content": "w4 w5"}],
    [{"role": "user", "content": ""}, {"role": "user", "content": "w9 \U0001f600"}],
)
"""Odd, and yet what servers log: they are answered."""

MESSAGES: tuple[Any, ...] = (
    *("hi", 5, [], {}, [5], [None], [[]], [{}], [{"role": None}], [{"role": 5, "content": "a"}]),
    *([{"role": "user", "content": odd}] for odd in (5, {}, [5], [{"type": "nothing"}], [[]])),
    *([{"role": "user", "content": "a\ud83d"}], [{"role": "\udc00", "content": "a"}]),
    [{"role": "assistant", "tool_calls": 5}],
    [{"role": "assistant", "tool_calls": [5]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
)
FIELDS: tuple[dict[str, Any], ...] = (
    *({"max_new_tokens": odd} for odd in (0, -1, "5", 1.5, True, [], 10**40, 10**12)),
    *({"temperature": odd} for odd in (float("nan"), float("inf"), -1, "hot", {}, 10**400)),
    *({"seed": odd} for odd in (2**70, 1.0, "x")),
    *({"sample": odd} for odd in (-1, 2**31, "x")),
    *({"top_k": odd} for odd in (-2, 1.5, 2**40)),
    *({"min_p": odd} for odd in (-0.1, 1.1, "x", float("nan"))),
    *({"presence_penalty": odd} for odd in (-2.5, 2.5, "x", float("nan"))),
    *({"repetition_penalty": odd} for odd in (0, -1, 1000, "x")),
    *({"logit_bias": odd} for odd in (5, [1], {"x": 1}, {"1": 1e9}, {"97": 1}, {"1": "x"})),
    *({"min_tokens": odd} for odd in (-1, 10**6, "x")),
    *({"ignore_eos": 1}, {"logprobs": 5}, {"top_logprobs": 3}),
    *({"logprobs": True, "top_logprobs": odd} for odd in (-1, 21, True)),
    *({"generated": odd} for odd in (5, [True], [-1], [2**32], [97], [3] * 2000)),
    *({"stop": odd} for odd in (5, [5], {}, "a\ud83d", ["a"] * 2000, "a" * 5000)),
    *({"stop_ids": odd} for odd in (7, [float("inf")], [-1], ["a"], [True])),
    *({"wait_s": odd} for odd in (float("nan"), -1, "x", 10**9)),
    *({"tokens": odd} for odd in ("x", [1.5], [True], [2**80], [-1], [None], {}, [[1], [2]], [])),
    *({"tokens": odd} for odd in ([96, 97], [2**31], list(range(3, 90)) * 5)),
    *({"log_logits": 1}, {"unknown": 1}, {"tools": 5}, {"prompt": 5}, {"prompt": ["a"]}),
    *({"messages": odd} for odd in MESSAGES),
)


def honest(number: int) -> dict[str, Any]:
    """One of the requests that are answered; a third of their prompt is what others have, too."""
    if number < len(CHATS):
        return {"messages": CHATS[number], "max_new_tokens": 6}
    random = Random(number)
    shared = Random(number % 3).choices(range(3, 97), k=24)
    return {
        "tokens": [*shared, *random.choices(range(3, 97), k=random.randrange(1, 40))],
        "max_new_tokens": 8,
    }


NUM_HONEST = len(CHATS) + 18


def odd_line(name: str, random: Random) -> tuple[bytes, str]:
    """A line that is refused, and the name under which it is."""
    kind = random.random()
    begin = b'{"id":' + json.dumps(name).encode() + b","
    if kind < 0.7:
        fields = random.choice(FIELDS)
        source = {} if {"tokens", "prompt", "messages"} & fields.keys() else {"tokens": [3, 4]}
        line = json.dumps({"id": name} | source | fields)
        return line.replace("Infinity", "1e999").encode("utf-8", "surrogatepass"), name
    if kind < 0.72:  # seldom: it is large
        return begin + b'"prompt":"' + b"x" * TOO_LONG + b'"}', name
    return random.choice(
        (
            (begin + b'"messages":' + b"[" * 50_000, name),
            (begin + b'"messages":' + b"[" * 5_000 + b"]" * 5_000 + b"}", name),
            (begin + b'"messages":' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"}", name),
            (begin + b'"prompt":"\xff\xfe"}', name),
            (begin + b'"prompt":"\xed\xa0\x80"}', name),
            (begin + b'"prompt":"a', name),
            (begin + b'"tokens":[1],"seed":' + b"9" * 5000 + b"}", name),
            (begin + b'"tokens":[1],"prompt":"a"}', name),
            (begin + b'"cancel":{}}', name),
            (b"\xff\xff" + begin + b'"tokens":[1]}', ""),
            (b"[" * 50_000, ""),
            (b"5", ""),
            (b"null", ""),
            (b"[]", ""),
            (b'"text"', ""),
            (b"NaN", ""),
            (b"\x00\x01\x02", ""),
            (b'{"cancel":["a"]}', ""),
            (b'{"id":["x"],"tokens":[1]}', ""),
            (b'{"id":1e999,"tokens":[1]}', ""),
            (b'{"id":"' + b"x" * 5000 + b'","tokens":[1]}', ""),
        )
    )


class Clerk:
    """One caller with one worker process at a time."""

    def __init__(
        self, target: str, seed: int, log: str, tenant: str, model: str, answers: str
    ) -> None:
        self.target, self.tenant, self.model = target, tenant, model
        self.random = Random(seed)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.answers: list[list[int]] = json.loads(Path(answers).read_text())
        self.ending = False
        self.count = 0
        self.told: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.process: subprocess.Popen[bytes] | None = None

    def end(self, *_: object) -> None:
        self.ending = True

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.end)
        while not self.ending:
            if self.process is None and not self.begin():
                time.sleep(0.2)
                continue
            self.serve()
            self.tell()
        if self.process is not None:
            self.leave(self.process)
        self.tell()

    def tell(self) -> None:
        line = json.dumps({"counts": dict(self.told), "wrong": self.wrong[:20]})
        os.write(self.log, line.encode() + b"\n")

    def begin(self) -> bool:
        """Start a worker; whether it is ready.  It is not while there is no service."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefixcache_worker", "--model", self.model),
                *("--dtype", "float32", "--connect", self.target, "--name", "clerk"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment() | {"PREFIXCACHE_TOKEN": TOKENS[self.tenant]},
        )
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            process.wait()
            return False
        assert json.loads(line)["event"] == "ready"
        self.process, self.events = process, queue.Queue()
        threading.Thread(target=self.listen, args=(process, self.events), daemon=True).start()
        self.told["workers"] += 1
        return True

    def listen(self, process: subprocess.Popen[bytes], events: queue.Queue[dict[str, Any]]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] in ("finished", "failed"):
                events.put(event)
        events.put({"event": "end", "id": ""})

    def serve(self) -> None:
        """Send some lines in any order; see what each is answered."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        due: dict[str, list[int]] = {}
        again: dict[str, list[int]] = {}
        refused: Counter[str] = Counter()
        lines = []
        for _ in range(self.random.randrange(1, LINES_AT_ONCE)):
            self.count += 1
            name = f"{self.count}"
            if self.random.random() < 0.5:
                number = self.random.randrange(NUM_HONEST)
                due[name] = self.answers[number]
                lines.append(json.dumps({"id": name} | honest(number)).encode())
                if self.random.random() < 0.2:  # the same name again, while it is in hand
                    lines.append(lines[-1])
                    refused[name] += 1
                    again[name] = due[name]
            else:
                line, told_as = odd_line(name, self.random)
                lines.append(line)
                refused[told_as] += 1
        killed = self.random.random() < KILLED
        try:
            process.stdin.write(b"\n".join(lines) + b"\n")
            process.stdin.flush()
            if killed:
                process.kill()
        except BrokenPipeError:
            pass  # told below: it has ended
        while due or +refused:
            try:
                event = self.events.get(timeout=PATIENCE_S)
            except queue.Empty:
                self.wrong.append(f"silent, before {[*due][:3]} and {[*refused][:3]}")
                process.kill()
                process.wait()
                break
            name = str(event["id"])
            if event["event"] == "end":
                if not killed:
                    self.wrong.append("the worker has ended by itself")
                break
            if event["event"] == "finished" and name in due:
                if event["tokens"] != due.pop(name):
                    self.wrong.append(f"another answer to {name}")
                self.told["answered"] += 1
            elif event["event"] == "finished" and event["tokens"] == again.pop(name, None):
                refused[name] -= 1  # the first one had ended when the second was read
            elif event["event"] == "failed" and refused[name] > 0:
                refused[name] -= 1
                self.told["refused"] += 1
            else:
                self.wrong.append(f"{event['event']} of {name!a}: {event.get('message', '')[:200]}")
                due.pop(name, None)
        if killed or process.poll() is not None:
            process.kill()
            process.wait()
            self.told["killed"] += killed
            self.process = None

    def leave(self, process: subprocess.Popen[bytes]) -> None:
        """Close its input: it ends by itself."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            self.wrong.append(f"the worker ended with {code} at the end of its input")


if __name__ == "__main__":
    Clerk(sys.argv[1], int(sys.argv[2]), *sys.argv[3:7]).run()
