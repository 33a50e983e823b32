"""The ledger, administration data, the administration page and alerts, as tables."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from asgi_llm_guard.admin.options import AdminCredential, AdminOptions, Role
from asgi_llm_guard.alerts import Alerts, BurnRate, Threshold, Webhook
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.control.store import Control
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Ledger, Retention
from asgi_llm_guard.settings.parts import Arguments, Table, check_keys, construct, no_boolean, problem

__all__ = ["AdminSettings", "AlertSettings", "ControlSettings", "LedgerSettings"]

_Percent = Annotated[float, BeforeValidator(no_boolean)]


class LedgerSettings(Arguments):
    """`[ledger]`: its database, and the arguments of `Retention`."""

    url: SecretStr | None = None
    """`None`: in the file of a SQLite storage, in memory beside one in memory. Shown nowhere: it may hold a password."""

    @model_validator(mode="after")
    def _check(self) -> LedgerSettings:
        self.retention()
        return self

    def retention(self) -> Retention:
        """How long what is kept. `false` stands for ever, for which TOML has no word."""
        given = {name: None if value is False else value for name, value in self.arguments().items()}
        return cast("Retention", construct(Retention, given, also=("url",)))

    def build(self, clock: Clock) -> Ledger | Retention:
        """The ledger; for the storage's own, how long it keeps what."""
        if self.url is None:
            return self.retention()
        return Ledger.open(self.url.get_secret_value(), clock=clock, retention=self.retention())


class ControlSettings(Table):
    """`[control]`: the arguments of `Control`."""

    url: SecretStr | None = None
    """Its database; `None`: the file of a SQLite storage, memory beside one in memory. Shown nowhere, because it may hold a password."""
    secret: SecretStr | None = None
    """Makes the digests of keys, and the seals of the audit."""
    old_secret: SecretStr | None = None
    """The one before, while it is replaced."""

    @model_validator(mode="after")
    def _check(self) -> ControlSettings:
        _check_secrets(self.secret, self.old_secret)
        return self

    def build(self, own: str | None, clock: Clock) -> Control:
        """The administration data; `own`: the database that the storage brings along.

        Raises:
            ConfigurationError: it brings none, and no other one is named.
        """
        url = own if self.url is None else self.url.get_secret_value()
        if url is None:
            raise ConfigurationError(
                "url: is missing; this storage brings no database along; name one: postgresql://…, or sqlite:///file.db"
            )
        secrets = [each.get_secret_value() for each in (self.secret, self.old_secret) if each is not None]
        return Control(url, secret=secrets or None, clock=clock)


class _CredentialSettings(Table):
    """One `[[admin.credentials]]` table: the arguments of `AdminCredential`."""

    name: str
    role: Role
    digest: str
    expires_at: datetime | None = None

    @model_validator(mode="after")
    def _check(self) -> _CredentialSettings:
        self.build()
        return self

    def build(self) -> AdminCredential:
        return AdminCredential(name=self.name, role=self.role, digest=self.digest, expires_at=self.expires_at)


_ADMIN_KEYS: Final = ("credentials", "secret", "old_secret", "path")


def _check_secrets(secret: SecretStr | None, old_secret: SecretStr | None) -> None:
    if old_secret is not None and secret is None:
        raise problem(
            "goes with secret, which is missing; what is new would else be made with the old one", "old_secret"
        )


class AdminSettings(Arguments):
    """`[admin]`: the arguments of `AdminOptions`. For `serve`, and for `build_admin_options`."""

    credentials: list[_CredentialSettings] = Field(default_factory=list)
    secret: SecretStr | None = None
    """Tokens are hashed and sessions are signed with it; better in the environment or a secret file."""
    old_secret: SecretStr | None = None
    """The one before, while it is replaced."""
    path: str = "/admin"
    """Where `serve` mounts it."""

    @model_validator(mode="after")
    def _check(self) -> AdminSettings:
        if not self.path.startswith("/") or self.path.endswith("/"):
            raise ValueError("path: expected a path such as '/admin'")
        check_keys(AdminOptions, self.arguments(), also=_ADMIN_KEYS)
        _check_secrets(self.secret, self.old_secret)
        if self.credentials and self.secret is not None:
            self.build()
        return self

    def build(self) -> AdminOptions:
        """The options."""
        secrets = [each.get_secret_value() for each in (self.secret, self.old_secret) if each is not None]
        return cast(
            "AdminOptions",
            construct(
                AdminOptions,
                self.arguments(),
                also=_ADMIN_KEYS,
                credentials=[credential.build() for credential in self.credentials],
                secret=secrets,
            ),
        )


class _ThresholdSettings(Table):
    """One `[[alerts.thresholds]]` table: the arguments of `Threshold`."""

    policy: str = "*"
    at: list[_Percent] | None = None
    scope: str = "*"
    of: Literal["used", "held"] = "used"
    shadow: bool = False

    @model_validator(mode="after")
    def _check(self) -> _ThresholdSettings:
        self.build()
        return self

    def build(self) -> Threshold:
        given: dict[str, Any] = self.model_dump(exclude={"at"})
        return Threshold(**given) if self.at is None else Threshold(**given, at=tuple(self.at))


class _BurnRateSettings(Table):
    """One `[[alerts.burn_rates]]` table: the arguments of `BurnRate`."""

    policy: str = "*"
    window: str = "1h"
    times: _Percent = 10
    scope: str = "*"
    shadow: bool = False

    @model_validator(mode="after")
    def _check(self) -> _BurnRateSettings:
        self.build()
        return self

    def build(self) -> BurnRate:
        return BurnRate(**self.model_dump())


class _WebhookSettings(Table):
    """One `[[alerts.webhooks]]` table: the arguments of `Webhook`."""

    url: SecretStr
    """Shown nowhere: its path may be a secret."""
    secret: str | list[str]
    """`env:NAME` or `file:PATH`, or two of them while one takes the other's place."""
    allow: list[str] = Field(default_factory=list)
    name: str | None = None
    ca_file: Path | None = None
    timeout_s: _Percent | None = None
    first_retry_s: _Percent | None = None

    def build(self, directory: Path) -> Webhook:
        given = self.model_dump(exclude={"url", "ca_file"}, exclude_none=True)
        ca_file = None if self.ca_file is None else directory / self.ca_file
        return Webhook(self.url.get_secret_value(), ca_file=ca_file, **given)


class AlertSettings(Table):
    """`[alerts]`: the arguments of `Alerts`, a table for each rule and webhook."""

    thresholds: list[_ThresholdSettings] | None = None
    burn_rates: list[_BurnRateSettings] = Field(default_factory=list)
    webhooks: list[_WebhookSettings] = Field(default_factory=list)
    patience: str | None = None

    def build(self, directory: Path) -> Alerts:
        """The alerts, with the secrets of their webhooks looked for."""
        thresholds = None if self.thresholds is None else [each.build() for each in self.thresholds]
        if thresholds is None and not self.burn_rates:
            thresholds = [Threshold()]
        rules = (*(thresholds or ()), *(each.build() for each in self.burn_rates))
        options = {} if self.patience is None else {"patience": self.patience}
        return Alerts(rules, webhooks=[each.build(directory) for each in self.webhooks], **options)
