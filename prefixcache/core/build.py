"""Whether the core runs as plain Python, or compiled from the same sources (`make compiled`)."""

from __future__ import annotations

from prefixcache.core import radix_tree

IS_COMPILED = not radix_tree.__file__.endswith(".py")
KIND = "compiled" if IS_COMPILED else "pure Python"
"""As people are told."""
