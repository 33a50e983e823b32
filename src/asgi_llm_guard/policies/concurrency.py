"""How many requests or calls one subject may have open at the same time."""

from __future__ import annotations

from asgi_llm_guard.claims import Claim, Durable, Meter, OnOutage, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.policies._scoped import NOTHING, Counts, Per, ScopedPolicy, Subject
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import whole
from asgi_llm_guard.windows import Slots

__all__ = ["Concurrency"]


class Concurrency(ScopedPolicy[Verdict]):
    """At most `limit` open at once: a slot is held until the response or the call has ended.

    Args:
        limit: a whole number, also as text; 0 blocks everything.
        per: whose requests share the slots. Where the scope is absent, no slot is taken.
        counts: `requests` takes one slot for a request and all its calls, `calls` one for each call.
        on_outage: what becomes of requests while the store does not answer (`docs/outages.md`).
        durable: what must have a slot before it counts as granted (`docs/storage.md`).

    Raises:
        ConfigurationError: a setting is malformed.
    """

    __slots__ = ("_limit",)

    def __init__(
        self,
        limit: int | str,
        *,
        per: Per = "user",
        name: str | None = None,
        status: int | None = None,
        counts: Counts = "requests",
        on_outage: OnOutage = "local",
        durable: Durable | None = None,
    ) -> None:
        super().__init__(
            per=per,
            name=f"{per}_concurrency" if name is None else name,
            counts=counts,
            status=status,
            on_outage=on_outage,
            durable=durable,
        )
        self._limit = whole(limit, name=f"{self.name}.limit")

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """One slot for each subject."""
        key = self._identify(context, call)
        verdict = self._memo.get(key)
        if verdict is None:
            subjects = self._subjects(context, call)
            claims = tuple(Claim(self._slots(subject), 1) for subject in subjects)
            verdict = self._keep(key, Verdict(claims) if claims else NOTHING, subjects)
        return verdict

    def _meters_of(self, scope: str, subject: Subject) -> tuple[Meter, ...]:  # noqa: ARG002 - it counts in one
        return (self._slots(subject),)

    def _slots(self, subject: Subject) -> Meter:
        return self._meter(
            self.per,
            subject,
            unit=Unit.SLOTS,
            rule=Rule.SLOTS,
            limit=self._limit,
            window=Slots(),
            key_suffix=("calls",) if self.counts == "calls" else (),  # what counts requests is another meter
        )
