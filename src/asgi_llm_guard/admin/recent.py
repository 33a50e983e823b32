"""The latest refusals of this process, with all that was known when they were made."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.denials.receipts import capacity, refusing
from asgi_llm_guard.events import Event, Refused

__all__ = ["RecentRefusals", "Refusing", "Told"]


class Refusing(msgspec.Struct, frozen=True, kw_only=True):
    """One limit that a call did not fit under."""

    policy: str
    scope: str
    subject: str
    unit: str
    requested: int
    limit: int | None
    used: int
    held: int
    resets_at_ms: int | None


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One refusal. Unlike what the caller was answered, it names every subject and figure."""

    at_ms: int
    policy: str
    code: str
    status: int
    message: str
    scope: str
    caller: str | None = None
    user: str | None = None
    departments: tuple[str, ...] = ()
    agent: str | None = None
    session: str | None = None
    route: str | None = None
    request_id: str | None = None
    model: str | None = None
    retry: bool
    retry_after_s: int | None = None
    fits_max_tokens: int | None = None
    violated: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    limits: tuple[Refusing, ...] = ()


class RecentRefusals:
    """An observer that keeps the last so many refusals. Quick, and safe to tell from any thread."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[tuple[int, Refused]] = deque(maxlen=most)

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, Refused):
            self._kept.append((self._clock.now_ms(), event))

    def latest(self, most: int, *, policy: str | None = None) -> Sequence[Told]:
        """The newest first."""
        found = []
        for at_ms, event in reversed(self._kept.copy()):
            if policy is None or event.denied.policy == policy:
                found.append(_told(at_ms, event))
                if len(found) == most:
                    break
        return found


def _told(at_ms: int, event: Refused) -> Told:
    context, denied = event.context, event.denied
    return Told(
        at_ms=at_ms,
        policy=denied.policy,
        code=denied.code,
        status=denied.status,
        message=denied.message,
        scope=denied.scope,
        caller=context.caller,
        user=context.user,
        departments=context.departments,
        agent=context.agent,
        session=context.session,
        route=context.route,
        request_id=context.request_id,
        model=None if event.call is None else event.call.requested or event.call.model,
        retry=denied.retry,
        retry_after_s=denied.retry_after_s,
        fits_max_tokens=denied.fits_max_tokens,
        violated=denied.violated,
        details=denied.details,
        limits=tuple(
            Refusing(
                policy=receipt.claim.meter.policy,
                scope=receipt.claim.meter.scope,
                subject=receipt.claim.meter.subject,
                unit=receipt.claim.meter.unit.value,
                requested=receipt.claim.amount,
                limit=None if receipt.claim.meter.limit is None else capacity(receipt.claim.meter),
                used=receipt.used,
                held=receipt.held,
                resets_at_ms=receipt.resets_at_ms,
            )
            for receipt in refusing(denied.receipts)
        ),
    )
