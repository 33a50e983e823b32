"""What an administration page is made with: who may log in, as what, and for how long."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, Self, get_args

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import Calendar, duration_ms

__all__ = ["ROLES", "AdminCredential", "AdminOptions", "Role", "peppers"]

Role = Literal["viewer", "operator", "admin"]
"""`viewer`: sees. `operator`: also stops, resets and raises. `admin`: also changes quotas, keys, prices and agents."""

ROLES: Final[dict[str, int]] = {role: rank for rank, role in enumerate(get_args(Role))}

_SCHEME: Final = "blake2b"
_DIGEST: Final = re.compile(r"blake2b:[0-9a-f]{64}", re.ASCII)
_PERSON: Final = b"llm-guard-admin"  # a caller's key and an administrator's token never hash alike
_SHORTEST_SECRET: Final = 16
_ORIGIN: Final = re.compile(r"https?://[^/\s]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminCredential:
    """One person or program that may use the administration page.

    Raises:
        ConfigurationError: a field is malformed; the message names it.
    """

    name: str
    """What the audit trail calls them."""
    role: Role
    digest: str = field(repr=False)
    """From `AdminCredential.hash` or `AdminCredential.generate`."""
    expires_at: datetime | None = None
    """With a time zone. `None`: it holds until it is taken away."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 256 or not self.name.isprintable():
            raise ConfigurationError(f"AdminCredential.name: expected a name of 1 to 256 characters, got {self.name!r}")
        if self.role not in ROLES:
            raise ConfigurationError(
                f"AdminCredential {self.name}: role must be viewer, operator or admin, got {self.role!r}"
            )
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise ConfigurationError(
                f"AdminCredential {self.name}: digest must be what AdminCredential.hash(token, secret) gives"
            )
        if self.expires_at is not None and (
            not isinstance(self.expires_at, datetime) or self.expires_at.tzinfo is None
        ):
            raise ConfigurationError(
                f"AdminCredential {self.name}: expires_at must be a datetime with a time zone, got {self.expires_at!r}"
            )

    @staticmethod
    def hash(token: str, secret: str | bytes) -> str:
        """The keyed hash of a token, for `digest`.

        Raises:
            ConfigurationError: the token is shorter than 32 characters, or the secret than 16 bytes.
        """
        if not isinstance(token, str) or not 32 <= len(token) <= 512:
            raise ConfigurationError(
                "AdminCredential.hash: a token must have 32 to 512 characters; let generate() make one"
            )
        return _digest(token, peppers(secret)[0])

    @classmethod
    def generate(
        cls, name: str, role: Role, *, secret: str | bytes, expires_at: datetime | None = None
    ) -> tuple[str, Self]:
        """A new random token of 256 bits, and its credential. The token is not kept: show it once.

        Raises:
            ConfigurationError: as `AdminCredential`.
        """
        token = f"lga-{secrets.token_urlsafe(32)}"
        return token, cls(name=name, role=role, digest=cls.hash(token, secret), expires_at=expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminOptions:
    """How `guard.admin_app` is made.

    Raises:
        ConfigurationError: a setting is malformed; the message names it.
    """

    credentials: Sequence[AdminCredential]
    """At least one. Keys of callers are none."""
    secret: str | bytes | Sequence[str | bytes] = field(repr=False)
    """At least 16 bytes that all processes share: tokens are hashed and sessions are signed with it. Of several, the
    first signs, and all are accepted."""
    title: str = "LLM guard"
    idle: str = "30m"
    """A session ends so long after its last request."""
    absolute: str = "12h"
    """A session ends so long after its login."""
    tz: str = "UTC"
    """The IANA time zone that pages begin with."""
    failed_logins: int = 10
    """From one address within five minutes; more are not looked at."""
    refusals_kept: int = 500
    """How many of this process's latest refusals are kept in memory with their explanation."""
    origins: Sequence[str] = ()
    """Other origins that forms may come from, where a proxy changes the Host header: `https://admin.example.com`."""

    def __post_init__(self) -> None:
        names = [credential.name for credential in self.credentials if isinstance(credential, AdminCredential)]
        if not names or len(names) != len(self.credentials):
            raise ConfigurationError(
                "AdminOptions.credentials: expected at least one AdminCredential; AdminCredential.generate makes one"
            )
        if len(set(names)) != len(names):
            raise ConfigurationError(f"AdminOptions.credentials: names must differ, got {', '.join(names)}")
        peppers(self.secret)
        if not isinstance(self.title, str) or not self.title.strip() or not self.title.isprintable():
            raise ConfigurationError(f"AdminOptions.title: expected a text, got {self.title!r}")
        if duration_ms(self.idle, name="AdminOptions.idle") > duration_ms(self.absolute, name="AdminOptions.absolute"):
            raise ConfigurationError(
                f"AdminOptions.idle: must not be longer than absolute, got {self.idle!r} and {self.absolute!r}"
            )
        Calendar("day", self.tz)
        for name, value in (("failed_logins", self.failed_logins), ("refusals_kept", self.refusals_kept)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000:
                raise ConfigurationError(f"AdminOptions.{name}: expected a whole number from 1 to 10000, got {value!r}")
        if isinstance(self.origins, str):
            raise ConfigurationError(f"AdminOptions.origins: expected a list of origins, got the text {self.origins!r}")
        for origin in self.origins:
            if not isinstance(origin, str) or not _ORIGIN.fullmatch(origin):
                raise ConfigurationError(
                    f"AdminOptions.origins: expected an origin such as https://admin.example.com, got {origin!r}"
                )

    def find(self, token: str, now_ms: int) -> AdminCredential | None:
        """Whose token it is; `None`: nobody's, or it has expired."""
        if not 32 <= len(token) <= 512:
            return None
        digests = [_digest(token, pepper) for pepper in peppers(self.secret)]
        found = None
        for credential in self.credentials:  # all of them: how long it takes tells nothing
            if any(hmac.compare_digest(credential.digest, digest) for digest in digests):
                found = credential
        return found if found is not None and _holds(found, now_ms) else None

    def named(self, name: str, fingerprint: str, now_ms: int) -> AdminCredential | None:
        """The credential that a session was begun with; `None`: it was changed since, or has expired."""
        for credential in self.credentials:
            if credential.name == name and hmac.compare_digest(credential.digest[-16:], fingerprint):
                return credential if _holds(credential, now_ms) else None
        return None


def peppers(secret: str | bytes | Sequence[str | bytes]) -> tuple[bytes, ...]:
    """The secrets as bytes.

    Raises:
        ConfigurationError: there is none, or one is shorter than 16 bytes.
    """
    several = (secret,) if isinstance(secret, (str, bytes)) else tuple(secret)
    raw = tuple(one.encode() if isinstance(one, str) else one for one in several)
    if not raw or not all(isinstance(one, bytes) and len(one) >= _SHORTEST_SECRET for one in raw):
        raise ConfigurationError(
            f"AdminOptions.secret: expected at least {_SHORTEST_SECRET} bytes; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return raw


def _digest(token: str, pepper: bytes) -> str:
    key = hashlib.blake2b(pepper, digest_size=32).digest()  # secrets may be longer than a key of blake2b
    return f"{_SCHEME}:{hashlib.blake2b(token.encode(errors='replace'), key=key, digest_size=32, person=_PERSON).hexdigest()}"


def _holds(credential: AdminCredential, now_ms: int) -> bool:
    return credential.expires_at is None or datetime.fromtimestamp(now_ms / 1000, UTC) < credential.expires_at
