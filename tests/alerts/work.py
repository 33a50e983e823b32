"""What worker processes do with alerts; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
import contextlib
from multiprocessing.connection import Connection
from pathlib import Path

from tests.alerts.kit import HERE, PRICES, SECRET, alerts_in, spend
from tests.shared.work import open_store

from asgi_llm_guard import Budget, Guard
from asgi_llm_guard.alerts import Alerts, Webhook
from asgi_llm_guard.alerts.alerts import CHORE, LAST_CHORE
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.events import Event
from asgi_llm_guard.secret import Secret

CALLERS = ("ann", "bob")


def spend_it_all(address: Path, number: int, pipe: Connection) -> None:
    """Spend budgets with all others, and tell of it; send which alerts were told here."""
    asyncio.run(_spend(str(address), number, pipe))


async def _spend(address: str, number: int, pipe: Connection) -> None:
    where, _, port = address.partition("@")
    seen: list[Event] = []
    webhook = Webhook(
        f"http://127.0.0.1:{port}/hook", secret=Secret(SECRET), allow=HERE, first_retry_s=0.01, timeout_s=10
    )
    guard = Guard(
        [Budget("$10/yearly")],
        storage=open_store(where),
        prices=PRICES,
        observers=[seen.append],
        alerts=Alerts(webhooks=[webhook]),
        hold_wait_s=10,
    )
    async with guard:
        await guard.chores.run(CHORE)
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        with contextlib.suppress(LimitExceeded):
            for n in range(13 + number % 2):
                for caller in CALLERS:
                    await spend(guard, 0.2, caller=caller)
                if n % 4 == 3:
                    await guard.chores.run(CHORE)
        pipe.send("spent")
        await asyncio.to_thread(pipe.recv)
        await guard.chores.run(CHORE)
        await guard.chores.run(LAST_CHORE)
        pipe.send([(alert.subject, alert.threshold) for alert in alerts_in(seen)])
