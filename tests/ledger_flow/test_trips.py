"""What a ledger costs the calls of a guard on Redis: nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.servers import OwnRedis, RedisServer, unique_namespace

from asgi_llm_guard import Budget, Context, Guard, Usage

pytestmark = pytest.mark.anyio


def executed(server: RedisServer) -> Counter[str]:
    """How often each command was executed, those of scripts among them."""
    lines = server.call("INFO", "commandstats").decode().splitlines()
    pairs = [line.removeprefix("cmdstat_").split(":calls=") for line in lines if line.startswith("cmdstat_")]
    return Counter({name: int(rest.split(",")[0]) for name, rest in pairs if name != "info"})


async def commands_of_ten_calls(server: RedisServer, ledger: str | None) -> dict[str, int]:
    """What the server does for ten calls: the least of several rounds, because chores come in between."""
    guard = Guard(
        [Budget("$5/daily")], storage=f"{server.url}?namespace={unique_namespace()}&timeout=10", ledger=ledger
    )
    rounds: list[Counter[str]] = []
    for _ in range(6):
        before = executed(server)
        for _ in range(10):
            async with (
                guard.open(Context(caller="ada", departments=("research", "sales"))),
                guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50) as call,
            ):
                call.record(Usage(input_tokens=80, output_tokens=20))
        rounds.append(executed(server) - before)
    await guard.aclose()
    return {
        name: min(one[name] for one in rounds) for name in set().union(*rounds) if all(name in one for one in rounds)
    }


async def test_a_ledger_adds_no_command_to_a_call(own_redis: OwnRedis, tmp_path: Path) -> None:
    """C9: with a ledger attached, calls cost the server exactly the commands that they cost without."""
    server = own_redis()
    without = await commands_of_ten_calls(server, None)
    attached = await commands_of_ten_calls(server, f"sqlite:///{tmp_path}/ledger.db")

    assert attached == without
    assert without["evalsha"] <= 20  # an admission and a settlement
    assert without["xadd"] == 10
