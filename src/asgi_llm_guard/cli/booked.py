"""The ledger from the command line: opened for one command, with a word on why there is none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from asgi_llm_guard.cli.common import Tool
from asgi_llm_guard.cli.failures import Exit, Failure

if TYPE_CHECKING:
    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.ledger import Ledger

__all__ = ["ledger_of", "with_ledger"]

T = TypeVar("T")


def ledger_of(tool: Tool, guard: Guard) -> Ledger:
    """The guard's ledger.

    Raises:
        Failure: there is none, or it is in the memory of another process.
    """
    if tool.in_memory:
        raise Failure(
            f"{tool.path}: storage: memory:// is the service's own: nothing of it can be seen from here; "
            "use sqlite:///guard.db or redis://, or name a ledger with --ledger URL",
            Exit.CONFIGURATION,
        )
    if guard.ledger is None:
        raise Failure(
            f"{tool.path}: no ledger is configured, and this storage has none of its own; set `ledger` in the "
            "settings, or name it with --ledger URL",
            Exit.CONFIGURATION,
        )
    return guard.ledger


async def with_ledger(tool: Tool, work: Callable[[Ledger], Awaitable[T]]) -> T:
    """Do something with the ledger that the settings or `--ledger` name."""
    guard = tool.guard(needs=("storage", "ledger"))
    try:
        return await work(ledger_of(tool, guard))
    finally:
        await guard.aclose()
