"""What worker processes do with a gateway; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec
from tests.gateway.kit import CONTEXT, MESSAGES, PRICES
from tests.gateway.processes_work import opened

from asgi_llm_guard import Budget, Guard, LimitExceeded, ProviderBudget
from asgi_llm_guard.gateway import Deployment, Gateway, RetryRules

SPENT: Final = "$0.000001/1d"
"""A provider's budget that holds no call at all."""


class Work(msgspec.Struct, frozen=True):
    """What one process is to do: so many calls at once."""

    calls: int
    strategy: str
    deployments: Sequence[Mapping[str, Any]]


def policies() -> list[Any]:
    """Everybody has enough, but for one provider."""
    return [Budget("$9/1d", per="global"), ProviderBudget({"openai": "$9/1d", "mistral": SPENT})]


def call_gateway(address: Path, number: int, pipe: Connection) -> None:
    """Make the calls that the parent tells of, all at once. Says `refused` for each that is, and `done` at the end."""

    async def main() -> None:
        storage = opened(str(address))
        await storage.open_holds()
        pipe.send("ready")
        work: Work = pipe.recv()
        guard = Guard(policies(), storage=storage, prices=PRICES, hold_wait_s=0)
        deployments = [Deployment(**each) for each in work.deployments]
        gateway = Gateway(guard, deployments, strategy=work.strategy, retry=RetryRules(retries=0))

        async def call() -> None:
            async with guard.open(CONTEXT):
                try:
                    await gateway.chat("auto", MESSAGES, max_tokens=20)
                except LimitExceeded:
                    pipe.send("refused")

        await asyncio.gather(*(call() for _ in range(work.calls)))
        await gateway.aclose()
        await guard.aclose()
        pipe.send(f"done {number}")

    asyncio.run(main())
