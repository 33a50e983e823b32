"""What the pages stand on: the guard's ledger, administration data, counters and open calls, behind one door."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from asgi_llm_guard.admin.budgets import Budget, budget_of
from asgi_llm_guard.admin.options import AdminOptions
from asgi_llm_guard.admin.recent import RecentRefusals
from asgi_llm_guard.admin.sessions import Failures, Session, Sessions
from asgi_llm_guard.admin.shown import cut
from asgi_llm_guard.control import Actor, AuditQuery, Control
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.ledger import Ledger
from asgi_llm_guard.policies.base import DepartmentAware
from asgi_llm_guard.standing import known_scopes
from asgi_llm_guard.storage.shared import ListsCalls, OpenCall

__all__ = ["MOST_OPEN", "MOST_SUBJECTS", "Desk"]

_log = logging.getLogger("asgi_llm_guard")

MOST_OPEN: Final = 1_000
MOST_SUBJECTS: Final = 200
_LEFT: Final = "logout"


@runtime_checkable
class _Readable(Protocol):
    """A book of quotas that can be read, as a `QuotaBook`."""

    @property
    def snapshot(self) -> tuple[int, Mapping[str, Any]]: ...


class Desk:
    """One administration page's guard and settings."""

    def __init__(self, guard: Guard, options: AdminOptions) -> None:
        self.guard = guard
        self.options = options
        self.sessions = Sessions(options)
        self.failures = Failures(options.failed_logins)
        self.recent = RecentRefusals(options.refusals_kept, guard.clock)
        guard.observe(self.recent)

    @property
    def now_ms(self) -> int:
        return self.guard.clock.now_ms()

    @property
    def ledger(self) -> Ledger | None:
        return self.guard.ledger

    @property
    def control(self) -> Control | None:
        return self.guard.control

    async def note(
        self, verb: str, target: str, *, actor: Actor, reason: str = "", new: Mapping[str, object] | None = None
    ) -> None:
        """Write into the audit what was done that is no change of administration data."""
        if self.control is not None:
            await self.control.note(verb, target, actor=actor, reason=reason, new=new)
        _log.info("administration: %s of %s by %s", verb, cut(target), cut(actor.name))

    async def note_refused(self, *, verb: str, target: str, name: str, role: str, address: str, why: str) -> None:
        """Write into the audit what somebody tried who may not. A store that does not answer hinders no refusal."""
        _log.warning("administration: %s refused to %s (%s) from %s: %s", cut(verb), cut(name), role, cut(address), why)
        if self.control is None:
            return
        try:
            actor = Actor(name=name, role=role, address=address)
            await self.control.note(verb, target, actor=actor, reason="", refused=why)
        except StorageError as error:
            _log.error("administration: a refused try is not in the audit: %s", error)

    # -------------------------------------------------------------------------- sessions

    async def end(self, session: Session, actor: Actor) -> bool:
        """End a session: at once in this process, and in all others by the row of the audit that says so; whether that
        could be written."""
        self.sessions.end(session)
        try:
            await self.note(_LEFT, f"session:{session.mark}", actor=actor)
        except StorageError as error:
            _log.error("administration: other processes do not know of a log-out: %s", error)
            return False
        return self.control is not None

    async def has_ended(self, session: Session) -> bool:
        """Whether somebody has left the session, in whichever process.

        While the administration data do not answer, those are taken for going on of which nobody knows better: what is
        looked at in an outage is its health, and nothing can be changed meanwhile.
        """
        if self.control is None:
            return False  # what this process knows, `Sessions.read` has looked at
        try:
            left = await self.control.audit(AuditQuery(verb=_LEFT, target=f"session:{session.mark}", limit=1))
        except StorageError as error:
            _log.warning("administration: nobody knows who has logged out elsewhere: %s", error)
            return False
        if left:
            self.sessions.end(session)
        return bool(left)

    # --------------------------------------------------------------------------- reading

    async def open_calls(self) -> Sequence[OpenCall] | None:
        """The calls that are open over all processes, newest first; `None`: this storage cannot list them."""
        storage = self.guard.storage
        return await storage.open_calls(MOST_OPEN) if isinstance(storage, ListsCalls) else None

    def quotas(self) -> Mapping[str, Any]:
        """The quotas that hold now, each as a `DepartmentQuota`: what code, files and administration data say together."""
        found: dict[str, Any] = {}
        for policy in self.guard.policies:
            if isinstance(policy, DepartmentAware) and isinstance(policy.book, _Readable):
                for name, quota in policy.book.snapshot[1].items():
                    found.setdefault(name, quota)
        return found

    async def budgets(self, subjects: Iterable[tuple[str, str]]) -> tuple[list[Budget], int]:
        """Every limit in money and tokens of these scopes and subjects, the fullest first; and of how many subjects none
        was looked at: of those after the first `MOST_SUBJECTS`."""
        scopes = known_scopes(self.guard.policies)
        wanted = [each for each in dict.fromkeys(subjects) if each[0] in scopes]
        wanted, others = wanted[:MOST_SUBJECTS], wanted[MOST_SUBJECTS:]
        found = await asyncio.gather(*(self.guard.meters_of(scope, subject) for scope, subject in wanted))
        now_ms = self.now_ms
        budgets = [
            budget
            for each in found
            for meter, reading in each
            if (budget := budget_of(meter, reading, now_ms)) is not None
        ]
        unique = {budget.key: budget for budget in budgets}
        return sorted(unique.values(), key=lambda budget: -budget.share), len(others)
