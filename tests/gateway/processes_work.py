"""What worker processes do with deployments; in a module of its own, because they import it anew."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from asgi_llm_guard.claims import Bundle, Granted
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.gateway.health import Cooldowns, cooldown_entries
from asgi_llm_guard.gateway.limits import DeploymentLimit, DeploymentLimits
from asgi_llm_guard.money import NANO
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

CALLS = 50
LIMITS = {
    "a": DeploymentLimit.of(rpm=40),
    "b": DeploymentLimit.of(tpm=305),
    "c": DeploymentLimit.of(budget="$0.505/1d"),
}
"""Room for 40, 30 and 50 calls of 10 tokens and a cent."""


def opened(address: str) -> RedisStorage | SqliteStorage:
    """The storage at a path, or at `url#namespace`."""
    url, _, namespace = address.partition("#")
    if namespace:
        return RedisStorage(url.replace(":/", "://", 1), namespace=namespace, timeout_s=10)
    return SqliteStorage(url, timeout_s=30)


def call_deployments(address: Path, number: int, pipe: Connection) -> None:
    """50 calls at once, each at the first deployment that has room; answers where they went, `None` for nowhere."""

    async def main() -> None:
        storage, policy = opened(str(address)), DeploymentLimits(LIMITS)

        async def make(n: int) -> str | None:
            names = "abc"[n % 3 :] + "abc"[: n % 3]
            calls = [Call(model="m", deployment=name, input_tokens=10, cost_nanousd=NANO // 100) for name in names]
            plans = [[Bundle(f"{number}-{n}", policy.plan(Context(), call, 0).claims)] for call in calls]
            answer = await storage.reserve(f"process-{number}", plans)
            return names[answer.plan] if isinstance(answer, Granted) else None

        await storage.open_holds()
        pipe.send("ready")
        pipe.recv()
        pipe.send(await asyncio.gather(*map(make, range(CALLS))))
        pipe.recv()  # what is held stays held until all have counted
        await storage.aclose()

    asyncio.run(main())


def cool_down(address: Path, number: int, pipe: Connection) -> None:
    """Tell of a failure for as long as the parent says, then answer what is cooling down, and for how many seconds."""

    async def main() -> None:
        storage = opened(str(address))
        cooldowns = Cooldowns(entries=cooldown_entries(storage))
        cooldowns.watch(["a", "b"])
        await storage.open_holds()
        pipe.send("ready")
        retry_after_s = pipe.recv()
        if retry_after_s is not None:
            await cooldowns.failed("a", "rate_limit", alone=False, retry_after_s=retry_after_s, message=f"of {number}")
        pipe.send("told")
        pipe.recv()
        cooldowns.watch(["a", "b"])  # anew: what was read before is not gone by
        found = await cooldowns.cooling()
        pipe.send({name: cooldown.left_s(SystemClock().now_ms()) for name, cooldown in found.items()})
        await storage.aclose()

    asyncio.run(main())
