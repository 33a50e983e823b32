"""The HTTP statuses of refusals: the table, and what may be said in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from asgi_llm_guard.claims import Meter, Rule, Unit
from asgi_llm_guard.decision import Code
from asgi_llm_guard.errors import ConfigurationError

__all__ = ["STATUS", "Statuses", "check_status", "check_statuses", "status_of"]

Statuses = Mapping[Code | Rule, int]

STATUS: Final[Mapping[Code, int]] = {
    "rate_limit_exceeded": 429,
    "concurrency_limit_exceeded": 429,
    "session_iterations_exhausted": 429,
    "quota_exceeded": 429,
    "budget_exhausted": 402,
    "held_by_others": 429,
    "request_exceeds_budget": 402,  # for money; 429 for everything else
    "session_overflow": 429,
    "session_required": 400,
    "model_not_allowed": 403,
    "model_unpriced": 403,
    "model_not_found": 404,
    "feature_not_allowed": 403,
    "invalid_request": 400,
    "credentials_invalid": 403,
    "body_too_large": 413,
    "body_encoded": 415,
    "route_not_listed": 403,
    "guard_unavailable": 503,
    "guard_draining": 503,
    "stopped": 403,
    "stream_timeout": 504,
}

#: 408 and 409 are retried by clients whatever the headers say; 401 makes them drop their credentials.
_NEVER: Final = frozenset({401, 408, 409})


def check_status(status: object, *, name: str = "status") -> int:
    """`status`, if a refusal may have it: 400 to 599, but not 401, 408 or 409.

    Raises:
        ConfigurationError: anything else.
    """
    if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599 or status in _NEVER:
        raise ConfigurationError(
            f"{name}: expected a status from 400 to 599 other than 401 (clients drop their credentials), "
            f"408 and 409 (clients retry them), got {status!r}"
        )
    return status


def check_statuses(statuses: Mapping[str, int], *, name: str = "statuses") -> Statuses:
    """Statuses by code or by rule, checked.

    Raises:
        ConfigurationError: an unknown code or rule, or a status that a refusal must not have.
    """
    checked: dict[Code | Rule, int] = {}
    rules = {rule.value: rule for rule in Rule}
    codes: dict[str, Code] = {code: code for code in get_args(Code)}
    for key, status in statuses.items():
        known = codes.get(key) or rules.get(key)
        if known is None:
            raise ConfigurationError(f"{name}: expected one of {', '.join([*rules, *codes])}, got {key!r}")
        checked[known] = check_status(status, name=f"{name}[{str(key)!r}]")
    return checked


def status_of(code: Code, meter: Meter, statuses: Statuses | None) -> int:
    if meter.status is not None:
        return meter.status
    if statuses is not None:
        for key in (code, meter.rule):
            if key in statuses:
                return statuses[key]
    if code == "request_exceeds_budget" and meter.unit is not Unit.NANOUSD:
        return 429
    return STATUS[code]
