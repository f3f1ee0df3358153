"""What a user says to prefixcache inside of vLLM's own settings.

vLLM has a place for plugins' settings: `--additional-config '{"prefixcache": {"connect": …}}'`; a
connector has one of its own, `kv_connector_extra_config`, which counts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from prefixcache.errors import InvalidRequest

SECTION = "prefixcache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of one engine."""

    connect: str | None = None
    """The service's address; by default this machine's.  The environment says who the engine is."""
    weights: str = ""
    """Names the weights where the model's name does not: another name shares nothing with it."""
    reserve: int = 64
    """Tokens of room beyond the prompt that a request asks for at first."""
    ahead: int = 32
    """With less room than this left, more is asked for, before it is needed."""
    window: int = 8
    """Waiting requests that hold a lease, or wait for one, at a time."""
    wait_s: float = 60.0
    """Seconds that a request waits for blocks, or for another's computation of its prefix."""
    spare_blocks: int = 0
    """Blocks kept for requests that come when the service is gone.  In place only."""

    def __post_init__(self) -> None:
        for name, least in (("reserve", 1), ("ahead", 1), ("window", 1), ("spare_blocks", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise InvalidRequest(
                    f"{SECTION}.{name} is {number!r}: a whole number of at least {least} is "
                    "expected"
                )
        wait = self.wait_s
        if not isinstance(wait, int | float) or isinstance(wait, bool) or not 0 <= wait < 1e9:
            raise InvalidRequest(f"{SECTION}.wait_s is {wait!r}: seconds are expected")
        for name in ("connect", "weights"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "weights"):
                raise InvalidRequest(f"{SECTION}.{name} is {text!r}: a text is expected")

    @classmethod
    def read(cls, *sections: Mapping[str, Any] | None) -> Self:
        """Give what the sections say; the first that says something counts.

        Raises:
            InvalidRequest: A name that is no option's, or a value of another kind.
        """
        known = {option.name for option in fields(cls)}
        said: dict[str, Any] = {}
        for section in reversed(sections):
            if section is None:
                continue
            if not isinstance(section, Mapping):
                raise InvalidRequest(f"{SECTION} is {section!r}: settings by name are expected")
            strange = sorted(map(str, section.keys() - known))
            if strange:
                raise InvalidRequest(
                    f"{SECTION} has no setting {', '.join(strange)}; it has "
                    f"{', '.join(sorted(known))}"
                )
            said |= section
        return cls(**said)

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """Read them from vLLM's configuration.

        Raises:
            InvalidRequest: As `read`.
        """
        extra = vllm_config.additional_config
        transfer = vllm_config.kv_transfer_config
        return cls.read(
            None if transfer is None else transfer.kv_connector_extra_config,
            extra.get(SECTION) if isinstance(extra, Mapping) else None,
        )
