"""Takes the caller from a signed token (JWT). Needs `asgi-llm-guard[jwt]`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError, NotInstalledError
from asgi_llm_guard.identity.base import Identity, IdentityError, Scope, header_name, scan, sent, spellings
from asgi_llm_guard.identity.keys import bearer
from asgi_llm_guard.identity.scope_user import text_of, texts_of

if TYPE_CHECKING:
    from joserfc.jwk import Key
    from joserfc.jws import JWSRegistry
    from joserfc.jwt import JWTClaimsRegistry

__all__ = ["JwtIdentity"]

# Which keys an algorithm takes. A key of another type is never tried, so that a public key cannot
# be passed off as a shared secret. `none` is not here, and cannot be allowed.
_KEY_TYPES: Final = {
    "HS256": "oct",
    "HS384": "oct",
    "HS512": "oct",
    "RS256": "RSA",
    "RS384": "RSA",
    "RS512": "RSA",
    "PS256": "RSA",
    "PS384": "RSA",
    "PS512": "RSA",
    "ES256": "EC",
    "ES384": "EC",
    "ES512": "EC",
    "Ed25519": "OKP",
    "EdDSA": "OKP",
}
_SHORTEST_SECRET: Final = 32
_INVALID: Final = "The access token is not valid, or not valid any more."


class JwtIdentity:
    """Resolves signed tokens to callers.

    `key` is a PEM text, a JWK or a JWK set (a mapping with `keys`), or the shared secret for `HS…`.
    `algorithms` lists what is accepted; shared secrets and public keys cannot be mixed. `iss`, `aud`
    and `exp` must be there and right, `nbf` and `iat` right if they are there, by the injected clock
    with `leeway_s` seconds either way; `issuer=None` or `audience=None` says on purpose that any
    will do.

    `caller`, `user`, `departments`, `agent` and `tags` name the claims to take; a claim inside
    another one is written `realm_access.roles`. A request without a token is anonymous; one with a
    token that does not hold is refused (403).

    Source: RFC 7519, section 4.1 (claims); RFC 8725, sections 3.1 to 3.12 (what to check).

    Raises:
        ConfigurationError: no, unknown or mixed algorithms, keys that do not fit them, a weak secret.
        NotInstalledError: the extra `jwt` is not installed.
    """

    __slots__ = (
        "_algorithms",
        "_claims",
        "_clock",
        "_header",
        "_keys",
        "_names",
        "_registry",
        "_table",
    )

    def __init__(
        self,
        key: str | bytes | Mapping[str, Any],
        *,
        algorithms: Sequence[str],
        issuer: str | None,
        audience: str | None,
        caller: str = "sub",
        user: str | None = None,
        departments: str | None = None,
        agent: str | None = None,
        tags: str | None = None,
        header: str = "authorization",
        leeway_s: int = 30,
        clock: Clock | None = None,
    ) -> None:
        try:
            from joserfc.jws import JWSRegistry
            from joserfc.jwt import JWTClaimsRegistry
        except ImportError:
            raise NotInstalledError("JwtIdentity", "jwt") from None
        if isinstance(leeway_s, bool) or not isinstance(leeway_s, int) or not 0 <= leeway_s <= 300:
            raise ConfigurationError(f"JwtIdentity: leeway_s must be from 0 to 300 seconds, got {leeway_s!r}")
        self._clock = clock if clock is not None else SystemClock()
        self._algorithms = _check_algorithms(algorithms)
        self._keys: tuple[Key, ...] = ()
        self.replace_key(key)
        self._names = {"caller": caller, "user": user, "departments": departments, "agent": agent, "tags": tags}
        for option, claim in self._names.items():
            if (claim is None and option == "caller") or (
                claim is not None and (not isinstance(claim, str) or not claim)
            ):
                raise ConfigurationError(f"JwtIdentity: {option} must be the name of a claim, got {claim!r}")
        self._header = header_name(header).encode()
        self._table = spellings([self._header.decode()])
        # Header parameters that nobody knows must be ignored (RFC 7515, section 4); `crit` still counts.
        self._registry: JWSRegistry = JWSRegistry(algorithms=self._algorithms, strict_check_header=False)
        expected: dict[str, Any] = {"exp": {"essential": True}}
        for claim, value in (("iss", issuer), ("aud", audience)):
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise ConfigurationError(f"JwtIdentity: {claim} must be a non-empty text or None, got {value!r}")
            expected[claim] = {"essential": True, "value": value}
        self._claims: JWTClaimsRegistry = JWTClaimsRegistry(now=self._now_s, leeway=leeway_s, **expected)

    def replace_key(self, key: str | bytes | Mapping[str, Any]) -> None:
        """Verify with another key or key set from now on: for issuers that change theirs.

        Raises:
            ConfigurationError: as the constructor; the old key stays in use.
        """
        self._keys = _import_keys(key, self._algorithms)

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The caller of the token that the request carries.

        Raises:
            IdentityError: the header is sent twice (400), or the token or one of its claims does not hold (403).
        """
        found = scan(scope["headers"], self._table)
        if not found:
            return None
        value = sent(self._header, found, self._table)
        token = bearer(value) if value is not None else None
        if not token:
            return None
        claims = self._verify(token)
        names = self._names
        caller = text_of(_claim(claims, names["caller"]), f"The token's claim {names['caller']}")
        if caller is None:
            raise IdentityError(f"The token has no claim {names['caller']}.", status=403)
        return Identity(
            caller=caller,
            user=text_of(_claim(claims, names["user"]), f"The token's claim {names['user']}"),
            departments=texts_of(_claim(claims, names["departments"]), f"The token's claim {names['departments']}"),
            agent=text_of(_claim(claims, names["agent"]), f"The token's claim {names['agent']}"),
            tags=texts_of(_claim(claims, names["tags"]), f"The token's claim {names['tags']}"),
        )

    def _now_s(self) -> int:
        return self._clock.now_ms() // 1000

    def _verify(self, token: bytes) -> dict[str, Any]:
        from joserfc.errors import JoseError
        from joserfc.jws import extract_compact, validate_compact

        # The token is JSON that anybody may have written, so its parts may be of any type and depth.
        foreign = (JoseError, ValueError, TypeError, AttributeError, RecursionError)
        try:
            signed = extract_compact(token, registry=self._registry)
            header = signed.headers()
            candidates = self._candidates(header.get("alg"), header.get("kid"))
        except foreign:
            raise IdentityError(_INVALID, status=403) from None
        for key in candidates:
            try:
                if validate_compact(signed, key, self._algorithms, self._registry):
                    break
            except foreign:  # a key on another curve, for example: the next one may fit
                continue
        else:
            raise IdentityError(_INVALID, status=403)
        try:
            claims: dict[str, Any] = json.loads(signed.payload or b"")
            self._claims.validate(claims)
        except foreign:
            raise IdentityError(_INVALID, status=403) from None
        return claims

    def _candidates(self, algorithm: object, key_id: object) -> list[Key]:
        fitting = [key for key in self._keys if algorithm in self._algorithms and _fits(key, str(algorithm))]
        if len(self._keys) > 1 and key_id is not None:
            return [key for key in fitting if key.kid == key_id]
        return fitting


def _check_algorithms(algorithms: object) -> tuple[str, ...]:
    if not isinstance(algorithms, (list, tuple, set, frozenset)) or not algorithms:
        raise ConfigurationError(f"JwtIdentity: algorithms must be a list such as ['RS256'], got {algorithms!r}")
    for algorithm in algorithms:
        if algorithm not in _KEY_TYPES:
            raise ConfigurationError(
                f"JwtIdentity: algorithms must be among {', '.join(_KEY_TYPES)}, got {algorithm!r}"
            )
    kinds = {_KEY_TYPES[algorithm] == "oct" for algorithm in algorithms}
    if len(kinds) > 1:
        raise ConfigurationError(
            "JwtIdentity: algorithms with a shared secret (HS…) and with a public key cannot be mixed, "
            f"got {', '.join(algorithms)}"
        )
    return tuple(algorithms)


def _import_keys(key: object, algorithms: Sequence[str]) -> tuple[Key, ...]:
    from joserfc.errors import JoseError, SecurityWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SecurityWarning)  # a key that the library doubts is none
            keys = _read_keys(key, {_KEY_TYPES[algorithm] for algorithm in algorithms})
    except (JoseError, SecurityWarning, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        # The library's message may quote the key.
        raise ConfigurationError(
            f"JwtIdentity: key cannot be read as a key for {', '.join(algorithms)} ({type(error).__name__})"
        ) from None
    keys = [one for one in keys if any(_fits(one, algorithm) for algorithm in algorithms)]
    if not keys:
        raise ConfigurationError(f"JwtIdentity: key has no key that fits {', '.join(algorithms)}")
    bits = max((int(algorithm[2:]) for algorithm in algorithms if algorithm.startswith("HS")), default=0)
    for one in keys:  # RFC 7518, section 3.2: at least as long as the hash
        if isinstance(one.raw_value, bytes) and len(one.raw_value) * 8 < bits:
            raise ConfigurationError(f"JwtIdentity: a shared secret for HS{bits} must have at least {bits // 8} bytes")
    return tuple(keys)


def _read_keys(key: object, kinds: set[str]) -> list[Key]:
    from joserfc.jwk import JWKRegistry, KeySet

    if isinstance(key, Mapping):
        if "keys" in key:
            return list(KeySet.import_key_set({"keys": list(key["keys"])}))
        return [JWKRegistry.import_key(dict(key))]
    if not isinstance(key, (str, bytes)):
        raise ConfigurationError(f"JwtIdentity: key must be a PEM text, a JWK or a JWK set, got a {type(key).__name__}")
    raw = key.encode() if isinstance(key, str) else key
    if "oct" not in kinds:
        return [_read_pem(raw, kinds)]
    if b"-----BEGIN" in raw:
        raise ConfigurationError("JwtIdentity: key is a public or private key, but algorithms want a shared secret")
    if len(raw) < _SHORTEST_SECRET:
        raise ConfigurationError(f"JwtIdentity: a shared secret must have at least {_SHORTEST_SECRET} bytes")
    return [JWKRegistry.import_key(raw, "oct")]


def _read_pem(raw: bytes, kinds: set[str]) -> Key:
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry

    problem: Exception = ValueError("no kind of key")
    for kind in sorted(kinds):
        try:
            return JWKRegistry.import_key(raw, kind)
        except (JoseError, ValueError, TypeError) as error:
            problem = error
    raise problem


def _fits(key: Key, algorithm: str) -> bool:
    return (
        key.key_type == _KEY_TYPES[algorithm]
        and key.get("use") in {None, "sig"}
        and key.get("alg") in {None, algorithm}
    )


def _claim(claims: Mapping[str, Any], name: str | None) -> object:
    """The claim `name`, which may itself contain dots, or the one inside others that the dots lead to."""
    if name is None:
        return None
    if name in claims:
        return claims[name]
    value: object = claims
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value
