"""The link to a cluster: who has which slot, and slots that go from node to node."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterator

import pytest
from tests.ports import free_port
from tests.servers import FaultProxy, OwnRedis, RedisCluster, RedisServer, wait_until
from tests.storage.link.kit import COUNT, PATIENT_S, PUSH, QUICK_S, SCRIPTS, Changes, linked, outcome, outcomes, until

from asgi_llm_guard.storage.redis_address import Address, Endpoint
from asgi_llm_guard.storage.redis_cluster import Cluster
from asgi_llm_guard.storage.redis_link import Link, LinkError

pytestmark = pytest.mark.anyio

TAGS = ["{a}", "{b}", "{c}", "{d}"]  # of all three masters


@pytest.fixture(scope="module", params=["redis", "valkey"])
def cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    """For this file, which moves its slots and loses nothing."""
    with RedisCluster(program=request.param) as cluster:
        yield cluster


def errors_of(cluster: RedisCluster, code: str) -> int:
    """How often the nodes have answered with an error."""
    stats = b"".join(node.call("INFO", "errorstats") for node in cluster.masters).decode()
    return sum(int(line.partition("count=")[2]) for line in stats.splitlines() if line.startswith(f"errorstat_{code}:"))


async def test_calls_go_to_the_node_that_has_the_slot(cluster: RedisCluster) -> None:
    """Keys of all masters are reached without a single redirection, and each key in order."""
    cluster.flush()
    before = errors_of(cluster, "MOVED")
    keys = [f"{{{number}}}:routed".encode() for number in range(40)]  # of all three, whatever was moved before
    async with linked(cluster.url) as link:
        sums = await outcomes([link.submit(COUNT, key, [b"1"]) for _ in range(20) for key in keys])

    assert sums == [n for n in range(1, 21) for _ in keys]
    assert len({cluster.node_of(cluster.slot_of(key)).port for key in keys}) == 3
    assert errors_of(cluster, "MOVED") == before


async def test_one_seed_that_answers_is_enough(cluster: RedisCluster) -> None:
    """Nodes of the URL that are gone are passed over."""
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.masters[2].port}"
    async with linked(url) as link:
        assert await link.command("SET", "{a}:seed", "1", key=b"{a}") == b"OK"


async def test_a_slot_that_moved_is_followed_in_order(cluster: RedisCluster) -> None:
    """Calls under way while a slot moves are all executed once, on either node, in the order of handing over."""
    cluster.flush()
    key = b"{a}:moved"
    slot = cluster.slot_of(key)
    source = cluster.node_of(slot)
    target = next(node for node in cluster.masters if node is not source)
    calls: list[asyncio.Future[bytes]] = []
    async with linked(cluster.url) as link:
        move = asyncio.create_task(asyncio.to_thread(cluster.move_slot, slot, target))
        left = 50  # turns after the move
        while left:
            left -= move.done()
            calls += [link.submit(PUSH, key, [len(calls) + n]) for n in range(5)]
            await asyncio.wait(calls[-3:-2], timeout=0.001)
        await move
        replies = await outcomes(calls)

        expected = [str(n).encode() for n in range(len(calls))]
        assert replies == expected
        assert await link.command("LRANGE", key, 0, -1, key=key) == expected
    assert cluster.node_of(slot) is target


async def test_many_calls_that_come_back_keep_their_order(cluster: RedisCluster) -> None:
    """A thousand calls sent to the node that had the slot before are executed in order by the one that has it now."""
    cluster.flush()
    key = b"{b}:moved"
    slot = cluster.slot_of(key)
    target = next(node for node in cluster.masters if node is not cluster.node_of(slot))
    async with linked(cluster.url, most=10**6) as link:
        await link.command("GET", key, key=key)
        cluster.move_slot(slot, target)
        calls = [link.submit(PUSH, key, [n]) for n in range(500)]
        while not any(call.done() for call in calls):
            calls.append(link.submit(PUSH, key, [len(calls)]))
            await asyncio.sleep(0)
        await outcomes(calls)

        assert await link.command("LRANGE", key, 0, -1, key=key) == [str(n).encode() for n in range(len(calls))]


async def test_a_slot_that_is_seen_to_have_moved_is_followed_in_order(cluster: RedisCluster) -> None:
    """Calls under way to a node that does not answer are not overtaken when a look-up tells that their slot has moved."""
    cluster.flush()
    key, other = b"{a}:seen", b"{b}:seen"
    slot, other_slot = cluster.slot_of(key), cluster.slot_of(other)
    source, target = cluster.node_of(slot), cluster.node_of(other_slot)
    if target is source:  # tests before this one have moved them
        target = next(node for node in cluster.masters if node is not source)
        cluster.move_slot(other_slot, target)
    third = next(node for node in cluster.masters if node not in {source, target})
    async with linked(cluster.url) as link:
        await outcomes([link.submit_command("GET", each, key=each) for each in (key, other)])
        cluster.move_slot(slot, target)
        cluster.move_slot(other_slot, third)
        source.pause()
        try:
            calls = [link.submit(PUSH, key, [n]) for n in range(10)]
            assert await outcome(link.submit(COUNT, other, [b"1"])) == 1  # comes back, so the slots are looked up
            servers = link._servers
            assert isinstance(servers, Cluster)
            await until(lambda: getattr(servers._slots[slot], "endpoint", None) == Endpoint(target.host, target.port))
            calls += [link.submit(PUSH, key, [n]) for n in range(10, 20)]
            await asyncio.wait(calls, timeout=0.05)
        finally:
            source.resume()
        await outcomes(calls)

        assert await link.command("LRANGE", key, 0, -1, key=key) == [str(n).encode() for n in range(20)]


async def test_what_was_not_loaded_goes_before_what_was_moved(cluster: RedisCluster) -> None:
    """A call that came back for its script, and one behind it that came back for its slot, are made in that order."""
    cluster.flush()
    key = b"{c}:both"
    slot = cluster.slot_of(key)
    source = cluster.node_of(slot)
    target = next(node for node in cluster.masters if node is not source)
    async with linked(cluster.url) as link:
        await link.command("GET", key, key=key)
        source.call("SCRIPT", "FLUSH")
        first = link.submit(PUSH, key, ["first"])  # written at once; its answer is not read before the loop goes on
        source.call("PING")
        cluster.move_slot(slot, target)
        second = link.submit(PUSH, key, ["second"])
        await outcomes([first, second])

        assert await link.command("LRANGE", key, 0, -1, key=key) == [b"first", b"second"]


async def test_a_key_that_is_on_its_way_is_asked_for(cluster: RedisCluster) -> None:
    """While a slot is being moved, calls for keys that are there already are made there, and the others are not."""
    cluster.flush()
    stays, goes = b"{c}:stays", b"{c}:goes"
    slot = cluster.slot_of(stays)
    source = cluster.node_of(slot)
    target = next(node for node in cluster.masters if node is not source)
    async with linked(cluster.url) as link:
        await link.submit(COUNT, stays, [b"1"])
        asked = errors_of(cluster, "ASK")
        cluster.begin_move(slot, target)
        calls = [link.submit(COUNT, key, [b"1"]) for _ in range(10) for key in (stays, goes)]
        trailing = link.submit_command("GET", goes, key=goes, trailing=True)
        try:
            assert await outcomes(calls) == [n + (key is stays) for n in range(1, 11) for key in (stays, goes)]
            assert await outcome(trailing) == b"10"
            assert errors_of(cluster, "ASK") > asked
            both = await outcome(link.submit_command("MGET", stays, goes, key=stays))
            assert isinstance(both, LinkError)
            assert (both.code, both.sent) == ("TRYAGAIN", False)
        finally:
            cluster.move_keys(slot, target)
            cluster.finish_move(slot, target)
        assert await link.submit(COUNT, stays, [b"0"]) == 11


async def test_nodes_are_reached_with_encryption(own_redis: OwnRedis) -> None:
    """With `tls-cluster yes` the nodes tell the ports that speak TLS, and those are connected to."""
    server = own_redis(cluster=True, tls=True, password="right-one", config=["tls-cluster yes"])
    server.call("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
    await asyncio.to_thread(
        wait_until, lambda: b"cluster_state:ok" in server.call("CLUSTER", "INFO"), "the slots are served"
    )
    url = f"rediss+cluster://:right-one@{server.host}:{server.tls_port}?ssl_ca_certs={server.authority}"
    async with linked(url) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        assert isinstance(servers := link._servers, Cluster)
        assert [endpoint.port for endpoint in servers._nodes] == [server.tls_port]


async def test_keys_of_two_slots_are_refused(cluster: RedisCluster) -> None:
    """A command over two slots fails as not sent, and says what to do."""
    async with linked(cluster.url) as link:
        error = await outcome(link.submit_command("MGET", "{a}", "{b}", key=b"{a}"))

    assert isinstance(error, LinkError)
    assert (error.code, error.sent) == ("CROSSSLOT", False)
    assert "give the namespace one hash tag" in str(error)


async def test_scripts_are_loaded_on_every_node_again(cluster: RedisCluster) -> None:
    """After SCRIPT FLUSH everywhere, calls to all nodes are executed."""
    async with linked(cluster.url) as link:
        keys = [f"{tag}:flushed".encode() for tag in TAGS]
        await outcomes([link.submit(COUNT, key, [b"0"]) for key in keys])
        for node in cluster.masters:
            node.call("SCRIPT", "FLUSH")
        before = await outcomes([link.submit_command("GET", key, key=key) for key in keys])
        after = await outcomes([link.submit(COUNT, key, [b"1"]) for key in keys])

    assert after == [int(value) + 1 for value in before]


async def test_a_server_without_a_cluster_is_named(redis_server: RedisServer) -> None:
    """The calls fail as not sent, and say which URL to write."""
    async with linked(f"redis+cluster://{redis_server.host}:{redis_server.port}") as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert "it is no cluster: write redis:// in the URL" in str(error)


async def test_a_cluster_that_is_gone_is_left_alone_until_it_is_back(cluster: RedisCluster) -> None:
    """Without any node the link is down, calls fail at once as not sent; it comes up by itself."""
    changes = Changes()
    with FaultProxy(cluster.masters[0].url) as seed:
        seed.refuse()
        async with linked(f"redis+cluster://{seed.host}:{seed.port}", on_change=changes) as link:
            error = await outcome(link.submit(COUNT, b"{a}", [b"0"]))
            assert isinstance(error, LinkError)
            assert not error.sent
            assert changes.told == ["down"]
            again = link.submit(COUNT, b"{a}", [b"0"]).exception()
            assert "is left alone for now" in str(again)
            seed.heal()
            await changes.last("up")
            assert await link.submit(COUNT, b"{a}:back", [b"0"]) == 0


def connections(node: RedisServer) -> int:
    """How many there are of links that call themselves `cancelled`."""
    return bytes(node.call("CLIENT", "LIST")).count(b" name=cancelled ")


async def test_closing_that_is_cancelled_closes_every_node(cluster: RedisCluster) -> None:
    """Who has no time to wait for a node that hangs leaves no connection to any of them, and no call without an outcome."""
    keys = [f"{tag}:cancelled".encode() for tag in TAGS]
    link = Link(Address.parse(f"{cluster.url}?client_name=cancelled")[0], scripts=SCRIPTS, timeout_s=PATIENT_S)
    assert all(isinstance(each, int) for each in await outcomes([link.submit(COUNT, key, [b"1"]) for key in keys]))
    hanging = cluster.node_of(cluster.slot_of(keys[0]))
    assert sum(map(connections, cluster.masters)) == len({cluster.node_of(cluster.slot_of(key)).port for key in keys})
    hanging.pause()
    try:
        call = link.submit(COUNT, keys[0], [b"1"])
        closing = asyncio.create_task(link.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait((closing,))
        error = await outcome(call)
        assert isinstance(error, LinkError)
        assert error.sent
    finally:
        hanging.resume()
    await asyncio.to_thread(wait_until, lambda: not any(map(connections, cluster.masters)), "all is closed")


async def test_a_node_that_hangs_after_its_slot_moved_is_passed_over(cluster: RedisCluster) -> None:
    """What it was asked stays unknown; calls handed over later are made where the slot is now."""
    cluster.flush()
    key, other = b"{a}:hangs", b"{b}:hangs"
    slot, other_slot = cluster.slot_of(key), cluster.slot_of(other)
    source = cluster.node_of(slot)
    target, third = (node for node in cluster.masters if node is not source)
    if cluster.node_of(other_slot) is not target:
        cluster.move_slot(other_slot, target)
    async with linked(cluster.url, timeout_s=QUICK_S) as link:
        asked = [link.submit_command("GET", each, key=each, timeout_s=PATIENT_S) for each in (key, other)]
        assert await outcomes(asked) == [None, None]
        cluster.move_slot(slot, target)
        cluster.move_slot(other_slot, third)
        source.pause()
        try:
            lost = link.submit(COUNT, key, [b"1"])
            assert await outcome(link.submit(COUNT, other, [b"1"], timeout_s=PATIENT_S)) == 1
            while isinstance(found := await outcome(link.submit(COUNT, key, [b"1"])), LinkError):
                pass
            assert found == 1
            error = lost.exception()
            assert isinstance(error, LinkError)
            assert error.sent
        finally:
            source.resume()


async def test_calls_wait_no_longer_than_their_timeout_for_the_slots(cluster: RedisCluster) -> None:
    """While no node tells who has which slot, calls fail in their time, as not sent, and past a bound at once."""
    before = asyncio.all_tasks()
    with FaultProxy(f"redis://{cluster.masters[0].host}:{cluster.masters[0].port}") as proxy:
        proxy.to_client.hold()
        async with linked(f"redis+cluster://{proxy.host}:{proxy.port}", timeout_s=QUICK_S, most=3) as link:
            calls = [link.submit(COUNT, b"{a}:waits", [b"1"]) for _ in range(4)]
            assert link.in_flight == 3
            errors = await outcomes(calls)
            assert [(type(error), error.sent) for error in errors] == [(LinkError, False)] * 4
            assert "could not be asked within 0.2 s" in str(errors[0])
            assert "3 calls wait" in str(errors[3])
            assert link.in_flight == 0

            left = link.submit(COUNT, b"{a}:waits", [b"1"], timeout_s=PATIENT_S)
            await link.aclose()
            assert "the link was closed" in str(left.exception())
            assert "the link was closed" in str(link.submit(COUNT, b"{a}:waits", [b"1"]).exception())
            assert asyncio.all_tasks() == before


async def test_a_lone_node_without_slots_is_named(own_redis: OwnRedis) -> None:
    """A node that belongs to no cluster yet cannot say who has which slot."""
    server = own_redis(cluster=True)
    async with linked(f"redis+cluster://{server.host}:{server.port}") as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert "is a node without a cluster" in str(error)


async def test_slots_that_cannot_be_read_are_logged(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not a list of slots fails the calls as not sent, and the log says what happened."""
    with FaultProxy(redis_server.url) as proxy:
        proxy.answer(b"*1\r\n*1\r\n:7\r\n", of="CLUSTER")
        async with linked(f"redis+cluster://{proxy.host}:{proxy.port}") as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert "answered something that is not a list of slots" in str(error)
    assert {record.message for record in caplog.records} == {
        f"redis: the slots of {proxy.host}:{proxy.port} cannot be read"
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_a_forked_process_does_not_use_the_nodes(cluster: RedisCluster) -> None:
    """In a child, calls fail as not sent, whether their slot's node is known or not."""
    async with linked(cluster.url) as link, linked(cluster.url) as unused:
        await link.command("GET", "{a}", key=b"{a}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is what is tested
            child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            code = 1
            try:
                errors = [each.submit(COUNT, b"{a}:fork", [b"1"]).exception() for each in (link, unused)]
                code = 0 if all(isinstance(error, LinkError) and "forked" in str(error) for error in errors) else 2
            finally:
                os._exit(code)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


async def test_one_node_that_dies_takes_only_its_slots_along() -> None:
    """Calls of other slots go on; those of the dead node fail until its replica has them, and then go on there."""
    with RedisCluster(replicas=1) as cluster:
        keys = [f"{tag}:dies".encode() for tag in TAGS[:3]]
        dead = cluster.node_of(cluster.slot_of(keys[0]))
        others = [key for key in keys if cluster.node_of(cluster.slot_of(key)) is not dead]
        changes = Changes()
        async with linked(cluster.url, on_change=changes) as link:
            assert await outcomes([link.submit(COUNT, key, [b"1"]) for key in keys]) == [1] * 3
            dead.call("WAIT", 1, 5_000)
            dead.kill()
            await changes.last("down")
            error = await outcome(link.submit(COUNT, keys[0], [b"1"]))
            assert isinstance(error, LinkError)
            assert not error.sent
            assert await outcomes([link.submit(COUNT, key, [b"1"]) for key in others]) == [2] * len(others)
            await changes.last("up")
            assert await link.submit(COUNT, keys[0], [b"1"]) == 2


async def test_a_slot_that_nobody_has_is_no_write(cluster: RedisCluster) -> None:
    """CLUSTERDOWN fails the call as not sent; so do later ones, until somebody has the slot again."""
    key = b"{d}:nobody"
    slot = cluster.slot_of(key)
    owner = cluster.node_of(slot)
    async with linked(cluster.url) as link:
        assert await link.submit(COUNT, key, [b"1"]) == 1
        for node in cluster.masters:
            node.call("CLUSTER", "DELSLOTS", slot)
        errors = [await outcome(link.submit(COUNT, key, [b"1"]))]
        while errors[-1].code:  # until the link has looked up who has it
            errors.append(await outcome(link.submit(COUNT, key, [b"1"])))
        assert isinstance(await outcome(link.submit(COUNT, b"{a}", [b"0"])), int)
        cluster.finish_move(slot, owner)
        while isinstance(counted := await outcome(link.submit(COUNT, key, [b"1"])), LinkError):
            errors.append(counted)

    assert counted == 2
    assert [error.sent for error in errors] == [False] * len(errors)
    assert "CLUSTERDOWN" in str(errors[0])
    assert f"has slot {slot}; see CLUSTER INFO" in str(errors[-1])
