"""The variables PREFIXCACHE_…: all that mean something, and what to say of any other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Final

_PREFIX: Final = "PREFIXCACHE_"

CLIENT: Final = (
    *("TARGET", "TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_NAME"),
    *("TOKENIZER", "TRACES", "TRACEBACK", "SOAK"),
    *("VLLM_PYTHON", "LMCACHE_PYTHON", "SGLANG_PYTHON", "GUIDELLM"),
)
"""Of the commands that ask a service, and of experiments."""

KERNELS: Final = ("CACHE", "CFLAGS", "CHECK", "NATIVE")
"""Of the kernels: the library in C, and what is looked at on a GPU."""

BUILD: Final = ("COMPILED",)
"""Of who makes a wheel with the compiled core."""

_ELSEWHERE: Final = frozenset([*CLIENT, *KERNELS, *BUILD])


def known() -> set[str]:
    """Give all names, without what they begin with."""
    from prefixcache.config import ServeSettings

    settings = (name.upper() for name in ServeSettings.model_fields)
    return {*settings, *_ELSEWHERE}


def unknown(environment: Iterable[str]) -> Iterator[str]:
    """Say of each variable that begins like ours that nothing reads it."""
    found = {
        name: name.upper().removeprefix(_PREFIX)
        for name in sorted(environment)
        if name.upper().startswith(_PREFIX)
    }
    if _ELSEWHERE.issuperset(found.values()):
        return  # the settings' libraries need not be loaded to say so
    names = known()
    for name, own in found.items():
        if own in names:
            continue
        near = difflib.get_close_matches(own, names, 1)
        hint = f"; did you mean {_PREFIX}{near[0]}?" if near else ""
        yield f"nothing reads the variable {name}{hint}"
