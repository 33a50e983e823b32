"""What an answer depends on, as one digest: the cache finds an answer by exactly this, and by nothing that is alike.

| part | why |
|---|---|
| kind, host and port, path with its query | who is asked for what; the API's version is in the query of some |
| dialect, provider, model | as they were recognised; a route may stand for another model than the body says |
| headers, but those of the connection, of traces and of repeats | versions, beta features, what gateways are told; and the provider's credentials, because two accounts may have two models of one name |
| whether the answer is streamed | the bytes differ |
| every field of the body | but those in `IRRELEVANT` |

The fields of the body may come in any order. Inside a field the order counts: models follow the order of the properties
of a schema. Numbers are told apart as they are written, up to what a double can tell: 1 and 1.0 are two keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

import msgspec

from asgi_llm_guard.context import Call

__all__ = [
    "IRRELEVANT",
    "STATEFUL",
    "CacheRequest",
    "Unfit",
    "canonical",
    "digest_of",
    "name_digest",
    "partition_digest",
    "read_body",
    "request_digest",
    "value_digest",
]

IRRELEVANT: Final = {
    "stream": "counts as whether the answer is streamed, wherever the dialect says so",
    "prompt_cache_key": "OpenAI, Mistral: where the provider keeps the prefix; the answer is the same",
    "prompt_cache_retention": "OpenAI: for how long it does",
    "cache_salt": "vLLM: who may share the prefix",
}
"""Fields of a body that do not change its answer, and why. All others count, `user` and `metadata` among them: the
answers of two end users of one caller stay apart."""

STATEFUL: Final = {
    "background": "the answer is fetched later",
    "container": "what is in the container changes",
    "conversation": "the answer is added to the conversation",
    "previous_response_id": "the answer continues what the provider keeps",
    "store": "the answer is to be stored at the provider",
}
"""Fields of a body with which a request does more than to be answered, so that a kept answer would not do."""

_UNRELATED: Final = frozenset({
    # of the connection and the client
    "accept-encoding", "cache-control", "connection", "content-length", "date", "expect", "keep-alive",
    "te", "transfer-encoding", "user-agent", "x-goog-api-client",
    # of this one request: repeats, traces, and signatures, whose account is told by the credential
    "amz-sdk-invocation-id", "amz-sdk-request", "b3", "baggage", "idempotency-key", "request-id", "sentry-trace",
    "traceparent", "tracestate", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token", "x-amzn-trace-id",
    "x-client-request-id", "x-cloud-trace-context", "x-correlation-id", "x-request-id",
})  # fmt: skip
_UNRELATED_PREFIXES: Final = ("x-b3-", "x-datadog-", "x-stainless-")
"""Headers that change no answer. All others count, whether they are known or not."""
_WRITTEN: Final = (bytes, date, datetime, time, timedelta, Decimal, UUID)


class CacheRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a provider, as it is going to be sent."""

    host: str
    """With its port, unless it is the usual one."""
    path: str
    """With its query."""
    body: bytes
    """JSON."""
    headers: Sequence[tuple[str, str]] = ()
    """All of them: the cache takes those that matter, and obeys `Cache-Control`."""
    dialect: str | None = None
    stream: bool | None = None
    """Whether the answer is asked for as a stream; `None`: by the body's `stream`."""


class Unfit(ValueError):  # noqa: N818 - what the request is
    """The request cannot be looked up; the message says why, for people to read."""


def partition_digest(partition: str) -> str:
    """Names a partition without showing who is in it."""
    return hashlib.sha256(b"partition\x00" + _bytes(partition)).hexdigest()


def name_digest(name: str) -> str:
    """The name of an epoch: of a fixed length, and of nobody that can be read from it."""
    return hashlib.sha256(b"name\x00" + _bytes(name)).hexdigest()[:32]


def digest_of(kind: str, *parts: str | bytes | None) -> bytes:
    """A digest of all parts, none of which can be mistaken for a part of another."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        if part is None:
            digest.update(b"\x00")
        else:
            data = part if isinstance(part, bytes) else _bytes(part)
            digest.update(b"\x01%d:" % len(data))
            digest.update(data)
    return digest.digest()


def read_body(body: bytes) -> dict[str, Any]:
    """The body of a request.

    Raises:
        Unfit: it is not a JSON object, or one that readers may understand in two ways.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except Unfit:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        raise Unfit("the body is not JSON") from error
    if not isinstance(value, dict):
        raise Unfit("the body is not a JSON object")
    return value


def request_digest(request: CacheRequest, call: Call | None, ignored: frozenset[str]) -> tuple[bytes, bool]:
    """The digest of a request to a provider, and whether its answer is streamed.

    Raises:
        Unfit: it cannot be looked up.
    """
    try:
        body = read_body(request.body)
        counted = {field: value for field, value in body.items() if field not in IRRELEVANT and field not in ignored}
        fields = canonical(counted)
    except RecursionError:
        raise Unfit("the body is nested too deeply") from None
    for field, why in STATEFUL.items():
        if body.get(field):
            raise Unfit(f"{field}: {why}")
    stream = bool(body.get("stream")) if request.stream is None else request.stream
    digest = digest_of(
        "request",
        request.host.lower(),
        request.path,
        request.dialect,
        None if call is None else call.provider,
        None if call is None else call.model,
        "stream" if stream else "whole",
        fields,
        *_relevant(request.headers, ignored),
    )
    return digest, stream


def canonical(fields: Mapping[str, Any]) -> bytes:
    """The fields in a fixed order, each as it is.

    Raises:
        Unfit: a number of them is larger than any that a reader would take.
    """
    ordered = {field: fields[field] for field in sorted(fields)}
    try:
        return json.dumps(ordered, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise Unfit("a number is too large") from error


def value_digest(kind: str, value: object, *parts: str | None) -> bytes:
    """The digest of a key that the application gives: texts, numbers, lists and mappings, and what is made of them.

    Raises:
        Unfit: it is made of something else.
    """
    try:
        data = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).encode()
    except RecursionError:
        raise Unfit("the key is nested too deeply") from None
    except Unfit:
        raise
    except ValueError:
        raise Unfit("the key has a number that JSON cannot say") from None
    return digest_of(kind, data, *parts)


def _plain(value: Any) -> Any:
    """`value` so that no two values of different types look alike."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [kind.__name__, *map(_plain, value)]
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise Unfit("the key has a mapping whose names are no texts")
        return {key: _plain(item) for key, item in value.items()}
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(value, Enum):
        return ["value", name, value.name]
    if kind in _WRITTEN:
        return ["value", name, value.hex() if kind is bytes else str(value)]
    if isinstance(value, msgspec.Struct):
        fields: list[Any] = [msgspec.structs.asdict(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [{field.name: getattr(value, field.name) for field in dataclasses.fields(value)}]
    elif callable(getattr(value, "model_dump", None)) and not isinstance(value, type):  # of pydantic
        # Not its dump: that leaves out or masks what is secret, excluded or private, and fields of subclasses.
        fields = [getattr(value, "__pydantic_extra__", None), getattr(value, "__pydantic_private__", None)]
    else:
        raise Unfit(f"the key has a {kind.__name__}; it may have texts, numbers, lists, mappings and models")
    return ["model", name, *map(_plain, fields), _plain(getattr(value, "__dict__", None))]


def _relevant(headers: Iterable[tuple[str, str]], ignored: frozenset[str]) -> list[str]:
    relevant = []
    for name, value in headers:
        lower = name.lower()
        if lower in _UNRELATED or lower in ignored or lower.startswith(_UNRELATED_PREFIXES):
            continue
        relevant.append((lower, _credential(value) if lower == "authorization" else value))
    return [text for header in sorted(relevant) for text in header]


def _credential(authorization: str) -> str:
    """What of a credential names the account. A signature is another one for every request."""
    if not authorization.startswith("AWS4-"):
        return authorization
    _, _, credential = authorization.partition("Credential=")
    return f"AWS4 {credential.partition('/')[0]}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise Unfit("the body has a field twice, and readers may take either")
    return value


def _no_constant(text: str) -> Any:
    raise Unfit(f"the body is not JSON: {text}")


def _bytes(text: str) -> bytes:
    # Ids may come from JSON, which can spell halves of characters.
    return text.encode("utf-8", "surrogatepass")
