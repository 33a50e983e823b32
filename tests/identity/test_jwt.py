"""Signed tokens: what is checked, and what cannot be passed off."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import Identity, IdentityError, JwtIdentity

NOW_S = 1_800_000_000
RSA = RSAKey.generate_key(2048, {"kid": "rsa-1"})
OTHER_RSA = RSAKey.generate_key(2048, {"kid": "rsa-2"})
EC = ECKey.generate_key("P-256", {"kid": "ec-1"})
EC384 = ECKey.generate_key("P-384", {"kid": "ec-2"})
OKP = OKPKey.generate_key("Ed25519", {"kid": "okp-1"})
SHARED = "a shared secret of thirty-two bytes or more"
PEM = RSA.as_pem(private=False)
CLAIMS: dict[str, Any] = {"sub": "ada", "iss": "https://id.example", "aud": "guard", "exp": NOW_S + 60}


class Clock:
    """Always the same instant."""

    def now_ms(self) -> int:
        return NOW_S * 1000


def verifier(key: Any = PEM, **options: Any) -> JwtIdentity:
    defaults: dict[str, Any] = {
        "algorithms": ["RS256"],
        "issuer": "https://id.example",
        "audience": "guard",
        "clock": Clock(),
        "leeway_s": 0,
    }
    return JwtIdentity(key, **(defaults | options))


def token(
    claims: Mapping[str, Any] = CLAIMS, key: Key = RSA, alg: str = "RS256", header: Mapping[str, Any] | None = None
) -> str:
    return jwt.encode({"alg": alg, **(header or {})}, dict(claims), key, algorithms=[alg])


def bearing(text: str | bytes) -> dict[str, Any]:
    raw = text.encode() if isinstance(text, str) else text
    return {"type": "http", "headers": [(b"accept", b"*/*"), (b"authorization", b"Bearer " + raw)]}


def jwks(*keys: Key) -> dict[str, Any]:
    return {"keys": [key.as_dict(private=False) for key in keys]}


def test_claims() -> None:
    """The caller and all that belongs to it come from the claims that the service names."""
    resolve = verifier(
        caller="client_id",
        user="sub",
        departments="https://id.example/departments",
        agent="act.agent",
        tags="realm.roles",
    )
    claims = CLAIMS | {
        "client_id": 77,
        "https://id.example/departments": ["research", "sales", "research"],
        "act": {"agent": "researcher"},
        "realm": {"roles": "beta"},
    }
    assert resolve(bearing(token(claims))) == Identity(
        caller="77", user="ada", departments=("research", "sales"), agent="researcher", tags=("beta",)
    )
    assert resolve(bearing(token(CLAIMS | {"client_id": "c", "act": "flat"}))) == Identity(caller="c", user="ada")


@pytest.mark.parametrize(
    "key, alg, verify_with",
    [
        (RSA, "RS256", PEM),
        (RSA, "PS256", PEM.decode()),
        (EC, "ES256", EC.as_pem(private=False)),
        (OKP, "Ed25519", OKP.as_dict(private=False)),
        (OctKey.import_key(SHARED), "HS256", SHARED),
        (OctKey.import_key(SHARED), "HS256", OctKey.import_key(SHARED).as_dict()),
        (RSA, "RS256", jwks(EC, RSA, OTHER_RSA)),
    ],
)
def test_keys(key: Key, alg: str, verify_with: Any) -> None:
    """Every kind of key verifies its algorithm, given as PEM, JWK, JWK set or shared secret."""
    assert verifier(verify_with, algorithms=[alg])(bearing(token(key=key, alg=alg))) == Identity(caller="ada")


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Basic x:y")], [(b"authorization", b"Bearer ")]])
def test_no_token_is_anonymous(headers: list[tuple[bytes, bytes]]) -> None:
    """A request without a bearer token is anonymous."""
    assert verifier()({"headers": headers}) is None


def test_own_header() -> None:
    """The token may travel in a header of its own; the other spelling is another header."""
    resolve = verifier(header="X-Access-Token")
    assert resolve({"headers": [(b"x-access-token", token().encode())]}) == Identity(caller="ada")
    assert resolve({"headers": [(b"x_access_token", token().encode())]}) is None


def test_duplicate_header() -> None:
    """T1: two authorization headers are refused with 400."""
    pair = (b"authorization", b"Bearer " + token().encode())
    with pytest.raises(IdentityError, match="authorization must be sent once") as caught:
        verifier()({"headers": [pair, pair]})
    assert caught.value.status == 400


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def unsigned(alg: str) -> str:
    return f"{encode({'alg': alg})}.{encode(CLAIMS)}."


def confused() -> str:
    """Signed with the *public* key, taken for a shared secret."""
    signed = unsigned("HS256").rpartition(".")[0]
    signature = hmac.new(PEM, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def without(claim: str) -> dict[str, Any]:
    return {name: value for name, value in CLAIMS.items() if name != claim}


def signed_payload(payload: bytes, header: Mapping[str, Any] | None = None) -> str:
    registry = jws.JWSRegistry(algorithms=["RS256"], strict_check_header=False)
    return jws.serialize_compact({"alg": "RS256", **(header or {})}, payload, RSA, registry=registry)


REFUSED: dict[str, str] = {
    "alg none": unsigned("none"),
    "alg None": unsigned("None"),
    "public key as shared secret": confused(),
    "foreign key": token(key=OTHER_RSA),
    "algorithm that is not listed": token(alg="RS384"),
    "changed claims": token(CLAIMS | {"sub": "eve"}).rpartition(".")[0] + "." + token().rpartition(".")[2],
    "expired": token(CLAIMS | {"exp": NOW_S}),
    "no expiry": token(without("exp")),
    "expiry is not a number": token(CLAIMS | {"exp": True}),
    "not yet valid": token(CLAIMS | {"nbf": NOW_S + 1}),
    "issued in the future": token(CLAIMS | {"iat": NOW_S + 1}),
    "other issuer": token(CLAIMS | {"iss": "https://evil.example"}),
    "no issuer": token(without("iss")),
    "other audience": token(CLAIMS | {"aud": ["another", "service"]}),
    "no audience": token(without("aud")),
    "no caller": token(without("sub")),
    "caller is a list": token(CLAIMS | {"sub": ["ada"]}),
    "caller with a line break": token(CLAIMS | {"sub": "a\nb"}),
    "departments are a table": token(CLAIMS | {"groups": {"a": 1}}),
    "critical header nobody knows": encode({"alg": "RS256", "crit": ["x"], "x": 1}) + "." + token().split(".", 1)[1],
    "not a token": "abc",
    "an API key": "lg-k1-secret",
    "header is a list": encode([]) + ".e30.AA",
    "key id is a list": encode({"alg": "RS256", "kid": ["rsa-1"]}) + ".e30.AA",
    "algorithm is a list": encode({"alg": ["RS256"]}) + ".e30.AA",
    "claims are a list": signed_payload(b"[]"),
    "claims are not JSON": signed_payload(b"sub=ada"),
    "claims without end": signed_payload(b"[" * 100_000),
    "five parts": "a.b.c.d.e",
    "too long": "a" * 200_000,
    "bytes of no alphabet": "\xff.\xff.\xff",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name: str) -> None:
    """T1: a token that does not hold is refused with 403, never taken for anonymous, and never shown."""
    with pytest.raises(IdentityError) as caught:
        verifier(departments="groups")(bearing(REFUSED[name].encode("latin-1")))
    assert caught.value.status == 403
    assert caught.value.message.isprintable()
    assert REFUSED[name] not in caught.value.message


def test_leeway() -> None:
    """Clocks may differ by the leeway, and no more."""
    resolve = verifier(leeway_s=30)
    assert resolve(bearing(token(CLAIMS | {"exp": NOW_S - 29, "nbf": NOW_S + 30}))) == Identity(caller="ada")
    with pytest.raises(IdentityError):
        resolve(bearing(token(CLAIMS | {"exp": NOW_S - 30})))


def test_any_issuer_and_audience() -> None:
    """Issuer and audience go unchecked only where the service says so."""
    resolve = verifier(issuer=None, audience=None)
    assert resolve(bearing(token({"sub": "ada", "exp": NOW_S + 1}))) == Identity(caller="ada")


def test_key_sets() -> None:
    """In a set, a token's `kid` picks the key; without one every fitting key is tried."""
    resolve = verifier(jwks(OTHER_RSA, EC384, RSA, EC), algorithms=["RS256", "ES256"])
    for key, alg in ((RSA, "RS256"), (OTHER_RSA, "RS256"), (EC, "ES256")):
        assert resolve(bearing(token(key=key, alg=alg))) == Identity(caller="ada")
        assert resolve(bearing(token(key=key, alg=alg, header={"kid": key.kid}))) == Identity(caller="ada")
    for kid in ("rsa-2", "ec-1", "unknown"):
        with pytest.raises(IdentityError):
            resolve(bearing(token(header={"kid": kid})))


def test_unknown_header_parameters() -> None:
    """Header parameters that nobody knows are ignored, as RFC 7515 asks."""
    assert verifier()(bearing(signed_payload(json.dumps(CLAIMS).encode(), {"nonce": "n"}))) == Identity(caller="ada")


def test_keys_for_other_uses() -> None:
    """A key that is meant for encryption, or for another algorithm, verifies nothing."""
    for limits in ({"use": "enc"}, {"alg": "PS256"}):
        with pytest.raises(ConfigurationError, match="no key that fits RS256"):
            verifier(RSA.as_dict(private=False) | limits)


def test_encryption_key_in_a_set() -> None:
    """A token that is signed with the set's key for encryption is refused."""
    keys = {"keys": [RSA.as_dict(private=False) | {"use": "enc"}, OTHER_RSA.as_dict(private=False)]}
    with pytest.raises(IdentityError):
        verifier(keys)(bearing(token()))


def test_replace_key() -> None:
    """When the issuer changes its keys, the new ones are used; a wrong key changes nothing."""
    resolve = verifier()
    resolve.replace_key(jwks(OTHER_RSA))
    assert resolve(bearing(token(key=OTHER_RSA))) == Identity(caller="ada")
    with pytest.raises(ConfigurationError):
        resolve.replace_key("not a key")
    assert resolve(bearing(token(key=OTHER_RSA))) == Identity(caller="ada")
    with pytest.raises(IdentityError):
        resolve(bearing(token()))


@pytest.mark.parametrize(
    "key, options, message",
    [
        (PEM, {"algorithms": []}, r"algorithms must be a list such as \['RS256'\], got \[\]"),
        (PEM, {"algorithms": "RS256"}, "algorithms must be a list"),
        (PEM, {"algorithms": ["none"]}, "algorithms must be among HS256, .*, got 'none'"),
        (PEM, {"algorithms": ["RS256", "HS256"]}, r"\(HS…\) and with a public key cannot be mixed, got RS256, HS256"),
        (PEM, {"algorithms": ["HS256"]}, "key is a public or private key, but algorithms want a shared secret"),
        (PEM, {"algorithms": ["ES256"]}, "key cannot be read as a key for ES256"),
        ("canary", {}, "key cannot be read as a key for RS256"),
        ({"kty": "canary"}, {}, "key cannot be read as a key for RS256"),
        ({"keys": []}, {}, "key cannot be read as a key for RS256"),
        (jwks(EC), {}, "key has no key that fits RS256"),
        (7, {}, "key must be a PEM text, a JWK or a JWK set, got a int"),
        ("canary", {"algorithms": ["HS256"]}, "a shared secret must have at least 32 bytes"),
        ({"kty": "oct", "k": "Y2FuYXJ5"}, {"algorithms": ["HS256"]}, r"a key for HS256 \(SecurityWarning\)"),
        ("ssh-rsa canary canary canary canary", {"algorithms": ["HS256"]}, r"a key for HS256 \(SecurityWarning\)"),
        ("canary", {"algorithms": ["Ed25519", "ES256"]}, "a key for Ed25519, ES256"),
        (SHARED, {"algorithms": ["HS256", "HS512"]}, "a shared secret for HS512 must have at least 64 bytes"),
        (PEM, {"caller": None}, "caller must be the name of a claim, got None"),
        (PEM, {"user": ""}, "user must be the name of a claim, got ''"),
        (PEM, {"issuer": ""}, "iss must be a non-empty text or None, got ''"),
        (PEM, {"audience": 7}, "aud must be a non-empty text or None, got 7"),
        (PEM, {"leeway_s": 301}, "leeway_s must be from 0 to 300 seconds, got 301"),
        (PEM, {"header": "a b"}, "got 'a b'"),
    ],
)
def test_configuration(key: Any, options: dict[str, Any], message: str) -> None:
    """T1: algorithms and keys that do not belong together are refused at start-up; keys are not shown."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        verifier(key, **options)
    assert "canary" not in str(caught.value)


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255)) | st.tuples(st.binary(), st.binary(), st.binary()))
def test_any_token(parts: str | tuple[bytes, ...]) -> None:
    """T17: whatever is sent as a token, it is refused or ignored, and nothing else is raised."""
    text = parts if isinstance(parts, str) else ".".join(base64.urlsafe_b64encode(part).decode() for part in parts)
    try:
        status = None if verifier()(bearing(text.encode("latin-1"))) is None else 200
    except IdentityError as error:
        status = error.status
    assert status in {None, 403}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["alg", "kid", "crit", "typ", "jwk", "b64", "cty"]), JSON | st.just("RS256")))
def test_any_header(header: dict[str, Any]) -> None:
    """T17: whatever the token's header says, the signature decides, and nothing else is raised."""
    rest = token().split(".", 1)[1]
    with pytest.raises(IdentityError):
        verifier(jwks(RSA, OTHER_RSA))(bearing(encode(header) + "." + rest))


def test_optional_dependency() -> None:
    """Without the extra, the package imports, and the resolver names the extra to install."""
    code = (
        "import sys; sys.modules['joserfc'] = None\n"
        "from asgi_llm_guard.identity import JwtIdentity\n"
        "from asgi_llm_guard.errors import NotInstalledError\n"
        "try: JwtIdentity('k', algorithms=['HS256'], issuer=None, audience=None)\n"
        "except NotInstalledError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "JwtIdentity needs an optional dependency: pip install 'asgi-llm-guard[jwt]'"


def test_light_import() -> None:
    """Importing the resolvers loads no optional library."""
    code = "import sys, asgi_llm_guard.identity; print({'joserfc', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
