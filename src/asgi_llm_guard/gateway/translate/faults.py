"""Errors of one API as errors of the other: the kind stays, in the words and with the status that SDKs know it by."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.wire import anthropic, openai_errors
from asgi_llm_guard.wire.base import ErrorKind
from asgi_llm_guard.wire.overflow import says_overflow
from asgi_llm_guard.wire.shape import pick

__all__ = ["BROKEN_OFF", "UNREADABLE", "as_anthropic", "as_openai", "error_to_anthropic", "error_to_openai"]

UNREADABLE: Final = "the provider sent something that could not be read"
BROKEN_OFF: Final = "the provider's answer broke off"

_LONGEST: Final = 4096
_OVERFLOW: Final = "prompt is too long: "
_NOT_INVALID: Final = frozenset({401, 402, 403, 407, 408, 429})

_OPENAI: Final[dict[ErrorKind, tuple[int, str, str | None]]] = {
    "rate_limit": (429, "rate_limit_error", "rate_limit_exceeded"),
    # Not 429 as at OpenAI itself: most clients would try again.
    "quota": (402, "insufficient_quota", "insufficient_quota"),
    "overload": (503, "server_error", "server_is_overloaded"),
    "context_overflow": (400, "invalid_request_error", "context_length_exceeded"),
    "invalid": (400, "invalid_request_error", None),
    "auth": (401, "authentication_error", "invalid_api_key"),
    "other": (500, "server_error", None),
}
_ANTHROPIC: Final[dict[ErrorKind, tuple[int, str]]] = {
    "rate_limit": (429, "rate_limit_error"),
    "quota": (402, "billing_error"),
    "overload": (529, "overloaded_error"),
    "context_overflow": (400, "invalid_request_error"),
    "invalid": (400, "invalid_request_error"),
    "auth": (401, "authentication_error"),
    "other": (500, "api_error"),
}
_BY_STATUS: Final = {403: "permission_error", 404: "not_found_error", 413: "request_too_large", 504: "timeout_error"}


def error_to_openai(status: int | None, value: object) -> tuple[int, dict[str, object]]:
    """Anthropic's error as OpenAI's, with its status; `status`: `None` in the middle of a stream."""
    return as_openai(anthropic.classify(status, value), _message(status, value), status)


def error_to_anthropic(status: int | None, value: object) -> tuple[int, dict[str, object]]:
    """OpenAI's error, or that of a server like it, as Anthropic's, with its status."""
    return as_anthropic(openai_errors.classify(status, value), _message(status, value), status)


def as_openai(kind: ErrorKind, message: str, status: int | None = None) -> tuple[int, dict[str, object]]:
    """An error of this kind for OpenAI's clients. `status`: what it came with."""
    usual, name, code = _OPENAI[kind]
    if kind == "auth" and status == 403:
        name, code = "permission_error", None
    error = {"message": message, "type": name, "param": None, "code": code}
    return _status(kind, status, usual), {"error": error}


def as_anthropic(kind: ErrorKind, message: str, status: int | None = None) -> tuple[int, dict[str, object]]:
    """An error of this kind for Anthropic's clients. `status`: what it came with."""
    usual, name = _ANTHROPIC[kind]
    told = _status(kind, status, usual)
    if told != usual:
        name = _BY_STATUS.get(told, name)
    if kind == "context_overflow" and not says_overflow(message):
        message = _OVERFLOW + message  # there is no code for it
    return told, {"type": "error", "error": {"type": name, "message": message}}


def _status(kind: ErrorKind, status: int | None, usual: int) -> int:
    """What the error came with, where that tells more and does not mean another kind."""
    keeps = (
        (kind == "invalid" and status is not None and 400 <= status < 500 and status not in _NOT_INVALID)
        or (kind == "auth" and status == 403)
        or (kind == "other" and status in (408, 504))
    )
    return status if keeps and status is not None else usual


def _message(status: int | None, value: object) -> str:
    error = openai_errors.error_of(value) or value
    for message in (error, pick(error, "message"), pick(error, "detail")):
        if isinstance(message, str) and message:
            return message[:_LONGEST]
    return "the provider failed" if status is None else f"the provider answered with status {status} and no message"
