"""Administration data from the command line: where it is, and who changes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from asgi_llm_guard.cli.common import Tool, actor_name
from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.control.changes import Actor
    from asgi_llm_guard.guard import Guard

__all__ = ["Administered", "actor", "administered", "follow"]

T = TypeVar("T")


class Administered:
    """Administration data, opened for one change and closed after it."""

    def __init__(self, tool: Tool, guard: Guard) -> None:
        self._tool = tool
        self._guard = guard

    def knows_policy(self, name: str) -> None:
        """Check that the settings have a policy of this name.

        Raises:
            ConfigurationError: they have none; names those that there are.
        """
        from asgi_llm_guard.settings import build_middleware_arguments

        routes = build_middleware_arguments(self._tool.settings())["routes"] or ()
        known = [
            policy.name for policy in (*self._guard.policies, *(extra for route in routes for extra in route.extra))
        ]
        if name not in known:
            raise ConfigurationError(f"{self._tool.path}: there is no policy {name!r}; known are {', '.join(known)}")

    def can_raise(self, value: Mapping[str, Any]) -> None:
        """Check a raise as the service would: what it cannot raise would have no effect.

        Raises:
            ConfigurationError: a field is malformed, or the policy has no such limit.
        """
        from asgi_llm_guard.overlay import Raise
        from asgi_llm_guard.settings import build_middleware_arguments

        routes = build_middleware_arguments(self._tool.settings())["routes"] or ()
        Raise(**value).check((*self._guard.policies, *(extra for route in routes for extra in route.extra)))

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
    settings = tool.settings()
    if settings.control is not None:
        return Administered(tool, tool.guard(settings, apart=True))
    if needed:
        raise Failure(
            f"{tool.path}: no administration data is configured; set `control` in the settings, or name it with "
            "--control sqlite:///control.db",
            Exit.CONFIGURATION,
        )
    return None


async def follow(guard: Guard) -> None:
    """Have the guard go by the administration data, as one that serves does.

    Raises:
        StorageError: they cannot be reached, so that nothing could be audited either.
    """
    if guard.control is not None and guard.follower is not None:
        await guard.control.version()
        await guard.follower.step()


def actor() -> Actor:
    """Whoever runs this command, for the audit."""
    from asgi_llm_guard.control.changes import Actor

    return Actor(name=actor_name(), role="admin", address="cli")
