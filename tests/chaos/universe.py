"""The prompts of a storm: known to all, so that a history can name them by numbers."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from chaos.pattern import prompt
from prefixcache.types import Layout

BLOCK_SIZE = 8
LAYOUT = Layout(num_layers=1, num_kv_heads=4, head_dim=32, dtype="float32")
"""A block's page in a plane is one of the processor's: blocks can be viewed side by side."""
MODELS = ("a@1", "b@1")
"""With what says which weights they have: so they may lie in a store of several machines."""
HONEST = ("blue", "green")
"""Tenants that use the same models with the same prompts, and must find nothing of each other."""
RED, BOSS = "red", "boss"
TOKENS = {name: f"secret-of-{name}" for name in (*HONEST, RED, BOSS)}
NUM_SYSTEMS, NUM_CHATS = 4, 48
SYSTEM_TOKENS, CHAT_TOKENS = 37, 90
RETURNERS = 4
"""Of each tenant: who come back to long chats of their own, each under a system of its own."""
LONG_MODEL = "long@1"
"""Theirs: who resets the others leaves it alone."""
NUM_LONG, LONG_TOKENS = 8, 512
"""How many such chats each of them has, and what is asked for of one."""
LONG_SYSTEMS = range(NUM_SYSTEMS, NUM_SYSTEMS + RETURNERS)


@cache
def tokens_of(system: int, chat: int) -> bytes:
    """Give all tokens that a chat may ever have; a request uses a beginning of them."""
    own = CHAT_TOKENS if system < NUM_SYSTEMS else LONG_TOKENS - SYSTEM_TOKENS
    return prompt((1000 + system, SYSTEM_TOKENS), (5000 + 100 * system + chat, own))


def common(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Count the tokens that two chats share."""
    a, b = tokens_of(*one), tokens_of(*other)
    count = 0
    while count < len(a) and a[count : count + 4] == b[count : count + 4]:
        count += 4
    return count // 4


def space(tenant: str, model: str) -> str:
    """Name what a tenant's prompts share, in histories and patterns: bytes differ by tenant."""
    return f"{tenant}/{model}"


def identities(path: Path) -> Path:
    """Write who may use the service in a storm: each by a token."""
    tables = []
    for name, token in TOKENS.items():
        means = "admin = true" if name == BOSS else f'tenant = "{name}"'
        digest = sha256(token.encode()).hexdigest()
        tables.append(f'[[identity]]\nname = "{name}"\n{means}\ntoken_sha256 = "{digest}"\n')
    path.write_text("\n".join(tables))
    path.chmod(0o600)
    return path
