"""Many calls at once over several deployments, in one process and in four: limits are exact, and the spread is as promised.

Answers wait at a gate until every call has been granted or refused, so that what is held is what counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import pytest
from tests.gateway.gateway_work import Work, call_gateway, policies
from tests.gateway.kit import BILLED, CONTEXT, MESSAGES, MODELS, fleet
from tests.gateway.processes_work import opened
from tests.servers import RedisServer
from tests.storage.sqlite_kit import workers

from asgi_llm_guard import LimitExceeded
from asgi_llm_guard.gateway import RetryRules
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock

PROCESSES: Final = 4
RATIOS: Final = {"a": 1, "b": 2, "c": 3}
SPREAD: Final[Mapping[str, Mapping[str, Any]]] = {
    "usage": {name: {"rpm": 1_000 * part} for name, part in RATIOS.items()},
    "weighted": {name: {"weight": float(part)} for name, part in RATIOS.items()},
    "least_busy": {},
    "lowest_cost": {},
}
"""What makes a strategy's ideal; without any it is the same for all, or everything for the cheapest."""


def ideal(strategy: str, calls: int) -> dict[str, float]:
    """How many calls each deployment is to get."""
    if strategy == "lowest_cost":
        return {"a": calls, "b": 0, "c": 0}
    parts = RATIOS if SPREAD[strategy] else dict.fromkeys(RATIOS, 1)
    return {name: calls * part / sum(parts.values()) for name, part in parts.items()}


async def bounds() -> dict[str, tuple[int, int]]:
    """What one call may use at most of each deployment: tokens, and nano-dollars."""
    found = {}
    for name in "abc":
        async with fleet(FrozenClock(1_800_000_000_000), name) as made:
            await made.chat()
            call = made.ended[0].call
        assert call is not None
        found[name] = (call.total_tokens, call.cost_nanousd or 0)
    return found


def room(size: Mapping[str, tuple[int, int]], a: int, b: int, c: int) -> dict[str, dict[str, Any]]:
    """Limits of three kinds that so many calls fit into, and not quite one more."""
    tokens, money = size["b"][0], size["c"][1]
    nanousd = money * (c + 1) - 1
    return {"a": {"rpm": a}, "b": {"tpm": tokens * (b + 1) - 1}, "c": {"budget": f"${nanousd / 10**9:.9f}/1d"}}


# ----------------------------------------------------------------------------------- one process


@pytest.mark.anyio
async def test_limits_of_each_are_exact() -> None:
    """D9, B2: of 200 calls at once each deployment gets as many as its rpm, tpm or budget has room for, and a provider
    over its budget none; the bill is the ledger."""
    limits = room(await bounds(), 40, 30, 50)
    clock = FrozenClock(1_800_000_000_000)
    hang = dict.fromkeys("abc", Behaviour.hang())
    async with fleet(
        clock, "e", "a", "b", "c", limits=limits, defaults=hang, policies=policies(), retry=RetryRules(retries=0)
    ) as made:
        refused = 0

        async def call() -> None:
            nonlocal refused
            async with made.guard.open(CONTEXT):
                try:
                    await made.gateway.chat("auto", MESSAGES, max_tokens=20)
                except LimitExceeded:
                    refused += 1
            if refused == 80:
                for provider in made.providers.values():
                    provider.release()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(call())

        assert {name: made[name].calls for name in "abce"} == {"a": 40, "b": 30, "c": 50, "e": 0}
        assert refused == 80
        await made.settled()


@pytest.mark.anyio
@pytest.mark.parametrize("strategy", SPREAD)
async def test_spread_of_each_strategy(strategy: str) -> None:
    """D2: of 200 calls at once each deployment gets its part by the strategy, to a tenth of it."""
    clock = FrozenClock(1_800_000_000_000)
    async with fleet(
        clock, "e", "a", "b", "c", limits=SPREAD[strategy], policies=policies(), strategy=strategy
    ) as made:
        async with asyncio.timeout(60):
            await asyncio.gather(*(made.chat() for _ in range(200)))
        assert made["e"].calls == 0
        check_spread({name: made[name].calls for name in RATIOS}, ideal(strategy, 200))
        await made.settled()


def check_spread(got: Mapping[str, int], expected: Mapping[str, float]) -> None:
    assert sum(got.values()) == round(sum(expected.values()))
    for name, part in expected.items():
        assert abs(got[name] - part) <= 0.1 * part, (got, expected)


# --------------------------------------------------------------------------------- four processes


@pytest.fixture(params=["sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer, namespace: str) -> Path:
    """A storage that processes share."""
    return tmp_path / "guard.db" if request.param == "sqlite" else Path(f"{redis_server.url}#{namespace}")


def run_processes(
    address: Path,
    calls: int,
    *,
    refused: int,
    strategy: str = "usage",
    limits: Mapping[str, Mapping[str, Any]],
    default: Behaviour,
) -> dict[str, int]:
    """So many calls of each of four processes at once; how many each deployment got. The ledger has to be the bill."""
    providers = {name: FakeProvider(prices=BILLED, default=default) for name in "eabc"}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(provider.serve()) for name, provider in providers.items()}
        deployments: Sequence[Mapping[str, Any]] = [
            {
                "provider": MODELS[name].partition("/")[0],
                "model": MODELS[name].partition("/")[2],
                "name": name,
                "api_key": "key-of-nobody",
                "api_base": str(url),
                **limits.get(name, {}),
            }
            for name, url in urls.items()
        ]
        with workers(PROCESSES, call_gateway, address) as started:
            pipes = [pipe for _, pipe in started]
            for pipe in pipes:
                pipe.send(Work(calls, strategy, deployments))
            while pipes:
                if refused == 0:
                    for provider in providers.values():
                        provider.release()
                pipe = next_ready(pipes)
                if pipe.recv() == "refused":
                    refused -= 1
                else:
                    pipes.remove(pipe)
        assert refused == 0
        spent, holds = asyncio.run(ledger(str(address)))
        assert holds == 0
        assert spent == sum(provider.total_nanousd for provider in providers.values())
    return {name: provider.calls for name, provider in providers.items()}


def next_ready(pipes: Sequence[Connection]) -> Connection:
    """The next process that says something."""
    ready = wait(pipes, timeout=60)
    assert ready, "more calls were granted than there is room for, and wait for their answers"
    return next(pipe for pipe in pipes if pipe in ready)


async def ledger(address: str) -> tuple[int, int]:
    """What was spent, and how many holds are open."""
    storage = opened(address)
    try:
        records = await storage.records(limit=1_000)
        return sum(record.cost_nanousd or 0 for record in records), await storage.open_holds()
    finally:
        await storage.aclose()


@pytest.mark.parametrize(
    ("calls", "places"),
    [(12, (10, 6, 12)), pytest.param(50, (40, 30, 50), marks=pytest.mark.slow)],
    ids=["small", "full"],
)
def test_processes_share_limits_exactly(address: Path, calls: int, places: tuple[int, int, int]) -> None:
    """D9, B2: four processes together send each deployment exactly what its rpm, tpm or budget has room for, and a
    provider over its budget nothing; the bill is the ledger."""
    limits = room(asyncio.run(bounds()), *places)
    got = run_processes(
        address, calls, refused=PROCESSES * calls - sum(places), limits=limits, default=Behaviour.hang()
    )
    assert got == {"e": 0, **dict(zip("abc", places, strict=True))}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SPREAD)
def test_processes_spread(address: Path, strategy: str) -> None:
    """D2: 800 calls of four processes at once are spread by the strategy, to a tenth of each deployment's part."""
    got = run_processes(address, 200, refused=0, strategy=strategy, limits=SPREAD[strategy], default=Behaviour.answer())
    assert got.pop("e") == 0
    check_spread(got, ideal(strategy, 800))
