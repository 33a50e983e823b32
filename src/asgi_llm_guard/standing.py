"""How somebody stands: every limit that holds for them, with what is used, held and left. For people and programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import Meter, Reading, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.denials.receipts import capacity
from asgi_llm_guard.denials.wording import period
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raises
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import Metered, Policy

__all__ = [
    "ResetMeter",
    "Standing",
    "StandingRow",
    "claimed_meters",
    "known_scopes",
    "meters_of",
    "reset_meter",
    "standing_of",
]


class StandingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One limit."""

    policy: str
    scope: str
    subject: str
    unit: Unit
    """Amounts are in this unit: nano-USD, tokens, calls or slots."""
    window: str | None
    """How long it lasts: `daily`, `7d`; `None`: there is no window (slots)."""
    limit: int | None
    """What `used + held` may come to, raises included; `None`: it is counted, without a limit."""
    used: int
    held: int
    """By calls that are open."""
    remaining: int | None
    """Never below 0."""
    resets_at_ms: int | None
    enforce: bool
    """`False`: it only watches (shadow)."""
    owned: bool
    """It is the caller's own: they may be shown the figures."""
    raised_until_ms: int | None = None
    """When the first of the raises ends that it has; `None`: it is not raised."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """All limits that hold for one context."""

    rows: tuple[StandingRow, ...]
    """In the order of the policies."""
    now_ms: int
    refused_by: str | None = None
    """The policy that refuses by itself whatever is left: a forbidden model, a stop; `None`: none does."""
    message: str = ""
    """What it says."""


class ResetMeter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter that was set to zero, as it was before."""

    key: str
    policy: str
    scope: str
    subject: str
    unit: Unit
    window: str | None
    used: int
    held: int
    """Stays held, and is charged when it settles."""


def claimed_meters(policies: Iterable[Policy], context: Context, call: Call | None, now_ms: int) -> list[Meter]:
    """Every meter that a request, and with `call` such a call, would claim on, each once. Ids that are counted are
    none of them."""
    meters: dict[str, Meter] = {}
    for policy in policies:  # one by one: one that refuses by itself does not hide the others
        asked = ask((policy,), context, call, now_ms)
        for claim in (*asked.requests, *asked.calls):
            if claim.meter.unit is not Unit.IDS:
                meters.setdefault(claim.meter.key, claim.meter)
    return list(meters.values())


_CALLER_SCOPES: Final = frozenset({"session"})


def known_scopes(policies: Iterable[Policy]) -> tuple[str, ...]:
    """The scopes in which these policies count."""
    scopes = [scope for policy in policies if isinstance(policy, Metered) for scope in policy.scopes()]
    return tuple(dict.fromkeys(scopes))


def meters_of(policies: Sequence[Policy], scope: str, subject: str, caller: str | None) -> list[Meter]:
    """Every meter of one subject, each once, over all policies.

    Raises:
        ConfigurationError: no policy counts in that scope, the subject is missing, or a session's caller is.
    """
    scopes = known_scopes(policies)
    if scope not in scopes:
        raise ConfigurationError(
            f"scope: no policy counts per {scope!r}; these are counted: {', '.join(scopes) or 'none'}"
        )
    if (scope == "global") != (not subject):
        wanted = "no subject: there is one for all" if scope == "global" else f"the name of a {scope}"
        raise ConfigurationError(f"subject: scope {scope!r} takes {wanted}, got {subject!r}")
    if scope in _CALLER_SCOPES and not caller:
        raise ConfigurationError(
            "caller: a session is one of its caller's; say whose it is ('anonymous' for those who are not verified)"
        )
    if caller is not None and scope not in _CALLER_SCOPES:
        raise ConfigurationError(f"caller: goes with scope 'session' only, got {caller!r} with {scope!r}")
    meters: dict[str, Meter] = {}
    for policy in policies:
        if isinstance(policy, Metered):
            for meter in policy.meters_of(scope, subject, caller=caller):
                meters.setdefault(meter.key, meter)
    return list(meters.values())


def standing_of(
    meters: Sequence[Meter], readings: Sequence[Reading], raises: Raises | None, now_ms: int
) -> list[StandingRow]:
    """A row for each of these meters, which are not raised yet."""
    rows = []
    for meter, reading in zip(meters, readings, strict=True):
        laid = [] if raises is None else raises.of(meter, now_ms)
        raised = meter if raises is None else raises.meter(meter, now_ms)
        limit = None if raised.limit is None else capacity(raised)
        rows.append(
            StandingRow(
                policy=meter.policy,
                scope=meter.scope,
                subject=meter.subject,
                unit=meter.unit,
                window=period(meter.window),
                limit=limit,
                used=reading.used,
                held=reading.held,
                remaining=None if limit is None else max(0, limit - reading.used - reading.held),
                resets_at_ms=reading.resets_at_ms,
                enforce=meter.enforce,
                owned=meter.owned,
                raised_until_ms=min((each.until_ms for each in laid), default=None),
            )
        )
    return rows


def reset_meter(meter: Meter, reading: Reading) -> ResetMeter:
    """What is set to zero, as it was."""
    return ResetMeter(
        key=meter.key,
        policy=meter.policy,
        scope=meter.scope,
        subject=meter.subject,
        unit=meter.unit,
        window=period(meter.window),
        used=reading.used,
        held=reading.held,
    )
