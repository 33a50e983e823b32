"""Settings as arguments of the constructors that code would call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from pydantic_core import PydanticCustomError

from asgi_llm_guard.admin.options import AdminOptions
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.control.store import Control
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.identity.extract import DEFAULT_SESSION
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.settings.identity import ControlKeysSettings
from asgi_llm_guard.settings.lines import line_in
from asgi_llm_guard.settings.load import GuardSettings
from asgi_llm_guard.settings.parts import extractor_of
from asgi_llm_guard.stream_rules import StreamRules

__all__ = [
    "build_admin_options",
    "build_control",
    "build_gateway_arguments",
    "build_guard_arguments",
    "build_middleware_arguments",
    "build_policies",
    "build_replacement",
    "build_then",
    "place",
]


def build_guard_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `Guard`. Reads the files that the settings name (keys, prices).

    Raises:
        ConfigurationError: one of these files is wrong; names the settings file, the key and that file.
    """
    keys = settings.identity is not None and settings.identity.kind == "control"
    arguments = {"storage": settings.storage.get_secret_value(), **_changing(settings, identity=not keys)}
    if settings.alerts is not None:
        with _named(settings, "alerts"):
            arguments["alerts"] = settings.alerts.build(settings.directory)
    for name in _SAME_NAME:
        value = getattr(settings, name)
        if value is not None:
            arguments[name] = value
    # Last what makes files: a mistake elsewhere leaves none behind.
    if settings.cache is not None:
        with _named(settings, "cache"):
            arguments["cache"] = settings.cache.build()
    if settings.ledger is not None:
        with _named(settings, "ledger"):
            arguments["ledger"] = settings.ledger.build(SystemClock())
    if settings.control is not None:
        arguments["control"] = build_control(settings)
    if settings.identity is not None and keys:
        with _named(settings, "identity"):
            arguments["identity"] = settings.identity.build(settings.directory, arguments.get("control"))
    return arguments


def build_control(settings: GuardSettings) -> Control:
    """The administration data, without a guard. Makes the file where it is not there.

    Raises:
        ConfigurationError: there is no `[control]`, or something in it is wrong; names the settings file and the key.
    """
    if settings.control is None:
        raise ConfigurationError(f"{settings.origin}: control: is missing")
    with _named(settings, "control"):
        return settings.control.build(settings.own_database, SystemClock())


def build_policies(settings: GuardSettings) -> tuple[Policy, ...]:
    """Every policy that the settings describe, those of routes too."""
    everywhere = [*settings.policies, *(policy for route in settings.routes or () for policy in route.extra)]
    return tuple(policy.build(settings.book) for policy in everywhere)


def build_replacement(settings: GuardSettings, *, identity: bool = True) -> dict[str, Any]:
    """The keyword arguments of `Guard.replace`: what can change while the service runs, all of it.

    `identity`: whether who is verified is among it.

    Raises:
        ConfigurationError: as `build_guard_arguments`.
    """
    usual = {
        "identity": None,
        "session": DEFAULT_SESSION,
        "streams": StreamRules(),
        "prices": PriceBook.snapshot(),
        "statuses": {},
        "routes": build_middleware_arguments(settings)["routes"],
    }
    if not identity:
        del usual["identity"]
    return {**usual, **_changing(settings, identity=identity)}


def build_then(settings: GuardSettings) -> Resolver | None:
    """Who is asked about keys that are not administered: the keys file beside them, read now.

    Raises:
        ConfigurationError: the file is wrong; names the settings file, the key and that file.
    """
    if not isinstance(settings.identity, ControlKeysSettings):
        return None
    with _named(settings, "identity"):
        return settings.identity.build_then(settings.directory)


def _changing(settings: GuardSettings, *, identity: bool) -> dict[str, Any]:
    """What the settings say of what can change while the service runs."""
    arguments: dict[str, Any] = {
        "policies": [policy.build(settings.book) for policy in settings.policies],
        "agents": settings.agents,
    }
    if settings.identity is not None and identity:
        with _named(settings, "identity"):
            arguments["identity"] = settings.identity.build(settings.directory, None)
    if settings.session is not None:
        arguments["session"] = extractor_of(settings.session)
    if settings.streams is not None:
        arguments["streams"] = settings.streams.build()
    if settings.prices is not None:
        with _named(settings, "prices"):
            arguments["prices"] = settings.prices.build(settings.directory)
    if settings.statuses is not None:
        arguments["statuses"] = settings.statuses
    return arguments


_SAME_NAME: Final = (
    "disclose",
    "hold_wait_s",
    "max_waiting",
    "max_overage",
    "session_limit",
    "anonymous_session_limit",
    "session_overflow",
    "session_ttl",
    "on_data_loss",
    "assumed_input_tokens",
    "assumed_output_tokens",
    "learn_output",
    "max_body_bytes",
)


def build_middleware_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `GuardMiddleware`, but for the guard itself."""
    return {
        "routes": None if settings.routes is None else [route.build(settings.book) for route in settings.routes],
        "exempt": settings.exempt,
        "unlisted": settings.unlisted,
        "rate_limit_headers": settings.rate_limit_headers,
    }


def build_admin_options(settings: GuardSettings) -> AdminOptions:
    """The options of `Guard.admin_app`.

    Raises:
        ConfigurationError: there is no `[admin]`, or something in it is wrong; names the settings file and the key.
    """
    if settings.admin is None:
        raise ConfigurationError(f"{settings.origin}: admin: is missing")
    with _named(settings, "admin"):
        return settings.admin.build()


def build_gateway_arguments(settings: GuardSettings) -> dict[str, Any]:
    """The keyword arguments of `gateway.Gateway`, but for the guard itself.

    Raises:
        ConfigurationError: there is no `[gateway]`, or something in it is wrong; names the settings file and the key.
    """
    if settings.gateway is None:
        raise ConfigurationError(f"{settings.origin}: gateway: is missing")
    from asgi_llm_guard.gateway.configured import gateway_arguments

    with _named(settings, "gateway"):
        return gateway_arguments(settings.gateway)


# ------------------------------------------------------------------------------------- errors


@contextmanager
def _named(settings: GuardSettings, key: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{place(settings, key)}: {key}: {error}") from None
    except PydanticCustomError as error:  # of a table that is no more than names until it is built
        inside = str((error.context or {}).get("key", ""))
        raise ConfigurationError(f"{place(settings, key, inside)}: {key}.{inside}: {error.message()}") from None


def place(settings: GuardSettings, *path: str | int) -> str:
    """The file that the settings come from, and the line of a key where it has one."""
    line = None
    if settings.file is not None:
        with suppress(OSError, UnicodeDecodeError):
            line = line_in(settings.file.read_text(encoding="utf-8"), path)
    return settings.origin if line is None else f"{settings.origin}, line {line}"
