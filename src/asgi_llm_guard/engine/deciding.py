"""Who decides: the storage, or this process by itself where the storage does not answer.

What this process may decide, and how it is made good afterwards, say the rules of `outage.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from asgi_llm_guard.claims import Bundle, Ended, Granted, Refused
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.engine.data_loss import DataLoss
from asgi_llm_guard.engine.holds import Asking, Hold
from asgi_llm_guard.engine.plans import Plans, renamed
from asgi_llm_guard.engine.settling import Settling
from asgi_llm_guard.engine.store import Store
from asgi_llm_guard.engine.waiters import Answer, Waiters
from asgi_llm_guard.errors import DataLost, StorageError

__all__ = ["Deciding"]

_UNAVAILABLE: Final = Refusal(
    policy="guard",
    code="guard_unavailable",
    message="The usage store does not answer, so this call cannot be admitted. Try again in a moment.",
)


class Deciding:
    """Asks the storage of one guard, after everything that was settled before, and waits for the holds of others."""

    def __init__(self, store: Store, loss: DataLoss, settling: Settling, waiters: Waiters) -> None:
        self._store = store
        self._loss = loss
        self._settling = settling
        self._waiters = waiters

    async def reserve(
        self, plans: Plans, *, again: bool = True
    ) -> tuple[Granted | Sequence[Refused | Refusal], Plans, bool]:
        """The storage's answer, or this process's own where the storage has none; and whether it is the latter.

        A refusal is one for each plan. With it come the plans, which may have got other ids.
        """
        store, loss = self._store, self._loss
        first = plans[0]
        if not first:
            return Granted((), store.clock.now_ms()), plans, False
        if store.leasing is not None and (granted := store.leasing.admit(store.owner, first)) is not None:
            return granted, plans, False
        try:
            if self._settling.unsettled or self._settling.handing_over:
                await self._settling.reconcile()
            if store.interruptible is not None:
                store.check_available()
            if loss.totals is not None:
                await loss.follow()
            answer = await store.verbs.reserve(store.owner, plans)
            if isinstance(answer, Refused):
                answer = await self._waiters.wait(answer, lambda: store.verbs.reserve(store.owner, plans))
        except DataLost as error:
            if again and await loss.lose(error):
                return await self.reserve(plans, again=False)
            return (_UNAVAILABLE,) * len(plans), plans, False
        except StorageError as error:
            return await self._undecided(plans, error)
        except BaseException:
            # Cancelled, or closed (GeneratorExit) or interrupted while it waited: nobody will take what is granted.
            self._settling.cancel(first)
            raise
        if store.state != "ok":  # not left to `answered`: calling it costs more than the rest of the line
            store.answered()
        if loss.totals is not None and loss.is_same_data():
            loss.totals.decided()
        if isinstance(answer, Ended):
            return (_UNAVAILABLE,) * len(plans), plans, False
        if isinstance(answer, Granted):
            store.here.seen.keep(answer.receipts)
            return answer, plans, False
        for state in answer.states:
            store.here.seen.keep(state)
        return _each(answer), plans, False

    async def _undecided(
        self, plans: Plans, error: StorageError
    ) -> tuple[Granted | Sequence[Refused | Refusal], Plans, bool]:
        """The storage did not answer: what this process says by itself. See the rules of `outage.py`."""
        store = self._store
        store.failed(error)
        unknown = plans[0] if error.sent else ()
        if unknown and len(plans) > 1:  # rule 4 of `outage.py`
            self._settling.cancel(unknown)
            ids = {bundle.call_id: store.new_id() for bundle in unknown}
            plans = tuple([tuple([renamed(bundle, ids[bundle.call_id]) for bundle in plan]) for plan in plans])
            unknown = ()
        verdicts: list[Refused | Refusal] = []
        for number, bundles in enumerate(plans):
            if not store.here.may_decide([claim for bundle in bundles for claim in bundle.claims]):
                verdicts.append(_UNAVAILABLE)
                continue
            answer = await store.here.reserve(store.owner, bundles)
            if isinstance(answer, Granted):
                return msgspec.structs.replace(answer, plan=number) if number else answer, plans, True
            verdicts.append(answer)
        if unknown:
            # The outcome is unknown: if it was granted it is given back, if it comes late it is refused.
            self._settling.cancel(unknown)
        return verdicts, plans, True

    async def amend(
        self, hold: Hold, bundle: Bundle, asking: Asking, now_ms: int, *, patient: bool
    ) -> tuple[Answer | Refusal, Bundle, bool]:
        """The answer to having `bundle` in place of `hold`, the bundle, which may have got another id, and whether
        this process has decided by itself.

        `asking` says, should this be cancelled, whether the hold may have been changed. `patient`: the holds of others
        are waited for.
        """
        store = self._store
        answer: Answer | Refusal
        try:
            answer = await self._amend(bundle, asking)
            if isinstance(answer, Refused) and patient:
                answer = await self._waiters.wait(answer, lambda: self._amend(bundle, asking))
        except DataLost as error:
            asking.unknown = False
            lost = Ended(hold.call_id, "unknown", now_ms)
            return lost if await self._loss.lose(error) else _UNAVAILABLE, bundle, False
        except StorageError as error:
            asking.unknown &= error.sent
            store.failed(error)
            if not store.here.may_decide(bundle.claims):
                return _UNAVAILABLE, bundle, False
            bundle = renamed(bundle, store.new_id(), now_ms)  # rule 3 of `outage.py`
            return await store.here.amend(store.owner, hold.call_id, bundle), bundle, True
        if store.state != "ok":
            store.answered()
        if isinstance(answer, Granted):
            store.here.forget(hold.call_id)  # the storage had granted it after all
        return answer, bundle, False

    async def _amend(self, bundle: Bundle, asking: Asking) -> Granted | Refused | Ended:
        if self._settling.unsettled or self._settling.handing_over:
            await self._settling.reconcile()
        self._store.check_available()
        asking.unknown = True
        answer = await self._store.verbs.amend(self._store.owner, bundle)
        asking.unknown = False
        return answer


def _each(answer: Refused) -> Sequence[Refused]:
    """A refusal for each plan."""
    return (answer,) if len(answer.states) == 1 else [Refused((state,), answer.now_ms) for state in answer.states]
