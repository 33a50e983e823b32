"""Errors as OpenAI's API and the servers that speak it send them: what kind each one is.

Source: https://platform.openai.com/docs/guides/error-codes (2026-11); those of other servers stand beside the
words they use.
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.wire.base import ErrorKind
from asgi_llm_guard.wire.faults import is_overflow, kind_of_status, may_be_overflow
from asgi_llm_guard.wire.shape import pick

__all__ = ["classify", "error_of", "is_error"]

_KINDS: Final[dict[object, ErrorKind]] = {
    # codes and types of OpenAI
    "context_length_exceeded": "context_overflow",
    "rate_limit_exceeded": "rate_limit",
    "slow_down": "rate_limit",
    "insufficient_quota": "quota",
    "credit_balance_exhausted": "quota",
    "organization_spend_limit_exceeded": "quota",
    "organization_usage_limit_exceeded": "quota",
    "project_spend_limit_exceeded": "quota",
    "server_is_overloaded": "overload",
    "invalid_api_key": "auth",
    # types of compatible servers
    "authentication_error": "auth",
    "permission_error": "auth",
    "rate_limit_error": "rate_limit",
    "rate_limited": "rate_limit",
    "overloaded_error": "overload",
    "RESOURCE_EXHAUSTED": "rate_limit",
    "UNAVAILABLE": "overload",
}


def error_of(value: object) -> object:
    """The error in an answer, under `error` or without an envelope, alone in a list or not; `None`: there is none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if pick(value, "object") == "error":
        return pick(value, "error") or value
    return pick(value, "error") or None


def classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is; `status` is `None` in the middle of a stream."""
    error = error_of(value) or value
    code, kind = pick(error, "code"), pick(error, "type") or pick(error, "status")
    message = error if isinstance(error, str) else pick(error, "message")
    text = message[:4096].lower() if isinstance(message, str) else ""
    if status is None and type(code) is int:  # OpenRouter and vLLM put the status there
        status = code
    if code == "string_above_max_length" or "string too long" in text:
        return "invalid"  # a text that is too long for its field; reads much like an overflow
    if is_overflow(status, message) or (code == "context_length_exceeded" and may_be_overflow(status)):
        return "context_overflow"
    for word in (code, kind):
        if isinstance(word, str) and word in _KINDS:
            return _KINDS[word]
    if status == 402 and pick(pick(error, "metadata"), "limit_source") == "openrouter_in_flight_budget":
        return "rate_limit"
    found = kind_of_status(status)
    if found == "other" and kind == "invalid_request_error" and status not in range(400, 500):
        return "invalid"
    return found


def is_error(value: object) -> bool:
    """Whether an object that may be anything is an error of this API.

    A function's own `{"error": "…"}` is none: it says nothing of the calls that were made.
    """
    error = pick(value, "error")
    return (
        pick(value, "type") != "error"  # Anthropic's envelope
        and pick(value, "event_type") is None  # an event of Gemini's Interactions
        and pick(value, "object") in (None, "error")
        and isinstance(error, dict)
        and isinstance(error.get("message"), str)
        and ("type" in error or ("code" in error and "status" not in error))  # `status`: Google's
    )
