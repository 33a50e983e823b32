"""The link under faults at random: what it says of each call is true, and nothing is overtaken or made twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from tests.servers import FaultProxy, RedisCluster, RedisServer, wait_until
from tests.storage.link.kit import PUSH, linked, outcomes

from asgi_llm_guard.storage.redis_link import Link, LinkError

pytestmark = pytest.mark.anyio

Fault = Callable[[], Awaitable[object]]


async def calls_under_faults(
    link: Link, key: bytes, rng: random.Random, faults: list[Fault], turns: int
) -> list[object]:
    """Hand over calls in bursts, with a fault now and then; the outcome of each, in the order of handing over."""
    calls: list[asyncio.Future[object]] = []
    for _ in range(turns):
        calls += [link.submit(PUSH, key, [len(calls) + n]) for n in range(rng.choice((0, 1, 1, 2, 10)))]
        if rng.random() < 0.05:
            await rng.choice(faults)()
        if calls:
            await asyncio.wait(calls[-1:], timeout=rng.choice((0, 0, 0.001, 0.2)))
    return await outcomes(calls)


def judge(seen: list[object], made: list[int]) -> None:
    """Compare what was said of each call with what the server has executed, in its order."""
    assert len(made) == len(set(made)), "a call was made twice"
    executed = set(made)
    for number, said in enumerate(seen):
        if isinstance(said, LinkError):
            assert said.sent or number not in executed, f"call {number} was made, and was said not to be: {said}"
        else:
            assert said == str(number).encode(), f"call {number} got the reply of another one"
            assert number in executed, f"call {number} was answered, and was not made"
    assert made == sorted(made), "a call was overtaken"


def rounds(quick: int, slow: int) -> list[object]:
    """Seeds: a few for every run, and many for the long one."""
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, slow))]


@pytest.mark.parametrize("seed", rounds(6, 300))
async def test_what_is_said_of_calls_to_one_server_is_true(
    redis_server: RedisServer, namespace: str, seed: int
) -> None:
    """Lost connections and replies, delays and flushed scripts: no call is made twice, overtaken, or denied falsely."""
    rng = random.Random(seed)
    key = namespace.encode()
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, timeout_s=0.1, failures=1000) as link:

            async def cut() -> None:
                proxy.cut()

            async def cut_reply() -> None:
                proxy.cut_at_reply(rng.randint(1, 5), of="EVALSHA")

            async def cut_request() -> None:
                proxy.cut_at_request(rng.randint(1, 5), of="EVALSHA")

            async def flush() -> None:
                redis_server.call("SCRIPT", "FLUSH")

            async def flush_between() -> None:
                link.submit_command("SCRIPT", "FLUSH")

            async def hold() -> None:
                lane = rng.choice((proxy.to_client, proxy.to_server))
                lane.hold()
                asyncio.get_running_loop().call_later(rng.choice((0.01, 0.15)), lane.release)

            faults: list[Fault] = [cut, cut_reply, cut_request, flush, flush_between, hold]
            seen = await calls_under_faults(link, key, rng, faults, 300)
            proxy.heal()
        made = [int(item) for item in redis_server.call("LRANGE", key, 0, -1)]

    judge(seen, made)
    assert sum(not isinstance(said, LinkError) for said in seen) > len(seen) / 3


@pytest.fixture(scope="module")
def cluster() -> object:
    """For this file, which moves its slots."""
    with RedisCluster() as cluster:
        yield cluster


def move_and_wait(cluster: RedisCluster, slot: int, target: RedisServer) -> None:
    """Move a slot, and wait until all nodes say the same: moves that overtake each other's news lose keys."""
    cluster.move_slot(slot, target)
    wait_until(lambda: len({what_it_says(node) for node in cluster.masters}) == 1, "all nodes say the same")


def what_it_says(node: RedisServer) -> tuple[tuple[str, ...], ...]:
    """Of each node of its cluster: the name, the epoch and the slots."""
    lines = (line.split() for line in node.call("CLUSTER", "NODES").decode().splitlines())
    return tuple(sorted((name, epoch, *slots) for name, _, _, _, _, _, epoch, _, *slots in lines))


@pytest.mark.parametrize("seed", rounds(4, 200))
async def test_what_is_said_of_calls_to_a_cluster_is_true(cluster: RedisCluster, namespace: str, seed: int) -> None:
    """Slots that move, killed connections and flushed scripts: no call is made twice, overtaken, or denied falsely."""
    rng = random.Random(seed)
    key = f"{{{namespace}}}".encode()
    slot = cluster.slot_of(key)
    loop = asyncio.get_running_loop()
    moves: list[asyncio.Future[None]] = []
    async with linked(f"{cluster.url}?client_name={namespace}", timeout_s=1.0, failures=1000) as link:

        async def move() -> None:
            if all(moving.done() for moving in moves):
                target = rng.choice([node for node in cluster.masters if node is not cluster.node_of(slot)])
                moves.append(loop.run_in_executor(None, move_and_wait, cluster, slot, target))

        async def kill_clients() -> None:
            node = rng.choice(cluster.masters)  # and only the link's: not those who move the slot
            for client in node.call("CLIENT", "LIST").decode().splitlines():
                if f" name={namespace} " in client:
                    node.call("CLIENT", "KILL", "ID", client.removeprefix("id=").partition(" ")[0])

        async def flush() -> None:
            rng.choice(cluster.masters).call("SCRIPT", "FLUSH")

        seen = await calls_under_faults(link, key, rng, [move, move, kill_clients, flush], 300)
        await asyncio.gather(*moves)
    made = [int(item) for item in cluster.node_of(slot).call("LRANGE", key, 0, -1)]

    judge(seen, made)
    assert sum(not isinstance(said, LinkError) for said in seen) > len(seen) / 10
