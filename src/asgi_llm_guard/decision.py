"""Decisions: what the guard answers. A refusal is a value; the skins turn it into a response or an exception."""

from __future__ import annotations

from typing import Literal

import msgspec

from asgi_llm_guard.claims import Receipt

__all__ = ["Admitted", "Code", "Decision", "Denied", "Refusal"]

Code = Literal[
    "rate_limit_exceeded",
    "concurrency_limit_exceeded",
    "session_iterations_exhausted",
    "quota_exceeded",
    "budget_exhausted",
    "held_by_others",
    "request_exceeds_budget",
    "session_overflow",
    "session_required",
    "model_not_allowed",
    "model_unpriced",
    "model_not_found",
    "feature_not_allowed",
    "invalid_request",
    "credentials_invalid",
    "body_too_large",
    "body_encoded",
    "route_not_listed",
    "guard_unavailable",
    "guard_draining",
    "stopped",
    "stream_timeout",
]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A policy refuses by itself, without asking the storage."""

    policy: str
    code: Code
    message: str
    """For the caller to read; discloses nothing that the caller does not own."""
    scope: str = "global"
    subject: str = ""
    status: int | None = None
    """`None`: by the table in `docs/denials.md`."""
    allowed: tuple[str, ...] = ()
    """Models that would be allowed instead, as they are listed."""
    owned: bool = False
    """The caller owns the scope: they may be told what is `allowed`."""


class Admitted(msgspec.Struct, frozen=True):
    """Everything was granted."""

    receipts: tuple[Receipt, ...]
    now_ms: int


class Denied(msgspec.Struct, frozen=True, kw_only=True):
    """Refused. Nothing was taken."""

    policy: str
    code: Code
    message: str
    status: int
    retry: bool
    """Whether the same request may succeed if it is sent again after `retry_after_s`."""
    retry_after_s: int | None = None
    """Whole seconds, rounded up, jitter included: the longest wait over all refusing claims."""
    scope: str = "global"
    subject: str = ""
    unit: str | None = None
    requested: int | None = None
    """What was asked for, in `unit`."""
    limit: int | None = None
    used: int | None = None
    held: int | None = None
    """`limit`, `used`, `held`: only where they may be shown to the caller."""
    resets_at_ms: int | None = None
    fits_max_tokens: int | None = None
    """The output limit with which the same request would have been admitted, if there is one."""
    violated: tuple[str, ...] = ()
    """Every policy that refused, in order."""
    details: tuple[str, ...] = ()
    """One line for each further refusing claim (`ProviderBudget`: spend and limit of each provider)."""
    approval_url: str | None = None
    """Where to ask for more, if the service has such a place."""
    receipts: tuple[Receipt, ...] = ()
    """The state of every claim. For code, logs and events; never rendered whole."""
    now_ms: int = 0


Decision = Admitted | Denied
