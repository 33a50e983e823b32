"""The parts of a guard that are in outer layers: taken here, when they are asked for, and not on import."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.base import Storage

if TYPE_CHECKING:
    from asgi_llm_guard.control.store import Control
    from asgi_llm_guard.guard import Guard

__all__ = ["bind_alerts", "local_storage", "open_control"]

_NEVER_MS: Final = 100 * 366 * 86_400_000


def open_control(control: Control | str | None, clock: Clock) -> Control | None:
    """The administration data that are meant, or whose database a URL names.

    Raises:
        ConfigurationError: neither is given.
    """
    if not isinstance(control, str):
        if control is not None and not callable(getattr(control, "prepare", None)):
            raise ConfigurationError(f"control: expected a Control or the URL of its database, got {control!r}")
        return control
    from asgi_llm_guard.control.store import Control

    return Control(control, clock=clock)


def bind_alerts(alerts: object, guard: Guard) -> None:
    """Have `alerts` watch a guard.

    Raises:
        ConfigurationError: they are none.
    """
    from asgi_llm_guard.alerts import Alerts

    if not isinstance(alerts, Alerts):
        raise ConfigurationError(f"alerts: expected Alerts(…), got {alerts!r}")
    alerts.bind(guard)


def local_storage(clock: Clock) -> Callable[[], Storage]:
    """Makes what a process counts in while its storage does not answer; no owner lapses in it."""
    from asgi_llm_guard.storage.memory import MemoryStorage

    return partial(MemoryStorage, clock=clock, lapse_ms=_NEVER_MS)
