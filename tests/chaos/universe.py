"""The prompts of a storm: known to all, so that a history can name them by numbers."""

from __future__ import annotations

from functools import cache

from chaos.pattern import prompt

BLOCK_SIZE = 4
MODELS = ("a", "b")
NUM_SYSTEMS, NUM_CHATS = 4, 48
SYSTEM_TOKENS, CHAT_TOKENS = 37, 90


@cache
def tokens_of(system: int, chat: int) -> bytes:
    """Give all tokens that a chat may ever have; a request uses a beginning of them."""
    return prompt((1000 + system, SYSTEM_TOKENS), (5000 + 100 * system + chat, CHAT_TOKENS))


def common(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Count the tokens that two chats share."""
    a, b = tokens_of(*one), tokens_of(*other)
    count = 0
    while count < len(a) and a[count : count + 4] == b[count : count + 4]:
        count += 4
    return count // 4
