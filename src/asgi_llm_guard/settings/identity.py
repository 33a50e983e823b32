"""Who is verified, as a table: one kind for each resolver."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

from pydantic import BaseModel, Field, SecretStr, model_validator

from asgi_llm_guard.control.store import Control
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import ApiKeys, JwtIdentity, PeerAddress, Resolver, ScopeUser, TrustedHeaders
from asgi_llm_guard.settings.parts import Number, Table

__all__ = ["IDENTITIES", "IdentitySettings"]


class ApiKeysSettings(Table):
    """`[identity]` with `kind = "api_keys"`: the arguments of `ApiKeys.from_file`."""

    kind: Literal["api_keys"]
    file: Path
    """The keys file, relative to the settings file."""
    secret: SecretStr | None = None
    """The secret of the digests; unless it is set, the keys file names a `secret_file`."""
    headers: list[str] | None = None
    unknown: Literal["refuse", "anonymous"] | None = None

    def build(self, directory: Path, control: Control | None) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver, with the keys file read."""
        secret = None if self.secret is None else self.secret.get_secret_value()
        return ApiKeys.from_file(directory / self.file, secret=secret, **given(self, "file", "secret"))


class JwtSettings(Table):
    """`[identity]` with `kind = "jwt"`: the arguments of `JwtIdentity`."""

    kind: Literal["jwt"]
    key: SecretStr | None = None
    """A PEM text, a JWK or JWK set as JSON, or a shared secret."""
    key_file: Path | None = None
    """A file with the key instead, relative to the settings file."""
    algorithms: list[str]
    issuer: str | Literal[False]
    """`false`: any will do."""
    audience: str | Literal[False]
    """`false`: any will do."""
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None
    header: str | None = None
    leeway_s: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> JwtSettings:
        if (self.key is None) == (self.key_file is None):
            raise ValueError("expected either key or key_file")
        return self

    def build(self, directory: Path, control: Control | None) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver, with the key file read."""
        text = self.key.get_secret_value() if self.key is not None else read_key(directory, self.key_file)
        others = given(self, "key", "key_file")
        return JwtIdentity(
            _jwt_key(text), **others | {"issuer": self.issuer or None, "audience": self.audience or None}
        )


class ScopeUserSettings(Table):
    """`[identity]` with `kind = "scope_user"`; the values name attributes of `scope["user"]`."""

    kind: Literal["scope_user"]
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None

    def build(self, directory: Path, control: Control | None) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return ScopeUser(**{option: _attribute(name) for option, name in given(self).items()})


class TrustedHeadersSettings(Table):
    """`[identity]` with `kind = "trusted_headers"`: the arguments of `TrustedHeaders`."""

    kind: Literal["trusted_headers"]
    proxies: list[str] = Field(default_factory=list)
    trust_headers: bool = False
    caller: str | None = None
    user: str | None = None
    departments: str | None = None
    agent: str | None = None
    tags: str | None = None
    max_length: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> TrustedHeadersSettings:
        self.build(Path(), None)
        return self

    def build(self, directory: Path, control: Control | None) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return TrustedHeaders(**given(self))


class PeerAddressSettings(Table):
    """`[identity]` with `kind = "peer_address"`: the arguments of `PeerAddress`."""

    kind: Literal["peer_address"]
    proxies: list[str] = Field(default_factory=list)
    ipv6_prefix: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> PeerAddressSettings:
        self.build(Path(), None)
        return self

    def build(self, directory: Path, control: Control | None) -> Resolver:  # noqa: ARG002 - one signature for all kinds
        """The resolver."""
        return PeerAddress(**given(self))


class ControlKeysSettings(Table):
    """`[identity]` with `kind = "control"`: the keys of `[control]`, which are made and revoked while the service runs."""

    kind: Literal["control"]
    file: Path | None = None
    """A keys file that is asked, too, relative to the settings file."""
    secret: SecretStr | None = None
    """The secret of that file's digests; unless it is set, the file names a `secret_file`."""
    headers: list[str] | None = None
    unknown: Literal["refuse", "anonymous"] | None = None

    def build(self, directory: Path, control: Control | None) -> Resolver:
        """The resolver, with the keys file read."""
        if control is None:
            raise ConfigurationError("there is no [control] whose keys it could know")
        return control.keys(then=self.build_then(directory), **given(self, "file", "secret"))

    def build_then(self, directory: Path) -> Resolver | None:
        """The resolver of the keys file, read now; `None`: there is none."""
        if self.file is None:
            return None
        secret = None if self.secret is None else self.secret.get_secret_value()
        return ApiKeys.from_file(directory / self.file, secret=secret, **given(self, "file", "secret"))


IdentitySettings = (
    ControlKeysSettings
    | ApiKeysSettings
    | JwtSettings
    | ScopeUserSettings
    | TrustedHeadersSettings
    | PeerAddressSettings
)
IDENTITIES: Final[Mapping[str, type[BaseModel]]] = {
    "api_keys": ApiKeysSettings,
    "jwt": JwtSettings,
    "scope_user": ScopeUserSettings,
    "trusted_headers": TrustedHeadersSettings,
    "peer_address": PeerAddressSettings,
    "control": ControlKeysSettings,
}


def given(table: Table, *but: str) -> dict[str, Any]:
    """The keys that were set, as arguments; the others keep the constructor's defaults."""
    return table.model_dump(exclude={"kind", *but}, exclude_none=True)


def _attribute(name: str) -> Callable[[Mapping[str, Any]], object]:
    def value(scope: Mapping[str, Any]) -> object:
        return getattr(scope["user"], name, None)

    return value


def read_key(directory: Path, file: Path | None) -> str:
    path = directory / (file or "")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigurationError(f"key_file: {path} cannot be read: {reason}") from None


def _jwt_key(text: str) -> str | Mapping[str, Any]:
    if not text.startswith("{"):
        return text
    try:
        return cast("dict[str, Any]", json.loads(text))
    except (ValueError, RecursionError) as error:
        position = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigurationError(f"key: begins like a JWK, but is not valid JSON{position}") from None
