"""From a `Denied` to bytes: a response, an event in a running stream, or a WebSocket close.

The body has the shape of the API that is being called, because its SDKs show a message only then; a
problem document (RFC 9457) where no dialect is known, or where the client prefers one. Every shape carries
the same machine-readable members (`_members`), under the names of `Denied`'s fields.

Money is rendered in US dollars, as decimal text (`"0.0125"`, unit `usd`): nano-dollars are an inner unit, and
a JSON number would be read as a float.

Nothing that a client chose reaches a header. Bodies are JSON, so ids with quotes or line breaks stay inside
their strings.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.decision import Code, Denied
from asgi_llm_guard.denials.receipts import refusing
from asgi_llm_guard.denials.wording import period, utc
from asgi_llm_guard.money import format_usd

__all__ = ["Container", "Rendered", "container_of", "render", "stream_error", "websocket_close"]

Headers = Sequence[tuple[bytes, bytes]]

Container = Literal["sse", "ndjson", "array", "eventstream"]
"""How a stream is written: server-sent events, lines of JSON, one JSON array, or AWS's binary frames."""

_JSON: Final = b"application/json"
_PROBLEM: Final = b"application/problem+json"
_TYPES: Final = "https://iana.org/assignments/http-problem-types#"
_URI_SAFE: Final = "/:?#[]@!$&'()*+,;=%~"
_HEADER_LETTERS: Final = 1024
"""Of a message within an event stream's header, which has room for 32,767 bytes."""
_REASON_BYTES: Final = 123
"""RFC 6455 §5.5: a control frame carries at most 125 bytes, two of which are the code."""


class Rendered(msgspec.Struct, frozen=True):
    """A response, ready to be sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def render(
    denied: Denied,
    *,
    dialect: str | None = None,
    accept: bytes | None = None,
    instance: str | None = None,
    fields: Headers = (),
) -> Rendered:
    """The response that tells of a refusal; also the body of a refused WebSocket handshake.

    `dialect` names an API (`openai`, `openai_responses`, `anthropic`, …); one that is not known gets a problem
    document. `accept` is the request's header. `instance` names this occurrence, such as the request id.
    `fields` are further headers (`wire.fields`).

    `Retry-After` goes with 429, with 503 and wherever a retry may succeed; elsewhere waiting is not the point.
    """
    shape = None if _prefers_problem(accept) else _shape(dialect)
    body = _json(_problem(denied, instance) if shape is None else shape(denied, instance))
    headers = [
        (b"content-type", _PROBLEM if shape is None else _JSON),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if denied.retry_after_s is not None and (denied.retry or denied.status in (429, 503)):
        headers.append((b"retry-after", b"%d" % denied.retry_after_s))
        if denied.retry:
            headers.append((b"retry-after-ms", b"%d" % (denied.retry_after_s * 1000)))
    if not denied.retry:
        headers.append((b"x-should-retry", b"false"))
    if shape is _bedrock:
        headers.append((b"x-amzn-errortype", _BEDROCK_TYPES[_kind(denied.code)].encode("ascii")))
    headers.extend(fields)
    return Rendered(denied.status, headers, body)


def container_of(content_type: bytes) -> Container:
    """How a streamed body of this type is written; what is JSON and no lines of it is one array."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == b"text/event-stream":
        return "sse"
    if kind == b"application/vnd.amazon.eventstream":
        return "eventstream"
    return "array" if kind in (b"", b"application/json") else "ndjson"


def stream_error(denied: Denied, dialect: str | None, container: Container | None = None) -> bytes:
    """What ends a stream which has already begun: the last event, as the dialect tells of an error in mid-stream.

    `container`: how the stream is written; `None`: as the dialect usually is. In an array it is a comma, the last
    element, and the bracket: what stands after another element. A meter that cuts puts it right elsewhere.
    """
    family = _family(dialect)
    if container is None:
        container = "eventstream" if family == "bedrock" else "ndjson" if family == "ollama" else "sse"
    if container == "eventstream":
        return _frame(denied)
    name, event = _EVENTS.get(dialect or "", _EVENTS.get(family or "", _last_event))(denied, dialect)
    if container == "ndjson":
        return _json(event) + b"\n"
    if container == "array":
        return b"," + _json(event) + b"]"
    named = b"" if name is None else b"event: " + name.encode("ascii") + b"\n"
    return named + b"data: " + _json(event) + b"\n\n"


def _frame(denied: Denied) -> bytes:
    """An exception message of AWS's binary event streams.

    Code and message are said in headers too: clients take them from there for exceptions that they do not expect in
    a stream, such as that of a quota.

    Source: the Amazon event stream encoding: lengths, their CRC-32, headers (type 7 is text), payload, CRC-32.
    """
    kind = _BEDROCK_TYPES[_kind(denied.code)]
    texts = (
        (":exception-type", kind[0].lower() + kind[1:]),
        (":content-type", "application/json"),
        (":message-type", "exception"),
        (":error-code", kind),
        (":error-message", denied.message[:_HEADER_LETTERS]),
    )
    headers = b"".join(
        struct.pack(f">B{len(name)}sBH", len(name), name.encode("ascii"), 7, len(encoded)) + encoded
        for name, encoded in ((name, text.encode("utf-8", "replace")) for name, text in texts)
    )
    payload = _json(_bedrock(denied, None))
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


def websocket_close(denied: Denied) -> tuple[int, str]:
    """The close code, 1013 (try again later) or 1008 (policy), and a reason of at most 123 bytes of UTF-8."""
    text = "".join(letter if letter.isprintable() else " " for letter in f"{denied.code}: {denied.message}")
    reason = text.encode("utf-8", "replace")[:_REASON_BYTES].decode("utf-8", "ignore")
    return (1013 if denied.retry else 1008), reason


# ------------------------------------------------------------------------------------- members


def _members(denied: Denied) -> dict[str, object]:
    """What a program reads: the same in every shape. The first eight are always there."""
    members: dict[str, object] = {
        "policy": denied.policy,
        "scope": denied.scope,
        "unit": "usd" if denied.unit == Unit.NANOUSD else denied.unit,
        "requested": _amount(denied, denied.requested),
        "resets_at": None if denied.resets_at_ms is None else utc(denied.resets_at_ms),
        "retry": denied.retry,
        "retry_after_s": denied.retry_after_s,
        "fits_max_tokens": denied.fits_max_tokens,
    }
    if denied.subject:
        members["subject"] = denied.subject
    for name in ("limit", "used", "held"):
        amount: int | None = getattr(denied, name)
        if amount is not None:
            members[name] = _amount(denied, amount)
    lasting = _period(denied)
    if lasting is not None:
        members["period"] = lasting
    if denied.approval_url is not None:
        members["approval_url"] = denied.approval_url
    if denied.details:
        members["details"] = list(denied.details)
    return members


def _amount(denied: Denied, amount: int | None) -> int | str | None:
    if amount is None or denied.unit != Unit.NANOUSD:
        return amount
    return format_usd(amount).replace("$", "")


def _period(denied: Denied) -> str | None:
    stuck = refusing(denied.receipts)
    return period(stuck[0].claim.meter.window) if stuck else None


def _violated(denied: Denied) -> list[str]:
    return list(denied.violated or (denied.policy,))


def _param(denied: Denied) -> str | None:
    return "model" if denied.code in ("model_not_allowed", "model_unpriced", "model_not_found") else None


def _json(value: object) -> bytes:
    # Lone surrogates can come in by a JSON body and cannot go out as UTF-8.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------- shapes

_KINDS: Final[Mapping[Code, str]] = {
    "rate_limit_exceeded": "rate",
    "concurrency_limit_exceeded": "rate",
    "held_by_others": "rate",
    "session_overflow": "rate",
    "session_iterations_exhausted": "quota",
    "quota_exceeded": "quota",
    "request_exceeds_budget": "quota",
    "budget_exhausted": "quota",
    "model_not_allowed": "forbidden",
    "model_unpriced": "forbidden",
    "model_not_found": "missing",
    "feature_not_allowed": "forbidden",
    "route_not_listed": "forbidden",
    "credentials_invalid": "forbidden",
    "session_required": "invalid",
    "invalid_request": "invalid",
    "body_too_large": "invalid",
    "body_encoded": "invalid",
    "guard_unavailable": "unavailable",
    "guard_draining": "unavailable",
    "stopped": "forbidden",
    "stream_timeout": "unavailable",
}
"""The classes that the APIs have types for."""

_OPENAI_TYPES: Final = {
    "rate": "rate_limit_error",
    "quota": "insufficient_quota",
    "forbidden": "permission_error",
    "missing": "invalid_request_error",
    "invalid": "invalid_request_error",
    "unavailable": "server_error",
}
_ANTHROPIC_TYPES: Final = {
    "rate": "rate_limit_error",
    "quota": "rate_limit_error",
    "forbidden": "permission_error",
    "missing": "not_found_error",
    "invalid": "invalid_request_error",
    "unavailable": "api_error",
}
_BEDROCK_TYPES: Final = {
    "rate": "ThrottlingException",
    "quota": "ServiceQuotaExceededException",
    "forbidden": "AccessDeniedException",
    "missing": "ResourceNotFoundException",
    "invalid": "ValidationException",
    "unavailable": "ServiceUnavailableException",
}
_GEMINI_STATUS: Final = {
    "rate": "RESOURCE_EXHAUSTED",
    "quota": "RESOURCE_EXHAUSTED",
    "forbidden": "PERMISSION_DENIED",
    "missing": "NOT_FOUND",
    "invalid": "INVALID_ARGUMENT",
    "unavailable": "UNAVAILABLE",
}


def _kind(code: Code) -> str:
    return _KINDS[code]


def _guard(denied: Denied) -> dict[str, object]:
    return {**_members(denied), "violated_policies": _violated(denied)}


def _openai(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    return {
        "error": {
            "message": denied.message,
            "type": _OPENAI_TYPES[_kind(denied.code)],
            "param": _param(denied),
            "code": denied.code,
            "guard": _guard(denied),
        }
    }


def _anthropic(denied: Denied, instance: str | None) -> dict[str, object]:
    kind = "billing_error" if denied.status == 402 else _ANTHROPIC_TYPES[_kind(denied.code)]
    details = {"error_code": denied.code, **_guard(denied)}
    named = {} if instance is None else {"request_id": instance}
    return {"type": "error", "error": {"type": kind, "message": denied.message, "details": details}, **named}


def _gemini(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    information = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": denied.code.upper(),
        "domain": "asgi-llm-guard",
        "guard": _guard(denied),
    }
    return {
        "error": {
            "code": denied.status,
            "message": denied.message,
            "status": _GEMINI_STATUS[_kind(denied.code)],
            "details": [information],
        }
    }


def _interactions(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    return {"error": {"code": denied.code, "message": denied.message, "guard": _guard(denied)}}


def _mistral(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    return {
        "object": "error",
        "message": denied.message,
        "type": _OPENAI_TYPES[_kind(denied.code)],
        "param": _param(denied),
        "code": denied.code,
        "guard": _guard(denied),
    }


def _cohere(denied: Denied, instance: str | None) -> dict[str, object]:
    named = {} if instance is None else {"id": instance}
    return {**named, "message": denied.message, "code": denied.code, "guard": _guard(denied)}


def _bedrock(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    return {"message": denied.message, "code": denied.code, "guard": _guard(denied)}


def _ollama(denied: Denied, instance: str | None) -> dict[str, object]:  # noqa: ARG001 - one signature for all shapes
    return {"error": denied.message, "code": denied.code, "guard": _guard(denied)}


def _problem(denied: Denied, instance: str | None) -> dict[str, object]:
    """RFC 9457, with the registered types of the RateLimit draft where their status and meaning are ours."""
    kind = _kind(denied.code)
    if denied.status == 429 and kind in ("rate", "quota"):
        about, title = f"{_TYPES}quota-exceeded", "Quota exceeded"
    elif denied.status == 503 and kind == "unavailable":
        about, title = f"{_TYPES}temporary-reduced-capacity", "Temporarily reduced capacity"
    else:
        about, title = "about:blank", _phrase(denied.status)
    occurrence = {} if instance is None else {"instance": quote(instance, safe=_URI_SAFE, errors="replace")}
    return {
        "type": about,
        "title": title,
        "status": denied.status,
        "detail": denied.message,
        **occurrence,
        "violated-policies": _violated(denied),
        "code": denied.code,
        **_members(denied),
    }


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # a status that a service made up
        return "Refused"


Shape = Callable[[Denied, str | None], dict[str, object]]

_SHAPES: Final[Mapping[str, Shape]] = {
    "openai": _openai,
    "azure": _openai,
    "openrouter": _openai,
    "vllm": _openai,
    "anthropic": _anthropic,
    "gemini": _gemini,
    "gemini_interactions": _interactions,
    "mistral": _mistral,
    "cohere": _cohere,
    "bedrock": _bedrock,
    "ollama": _ollama,
}


def _family(dialect: str | None) -> str | None:
    """`openai` for `openai_responses`; compatible servers count as what they are compatible with."""
    if dialect is None:
        return None
    family = dialect.partition("_")[0]
    return "openai" if _SHAPES.get(family) is _openai else family


def _shape(dialect: str | None) -> Shape | None:
    return _SHAPES.get(dialect or "") or _SHAPES.get(_family(dialect) or "")


# ------------------------------------------------------------------------------------- events

Event = Callable[[Denied, str | None], tuple[str | None, dict[str, object]]]
"""The name of a server-sent event, if it has one, and what it says."""


def _last_event(denied: Denied, dialect: str | None) -> tuple[str | None, dict[str, object]]:
    return "error", (_shape(dialect) or _problem)(denied, None)


def _unnamed(denied: Denied, dialect: str | None) -> tuple[str | None, dict[str, object]]:
    return None, (_shape(dialect) or _problem)(denied, None)


def _of_responses(denied: Denied, dialect: str | None) -> tuple[str | None, dict[str, object]]:  # noqa: ARG001 - see Event
    flat = {"type": "error", "code": denied.code, "message": denied.message, "param": _param(denied)}
    return "error", {**flat, **_openai(denied, None)}


def _of_interactions(denied: Denied, dialect: str | None) -> tuple[str | None, dict[str, object]]:  # noqa: ARG001 - see Event
    return "error", {"event_type": "error", **_interactions(denied, None)}


def _of_cohere(denied: Denied, dialect: str | None) -> tuple[str | None, dict[str, object]]:  # noqa: ARG001 - see Event
    """For both versions of the API, whose events name their kind by other members."""
    told = {"error": denied.message, "code": denied.code, "guard": _guard(denied), "finish_reason": "ERROR"}
    older = {"event_type": "stream-end", "is_finished": True, "response": {"text": "", "finish_reason": "ERROR"}}
    return "message-end", {"type": "message-end", "delta": told, **told, **older}


_EVENTS: Final[Mapping[str, Event]] = {
    "openai": _unnamed,
    "openai_responses": _of_responses,
    "gemini": _unnamed,
    "gemini_interactions": _of_interactions,
    "cohere": _of_cohere,
}
"""Of a dialect, or else of its family."""


# ------------------------------------------------------------------------------------- accept


def _prefers_problem(accept: bytes | None) -> bool:
    """Whether the client names problem documents, and wants JSON no more than them.

    Wildcards ask for nothing in particular; they only count as a wish for plain JSON.
    Source: RFC 9110 §12.5.1.
    """
    if accept is None or b"problem+json" not in accept.lower():
        return False
    weights: dict[str, float] = {}
    for part in accept.decode("latin-1").lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weights[name] = _weight(parameters)
    plain = next((weights[name] for name in ("application/json", "application/*", "*/*") if name in weights), 0.0)
    problem = weights.get("application/problem+json", 0.0)
    return problem > 0 and problem >= plain


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0 <= weight <= 1 else 0.0
    return 1.0
