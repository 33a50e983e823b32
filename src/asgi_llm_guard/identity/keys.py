"""API keys: a table of keyed hashes, from code or from a TOML file.

The table holds no key that could be used: whoever reads it, and does not have the secret, can
neither use nor guess one. A key is long and random, so one quick keyed hash is enough; the slow
hashes that passwords need would let anybody keep the service busy with wrong keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import (
    Identity,
    IdentityError,
    Scope,
    check_params,
    clean,
    header_name,
    scan,
    sent,
    spellings,
)

__all__ = ["ApiKey", "ApiKeys", "bearer", "read_toml"]

Secret = str | bytes
Secrets = Secret | Sequence[Secret]

_SCHEME: Final = "blake2b"
_DIGEST: Final = re.compile(r"blake2b:[0-9a-f]{64}", re.ASCII)
_PERSON: Final = b"llm-guard-apikey"  # the same key and secret hash differently anywhere else
_SHORTEST_SECRET: Final = 16
_LONGEST_KEY: Final = 512
_PREFIX: Final = 8
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)
_FIELDS: Final = ("id", "digest", "caller", "user", "departments", "agent", "tags", "params", "expires_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key: what it is known by, its keyed hash, and what it says about whoever shows it.

    Several keys may name one caller, so that a new one works before the old one ends.

    Raises:
        ConfigurationError: a field is malformed; the message names it, and the key by its `id`.
    """

    id: str
    """Names the key for people: in messages, and to tell which one to take away."""
    digest: str = field(repr=False)
    """From `ApiKeys.hash` or `ApiKeys.generate`."""
    caller: str
    user: str | None = None
    departments: tuple[str, ...] = ()
    agent: str | None = None
    tags: tuple[str, ...] = ()
    params: Mapping[str, object] = field(default_factory=dict)
    """Limits that belong to the key: `max_iterations`, and names starting with `x_` for policies of your own."""
    expires_at: datetime | None = None
    """With a time zone. From this instant on the key is not known any more; `None`: it does not end."""

    def __post_init__(self) -> None:
        _check_text("key", "id", self.id)
        where = f"key {self.id!r}"
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise ConfigurationError(
                f"{where}: digest must be the text that ApiKeys.hash gives ('blake2b:' and 64 hexadecimal digits), "
                "never the key itself"
            )
        _check_text(where, "caller", self.caller)
        for name in ("user", "agent"):
            if getattr(self, name) is not None:
                _check_text(where, name, getattr(self, name))
        for name in ("departments", "tags"):
            object.__setattr__(self, name, _check_texts(where, name, getattr(self, name)))
        object.__setattr__(self, "params", MappingProxyType(check_params(self.params, prefix=f"{where}: params.")))
        ends = self.expires_at
        if ends is not None and (not isinstance(ends, datetime) or ends.utcoffset() is None):
            raise ConfigurationError(
                f"{where}: expires_at must be a date and time with a time zone (2027-01-31T00:00:00Z), got {ends!s}"
            )

    def to_toml(self) -> str:
        """The key as an entry of a keys file, ready to be appended."""
        lines = ["[[keys]]"]
        for name in _FIELDS:
            value = getattr(self, name)
            if name == "params":
                lines += [f"params.{_quote(key)} = {_toml(item)}" for key, item in value.items()]
            elif isinstance(value, datetime):
                lines.append(f"{name} = {value.astimezone(UTC).isoformat()}")
            elif value:
                lines.append(f"{name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


class ApiKeys:
    """Resolves API keys to callers.

    `secret` turns keys into digests; it belongs in the environment or a secret file, not beside
    the table. With several secrets, digests made with any of them are found, so that one can be
    replaced while keys that were hashed with it are still in use.

    A key is read from the first of `headers` that is sent; `Authorization` may say `Bearer`. A
    request that carries no key is anonymous. One whose key is unknown or has expired is refused
    (403, and not told which of the two) with `unknown="refuse"`, or anonymous with
    `unknown="anonymous"`, for services that share the header with another authentication.

    Raises:
        ConfigurationError: a short secret, two keys with one id or one digest, not a header's name.
    """

    __slots__ = ("_by_prefix", "_clock", "_headers", "_peppers", "_table", "_unknown")

    def __init__(
        self,
        keys: Sequence[ApiKey],
        *,
        secret: Secrets,
        headers: Sequence[str] = ("authorization", "x-api-key", "api-key"),
        unknown: Literal["refuse", "anonymous"] = "refuse",
        clock: Clock | None = None,
    ) -> None:
        if unknown not in {"refuse", "anonymous"}:
            raise ConfigurationError(f"ApiKeys: unknown must be 'refuse' or 'anonymous', got {unknown!r}")
        if isinstance(headers, str) or not headers:
            raise ConfigurationError(f"ApiKeys: headers must be a list such as ['authorization'], got {headers!r}")
        self._unknown = unknown
        self._clock = clock if clock is not None else SystemClock()
        self._peppers = _peppers(secret)
        names = [header_name(name) for name in headers]
        self._headers = tuple(name.encode() for name in names)
        self._table = spellings(names)
        self._by_prefix: dict[bytes, list[tuple[bytes, int | None, Identity]]] = {}
        ids: set[str] = set()
        digests: dict[str, str] = {}
        for key in keys:
            if not isinstance(key, ApiKey):
                raise ConfigurationError(f"ApiKeys: expected ApiKey records, got a {type(key).__name__}")
            if key.id in ids:
                raise ConfigurationError(f"key {key.id!r}: there are two keys with this id; give each its own")
            if key.digest in digests:
                raise ConfigurationError(f"key {key.id!r}: has the same digest as key {digests[key.digest]!r}")
            ids.add(key.id)
            digests[key.digest] = key.id
            digest = bytes.fromhex(key.digest.removeprefix(f"{_SCHEME}:"))
            ends_ms = None if key.expires_at is None else (key.expires_at - _EPOCH) // _MS
            self._by_prefix.setdefault(digest[:_PREFIX], []).append((digest, ends_ms, _identity(key)))

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        secret: Secrets | None = None,
        headers: Sequence[str] = ("authorization", "x-api-key", "api-key"),
        unknown: Literal["refuse", "anonymous"] = "refuse",
        clock: Clock | None = None,
    ) -> Self:
        """Read a TOML file with a `[[keys]]` table for each key; see `ApiKey` for its fields.

        Without `secret`, the file names one: `secret_file = "keys.secret"`, relative to itself.

        Raises:
            ConfigurationError: the file cannot be read or is wrong; names the file, the key and the field.
        """
        file = Path(path)
        table = read_toml(file)
        for name in table:
            if name not in {"keys", "secret_file"}:
                raise ConfigurationError(f"{file}: {name}: unknown; expected secret_file and [[keys]] tables")
        if secret is None:
            secret = _secret_of(file, table.get("secret_file"))
        entries = table.get("keys", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigurationError(f"{file}: keys: expected [[keys]] tables")
        try:
            keys = [_record(index, entry) for index, entry in enumerate(entries)]
            return cls(keys, secret=secret, headers=headers, unknown=unknown, clock=clock)
        except ConfigurationError as error:
            raise ConfigurationError(f"{file}: {error}") from None

    @staticmethod
    def hash(key: str, secret: Secret) -> str:
        """The digest of `key`, for its record: a BLAKE2b of 256 bits, keyed with `secret`.

        Raises:
            ConfigurationError: the key is shorter than 16 characters or longer than 512 bytes, or the
                secret is too short.
        """
        if not isinstance(key, str) or len(key) < _SHORTEST_SECRET or len(key.encode()) > _LONGEST_KEY:
            raise ConfigurationError(f"key: expected a text of {_SHORTEST_SECRET} to {_LONGEST_KEY} characters")
        (pepper,) = _peppers(secret)
        return f"{_SCHEME}:{_hash(key.encode(), pepper).hex()}"

    @classmethod
    def generate(
        cls,
        caller: str,
        *,
        secret: Secret,
        user: str | None = None,
        departments: Sequence[str] = (),
        agent: str | None = None,
        tags: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, ApiKey]:
        """A new random key of 256 bits, and its record. The key is not kept: show it once, then forget it.

        Raises:
            ConfigurationError: as `ApiKey`.
        """
        name = f"k{secrets.token_hex(4)}"
        key = f"lg-{name}-{secrets.token_urlsafe(32)}"
        record = ApiKey(
            id=name,
            digest=cls.hash(key, secret),
            caller=caller,
            user=user,
            departments=tuple(departments),
            agent=agent,
            tags=tuple(tags),
            params=params or {},
            expires_at=expires_at,
        )
        return key, record

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The caller of the key that the request carries.

        Raises:
            IdentityError: two different keys, a header sent twice (400), or a key that does not hold (403).
        """
        found = scan(scope["headers"], self._table)
        if not found:
            return None
        shown: bytes | None = None
        for name in self._headers:
            value = sent(name, found, self._table)
            if value is None:
                continue
            key = bearer(value) if name == b"authorization" else value.strip(b" \t")
            if not key:
                continue
            if shown is not None and not hmac.compare_digest(shown, key):
                raise IdentityError("The request carries two different API keys; send one.")
            shown = key
        if shown is None:
            return None
        identity = self._find(shown)
        if identity is None and self._unknown == "refuse":
            raise IdentityError("The API key is not known, or not valid any more; ask for a new one.", status=403)
        return identity

    def _find(self, key: bytes) -> Identity | None:
        if len(key) > _LONGEST_KEY:
            return None
        for pepper in self._peppers:
            digest = _hash(key, pepper)
            for known, ends_ms, identity in self._by_prefix.get(digest[:_PREFIX], ()):
                if hmac.compare_digest(known, digest) and (ends_ms is None or self._clock.now_ms() < ends_ms):
                    return identity
        return None


def bearer(value: bytes) -> bytes | None:
    """The token of an `Authorization` header: after `Bearer`, or the whole value if it names no scheme."""
    scheme, space, token = value.strip(b" \t").partition(b" ")
    if not space:
        return None if scheme.lower() == b"bearer" else scheme
    return token.strip(b" \t") if scheme.lower() == b"bearer" else None


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigurationError: it cannot be read, or is not TOML; names the file, and line and column.
    """
    text = ""
    try:
        text = file.read_bytes().decode()
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file}: is not UTF-8 (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        last = text.splitlines() or [""]
        end = f"at line {len(last)}, column {len(last[-1]) + 1}, the end of the file"
        raise ConfigurationError(
            f"{file}: is not valid TOML: {str(error).replace('at end of document', end)}"
        ) from None
    except ValueError:  # Python reads no longer ones
        found = re.search("[0-9_]{4000,}", text)
        line = text.count("\n", 0, found.start() if found else 0) + 1
        raise ConfigurationError(f"{file}, line {line}: a number of too many digits") from None
    except RecursionError:
        raise ConfigurationError(f"{file}: is nested too deep") from None


def _hash(key: bytes, pepper: bytes) -> bytes:
    return hashlib.blake2b(key, key=pepper, digest_size=32, person=_PERSON).digest()


def _peppers(secret: Secrets) -> tuple[bytes, ...]:
    several = (secret,) if isinstance(secret, (str, bytes)) else tuple(secret)
    peppers = []
    for one in several:
        raw = one.encode() if isinstance(one, str) else one
        if not isinstance(raw, bytes) or len(raw) < _SHORTEST_SECRET:
            raise ConfigurationError(
                f"ApiKeys: secret must be a text of at least {_SHORTEST_SECRET} characters, better 32 random bytes "
                "(python -c 'import secrets; print(secrets.token_urlsafe(32))')"
            )
        peppers.append(hashlib.blake2b(raw, digest_size=64, person=_PERSON).digest())
    if not peppers:
        raise ConfigurationError("ApiKeys: expected at least one secret, got none")
    return tuple(peppers)


def _secret_of(file: Path, named: object) -> str:
    if not isinstance(named, str) or not named:
        raise ConfigurationError(
            f"{file}: secret_file: name the file with the secret of the keys, or pass secret= to ApiKeys.from_file"
        )
    path = file.parent / named
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigurationError(f"{file}: secret_file: {path} cannot be read: {reason}") from None


def _record(index: int, entry: Mapping[str, Any]) -> ApiKey:
    named = entry.get("id")
    where = f"key {named!r}" if isinstance(named, str) and named else f"keys[{index}]"
    for name in entry:
        if name in {"key", "secret", "token"}:  # its value is a secret: not to be shown
            raise ConfigurationError(f"{where}: {name}: a keys file holds digests, never keys; see ApiKeys.hash")
        if name not in _FIELDS:
            raise ConfigurationError(f"{where}: {name}: unknown; expected one of {', '.join(_FIELDS)}")
    for name in ("id", "digest", "caller"):
        if name not in entry:
            raise ConfigurationError(f"{where}: {name}: is missing")
    return ApiKey(**entry)


def _identity(key: ApiKey) -> Identity:
    return Identity(
        caller=key.caller,
        user=key.user,
        departments=key.departments,
        agent=key.agent,
        params=key.params,
        tags=key.tags,
    )


def _check_text(where: str, name: str, value: object) -> None:
    try:
        sound = isinstance(value, str) and clean(value, name) == value
    except IdentityError as error:
        raise ConfigurationError(f"{where}: {error.message}") from None
    if not sound:
        raise ConfigurationError(f"{where}: {name}: expected a non-empty text without spaces around it, got {value!r}")


def _check_texts(where: str, name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ConfigurationError(f"{where}: {name}: expected a list of texts, got {values!r}")
    for value in values:
        _check_text(where, name, value)
    return tuple(values)


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON leaves alone.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: object) -> str:
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    raise ConfigurationError(f"params: a {type(value).__name__} cannot be written to a keys file")
