"""Administration data from the command line: where it is, and who changes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from asgi_llm_guard.cli.common import Tool, actor_name
from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.control.changes import Actor
    from asgi_llm_guard.control.store import Control
    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.settings import GuardSettings

__all__ = ["Administered", "actor", "administered", "follow"]

T = TypeVar("T")


class Administered:
    """Administration data, opened for one change and closed after it."""

    def __init__(self, tool: Tool, settings: GuardSettings) -> None:
        self._tool = tool
        self._settings = settings

    def knows_policy(self, name: str) -> None:
        """Check that the settings have a policy of this name.

        Raises:
            ConfigurationError: they have none; names those that there are.
        """
        from asgi_llm_guard.settings.build import build_policies

        known = [policy.name for policy in build_policies(self._settings)]
        if name not in known:
            raise ConfigurationError(f"{self._tool.path}: there is no policy {name!r}; known are {', '.join(known)}")

    def can_raise(self, value: Mapping[str, Any]) -> None:
        """Check a raise as the service would: what it cannot raise would have no effect.

        Raises:
            ConfigurationError: a field is malformed, or the policy has no such limit.
        """
        from asgi_llm_guard.overlay import Raise
        from asgi_llm_guard.settings.build import build_policies

        Raise(**value).check(build_policies(self._settings))

    async def do(self, work: Callable[[Control], Awaitable[T]]) -> T:
        """Do something with the `Control`. A file that is made for it is told on stderr."""
        from asgi_llm_guard.settings.build import build_control

        self._tool.tell_made("control", self._settings)
        control = build_control(self._settings)
        try:
            return await work(control)
        finally:
            await control.aclose()


@overload
def administered(tool: Tool, *, needed: Literal[True] = True, makes: bool = False) -> Administered: ...


@overload
def administered(tool: Tool, *, needed: Literal[False], makes: bool = False) -> Administered | None: ...


def administered(tool: Tool, *, needed: bool = True, makes: bool = False) -> Administered | None:
    """The administration data that the settings or `--control` name; `None`: there is none.

    `makes`: the change may be the first one, before the service has started: a file that the settings name is made. One
    that the command line names has to be there.

    Raises:
        Failure: there is none, and it is `needed`.
        ConfigurationError: its file is not there, or another one.
    """
    settings = tool.settings()
    if settings.control is not None:
        tool.check("control", settings, new=makes and not tool.told("control"))
        return Administered(tool, settings)
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
