"""The scope that code runs in: the admission, or the call inside it, that encloses it.

One mutable object in a context variable, which threads, tasks and generators share.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextvars import Token

    from asgi_llm_guard.admission import Scope

__all__ = ["current_scope", "enter", "leave"]

_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("asgi_llm_guard_scope", default=None)


def current_scope() -> Scope | None:
    """The innermost scope that this code runs in."""
    return _scope.get()


def enter(scope: Scope) -> Token[Scope | None]:
    """Make `scope` the current one."""
    return _scope.set(scope)


def leave(token: Token[Scope | None]) -> None:
    """Make the scope before it the current one again."""
    # A block may be left by another task than entered it, as streams are that nobody reads to their end.
    # That task's context never had the scope, so there is nothing to restore.
    with contextlib.suppress(ValueError):
        _scope.reset(token)
