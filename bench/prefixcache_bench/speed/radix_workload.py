"""The workload of the tree's benchmark: chats under shared system prompts, and probes to look for.

64 system prompts of 1,000 to 4,000 tokens, used by Zipf's law; chats of up to six turns of 150 to
800 tokens on top; every turn of a chat is stored once.  Among them stand 16 chats of each probed
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VOCABULARY = 150_000
NUM_SYSTEM_PROMPTS = 64
TURNS_OF_A_PROBE = 8
FRESH_TOKENS = 37
"""Tokens of a new user message, after a stored chat."""
DECODED_TOKENS = 256
"""Tokens generated after it."""

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Probe:
    """One stored chat, and what a request makes of it; packed tokens."""

    stored: bytes
    hit: bytes
    """The chat and a new message."""
    miss: bytes
    """As many tokens that nobody has stored."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What to store, in order, and what to look for."""

    sequences: list[bytes]
    probes: dict[int, list[Probe]]
    """By length in tokens."""


def tokens(rng: np.random.Generator, count: int) -> Tokens:
    """Draw token ids."""
    return rng.integers(0, VOCABULARY, size=count, dtype=np.int32)


def build(background_tokens: int, lengths: tuple[int, ...], per_length: int) -> Workload:
    """Draw the workload; the same for the same arguments."""
    rng = np.random.default_rng(1)
    systems = [tokens(rng, int(rng.integers(1_000, 4_001))) for _ in range(NUM_SYSTEM_PROMPTS)]
    sequences: list[bytes] = []
    stored = 0
    while stored < background_tokens:
        chat = systems[min(int(rng.zipf(1.3)) - 1, NUM_SYSTEM_PROMPTS - 1)]
        stored -= len(chat)
        for _ in range(int(rng.integers(1, 7))):
            chat = np.concatenate([chat, tokens(rng, int(rng.integers(150, 800)))])
            sequences.append(chat.tobytes())
        stored += len(chat)
    probes: dict[int, list[Probe]] = {}
    for length in lengths:
        probes[length] = []
        for number in range(per_length):
            chat = systems[number % NUM_SYSTEM_PROMPTS][: length // 2]
            step = (length - len(chat)) // TURNS_OF_A_PROBE
            for turn in range(TURNS_OF_A_PROBE):
                count = step if turn < TURNS_OF_A_PROBE - 1 else length - len(chat)
                chat = np.concatenate([chat, tokens(rng, count)])
                sequences.append(chat.tobytes())
            packed = chat.tobytes()
            probes[length].append(
                Probe(
                    stored=packed,
                    hit=packed + tokens(rng, FRESH_TOKENS).tobytes(),
                    miss=tokens(rng, length).tobytes(),
                )
            )
    return Workload(sequences, probes)
