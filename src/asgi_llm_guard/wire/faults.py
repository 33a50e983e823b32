"""What errors mean where a provider says no more than a status and a text."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.wire.base import ErrorKind
from asgi_llm_guard.wire.overflow import says_overflow
from asgi_llm_guard.wire.shape import pick

__all__ = ["is_overflow", "kind_of_status", "may_be_overflow", "status_error"]

_STATUSES: Final[dict[int, ErrorKind]] = {
    401: "auth",
    402: "quota",
    403: "auth",
    407: "auth",
    408: "other",
    429: "rate_limit",
    502: "overload",
    503: "overload",
    529: "overload",
}
_UNUSABLE: Final = frozenset({None, 400, 413, 422})


def is_overflow(status: int | None, message: object) -> bool:
    """Whether an error says that the input is larger than the model's window; `status=None`: in mid-stream."""
    return may_be_overflow(status) and says_overflow(message)


def may_be_overflow(status: int | None) -> bool:
    """Whether errors with this status may say so; `None`: in mid-stream."""
    return status in _UNUSABLE


def kind_of_status(status: int | None) -> ErrorKind:
    """What an error is that says no more than its status; `None`: in mid-stream."""
    if status is None:
        return "other"
    return _STATUSES.get(status) or ("invalid" if 400 <= status < 500 else "other")


def status_error(obj: object) -> int | None:
    """The status of an exception that a library made of an error response; `None`: of anything else."""
    status = pick(obj, "status_code") if isinstance(obj, BaseException) else None
    return status if type(status) is int else None
