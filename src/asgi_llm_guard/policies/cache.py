"""Which answers may be kept, and who may see them: the scope of the response cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Final, Self

from asgi_llm_guard.claims import Meter, escape
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies._scoped import Memo, NamedPolicy, caller_subject
from asgi_llm_guard.policies.base import CacheDirective, Verdict
from asgi_llm_guard.policies.grammar import ttl_ms

__all__ = ["CacheScope"]

_log = logging.getLogger("asgi_llm_guard.policies")

_PUBLIC: Final = "public"


def _no_knowledge_base(_context: Context) -> None:
    return None


class CacheScope(NamedPolicy):
    """Answers may be kept, each for the verified caller and user that asked, and nobody else.

    A request that uses a knowledge base is cached only where the settings of that knowledge base
    say so (`{"cache": True, "acl": "<digest of its access list>", "version": "<of its documents>"}`),
    in a partition of that digest and version: a changed access list, or corpus, finds nothing of
    before. Settings that are missing, malformed or cannot be read mean: not cached. The version may
    be left out, where documents never change or are revoked.

    Args:
        enabled: `False` turns caching off whatever the rest says.
        public: requests without a verified caller share one partition; otherwise they are not
            cached. Never holds for knowledge bases.
        ttl: how long an answer may be kept, whole seconds or a duration.
        knowledge_base: gives the id of the knowledge base that a request uses, or `None`.
        settings: looked up for each request, so it may be a live view of settings that change.

    Raises:
        ConfigurationError: a setting is malformed.
    """

    __slots__ = ("_knowledge_base", "_memo", "_settings", "_ttl_s", "enabled", "public")

    def __init__(
        self,
        *,
        enabled: bool = True,
        public: bool = False,
        ttl: str | int | None = None,
        knowledge_base: Callable[[Context], str | None] | None = None,
        settings: Mapping[str, Mapping[str, object]] | None = None,
        name: str = "cache",
    ) -> None:
        super().__init__(name=name, counts="calls", status=None)
        for option, value in ("enabled", enabled), ("public", public):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name}.{option}: expected True or False, got {value!r}")
        if knowledge_base is not None and (not callable(knowledge_base) or inspect.iscoroutinefunction(knowledge_base)):
            raise ConfigurationError(
                f"{name}.knowledge_base: expected a function from the context to an id or None, not asynchronous, got "
                f"{knowledge_base!r}"
            )
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigurationError(
                f"{name}.settings: expected a mapping from a knowledge base to its settings, got {settings!r}"
            )
        if settings is not None and knowledge_base is None:
            raise ConfigurationError(
                f"{name}.settings: needs knowledge_base, which says which settings are a request's"
            )
        self.enabled = enabled
        self.public = public
        self._memo: Memo[Verdict] = Memo()
        self._ttl_s = None if ttl is None else -(-ttl_ms(ttl, name=f"{name}.ttl") // 1000)
        self._knowledge_base = _no_knowledge_base if knowledge_base is None else knowledge_base
        self._settings: Mapping[str, Mapping[str, object]] = {} if settings is None else settings

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """A directive for the cache; never a claim or a refusal."""
        if self._knowledge_base is not _no_knowledge_base:
            return Verdict(cache=self._directive(context))
        key = (context.caller, context.user)
        return self._memo.get(key) or self._memo.keep(key, Verdict(cache=self._directive(context)))

    def samples(self) -> tuple[Meter, ...]:
        """None: it never claims."""
        return ()

    def _copy(self, **changes: object) -> Self:
        return super()._copy(_memo=Memo(), **changes)

    def _directive(self, context: Context) -> CacheDirective:
        if not self._enforce:
            return CacheDirective(allowed=False, reason="the policy is in shadow")
        if not self.enabled:
            return CacheDirective(allowed=False, reason="caching is not enabled")
        try:
            knowledge_base = self._knowledge_base(context)
            if not isinstance(knowledge_base, str | None):
                raise TypeError(f"expected a text or None, got {knowledge_base!r}")  # noqa: TRY301 - logged as the others
            settings = None if knowledge_base is None else self._settings.get(knowledge_base)
        except Exception:  # noqa: BLE001 - logged
            # The user's function or a live view of settings: whatever it raises, "cannot be read" is the safe answer.
            _log.warning("%s: the knowledge base or its settings cannot be read; not cached", self.name, exc_info=True)
            return CacheDirective(allowed=False, reason="the settings of the knowledge base cannot be read")
        parts = self._partition(context)
        if knowledge_base is None:
            if not parts:
                return CacheDirective(allowed=False, reason="there is no verified caller or user")
            return self._allowed(context, parts)
        settings = settings if isinstance(settings, Mapping) else {}
        acl, version = settings.get("acl") if settings.get("cache") is True else None, settings.get("version", "")
        if not isinstance(acl, str) or not acl or type(version) not in (str, int):
            return CacheDirective(allowed=False, reason="the settings of the knowledge base do not allow it")
        if not parts or parts == (_PUBLIC,):
            return CacheDirective(allowed=False, reason="there is no verified caller or user")
        of_version = (str(version),) if "version" in settings else ()
        return self._allowed(context, (*parts, "kb", knowledge_base, acl, *of_version), ("kb", knowledge_base))

    def _allowed(self, context: Context, parts: tuple[str, ...], *names: tuple[str, str]) -> CacheDirective:
        if context.user is not None:
            names = (("user", context.user), *names)
        if context.caller is not None:
            names = (("caller", context.caller), *names)
        return CacheDirective(
            allowed=True, partition=_join(parts), ttl_s=self._ttl_s, names=tuple([_join(name) for name in names])
        )

    def _partition(self, context: Context) -> tuple[str, ...]:
        if context.caller is None and context.user is None:
            return (_PUBLIC,) if self.public else ()
        user = () if context.user is None else ("user", context.user)
        return (*caller_subject(context).parts, *user)


def _join(parts: tuple[str, ...]) -> str:
    return ":".join(map(escape, parts))
