"""In which way an attempt failed: the classes that retries, fallbacks and cooldowns go by. Pure.

Those of `wire.base.ErrorKind`, and what has no wire format: no answer, no good one, or a refusal that names a reason
which other deployments may not share.
"""

from __future__ import annotations

import re
from typing import Final, Literal, get_args

import msgspec

from asgi_llm_guard.wire.base import ErrorKind
from asgi_llm_guard.wire.faults import kind_of_status, status_error
from asgi_llm_guard.wire.shape import pick

__all__ = ["ERROR_CLASSES", "ErrorClass", "class_of", "class_of_error"]

_Own = Literal[
    "timeout",  # no answer in time
    "connection",  # no answer: refused, reset, no such host, TLS
    "empty",  # an answer without text and without a tool call, or one that is none
    "not_found",  # the provider does not know the model, or the path
    "content_policy",  # the provider will not answer this
]
ErrorClass = ErrorKind | _Own

ERROR_CLASSES: Final[frozenset[str]] = frozenset({*get_args(ErrorKind), *get_args(_Own)})

_TIMEOUTS: Final = frozenset({408, 504})
_LONGEST: Final = 16_384
"""Bytes of an error's body that are looked at."""
_DEPTH: Final = 8
"""Exceptions may be wrapped so often."""

_POLICY_CODES: Final = frozenset(
    {"content_filter", "content_policy_violation", "moderation_blocked", "responsibleaipolicyviolation"}
)
_POLICY_TEXTS: Final = re.compile(
    "content filtering policy"  # Anthropic
    "|content management policy"  # Azure
    "|rejected (?:as a result of|by) (?:our|the) safety system"  # OpenAI
    "|requires moderation on .{0,200} your input was flagged",  # OpenRouter
    re.DOTALL,
)
_RATE_TEXT: Final = re.compile(r"\b429\b|rate.?limit|too many requests", re.IGNORECASE)


def class_of(status: int | None, kind: ErrorKind | None = None, body: bytes = b"") -> ErrorClass:
    """What an error answer is: by what its dialect says (`kind`; `None`: nothing), its status and its body.

    `status`: `None` in the middle of a stream.
    """
    found = kind_of_status(status) if kind is None else kind
    if found in ("invalid", "auth", "other") and _names_policy(body):
        return "content_policy"
    if status == 404 and found == "invalid":
        return "not_found"
    if status in _TIMEOUTS and found in ("invalid", "other", "overload"):
        return "timeout"
    return found


def class_of_error(error: BaseException) -> ErrorClass:
    """What an exception of a client library means. An answer that it wraps says more than that it was wrapped:
    a 429 that comes as a connection error is one."""
    seen: BaseException | None = error
    texts = []
    for _ in range(_DEPTH):
        if seen is None:
            break
        status = status_error(seen)
        if status is not None and status >= 400 and kind_of_status(status) != "other":
            return class_of(status)
        texts.append(str(seen)[:_LONGEST])
        seen = seen.__cause__ or seen.__context__
    if any(map(_RATE_TEXT.search, texts)):
        return "rate_limit"
    status = status_error(error)
    if status is not None and status >= 400:
        return class_of(status)
    return "timeout" if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower() else "connection"


def _names_policy(body: bytes) -> bool:
    if not body:
        return False
    try:
        value = msgspec.json.decode(body[:_LONGEST])
    except (msgspec.DecodeError, UnicodeDecodeError):  # cut, or no JSON
        value = None
    outer = pick(value, "error") or value
    codes = (pick(outer, "code"), pick(pick(outer, "innererror"), "code"))
    if any(isinstance(code, str) and code.lower() in _POLICY_CODES for code in codes):
        return True
    return _POLICY_TEXTS.search(body[:_LONGEST].decode("utf-8", "replace").lower()) is not None
