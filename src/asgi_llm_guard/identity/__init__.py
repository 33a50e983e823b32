"""Who asks: resolvers for verified callers, and extractors for ids that callers may choose."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_llm_guard.identity.base import Identity, IdentityError, Resolver
    from asgi_llm_guard.identity.extract import (
        DEFAULT_SESSION,
        Extractor,
        baggage,
        body,
        first_of,
        header,
        vendor_header,
    )
    from asgi_llm_guard.identity.headers import TrustedHeaders
    from asgi_llm_guard.identity.jwt import JwtIdentity
    from asgi_llm_guard.identity.keys import ApiKey, ApiKeys
    from asgi_llm_guard.identity.proxies import PeerAddress, Proxies, client_address
    from asgi_llm_guard.identity.scope_user import ScopeUser

__all__ = [
    "DEFAULT_SESSION",
    "ApiKey",
    "ApiKeys",
    "Extractor",
    "Identity",
    "IdentityError",
    "JwtIdentity",
    "PeerAddress",
    "Proxies",
    "Resolver",
    "ScopeUser",
    "TrustedHeaders",
    "baggage",
    "body",
    "client_address",
    "first_of",
    "header",
    "vendor_header",
]

# A service uses one or two of them, and the guard itself none: each is imported when it is first asked for.
_HOMES = {
    "ApiKey": "keys",
    "ApiKeys": "keys",
    "DEFAULT_SESSION": "extract",
    "Extractor": "extract",
    "Identity": "base",
    "IdentityError": "base",
    "JwtIdentity": "jwt",
    "PeerAddress": "proxies",
    "Proxies": "proxies",
    "Resolver": "base",
    "ScopeUser": "scope_user",
    "TrustedHeaders": "headers",
    "baggage": "extract",
    "body": "extract",
    "client_address": "proxies",
    "first_of": "extract",
    "header": "extract",
    "vendor_header": "extract",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
