"""The demo without a model: real service, real processes, `fake_worker.py` instead of the worker.

Arguments: `--plain` for a demo without its picture, which takes seconds to draw, and the fake
worker's own.  Exit code as the demo's.
"""

import sys
from pathlib import Path

import typer
from rich.console import Console

from prefixcache_worker.demo import chats, picture, runner
from prefixcache_worker.demo.command import run_and_report
from prefixcache_worker.demo.transcript import Transcript

LETTERS = 200


class Letters:
    """A tokeniser whose tokens are letters."""

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        return "".join(f"<{m['role'][0]}>{m['content']}</>" for m in conversation) + "<a>"

    def encode(self, text, *, add_special_tokens):
        return list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode()


def shortened(chat):
    """Keep the system prompt short enough for a test, but different from the others."""
    known = chat.assistant
    length = 1000 if known.name in ("bicycle", "travel") else LETTERS
    assistant = chats.Assistant(known.name, known.title, known.system[:length])
    return chats.Chat(chat.id, assistant, chat.turns)


def setup(num_workers, *arguments):
    workload = chats.load().quick()
    small = tuple(shortened(chat) for chat in workload.chats)
    workload = chats.Workload({chat.assistant.name: chat.assistant for chat in small}, small)
    transcripts = {chat.id: Transcript(chat, Letters(), frozenset()) for chat in small}
    names = tuple(f"w{i + 1}" for i in range(num_workers))
    fake = str(Path(__file__).with_name("fake_worker.py"))
    command = (sys.executable, fake, *arguments)
    bits = "--bits" in arguments
    return runner.Setup(workload, transcripts, "fake", names, command, bits=bits)


def main():
    num_workers, folder, *arguments = sys.argv[1:]
    if "--plain" in arguments:
        arguments.remove("--plain")
        picture.draw = lambda *_: None
    console = Console(width=160)
    try:
        result = run_and_report(
            console, setup(int(num_workers), *arguments), Path(folder) / "demo.json"
        )
    except typer.Exit as end:
        sys.exit(end.exit_code)
    survived = result["sentence"] is None or result["sentence"]["survived"]
    sys.exit(0 if result["identical"] and survived else 1)


if __name__ == "__main__":
    main()
