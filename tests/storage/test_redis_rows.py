"""What several processes, hosts and nodes share through Redis: the promises that have a number."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from tests.fault_proxy import FaultProxy
from tests.ports import free_port
from tests.servers import RedisServer, shared_cluster
from tests.storage.values import ME, MINUTE_MS, claim, draft, level, meter, record, settle, take

from asgi_llm_guard import Context, Guard, LimitExceeded, ProviderBudget
from asgi_llm_guard.claims import Bundle, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Calendar, Distinct, Lifetime, Rolling, Sliding, Slots

pytestmark = pytest.mark.anyio

WINDOWS = (Lifetime(60_000), Rolling(60_000), Calendar("month"), Sliding(60_000, 60), Slots(), Distinct(60_000))


@pytest.fixture
async def storage(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, timeout_s=10)
    yield storage
    await storage.aclose()


def keys_of(server: RedisServer, namespace: str) -> list[str]:
    return sorted(key.decode() for key in server.call("KEYS", f"*{namespace}*"))


def test_processes_share_a_limit_exactly(redis_server: RedisServer, namespace: str) -> None:
    """A6: four processes with 25 calls each at once, under a limit of 50 calls, are granted exactly 50."""
    script = f"""
import asyncio
from asgi_llm_guard.claims import Granted
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.windows import Lifetime
from tests.storage.values import ask, claim, meter

async def main():
    storage = RedisStorage({redis_server.url!r}, namespace={namespace!r}, timeout_s=10)
    await storage.open_holds()
    print("ready", flush=True)
    number = input()
    on = claim(meter(Lifetime(3_600_000), 50))
    answers = await asyncio.gather(*[ask(storage, f"{{number}}-{{n}}", on, owner=number) for n in range(25)])
    print(sum(isinstance(answer, Granted) for answer in answers), flush=True)
    await storage.aclose()

asyncio.run(main())
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
    granted = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(granted) == 50


async def test_two_services_never_overshoot_a_provider(redis_server: RedisServer, namespace: str) -> None:
    """B5: two guards on one Redis reserve before they call, so that together they never get more than the budget."""
    url = f"{redis_server.url}?namespace={namespace}&timeout=10"
    policy = ProviderBudget({"openai": "$0.25/1d"})
    async with Guard([policy], storage=url) as one, Guard([policy], storage=url) as other:
        bound = one.describe("openai/gpt-4o-mini", max_output_tokens=100_000).cost_nanousd
        assert bound is not None
        outcomes = []

        async def call(guard: Guard) -> None:
            async with guard.open(Context(caller="ada")):
                try:
                    async with guard.call(
                        model="openai/gpt-4o-mini", max_output_tokens=100_000
                    ):  # records nothing, so it is charged what it held
                        outcomes.append("granted")
                except LimitExceeded:
                    outcomes.append("refused")

        await asyncio.gather(*[call(guard) for guard in (one, other) * 10])
        fits = 250_000_000 // bound
        assert 0 < fits < 20
        assert outcomes.count("granted") == fits


async def test_all_keys_of_a_namespace_are_in_one_slot(namespace: str) -> None:
    """A8, conformance 47: whatever is counted, every key has the namespace as its only hash tag, and its slot."""
    cluster = shared_cluster()
    storage = RedisStorage(cluster.url, namespace=namespace, timeout_s=10)
    braces = [claim(meter(window, subject="{tag}"), 1, "{member}") for window in WINDOWS]
    await take(storage, "{call}", *braces, draft=draft("{call}"), owner="{owner}")
    await settle(storage, "{call}", record=record("{call}", 5))
    await take(storage, "open", *braces, owner="{owner}")
    found = [keys for node in cluster.nodes if (keys := keys_of(node, namespace))]
    assert len(found) == 1, "all keys are on one node"
    assert len(found[0]) > len(WINDOWS)
    assert all(key.startswith(f"llmguard1:{{{namespace}}}:") for key in found[0])
    slots = {cluster.nodes[0].call("CLUSTER", "KEYSLOT", key) for key in found[0]}
    assert len(slots) == 1
    await storage.aclose()


async def test_later_amounts_do_not_move_the_end_of_a_window(
    storage: RedisStorage, redis_server: RedisServer, namespace: str
) -> None:
    """Conformance 45: every counter has an expiry from its first use on; more of it neither renews nor removes that."""
    tokens = meter(Rolling(MINUTE_MS))
    (first,) = await take(storage, "first", claim(tokens, 10))
    (key,) = [key for key in keys_of(redis_server, namespace) if ":c:" in key]
    expires_ms = redis_server.call("PEXPIRETIME", key)
    assert first.resets_at_ms is not None
    assert expires_ms >= first.resets_at_ms
    (second,) = await take(storage, "second", claim(tokens, 10))
    await settle(storage, "first", 30, record=record("first", 5))
    assert (second.pin, second.resets_at_ms) == (first.pin, first.resets_at_ms)
    assert redis_server.call("PEXPIRETIME", key) == expires_ms


@pytest.mark.parametrize("executed", [True, False])
async def test_an_error_on_one_gauge_leaves_none_taken(
    redis_server: RedisServer, namespace: str, *, executed: bool
) -> None:
    """Conformance 59: when the store fails while it takes the slots of a key and of its team, cancelling leaves both free."""
    key, team = meter(Slots(), 1, subject="key"), meter(Slots(), 1, subject="team")
    async with FaultProxy(redis_server.url) as proxy:
        storage = RedisStorage(proxy.url, namespace=namespace, timeout_s=10)
        await storage.open_holds()
        proxy.refuse()
        if executed:
            proxy.cut_at_reply(of="EVALSHA")
        else:
            proxy.cut_at_request(of="EVALSHA")
        with pytest.raises(StorageError):
            await storage.reserve(ME, ((Bundle("call", (claim(key), claim(team))),),))
        proxy.heal()
        await storage.settle((Settlement("call", ()),))
        assert [await level(storage, on) for on in (key, team)] == [(0, 0), (0, 0)]
        await take(storage, "next", claim(key), claim(team))
        await storage.aclose()


async def test_an_outage_is_told_once_and_leaves_no_task(caplog: pytest.LogCaptureFixture) -> None:
    """Conformance 28: while Redis cannot be reached, heartbeats log one error in all, and leave no task behind."""
    before = asyncio.all_tasks()
    guard = Guard([ProviderBudget({"openai": "$1/1d"})], storage=f"redis://127.0.0.1:{free_port()}?timeout=1")
    for _ in range(10):
        await guard.heartbeat()
    assert [entry.levelname for entry in caplog.records].count("ERROR") == 1
    await guard.aclose()
    assert asyncio.all_tasks() == before
