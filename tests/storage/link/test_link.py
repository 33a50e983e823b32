"""The link to one server: order, loss, timeouts, the breaker, and what comes back."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import warnings

import pytest
from tests.servers import FaultProxy, OwnRedis, RedisServer, wait_until
from tests.storage.link.kit import (
    COUNT,
    PATIENT_S,
    PUSH,
    QUICK_S,
    SCRIPTS,
    Changes,
    fail_until_down,
    linked,
    outcome,
    outcomes,
    until,
)

from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_link import Link, LinkError, Script
from asgi_llm_guard.storage.redis_node import Node

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    """Shared, of either kind."""
    found = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(found, RedisServer)
    return found


@pytest.fixture
def key(namespace: str) -> bytes:
    return f"{{{namespace}}}:key".encode()


async def test_a_thousand_calls_are_answered_in_order(server: RedisServer, key: bytes) -> None:
    """A thousand calls handed over in one turn get each its own reply, in the order of handing over."""
    async with linked(server.url) as link:
        sums = await outcomes([link.submit(COUNT, key, [b"1"]) for _ in range(1000)])

    assert sums == list(range(1, 1001))


async def test_calls_of_many_tasks_get_their_own_replies(server: RedisServer, namespace: str) -> None:
    """Sixty-four tasks with a key each count to fifty, each by itself."""
    async with linked(server.url) as link:

        async def task(number: int) -> list[int]:
            key = f"{namespace}:{number}".encode()
            return [await link.submit(COUNT, key, [b"1"]) for _ in range(50)]

        counted = await asyncio.gather(*map(task, range(64)))

    assert counted == [list(range(1, 51))] * 64


async def test_all_calls_share_one_connection(redis_server: RedisServer, key: bytes) -> None:
    """However many calls are under way, there is one connection; it is opened by the first call."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url) as link:
            assert proxy.counts.connections == 0
            await outcomes([link.submit(COUNT, key, [b"1"]) for _ in range(100)])
            assert proxy.counts.connections == 1


async def test_replies_come_as_they_are(redis_server: RedisServer, key: bytes) -> None:
    """Integers, bytes, nil and nested lists are not converted; arguments may be bytes, text and integers."""
    script = Script("return {KEYS[1], ARGV, 7, false, {}}")
    async with linked(redis_server.url, scripts=[script]) as link:
        assert await link.submit(script, key, [b"\x00\xff", "é", 5]) == [
            key,
            [b"\x00\xff", b"\xc3\xa9", b"5"],
            7,
            None,
            [],
        ]
        assert await link.command("GET", key) is None
        assert await link.command("ECHO", "") == b""


async def test_a_cancelled_call_is_made_and_drops_only_itself(redis_server: RedisServer, key: bytes) -> None:
    """Its neighbours get their own replies, the connection stays, and what was handed over is executed."""
    async with linked(redis_server.url) as link:
        await link.command("PING")
        calls = [link.submit(COUNT, key, [b"1"]) for _ in range(9)]
        for call in calls[::3]:
            call.cancel()

        assert [call.result() for call in await asyncio.gather(*map(_done, calls)) if not call.cancelled()] == [
            2, 3, 5, 6, 8, 9,
        ]  # fmt: skip
        assert await link.submit(COUNT, key, [b"1"]) == 10


async def test_a_call_that_is_cancelled_before_there_is_a_connection_is_made(
    redis_server: RedisServer, key: bytes
) -> None:
    """What was handed over is executed, though its reply is not wanted, also when it had to wait."""
    async with linked(redis_server.url) as link:
        link.submit(COUNT, key, [b"5"]).cancel()

        assert await link.submit(COUNT, key, [b"1"]) == 6


async def _done(future: asyncio.Future[int]) -> asyncio.Future[int]:
    await asyncio.wait((future,))
    return future


# Scripts


async def test_the_scripts_are_loaded_when_the_connection_is_made(own_redis: OwnRedis) -> None:
    """The first call finds its script: no EVALSHA fails."""
    server = own_redis()
    async with linked(server.url) as link:
        await link.submit(COUNT, b"key", [b"1"])
        stats = await link.command("INFO", "errorstats")

    assert b"NOSCRIPT" not in stats


async def test_scripts_that_were_flushed_are_loaded_again_in_order(own_redis: OwnRedis) -> None:
    """After SCRIPT FLUSH in the middle of many calls, all are executed once, in the order of handing over."""
    server = own_redis()
    async with linked(server.url) as link:
        await link.command("PING")
        calls = [link.submit(PUSH, b"list", [n]) for n in range(100)]
        link.submit_command("SCRIPT", "FLUSH")
        calls += [link.submit(PUSH, b"list", [n]) for n in range(100, 200)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        calls += [link.submit(PUSH, b"list", [n]) for n in range(200, 300)]
        await until(calls[99].done)
        calls += [link.submit(PUSH, b"list", [n]) for n in range(300, 400)]
        await outcomes(calls)

        assert await link.command("LRANGE", "list", 0, -1) == [str(n).encode() for n in range(400)]
        assert [call.result() for call in calls] == [str(n).encode() for n in range(400)]


async def test_what_comes_back_is_sent_before_what_is_handed_over_then(own_redis: OwnRedis) -> None:
    """A call handed over in the very turn in which another comes back does not overtake it."""
    server = own_redis()
    with FaultProxy(server.url) as proxy:
        async with linked(proxy.url, most=10**6) as link:
            await link.command("SCRIPT", "FLUSH")
            proxy.to_client.hold()
            asked = proxy.counts.replies
            first = link.submit(PUSH, b"list", ["first"])
            await proxy.until(lambda counts: counts.replies > asked)
            proxy.to_client.release()
            others: list[asyncio.Future[bytes]] = []
            while not first.done():
                others.append(link.submit(PUSH, b"list", [len(others)]))
                await asyncio.sleep(0)
            await outcomes(others)

            assert await link.command("LRANGE", "list", 0, -1) == [
                b"first",
                *(str(n).encode() for n in range(len(others))),
            ]


async def test_what_trails_a_call_follows_it_when_it_is_sent_again(own_redis: OwnRedis) -> None:
    """WAIT behind a script that was not loaded is answered behind the script's second sending, not its first."""
    server = own_redis()
    async with linked(server.url) as link:
        await link.command("SCRIPT", "FLUSH")
        count = link.submit(COUNT, b"key", [b"1"])
        trailing = link.submit_command("GET", "key", trailing=True)
        other = link.submit_command("GET", "key")
        await outcomes([count, trailing, other])

    # `other` did not trail, and was answered before; that shows that the script was sent twice.
    assert (count.result(), trailing.result(), other.result()) == (1, b"1", None)


async def test_a_cancelled_call_that_comes_back_is_made_all_the_same(own_redis: OwnRedis) -> None:
    """Cancelling takes back the interest in the reply, not the call, also when its script was not loaded."""
    server = own_redis()
    async with linked(server.url) as link:
        await link.command("SCRIPT", "FLUSH")
        link.submit(COUNT, b"key", [b"5"]).cancel()

        assert await link.submit(COUNT, b"key", [b"1"]) == 6


async def test_scripts_that_the_user_may_not_load_fail_the_calls(own_redis: OwnRedis) -> None:
    """Without the right to SCRIPT LOAD the calls fail, surely not executed, and say which rights are needed."""
    server = own_redis()
    server.call("ACL", "SETUSER", "weak", "on", ">weak", "~*", "+@all", "-script")
    async with linked(server.url.replace("://", "://weak:weak@")) as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert "NOPERM" in str(error)
    assert "it needs EVALSHA, SCRIPT LOAD" in str(error)


async def test_a_script_that_was_not_declared_fails_and_ends(own_redis: OwnRedis) -> None:
    """A script that the link does not know comes back again and again, but not for ever."""
    server = own_redis()
    async with linked(server.url) as link:
        error = await outcome(link.submit(Script("return 1"), b"key", []))

    assert isinstance(error, LinkError)
    assert (error.code, error.sent) == ("NOSCRIPT", False)


# Errors


@pytest.mark.parametrize(
    "reply, sent, says",
    [
        (
            "OOM command not allowed when used memory > 'maxmemory'.",
            False,
            "raise it, or give the guard a server of its own",
        ),
        ("MISCONF Redis is configured to save RDB snapshots", False, "the server cannot save its data set"),
        ("NOREPLICAS Not enough good replicas to write.", False, "min-replicas-to-write"),
        ("BUSY Redis is busy running a script.", False, "SCRIPT KILL"),
        ("MOVED 1 10.0.0.1:6379", False, "write redis+cluster:// in the URL"),
        ("ERR user_script:1: something is wrong", True, "something is wrong"),
        ("WRONGTYPE Operation against a key", True, "choose another namespace"),
    ],
)
async def test_an_error_says_what_to_do_and_whether_it_was_executed(
    redis_server: RedisServer, reply: str, sent: bool, says: str
) -> None:
    """A refusal before the first write is surely not executed; any other error may come after writes."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url) as link:
            await link.command("PING")
            proxy.answer(f"-{reply}\r\n".encode(), times=1)
            error = await outcome(link.submit(COUNT, b"key", [b"0"]))
            assert isinstance(error, LinkError)
            assert (error.sent, error.code) == (sent, reply.partition(" ")[0])
            assert reply.rstrip(".") in str(error)
            assert says in str(error)
            assert await link.command("PING") == b"PONG"
            assert link.state == "up"


async def test_out_of_memory_is_no_write(own_redis: OwnRedis) -> None:
    """A server that has reached maxmemory refuses the script before it writes."""
    server = own_redis()
    async with linked(server.url) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        await link.command("CONFIG", "SET", "maxmemory", "1")
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))
        assert isinstance(error, LinkError)
        assert (error.sent, error.code) == (False, "OOM")
        assert await link.command("GET", "key") == b"1"


async def test_a_master_that_became_a_replica_is_looked_up_anew(own_redis: OwnRedis) -> None:
    """READONLY fails the call, surely not executed; the connection is made anew, and serves again when it may."""
    server = own_redis()
    changes = Changes()
    async with linked(server.url, on_change=changes) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        server.call("REPLICAOF", "127.0.0.1", "1")
        calls = [link.submit(COUNT, b"key", [b"1"]) for _ in range(3)]
        errors = await outcomes(calls)
        assert [(type(error), error.sent, error.code) for error in errors] == [(LinkError, False, "READONLY")] * 3
        await changes.last("down")
        assert "is a replica" in changes.reasons[-1]
        server.call("REPLICAOF", "NO", "ONE")
        await changes.last("up")
        assert await link.submit(COUNT, b"key", [b"1"]) == 2


# Loss


async def test_a_lost_reply_is_an_unknown_outcome(redis_server: RedisServer, key: bytes) -> None:
    """The call that was executed without a reply fails as sent; the next one finds a new connection."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url) as link:
            await link.command("PING")
            proxy.cut_at_reply(of="EVALSHA")
            error = await outcome(link.submit(COUNT, key, [b"1"]))
            assert isinstance(error, LinkError)
            assert error.sent
            assert "what became of the call is unknown" in str(error)
            assert await link.submit(COUNT, key, [b"1"]) == 2
            assert proxy.counts.connections == 2


async def test_a_reply_that_never_comes_fails_in_time(redis_server: RedisServer, key: bytes) -> None:
    """Without a reply a call fails when its time is over, and not much later."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, timeout_s=QUICK_S) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            proxy.to_client.drop = True
            begun = time.monotonic()
            call = link.submit(COUNT, key, [b"1"])
            # Where the machine stands still, both times are over at once, and the call's comes first all the same.
            in_time, _ = await asyncio.wait([call], timeout=2 * QUICK_S)
            took = time.monotonic() - begun
            error = await outcome(call)

    assert in_time
    assert isinstance(error, LinkError)
    assert error.sent
    assert "did not answer within 0.2 s" in str(error)
    assert took >= QUICK_S


async def test_a_late_reply_is_not_taken_for_the_next_one(redis_server: RedisServer, key: bytes) -> None:
    """After a timeout the late reply is thrown away, and the next call gets its own."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, timeout_s=QUICK_S) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            proxy.to_client.hold()
            late = await outcome(link.submit(COUNT, key, [b"1"]))
            assert isinstance(late, LinkError)
            next_call = link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S)
            proxy.to_client.release()
            assert await outcome(next_call) == 2
            assert proxy.counts.connections == 1


async def test_a_longer_timeout_is_for_one_call(redis_server: RedisServer, key: bytes) -> None:
    """A call that was given more time waits longer than those before and behind it."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, timeout_s=QUICK_S, failures=100) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            proxy.to_client.hold()
            before = link.submit(COUNT, key, [b"1"])
            patient = link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S)
            behind = link.submit(COUNT, key, [b"1"])
            assert [type(await outcome(call)) for call in (before, behind)] == [LinkError, LinkError]
            assert not patient.done()
            proxy.to_client.release()
            assert await outcome(patient) == 2


def await_count(server: RedisServer, key: bytes, count: int) -> None:
    """Keep the event loop until the server has executed so many calls."""
    wait_until(lambda: int(server.call("GET", key) or 0) >= count, f"{count} calls are executed")


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
def test_a_loop_that_was_kept_does_not_blame_the_server(redis_server: RedisServer, key: bytes, loop_kind: str) -> None:
    """Whoever keeps the event loop for longer than the timeout: replies that came meanwhile count as in time."""
    run = pytest.importorskip("uvloop").run if loop_kind == "uvloop" else asyncio.run

    async def main() -> None:
        changes = Changes()
        async with linked(redis_server.url, timeout_s=QUICK_S, failures=1, on_change=changes) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            for turn in range(3):
                before = link.submit(COUNT, key, [b"1"])
                await asyncio.sleep(0)
                time.sleep(1.5 * QUICK_S)  # noqa: ASYNC251 - it is what is tested
                await_count(redis_server, key, 2 * turn + 1)
                after = link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S)
                await asyncio.sleep(0)
                assert [type(each) for each in await outcomes([before, after])] == [int, int]
            assert changes.told == []

    run(main())


async def test_a_thousand_calls_end_when_the_connection_is_cut(redis_server: RedisServer, key: bytes) -> None:
    """All that were under way fail as unknown, at once, and nothing is sent again."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url) as link:
            await link.command("PING")
            proxy.to_server.hold()
            calls = [link.submit(COUNT, key, [b"1"]) for _ in range(1000)]
            await asyncio.sleep(0)  # the turn in which they are written
            proxy.cut()
            errors = await outcomes(calls)
            assert {(type(error), error.sent) for error in errors} == {(LinkError, True)}
            proxy.heal()
            assert await link.submit(COUNT, key, [b"1"]) == 1


async def test_calls_that_were_not_written_wait_for_the_next_connection(redis_server: RedisServer, key: bytes) -> None:
    """When a server comes back within their time, calls that wait for it are executed, in order."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, failures=1000) as link:
            proxy.refuse()
            calls = [link.submit(COUNT, key, [b"1"]) for _ in range(10)]
            seen = [link.submit(COUNT, key, [b"1"])]
            await asyncio.wait(seen, timeout=QUICK_S)
            proxy.heal()
            assert await outcomes(calls + seen) == list(range(1, 12))


async def test_a_refused_connection_is_surely_not_executed(own_redis: OwnRedis) -> None:
    """Where nobody listens, calls fail within their time as not sent, and say where and why."""
    server = own_redis()
    server.stop()
    begun = time.monotonic()
    async with linked(server.url) as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert f"{server.host}:{server.port} could not be reached" in str(error)
    assert time.monotonic() - begun < PATIENT_S


async def test_calls_wait_no_longer_than_their_timeout_for_a_connection(redis_server: RedisServer) -> None:
    """While a connection is not made and not refused, a call fails in its time, as not sent."""
    with FaultProxy(redis_server.url) as proxy:
        proxy.to_client.hold()
        async with linked(proxy.url, timeout_s=QUICK_S) as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))
            assert isinstance(error, LinkError)
            assert not error.sent
            assert "could not be asked within 0.2 s" in str(error)


async def test_a_connection_that_is_not_made_in_time_is_given_up(redis_server: RedisServer) -> None:
    """Connecting has a time of its own, and the reason tells of it."""
    with FaultProxy(redis_server.url) as proxy:
        proxy.to_client.hold()
        changes = Changes()
        async with linked(f"{proxy.url}?connect_timeout=0.1", failures=1, on_change=changes) as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))
            assert isinstance(error, LinkError)
            assert "could not be reached within 0.1 s" in str(error)
            proxy.to_client.release()
            await changes.last("up")


async def test_a_server_that_closes_what_is_idle_has_not_failed(redis_server: RedisServer) -> None:
    """A connection that was closed while nothing was under way is made anew, and nobody is told of trouble."""
    changes = Changes()
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, failures=1, on_change=changes) as link:
            await link.command("PING")
            proxy.cut()
            await connected(proxy, 2)
            assert await link.command("PING") == b"PONG"
            assert changes.told == []


async def test_a_server_that_closes_whatever_is_opened_has_failed(redis_server: RedisServer) -> None:
    """Connections that are lost as soon as they are made are not made again at once, for ever."""
    changes = Changes()
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, failures=2, on_change=changes) as link:
            await link.command("PING")
            node = link._servers
            assert isinstance(node, Node)
            for connections in (2, 3):
                assert changes.told == []
                proxy.cut()
                await connected(proxy, connections)
                await until(lambda: node.connected)
            proxy.cut()
            await changes.last("down")


async def connected(proxy: FaultProxy, times: int) -> None:
    await proxy.until(lambda counts: counts.connections == times)


# The breaker


async def test_a_server_that_stops_is_left_alone_until_it_answers(own_redis: OwnRedis) -> None:
    """After some timeouts calls fail at once, without being sent; when the server answers again, they are made again."""
    server = own_redis()
    changes = Changes()
    with FaultProxy(server.url) as proxy:
        async with linked(proxy.url, timeout_s=QUICK_S, on_change=changes) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            server.pause()
            assert [error.sent for error in await fail_until_down(link)] == [True] * 3

            written = proxy.counts.requests
            took = []
            for _ in range(20):
                begun = time.perf_counter()
                error = await outcome(link.submit(COUNT, b"key", [b"1"]))
                took.append(time.perf_counter() - begun)
                assert isinstance(error, LinkError)
                assert not error.sent
                assert "is left alone for now" in str(error)
                assert "did not answer within 0.2 s" in str(error)
            assert min(took) < 0.001
            assert proxy.counts.requests == written

            server.resume()
            await changes.last("up")
            assert await link.submit(COUNT, b"other", [b"1"], timeout_s=PATIENT_S) == 1
            assert changes.told == ["down", "up"]


async def test_a_server_that_restarts_is_found_without_any_call(own_redis: OwnRedis) -> None:
    """When the server is gone the link says so once, looks for it by itself, and says once that it is back."""
    server = own_redis()
    changes = Changes()
    async with linked(server.url, on_change=changes) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        server.stop()
        await changes.last("down")
        server.start()
        await changes.last("up")
        assert await link.submit(COUNT, b"key", [b"1"]) == 1  # it kept nothing; and its scripts are loaded
        assert changes.told == ["down", "up"]


async def test_one_answer_between_timeouts_keeps_the_link_up(redis_server: RedisServer, key: bytes) -> None:
    """Only failures in a row count: a server that answers every other call is not left alone."""
    with FaultProxy(redis_server.url) as proxy:
        changes = Changes()
        async with linked(proxy.url, timeout_s=QUICK_S, failures=2, on_change=changes) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            for _ in range(3):
                proxy.to_client.hold()
                assert isinstance(await outcome(link.submit(COUNT, key, [b"1"])), LinkError)
                proxy.to_client.release()
                assert isinstance(await outcome(link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S)), int)
            assert changes.told == []


async def test_a_connection_that_hangs_is_replaced(redis_server: RedisServer, key: bytes) -> None:
    """A connection on which nothing is answered any more is dropped, and another one is made."""
    with FaultProxy(redis_server.url) as proxy:
        changes = Changes()
        async with linked(proxy.url, timeout_s=QUICK_S, on_change=changes) as link:
            await link.command("PING", timeout_s=PATIENT_S)
            proxy.to_client.drop = True  # what is open stays lost for good, as behind a firewall that forgot it
            await outcomes([link.submit(COUNT, key, [b"1"]) for _ in range(2)])
            await fail_until_down(link)
            proxy.to_client.drop = False
            await changes.last("up")
            assert isinstance(await link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S), int)
            assert proxy.counts.connections >= 2


async def test_calls_past_the_bound_are_refused_at_once(redis_server: RedisServer, key: bytes) -> None:
    """Connected or not, so many calls wait, and one more fails as not sent and names the bound."""
    with FaultProxy(redis_server.url) as proxy:
        async with linked(proxy.url, most=5) as link:
            calls = [link.submit(COUNT, key, [b"1"]) for _ in range(6)]
            assert isinstance(calls[5].exception(), LinkError)
            await outcomes(calls[:5])

            proxy.to_client.hold()
            calls = [link.submit(COUNT, key, [b"1"]) for _ in range(6)]
            error = calls[5].exception()
            assert isinstance(error, LinkError)
            assert not error.sent
            assert "5 calls" in str(error)
            assert link.in_flight == 5
            proxy.to_client.release()
            assert await outcomes(calls[:5]) == [6, 7, 8, 9, 10]


# Who connects


async def test_a_password_is_used_and_not_shown(own_redis: OwnRedis) -> None:
    """The right password lets in; a wrong one, or none, fails at once, and no error shows either."""
    server = own_redis(password="right-one")
    async with linked(server.url) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        assert "right-one" not in repr(link.address)

    for wrong in (":wrong-one@", ""):
        changes = Changes()
        with FaultProxy(server.url.replace(":right-one@", wrong)) as proxy:
            async with linked(proxy.url, on_change=changes) as link:
                error = await outcome(link.submit(COUNT, b"key", [b"1"]))
                assert proxy.counts.connections == 1  # it is not tried again and again
        assert isinstance(error, LinkError)
        assert not error.sent
        assert error.__cause__ is None
        assert changes.told == ["down"]
        for text in (str(error), *changes.reasons):
            assert "wrong-one" not in text
            assert "password" in text


async def test_user_and_database_are_those_of_the_url(own_redis: OwnRedis) -> None:
    """The connection logs in as the named user, selects the database and tells its name."""
    server = own_redis()
    server.call("ACL", "SETUSER", "us@er", "on", ">p@ss/word", "~*", "+@all")
    url = f"redis://us%40er:p%40ss%2Fword@{server.host}:{server.port}/3?client_name=billing"
    async with linked(url) as link:
        assert await link.command("ACL", "WHOAMI") == b"us@er"
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        clients = (await link.command("CLIENT", "LIST", "TYPE", "normal")).decode()
        assert await link.command("CLIENT", "GETNAME") == b"billing"
    assert " db=3 " in next(line for line in clients.splitlines() if "billing" in line)
    assert server.call("GET", "key") is None


async def test_connects_by_a_unix_socket(redis_server: RedisServer, key: bytes) -> None:
    """A path instead of a host."""
    async with linked(redis_server.unix_url) as link:
        assert await link.submit(COUNT, key, [b"1"]) == 1


async def test_connects_with_encryption(own_redis: OwnRedis) -> None:
    """A certificate that the given authority signed is accepted, and the connection is encrypted."""
    server = own_redis(tls=True, password="right-one")
    async with linked(server.url) as link:
        sums = await outcomes([link.submit(COUNT, b"key", [b"1"]) for _ in range(100)])
        assert sums == list(range(1, 101))
        big = b"x" * 300_000
        assert await link.command("SET", "big", big) == b"OK"
        assert await link.command("GET", "big") == big


async def test_a_certificate_of_an_unknown_authority_is_refused(own_redis: OwnRedis) -> None:
    """Without the authority's certificate nothing is sent; with `ssl_cert_reqs=none` it is not asked for."""
    server = own_redis(tls=True)
    bare = server.url.partition("?")[0]
    async with linked(bare) as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))
        assert isinstance(error, LinkError)
        assert not error.sent
        assert "certificate verify failed" in str(error)
    async with linked(f"{bare}?ssl_cert_reqs=none") as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1


# What the server is


async def test_tells_what_the_server_is(server: RedisServer) -> None:
    """Name, version, role, and what start-up warns about."""
    async with linked(server.url) as link:
        info = await link.server_info()

    assert info.name == server.program.capitalize()
    assert info.is_valkey == (server.program == "valkey")
    assert info.version[0] >= 7
    assert (info.role, info.replicas) == ("master", 0)
    assert (info.maxmemory_policy, info.maxmemory) == ("noeviction", 0)
    assert (info.aof, info.rdb) == (False, False)


async def test_tells_of_persistence(own_redis: OwnRedis) -> None:
    """An append-only file, snapshots, and a policy that evicts are seen."""
    server = own_redis(appendonly=True, config=["save 3600 1"], maxmemory="100mb")
    server.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    async with linked(server.url) as link:
        info = await link.server_info()

    assert (info.aof, info.rdb) == (True, True)
    assert (info.maxmemory_policy, info.maxmemory) == ("allkeys-lru", 100 * 2**20)


async def test_what_may_not_be_asked_is_unknown(own_redis: OwnRedis) -> None:
    """A user without the right to INFO and CONFIG can use the link; what it cannot see is `None`."""
    server = own_redis()
    server.call("ACL", "SETUSER", "weak", "on", ">weak", "~*", "+@all", "-info", "-config")
    async with linked(server.url.replace("://", "://weak:weak@")) as link:
        assert await link.submit(COUNT, b"key", [b"1"]) == 1
        info = await link.server_info()

    assert info.version == ()
    assert {info.role, info.replicas, info.maxmemory_policy, info.maxmemory, info.aof, info.rdb} == {None}


@pytest.mark.parametrize(
    "info, says",
    [
        ("redis_version:6.2.14", "is Redis 6.2.14; needed is Redis 7.0 or Valkey 8.0, or later"),
        ("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.2.9", "is Valkey 7.2.9; needed is"),
    ],
)
async def test_a_server_that_is_too_old_is_refused(redis_server: RedisServer, info: str, says: str) -> None:
    """The first call fails at once, as not sent, and names the version and the one that is needed."""
    with FaultProxy(redis_server.url) as proxy:
        proxy.answer(f"${len(info)}\r\n{info}\r\n".encode(), of="INFO")
        async with linked(proxy.url) as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert says in str(error)


async def test_what_is_no_redis_is_refused() -> None:
    """A server of another protocol fails the calls, as not sent."""

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(web, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with linked(f"redis://127.0.0.1:{port}") as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent


# The end


async def test_closing_waits_for_what_is_under_way(redis_server: RedisServer, key: bytes) -> None:
    """Calls handed over before `aclose` are answered; those after it fail as not sent. No task is left."""
    before = asyncio.all_tasks()
    link = Link(Address.parse(redis_server.url)[0], scripts=SCRIPTS, timeout_s=PATIENT_S)
    calls = [link.submit(COUNT, key, [b"1"]) for _ in range(100)]
    late: list[asyncio.Future[int]] = []
    calls[0].add_done_callback(lambda _: late.append(link.submit(COUNT, key, [b"1"])))
    await link.aclose()

    assert [call.result() for call in calls] == list(range(1, 101))
    assert "the link was closed" in str(late[0].exception())
    error = await outcome(link.submit(COUNT, key, [b"1"]))
    assert isinstance(error, LinkError)
    assert not error.sent
    assert "the link was closed" in str(error)
    assert link.in_flight == 0
    assert asyncio.all_tasks() == before
    await link.aclose()


async def test_closing_ends_when_the_server_does_not_answer(redis_server: RedisServer, key: bytes) -> None:
    """What gets no answer fails, and nothing is left, whether connected, connecting or waiting to connect."""
    before = asyncio.all_tasks()
    with FaultProxy(redis_server.url) as proxy:
        up, connecting = [
            Link(Address.parse(proxy.url)[0], scripts=SCRIPTS, timeout_s=QUICK_S, failures=100) for _ in range(2)
        ]
        await up.command("PING", timeout_s=PATIENT_S)
        proxy.to_client.hold()
        calls = [link.submit(COUNT, key, [b"1"], timeout_s=PATIENT_S) for link in (up, connecting)]
        await connected(proxy, 2)
        await asyncio.gather(up.aclose(), connecting.aclose())
        errors = await outcomes(calls)
        assert [(type(error), error.sent) for error in errors] == [(LinkError, True), (LinkError, False)]
        proxy.refuse()
        proxy.cut()
        waiting = Link(Address.parse(proxy.url)[0], scripts=SCRIPTS, timeout_s=QUICK_S, failures=1)
        await outcome(waiting.submit(COUNT, key, [b"1"]))
        await waiting.aclose()

    assert asyncio.all_tasks() == before


async def test_closing_that_is_cancelled_closes_all_the_same(redis_server: RedisServer, key: bytes) -> None:
    """Who has no time to wait for the last answers leaves neither a connection nor a task, connected or connecting."""
    before = asyncio.all_tasks()
    with FaultProxy(redis_server.url) as proxy:
        up, connecting = [Link(Address.parse(proxy.url)[0], scripts=SCRIPTS, timeout_s=PATIENT_S) for _ in range(2)]
        await up.command("PING")
        proxy.to_client.hold()
        calls = [link.submit(COUNT, key, [b"1"]) for link in (up, connecting)]
        await connected(proxy, 2)
        closing = [asyncio.create_task(link.aclose()) for link in (up, connecting)]
        await asyncio.sleep(0)
        for task in closing:
            task.cancel()
        await asyncio.wait(closing)
        assert all(task.cancelled() for task in closing)
        errors = await outcomes(calls)
        assert [(type(error), error.sent) for error in errors] == [(LinkError, True), (LinkError, False)]
        proxy.heal()
        await proxy.until(lambda counts: counts.open == 0)

    assert asyncio.all_tasks() == before


def test_a_loop_that_ends_without_closing_makes_no_noise(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    """Connected, or trying to connect, a link that is simply forgotten leaves no task that complains."""
    server = own_redis()

    async def forget(url: str) -> None:
        link = Link(Address.parse(url)[0], scripts=SCRIPTS, timeout_s=PATIENT_S, failures=1)
        await outcome(link.submit(COUNT, b"key", [b"1"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a socket was left open, and Python says so, rightly
        asyncio.run(forget(server.url))
        server.stop()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(forget(server.url))
        loop.close()
        gc.collect()

    assert caplog.records == []


def test_works_on_another_event_loop(own_redis: OwnRedis) -> None:
    """On uvloop: order, timeouts, loss, encryption and recovery."""
    uvloop = pytest.importorskip("uvloop")
    server = own_redis(tls=True)

    async def main() -> None:
        with FaultProxy(f"redis://{server.host}:{server.port}/0") as proxy:
            changes = Changes()
            async with linked(proxy.url, timeout_s=QUICK_S, failures=2, on_change=changes) as link:
                calls = [link.submit(COUNT, b"key", [1], timeout_s=PATIENT_S) for _ in range(500)]
                assert await outcomes(calls) == list(range(1, 501))
                proxy.cut_at_reply(of="EVALSHA")
                assert (await outcome(link.submit(COUNT, b"key", [1], timeout_s=PATIENT_S))).sent
                proxy.to_client.drop = True
                await fail_until_down(link)
                proxy.heal()
                await changes.last("up")
                assert isinstance(await link.submit(COUNT, b"key", [1], timeout_s=PATIENT_S), int)
        async with linked(server.url) as link:
            assert await outcomes([link.submit(COUNT, b"tls", [1]) for _ in range(500)]) == list(range(1, 501))

    uvloop.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_a_forked_process_does_not_write_to_the_connection(redis_server: RedisServer, key: bytes) -> None:
    """In a child, calls fail as not sent; the parent's connection is untouched."""
    async with linked(redis_server.url) as link:
        assert await link.submit(COUNT, key, [b"1"]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which is what is tested
            child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            code = 1
            try:
                error = link.submit(COUNT, key, [b"1"]).exception()
                code = 0 if isinstance(error, LinkError) and not error.sent and "forked" in str(error) else 2
            finally:
                os._exit(code)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert await link.submit(COUNT, key, [b"1"]) == 2
