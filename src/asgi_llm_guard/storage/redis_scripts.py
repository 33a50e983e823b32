"""The scripts that the server runs, each made of files in `lua/`."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

from asgi_llm_guard.storage.redis_link import Script

__all__ = [
    "ALL",
    "AMEND",
    "ENTRIES",
    "EPOCH",
    "HOLD",
    "METERS",
    "OWNERS",
    "RESERVE",
    "SETTLE",
    "SHARED",
    "STREAM",
    "script",
]

_COMMON: Final = ("state", "windows")
RESERVE: Final = (*_COMMON, "take", "reserve")
SETTLE: Final = (*_COMMON, "release", "settle")
AMEND: Final = (*_COMMON, "take", "release", "amend")
OWNERS: Final = (*_COMMON, "release", "sweep", "owners")
METERS: Final = (*_COMMON, "meters")
EPOCH: Final = ("state", "epoch")
HOLD: Final = ("state", "hold")
ENTRIES: Final = ("entries",)
SHARED: Final = ("shared",)
STREAM: Final = ("state", "stream")
ALL: Final = (RESERVE, SETTLE, AMEND, OWNERS, METERS, EPOCH, HOLD, ENTRIES, SHARED, STREAM)


@cache
def script(parts: tuple[str, ...]) -> Script:
    """The script that is made of these files."""
    folder = resources.files("asgi_llm_guard.storage") / "lua"
    return Script("\n".join((folder / f"{part}.lua").read_text("utf-8") for part in parts))
