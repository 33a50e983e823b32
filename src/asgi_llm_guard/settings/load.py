"""Everything that a guard and its middleware can be told, and where it is read from."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.keys import read_toml
from asgi_llm_guard.policies import QuotaBook
from asgi_llm_guard.routes import RouteTable
from asgi_llm_guard.settings.files import content_of
from asgi_llm_guard.settings.identity import IdentitySettings
from asgi_llm_guard.settings.operations import AdminSettings, AlertSettings, ControlSettings, LedgerSettings
from asgi_llm_guard.settings.parts import Agent, Number, Seconds, Sources, Statuses, problem
from asgi_llm_guard.settings.policies import DepartmentSettings, PolicySettings, RouteSettings, StreamSettings
from asgi_llm_guard.settings.problems import ENV_PREFIX, NESTED, check_names, problem_of
from asgi_llm_guard.settings.tables import CacheSettings, PriceSettings

__all__ = ["GuardSettings", "load_settings"]


class GuardSettings(BaseSettings):
    """Everything that a guard and its middleware can be told in a file. `None`: as the guard's own default.

    Built in code, what is passed wins over the environment; `load_settings` lets the environment win
    over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=NESTED,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        secrets_dir_missing="error",
        validate_default=False,
    )

    storage: SecretStr = SecretStr("memory://")
    """A URL; shown nowhere, because it may hold a password."""
    policies: list[PolicySettings] = []
    agents: dict[str, Agent] = {}
    departments: dict[str, DepartmentSettings] = {}
    identity: Annotated[IdentitySettings, Field(discriminator="kind")] | None = None
    session: Sources | None = None
    prices: PriceSettings | None = None
    streams: StreamSettings | None = None
    cache: CacheSettings | None = None
    ledger: LedgerSettings | None = None
    control: ControlSettings | None = None
    alerts: AlertSettings | None = None
    admin: AdminSettings | None = None
    gateway: dict[str, Any] | None = Field(default=None, repr=False)
    """Deployments and how they are chosen; see `build_gateway_arguments`. Shown nowhere, because it may hold keys."""
    routes: list[RouteSettings] | None = None
    exempt: list[str] = []
    unlisted: Literal["deny", "pass"] = "pass"
    rate_limit_headers: bool = True
    statuses: Statuses | None = None
    disclose: Literal["owned", "all"] | None = None
    hold_wait_s: Seconds | None = Field(default=None, ge=0, le=60)
    max_waiting: Number | None = Field(default=None, ge=0)
    max_overage: Number | None = Field(default=None, ge=1)
    session_limit: Number | None = Field(default=None, ge=0)
    anonymous_session_limit: Number | None = Field(default=None, ge=0)
    session_overflow: Literal["deny", "share"] | None = None
    on_data_loss: Literal["deny", "accept", "rebuild"] | None = None
    session_ttl: str | None = None
    assumed_input_tokens: Number | None = Field(default=None, ge=0)
    assumed_output_tokens: Number | None = Field(default=None, ge=0)
    learn_output: str | None = None
    max_body_bytes: Number | None = Field(default=None, ge=0)
    secrets_dir: Path | None = None
    """A folder of secret files: `llm_guard_identity__secret`, `llm_guard_storage`, …; relative to the file."""

    _file: Path | None = PrivateAttr(default=None)
    _content: str = PrivateAttr(default="")
    _book: QuotaBook | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self) -> GuardSettings:
        everywhere = [*self.policies, *(policy for route in self.routes or () for policy in route.extra)]
        if self.departments and not any(policy.kind == "quota" for policy in everywhere):
            raise problem('no policy reads them; add [[policies]] with kind = "quota"', "departments")
        RouteTable(None, exempt=self.exempt, unlisted=self.unlisted)
        return self

    @property
    def file(self) -> Path | None:
        """Where the settings were read from; `None`: they were built in code."""
        return self._file

    @property
    def path(self) -> Path:
        """The same, where they were."""
        assert self._file is not None  # noqa: S101 - asked of settings that were loaded
        return self._file

    @property
    def content(self) -> str:
        """Names the content of all files that they were read from, as it was before; see `files`."""
        return self._content

    @property
    def directory(self) -> Path:
        """What file names are relative to: where the settings file is, or the working directory."""
        return Path() if self._file is None else self._file.parent

    @property
    def book(self) -> QuotaBook:
        """The quotas of the departments: one book for the guard and all its routes, so that a change reaches all."""
        if self._book is None:
            self._book = QuotaBook({name: department.build() for name, department in self.departments.items()})
        return self._book

    @property
    def own_database(self) -> str | None:
        """The URL of the database that the storage brings along: the file of a SQLite storage, or this process's memory;
        `None`: it brings none."""
        scheme, _, rest = self.storage.get_secret_value().partition("://")
        return {"sqlite": f"sqlite://{rest.partition('?')[0]}", "memory": "sqlite://:memory:"}.get(scheme)

    @property
    def origin(self) -> str:
        """Where the settings come from, for messages."""
        return "settings" if self._file is None else str(self._file)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings passes every source by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is passed, then the environment, then secret files."""
        check_names(os.environ, GuardSettings)
        return init_settings, env_settings, NestedSecretsSettingsSource(file_secret_settings)


class _FileSettings(GuardSettings):
    """What is passed is a file's content: the environment and secret files win over it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file, environment, secrets = super().settings_customise_sources(
            settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
        )
        return environment, secrets, file


def load_settings(path: str | os.PathLike[str]) -> GuardSettings:
    """The settings in the TOML file `path`, with secret files and the environment over them.

    Raises:
        ConfigurationError: a line for each problem: the file or the environment variable, the key, the
            value (never a secret) and what is allowed; the line, and the column where the file is not TOML.
    """
    file = Path(path)
    # Twice, and named in between: whatever changes from then on has another name, and is read once more.
    content = content_of(_read(file))
    settings = _read(file)
    settings._content = content  # noqa: SLF001 - our own class
    return settings


def _read(file: Path) -> GuardSettings:
    content = read_toml(file)
    folder = os.environ.get(f"{ENV_PREFIX}SECRETS_DIR") or content.get("secrets_dir")
    secrets_dir = file.parent / folder if isinstance(folder, str) else None
    if secrets_dir is not None and not secrets_dir.is_dir():
        raise ConfigurationError(f"{file}: secrets_dir: expected a folder, got {str(secrets_dir)!r}")
    text = ""
    with suppress(OSError, UnicodeDecodeError):  # it changes while it is read: what is wrong has no line then
        text = file.read_text(encoding="utf-8")
    try:
        if secrets_dir is not None:
            check_names((path.name for path in secrets_dir.iterdir()), GuardSettings, what="secret file")
        settings = _FileSettings(_secrets_dir=secrets_dir, **content)  # type: ignore[call-arg]  # BaseSettings takes it
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = dict.fromkeys([problem_of(file, text, detail, GuardSettings) for detail in details])
        raise ConfigurationError("\n".join(problems)) from None
    except SettingsError as error:
        named = re.search(r'field "(\w+)"', str(error))
        variable = f"{ENV_PREFIX}{named[1].upper()}" if named else ENV_PREFIX
        raise ConfigurationError(f"environment variable or secret file {variable}: is not valid JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigurationError(f"{file}: secrets_dir: a file in {secrets_dir} cannot be read: {reason}") from None
    settings._file = file  # noqa: SLF001 - our own class
    return settings
