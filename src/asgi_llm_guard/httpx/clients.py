"""Clients whose requests are guarded: all that the library's own client does, over guarded transports."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from asgi_llm_guard.guard import Guard
from asgi_llm_guard.hook import HookOptions
from asgi_llm_guard.httpx.library import Library, library_named
from asgi_llm_guard.httpx.transports import AsyncGuardTransport, GuardTransport

__all__ = ["async_client", "sync_client"]

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 600.0


def async_client(guard: Guard, *, library: Library = "auto", **options: Any) -> Any:
    """An `AsyncClient` whose requests are guarded; see `Guard.httpx_client`."""
    made = library_named(library)
    hooked, plain = _split(made, options)
    return _wrap(made.AsyncClient(**plain), lambda transport: AsyncGuardTransport(guard, transport, **hooked))


def sync_client(guard: Guard, *, library: Library = "auto", **options: Any) -> Any:
    """A `Client` whose requests are guarded; see `Guard.httpx_client`."""
    made = library_named(library)
    hooked, plain = _split(made, options)
    return _wrap(made.Client(**plain), lambda transport: GuardTransport(guard, transport, **hooked))


def _split(library: ModuleType, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the hook and those of the client, with the defaults that the SDKs give to theirs."""
    hooked = {name: value for name, value in options.items() if name in HookOptions.__annotations__}
    plain = {name: value for name, value in options.items() if name not in HookOptions.__annotations__}
    plain.setdefault("follow_redirects", True)
    plain.setdefault("timeout", library.Timeout(_ANSWER_S, connect=_CONNECT_S))
    plain.setdefault("limits", library.Limits(max_connections=1000, max_keepalive_connections=100))
    return hooked, plain


def _wrap(client: Any, wrapped: Callable[[Any], Any]) -> Any:
    """`client` with every transport of its own wrapped, those of proxies too."""
    # No public name leads to them, and a client with a transport of its own takes no notice of proxies, limits
    # and certificates.
    client._transport = wrapped(client._transport)  # noqa: SLF001
    client._mounts = {  # noqa: SLF001
        pattern: None if transport is None else wrapped(transport)
        for pattern, transport in client._mounts.items()  # noqa: SLF001
    }
    return client
