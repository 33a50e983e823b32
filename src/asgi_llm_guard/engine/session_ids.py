"""How many session ids of one caller may be live: ids are free text, and each has counters of its own."""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.claims import Claim, Meter, Refused, Rule, Unit, meter_key
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.windows import Distinct

__all__ = ["OVERFLOW_SESSION", "SessionIds", "counted_as", "overflows"]

OVERFLOW_SESSION: Final = "\x00overflow"
"""The session that new ids share once a caller has too many: no client can send a control character."""

_METERS_KEPT: Final = 4096


class SessionIds:
    """Claims the id of a session wherever a policy counts by session.

    Args:
        limit, anonymous_limit: live ids for each caller, and for all anonymous ones together.
        ttl_ms: how long an id counts as live after it was last admitted.
    """

    __slots__ = ("_limits", "_meters", "_window")

    def __init__(self, limit: int, anonymous_limit: int, ttl_ms: int) -> None:
        self._limits = (limit, anonymous_limit)
        self._window = Distinct(ttl_ms)
        self._meters: dict[str | None, Meter] = {}

    def claim(
        self, context: Context, call_claims: tuple[Claim, ...], request_claims: tuple[Claim, ...]
    ) -> Claim | None:
        """The claim that bounds the live session ids of a caller, if any policy counts by session."""
        for claim in call_claims:
            if claim.meter.scope == "session":
                break
        else:
            if not any(claim.meter.scope == "session" for claim in request_claims):
                return None
        meter = self._meters.get(context.caller)
        if meter is None:
            if len(self._meters) >= _METERS_KEPT:
                self._meters.clear()
            anonymous = context.caller is None
            subject = ("anonymous",) if context.caller is None else ("caller", context.caller)
            meter = self._meters[context.caller] = Meter(
                key=meter_key("sessions", Unit.IDS, self._window, *subject),
                policy="sessions",
                scope="caller",
                subject=context.caller or "anonymous",
                unit=Unit.IDS,
                rule=Rule.IDS,
                limit=self._limits[anonymous],
                window=self._window,
                owned=not anonymous,
                on_outage="local",
            )
        return Claim(meter, 1, context.session)


def counted_as(context: Context, *, shared: bool) -> Context:
    """The context that policies are asked with; `shared`: its session is one beyond its caller's bound."""
    return msgspec.structs.replace(context, session=OVERFLOW_SESSION) if shared else context


def overflows(answer: Refused | Refusal) -> bool:
    """Whether the caller has too many session ids to open another."""
    return isinstance(answer, Refused) and any(
        receipt.claim.meter.rule is Rule.IDS and not receipt.fits for receipt in answer.states[0]
    )
