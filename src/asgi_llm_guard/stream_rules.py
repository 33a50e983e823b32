"""How long a streamed answer may last, and what becomes of one that is longer than what is held for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["StreamRules"]

_LONGEST_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRules:
    """What holds for streamed answers.

    Raises:
        ConfigurationError: a value is malformed, or `drain="read"` without `total_s`.
    """

    cut: bool = False
    """End a stream, with the last event that its dialect has for errors, when it has used up what is held for it and
    no more can be held. `False`: it goes on, and what it uses is debited past the limit."""
    idle_s: float | None = None
    """End a stream from which nothing has come for so many seconds."""
    total_s: float | None = None
    """End a stream that has lasted so many seconds since its first byte was due."""
    drain: Literal["close", "read"] = "close"
    """When the client leaves, or the stream was cut: `close` it, and charge what was counted; or `read` it to its end
    in the background, to charge what it reports. Within `total_s`, which `read` must have."""

    @property
    def timed(self) -> bool:
        """Whether there is a deadline."""
        return self.idle_s is not None or self.total_s is not None

    @property
    def watches(self) -> bool:
        """Whether there is more to do than to meter a stream and to hold for it."""
        return self.cut or self.timed

    def __post_init__(self) -> None:
        for name in ("idle_s", "total_s"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 < value <= _LONGEST_S:
                raise ConfigurationError(f"StreamRules.{name}: expected seconds above 0, at most a day, got {value!r}")
        if not isinstance(self.cut, bool):
            raise ConfigurationError(f"StreamRules.cut: expected True or False, got {self.cut!r}")
        if self.drain not in ("close", "read"):
            raise ConfigurationError(f"StreamRules.drain: expected 'close' or 'read', got {self.drain!r}")
        if self.drain == "read" and self.total_s is None:
            raise ConfigurationError(
                "StreamRules: drain='read' reads streams that nobody waits for; give it an end with total_s"
            )
