"""Another configuration and administration data together: neither takes the other's place, not even for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from asgi_llm_guard import Context, Guard, Quota, QuotaBook
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.following import CHORE
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

ANNA = Actor(name="anna", role="admin")


async def test_administered_quotas_hold_before_a_new_configuration_does(clock: FrozenClock) -> None:
    """No call of any thread finds the quotas of a changed file without what is administered laid over them."""
    control = Control("sqlite://:memory:", clock=clock)
    await control.put("department", "research", {"daily_cost": 0}, actor=ANNA)
    guard = Guard([Quota(QuotaBook({"research": {"daily_cost": 100}}))], clock=clock, control=control)
    in_force: list[bool] = []

    class Noticed(QuotaBook):
        """Notes whether calls go by it already when what is administered is laid over it."""

        def lay_over(self, quotas: Mapping[str, Any]) -> None:
            in_force.append(any(isinstance(policy, Quota) and policy.book is self for policy in guard.policies))
            super().lay_over(quotas)

    async with guard:
        async with guard.open(Context(caller="ada")):
            pass
        await guard.chores.run(CHORE)
        book = Noticed({"research": {"daily_cost": 100}})
        guard.replace(policies=[Quota(book)])
        quota = book.get("research")
        assert quota is not None
        assert quota.daily_cost == 0
        assert in_force[:1] == [False]
