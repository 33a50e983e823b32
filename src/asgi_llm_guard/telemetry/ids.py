"""Ids that may leave the service: as keyed hashes, and only if somebody asks for them."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError

__all__ = ["IdHash"]

_LEAST: Final = 16
_MOST: Final = 64
_BYTES: Final = 12


class IdHash:
    """BLAKE2b with a secret: the same id has the same hash, and nobody without the secret can try names.

    Args:
        secret: 16 to 64 bytes, the guard's own. Another one makes other hashes.

    Raises:
        ConfigurationError: it is too short, or too long.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        if not isinstance(secret, str) or not _LEAST <= len(secret.encode()) <= _MOST:
            raise ConfigurationError(f"id_secret: expected a text of {_LEAST} to {_MOST} bytes")
        self._secret = secret.encode()

    def hash(self, kind: str, *parts: str) -> str:
        """The hash of an id of a kind: those of different kinds differ, whatever the ids are."""
        digest = blake2b(key=self._secret, digest_size=_BYTES, person=kind.encode()[:16])
        for part in parts:
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(raw) + raw)
        return digest.hexdigest()

    def of(self, context: Context) -> dict[str, str]:
        """The ids of a context, as attributes. Sessions are those of their caller."""
        found = {}
        for name, kind, value in (
            ("llm_guard.caller.hash", "caller", context.caller),
            ("user.hash", "user", context.user),
            ("llm_guard.agent.hash", "agent", context.agent),
        ):
            if value is not None:
                found[name] = self.hash(kind, value)
        if context.session is not None:
            found["llm_guard.session.hash"] = self.hash("session", context.caller or "", context.session)
        return found
