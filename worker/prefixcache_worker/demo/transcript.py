"""One chat as tokens, growing turn by turn so that every prompt extends the one before.

```
turn 1   <system> … <user> question 1 <assistant>                     prompt 1
                                                  answer 1
turn 2   ─────────── prompt 1 ──────────────────  answer 1  <user> question 2 <assistant>
         the very same token ids as before, not the same text tokenised again
```
A tokeniser does not always give back the ids that a model produced; tokenising the whole text again
would change ids in the middle of the history, and what was cached could not be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prefixcache_worker.demo.chats import Chat


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokeniser that a transcript uses."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """Give the text of a conversation."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Give the ids of a text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Give the text of ids."""


class Transcript:
    """The messages and the token ids of one chat.

    Args:
        chat: what the user says.
        tokenizer: a Hugging Face tokeniser with a chat template.
        stop_ids: ids that end an answer; the template writes them itself, so that they are not
            taken into the history twice.
    """

    def __init__(self, chat: Chat, tokenizer: ChatTokenizer, stop_ids: frozenset[int]) -> None:
        self.chat = chat
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._messages = [{"role": "system", "content": chat.assistant.system}]
        self._text = ""
        self._tokens: list[int] = []

    def ask(self, turn: int) -> list[int]:
        """Append the user's words of `turn` and give the whole prompt's ids."""
        return self.say(self.chat.turns[turn])

    def say(self, words: str) -> list[int]:
        """Append words of the user and give the whole prompt's ids.

        O(new text), and the whole text once where a template rewrites what came before (some drop
        earlier reasoning): then the history is tokenised anew and shares less.
        """
        self._messages.append({"role": "user", "content": words})
        text = self._render(self._messages)
        if self._text and text.startswith(self._text):
            self._tokens += self._encode(text[len(self._text) :])
        else:
            self._tokens = self._encode(text)
        self._text = text
        return list(self._tokens)

    def answer(self, tokens: Sequence[int]) -> str:
        """Append the model's answer, with the ids that it produced, and give its text."""
        kept = list(tokens)
        while kept and kept[-1] in self._stop_ids:
            kept.pop()
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": text})
        self._tokens += kept
        self._text += text
        return text

    def num_system_tokens(self) -> int:
        """Tokens of the system prompt with its frame: what chats of one assistant share.

        The longest common prefix of two prompts that differ in the first letter of the question.
        """
        system = self._messages[0]
        one, two = (
            self._encode(self._render([system, {"role": "user", "content": question}]))
            for question in ("A", "Q")
        )
        return next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
