"""Keys that are administered: who shows one that is known, not revoked and not over, is its caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.control.values import Key
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import Identity, IdentityError, Resolver, Scope
from asgi_llm_guard.identity.keys import ApiKeys, Secrets

__all__ = ["ControlKeys"]

_HEADERS: Final = ("authorization", "x-api-key", "api-key")


class ControlKeys:
    """Resolves keys of the administration data to callers: `Guard(control=control, identity=control.keys())`.

    A key ends when it is revoked, as soon as this process follows the change, and at its `expires_at_ms` by the
    clock. What `ApiKeys` says of headers, secrets and comparison holds here, too.

    Args:
        secret: what digests of keys are made with; several while one is replaced.
        then: asked about requests whose key is not known here (`ApiKeys.from_file(...)`), and about those without one.
        unknown: what becomes of a key that nobody knows.

    Raises:
        ConfigurationError: as `ApiKeys`; or `then` is no resolver.
    """

    __slots__ = ("_ask", "_clock", "_headers", "_secret", "_then", "_unknown")

    def __init__(
        self,
        *,
        secret: Secrets,
        then: Resolver | None = None,
        headers: Sequence[str] = _HEADERS,
        unknown: Literal["refuse", "anonymous"] = "refuse",
        clock: Clock | None = None,
    ) -> None:
        if then is not None and not callable(then):
            raise ConfigurationError(f"keys: then: expected a resolver such as ApiKeys(...), got {then!r}")
        self._secret = secret
        self._then = then
        self._headers = headers
        self._unknown: Literal["refuse", "anonymous"] = unknown
        self._clock = clock
        self._table(())  # a wrong setting is told here
        self._ask: ApiKeys | None = None

    @property
    def loaded(self) -> bool:
        """Whether keys were ever loaded. Until then every request is refused: nobody knows who may call."""
        return self._ask is not None

    def table(self, keys: Iterable[Key]) -> ApiKeys:
        """What resolves these keys; for `use`.

        Raises:
            ConfigurationError: two keys have one digest.
        """
        return self._table([key for key in keys if key.revoked_ms is None])

    def use(self, table: ApiKeys) -> None:
        """Resolve by `table` from now on."""
        self._ask = table

    def ask_then(self, then: Resolver | None) -> None:
        """Have `then` be asked in place of the one before."""
        self._then = then

    def load(self, keys: Mapping[str, Key] | Iterable[Key]) -> None:
        """Resolve these keys from now on, and no others.

        Raises:
            ConfigurationError: as `table`; nothing was changed.
        """
        self.use(self.table(keys.values() if isinstance(keys, Mapping) else keys))

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The caller of the key that the request carries.

        Raises:
            IdentityError: as `ApiKeys`, or of `then`; nothing was loaded yet (503).
        """
        ask = self._ask
        if ask is None:
            raise IdentityError("The keys of this service are not loaded yet. Try again in a moment.", status=503)
        try:
            identity = ask(scope)
        except IdentityError as error:
            if error.status != 403 or self._then is None:
                if error.status == 403 and self._unknown == "anonymous":
                    return None
                raise
            found = self._then(scope)
            if found is None and self._unknown == "refuse":
                raise  # a key was shown, and nobody knows it
            return found
        if identity is None and self._then is not None:
            return self._then(scope)
        return identity

    def _table(self, keys: Sequence[Key]) -> ApiKeys:
        return ApiKeys([key.record() for key in keys], secret=self._secret, headers=self._headers, clock=self._clock)
