"""Which of the two libraries: by name where a client is made, by the class of what it is handed elsewhere."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final, Literal

from asgi_llm_guard.errors import ConfigurationError, NotInstalledError

__all__ = ["Library", "library_named", "library_of"]

Library = Literal["auto", "httpx", "httpx2"]

_LIBRARIES: Final = ("httpx2", "httpx")


def library_named(name: Library) -> ModuleType:
    """The library of this name; `auto`: httpx2 if it is installed, else httpx.

    Raises:
        ConfigurationError: it has another name.
        NotInstalledError: it is missing.
    """
    if name not in ("auto", *_LIBRARIES):
        raise ConfigurationError(f"library: expected 'auto', 'httpx' or 'httpx2', got {name!r}")
    for candidate in _LIBRARIES if name == "auto" else (name,):
        try:
            return importlib.import_module(candidate)
        except ImportError:
            continue
    raise NotInstalledError("a guarded client", "httpx")


def library_of(value: Any) -> ModuleType:
    """The library that a request or a body is of: by its class, or the one that its class comes from."""
    for kind in type(value).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _LIBRARIES:
            return sys.modules[root]
    raise TypeError(f"a guarded transport got a request of {type(value)!r}, which is of neither httpx nor httpx2")
