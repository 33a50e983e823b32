"""What is told of a decision: to callers, why they are refused; to observers, everything."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from asgi_llm_guard.claims import Granted, Refused, Rule
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.denials import deny, refuse
from asgi_llm_guard.denials.approval import check_approval_url, with_approval
from asgi_llm_guard.events import Admission, Event, Observer, ShadowMisfit, emit
from asgi_llm_guard.events import Refused as RefusedEvent
from asgi_llm_guard.plan import Asked

__all__ = ["Telling", "Untold"]

Untold = list[tuple[Call | None, Denied]]
"""Calls and their refusals, which observers were not told yet."""


class Telling:
    """How one guard tells what it has decided.

    Args:
        disclose: `owned`: refusals show limits and counts of scopes that the caller owns; `all`: of all.
        statuses: HTTP statuses by code or rule, in place of the table.
        approval_url: where more may be asked for; `None`: nowhere.
        jitter: how many seconds a wait of so many is made longer; at random by default.

    Raises:
        ConfigurationError: the URL is none, or has unknown fields.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        observers: Sequence[Observer],
        disclose: Literal["owned", "all"],
        statuses: Mapping[Code | Rule, int],
        approval_url: str | None,
        jitter: Callable[[int], int] | None,
    ) -> None:
        self.clock = clock
        self.observers = tuple(observers)
        self.disclose: Literal["owned", "all"] = disclose
        self.statuses = statuses
        self._approval_url = check_approval_url(approval_url)
        self._jitter = jitter or _jitter

    # -------------------------------------------------------------------------------- observers

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` every event from now on, until what is given is called."""
        self.observers = (*self.observers, observer)

        def stop() -> None:
            self.observers = tuple([each for each in self.observers if each is not observer])

        return stop

    def tell(self, event: Event) -> None:
        """Tell every observer."""
        emit(self.observers, event)

    def admitted(
        self, context: Context, call: Call | None, granted: Granted, call_id: str | None, *, degraded: bool
    ) -> None:
        """Tell the observers of an admission, and of what would have refused it if it were not in shadow."""
        emit(self.observers, Admission(context, call, granted, degraded, call_id))
        for receipt in granted.receipts:
            meter = receipt.claim.meter
            if not meter.enforce and not receipt.fits and meter.limit is not None:
                misfit = ShadowMisfit(
                    context, call, meter.policy, receipt.claim.amount, receipt.used, receipt.held, meter.limit
                )
                emit(self.observers, misfit)

    def shadow_refused(self, asked: Asked, context: Context, call: Call | None) -> None:
        """Tell the observers which policies would have refused by themselves if they were not in shadow."""
        for refusal in asked.shadow_refusals:
            emit(self.observers, ShadowMisfit(context, call, refusal.policy, 1, 0, 0, 0))

    # --------------------------------------------------------------------------------- refusals

    def refuse(self, refusal: Refusal, now_ms: int) -> Denied:
        """The decision for a refusal that needed no storage. Nobody is told."""
        return refuse(refusal, statuses=self.statuses, now_ms=now_ms, disclose=self.disclose)

    def deny(self, answer: Refused, call: Call | None) -> Denied:
        """The decision for what the storage has refused. Nobody is told."""
        return deny(answer, call, disclose=self.disclose, jitter=self._jitter, statuses=self.statuses)

    def with_models(self, denied: Denied, models: Sequence[str]) -> Denied:
        """It says which cheaper models would have fitted."""
        return msgspec.structs.replace(denied, details=(*denied.details, f"would fit: {', '.join(models)}"))

    def denied_any(
        self, context: Context, refused: Sequence[tuple[Call | None, Denied]], *, told: bool = True
    ) -> list[Denied]:
        """The decision for a call that none of several could answer, each with its refusal: told once for each policy."""
        reasons: set[tuple[str, str, str]] = set()
        answer = []
        for call, denied in refused:
            why = denied.policy, denied.scope, denied.code
            answer.append(self.denied(context, call, denied, told=told and why not in reasons))
            reasons.add(why)
        return answer

    def denied(self, context: Context, call: Call | None, denied: Denied, *, told: bool = True) -> Denied:
        """A decision as it is given: it says where more may be asked for, and with `told` the observers are told."""
        if self._approval_url is not None:
            denied = with_approval(denied, self._approval_url)
        if told and self.observers:
            emit(self.observers, RefusedEvent(context, call, denied))
        return denied


def _jitter(wait_s: int) -> int:
    return random.randint(0, wait_s // 10)  # noqa: S311 - spreads retries; nothing secret
