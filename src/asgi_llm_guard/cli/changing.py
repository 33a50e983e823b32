"""Administration data from the command line: where it is, and who changes it."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from asgi_llm_guard.cli.common import Tool, actor_name
from asgi_llm_guard.cli.failures import Exit, Failure

if TYPE_CHECKING:
    from asgi_llm_guard.control.changes import Actor

__all__ = ["Administered", "actor", "administered"]

T = TypeVar("T")


class Administered:
    """Administration data, opened for one change and closed after it."""

    def __init__(self, guard: Any) -> None:
        self._guard = guard

    async def do(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Do something with the `Control`."""
        try:
            return await work(self._guard.control)
        finally:
            await self._guard.aclose()


@overload
def administered(tool: Tool, *, needed: Literal[True] = True) -> Administered: ...


@overload
def administered(tool: Tool, *, needed: Literal[False]) -> Administered | None: ...


def administered(tool: Tool, *, needed: bool = True) -> Administered | None:
    """The administration data that the settings or `--control` name; `None`: there is none.

    Raises:
        Failure: there is none, and it is `needed`.
    """
    if tool.names_control:
        return Administered(tool.guard())
    if needed:
        raise Failure(
            f"{tool.path}: no administration data is configured; set `control` in the settings, or name it with "
            "--control sqlite:///control.db",
            Exit.CONFIGURATION,
        )
    return None


def actor() -> Actor:
    """Whoever runs this command, for the audit."""
    from asgi_llm_guard.control.changes import Actor

    return Actor(name=actor_name(), role="admin", address=socket.gethostname())
