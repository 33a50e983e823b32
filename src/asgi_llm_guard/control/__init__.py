"""Administration data: what operators change while services run, versioned and audited in SQL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_llm_guard.control.changes import Actor, AuditEntry, AuditQuery, Change, Conflict, NotThere, Verified
    from asgi_llm_guard.control.keys import ControlKeys
    from asgi_llm_guard.control.state import ControlState, Entry, NewerRelease
    from asgi_llm_guard.control.store import Control
    from asgi_llm_guard.control.values import Agent, Department, Key, KnowledgeBase, Price
    from asgi_llm_guard.overlay import Raise
    from asgi_llm_guard.stops import Stop

__all__ = [
    "Actor",
    "Agent",
    "AuditEntry",
    "AuditQuery",
    "Change",
    "Conflict",
    "Control",
    "ControlKeys",
    "ControlState",
    "Department",
    "Entry",
    "Key",
    "KnowledgeBase",
    "NewerRelease",
    "NotThere",
    "Price",
    "Raise",
    "Stop",
    "Verified",
]

_HOMES = {
    "Actor": "control.changes",
    "Agent": "control.values",
    "AuditEntry": "control.changes",
    "AuditQuery": "control.changes",
    "Change": "control.changes",
    "Conflict": "control.changes",
    "Control": "control.store",
    "ControlKeys": "control.keys",
    "ControlState": "control.state",
    "Department": "control.values",
    "Entry": "control.state",
    "Key": "control.values",
    "KnowledgeBase": "control.values",
    "NewerRelease": "control.state",
    "NotThere": "control.changes",
    "Price": "control.values",
    "Raise": "overlay",
    "Stop": "stops",
    "Verified": "control.changes",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"asgi_llm_guard.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
