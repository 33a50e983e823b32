"""Who asks: resolvers for verified callers, and extractors for ids that callers may choose."""

from asgi_llm_guard.identity.base import Identity, IdentityError, Resolver
from asgi_llm_guard.identity.extract import DEFAULT_SESSION, Extractor, baggage, body, first_of, header, vendor_header
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
