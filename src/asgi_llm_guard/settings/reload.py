"""A guard follows the files that its settings were read from.

Rule 1: whatever changed is read, checked and built as a whole before any of it holds. With a mistake in it, everything
stays as it was, and the mistake is told once, with its line. It is looked at again each second: what was missing may come.

Rule 2: what cannot change while the service runs (the storage, for example) is such a mistake: the file would else say
one thing and the service do another.

Rule 3: files are read once a second and compared by content. That works on every mount, also where a link is changed to
point to another folder, and costs a second at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from asgi_llm_guard.control.keys import ControlKeys
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import ConfigurationChanged, ConfigurationRejected, emit
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.settings.build import build_gateway_arguments, build_replacement, build_then
from asgi_llm_guard.settings.files import content_of
from asgi_llm_guard.settings.identity import ControlKeysSettings
from asgi_llm_guard.settings.load import GuardSettings, load_settings
from asgi_llm_guard.settings.names import unmatched

if TYPE_CHECKING:
    from asgi_llm_guard.gateway import Deployment, Gateway
    from asgi_llm_guard.guard import Guard

__all__ = ["CHORE", "Reload", "watch"]

_log = logging.getLogger("asgi_llm_guard")

CHORE: Final = "configuration"
"""The name of the chore that looks at the files."""
EVERY_S: Final = 1.0

_CHANGING: Final = frozenset({
    "policies", "agents", "departments", "identity", "session", "streams", "prices", "statuses", "routes", "gateway",
})  # fmt: skip


class Reload:
    """Follows the files of one guard. Made by `watch`.

    Args:
        settings: what the guard was made from.
        gateway: whose deployments follow the file, too; without it, a change of `[gateway]` needs a new start.
        check: raises `ConfigurationError` for what else must not be in them.
    """

    def __init__(
        self,
        guard: Guard,
        settings: GuardSettings,
        *,
        gateway: Gateway | None = None,
        check: Callable[[GuardSettings], object] | None = None,
    ) -> None:
        if settings.file is None:
            raise ConfigurationError("watch: these settings were read from no file; use load_settings(path)")
        self.version = settings.content
        """What names the content that holds: the same in every process that goes by the same files."""
        self.error: str | None = None
        """Why what is in the files now does not hold; `None`: it does."""
        self._guard = guard
        self._gateway = gateway
        self._check = check
        self._settings = settings
        self._seen = self.version

    async def check(self) -> bool:
        """Look at the files now; whether something else holds since. One turn of the chore."""
        content = await asyncio.to_thread(content_of, self._settings)
        if content == self._seen and self.error is None:
            return False
        self._seen = content
        try:
            settings, replacement, then = await asyncio.to_thread(self._read)
            added, removed = self._deployments(settings)
            self._guard.replace(**replacement)
        except ConfigurationError as error:
            if self.error == str(error):
                return False
            self.error = str(error)
            _log.error("the configuration was changed, and is not taken over; the last good one holds: %s", error)
            emit(self._guard.engine.observers, ConfigurationRejected(self.version, str(error)))
            return False
        if self._gateway is not None:
            for name in removed:
                self._gateway.remove(name)
            for deployment in added:
                self._gateway.add(deployment)
        resolver = self._guard.configuration.identity
        if isinstance(settings.identity, ControlKeysSettings) and isinstance(resolver, ControlKeys):
            resolver.ask_then(then)
        known = {each.name for each in unmatched(self._settings)}
        for rule in unmatched(settings):
            if rule.name not in known:
                _log.warning("%s: no policy is called %r any more: the alert rule has no effect", rule.where, rule.name)
        self._settings = settings
        self.version = self._seen = settings.content
        self.error = None
        _log.info("the configuration was changed, and holds from now on: version %s", self.version)
        emit(self._guard.engine.observers, ConfigurationChanged(self.version))
        return True

    def _read(self) -> tuple[GuardSettings, dict[str, Any], Resolver | None]:
        """The files as they are now, as what the guard is to go by; and who is asked after administered keys."""
        now = self._settings
        settings = load_settings(now.path)
        fixed = [name for name in GuardSettings.model_fields if _differs(name, now, settings)]
        if (now.routes is None) != (settings.routes is None):
            fixed.append("routes")
        if self._gateway is None and now.gateway != settings.gateway:
            fixed.append("gateway")
        kept = settings.identity is not None and settings.identity.kind == "control"
        if settings.identity != now.identity and (kept or _is_control(now)):
            fixed.append("identity")
        if fixed:
            raise ConfigurationError(
                f"{settings.origin}: {', '.join(fixed)}: cannot change while the service runs; start it again, or take "
                "the change back"
            )
        if self._check is not None:
            self._check(settings)
        return settings, build_replacement(settings, identity=not kept), build_then(settings)

    def _deployments(self, settings: GuardSettings) -> tuple[list[Deployment], list[str]]:
        """Which deployments come, and which go; a changed one does both."""
        if self._gateway is None or settings.gateway == self._settings.gateway:
            return [], []
        wanted, before = build_gateway_arguments(settings), build_gateway_arguments(self._settings)
        entries = wanted.pop("deployments")
        del before["deployments"]
        other = sorted(name for name in wanted.keys() | before.keys() if wanted.get(name) != before.get(name))
        if other:
            raise ConfigurationError(
                f"{settings.origin}: gateway.{other[0]}: cannot change while the service runs; start it again, or take "
                "the change back"
            )
        try:
            new: Mapping[str, Deployment] = {each.name: each for each in self._gateway.parse(entries)}
        except ConfigurationError as error:
            raise ConfigurationError(f"{settings.origin}: gateway: {error}") from None
        old = {each.name: each for each in self._gateway.deployments}
        changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
        return (
            [new[name] for name in new if name not in old or name in changed],
            [name for name in old if name not in new or name in changed],
        )


def watch(
    guard: Guard,
    settings: GuardSettings,
    *,
    gateway: Gateway | None = None,
    check: Callable[[GuardSettings], object] | None = None,
) -> Reload:
    """Have `guard` follow the files that `settings` were read from, as long as it is open (`docs/settings.md`).

    Raises:
        ConfigurationError: the settings were read from no file.
    """
    reload = Reload(guard, settings, gateway=gateway, check=check)
    guard.chores.add(CHORE, EVERY_S, reload.check)
    return reload


def _differs(name: str, one: GuardSettings, other: GuardSettings) -> bool:
    return name not in _CHANGING and getattr(one, name) != getattr(other, name)


def _is_control(settings: GuardSettings) -> bool:
    return settings.identity is not None and settings.identity.kind == "control"
