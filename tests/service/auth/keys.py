"""Tokens, identities and services for these tests."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

TOKENS = {name: f"secret-of-{name}" for name in ("acme", "bolt", "boss")}


def digest(name: str) -> str:
    return sha256(TOKENS[name].encode()).hexdigest()


def identities(folder: Path, more: str = "") -> Path:
    """Two tenants and an operator, each with a token."""
    path = folder / "identities.toml"
    path.write_text(
        "\n".join(
            f'[[identity]]\nname = "{name}-serving"\ntenant = "{name}"\n'
            f'models = ["tiny*"]\ntoken_sha256 = "{digest(name)}"\n'
            for name in ("acme", "bolt")
        )
        + f'[[identity]]\nname = "boss"\nadmin = true\ntoken_sha256 = ["{digest("boss")}"]\n'
        + more
    )
    path.chmod(0o600)
    return path
