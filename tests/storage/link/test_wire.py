from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from asgi_llm_guard.storage.redis_address import Endpoint
from asgi_llm_guard.storage.redis_wire import Call, LinkError, ServerError, Trailing, Wire, pack

pytestmark = pytest.mark.anyio

PLACE = Endpoint("redis.example", 6379)
PING = pack(("PING",))


class Transport(asyncio.Transport):
    """Keeps what is written, one item for each write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


class Owner:
    """Keeps what a wire tells."""

    def __init__(self) -> None:
        self.refusals: list[tuple[Call, str]] = []
        self.recoveries = 0
        self.losses: list[tuple[list[Call], bool, str]] = []

    def refused(self, wire: Wire, call: Call, error: ServerError) -> None:
        self.refusals.append((call, str(error)))

    def recovered(self, wire: Wire) -> None:
        self.recoveries += 1

    def lost(self, wire: Wire, unwritten: Sequence[Call], *, pending: bool, reason: str) -> None:
        self.losses.append((list(unwritten), pending, reason))


class Bench:
    """A wire between an owner and a transport that is a list."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.owner = Owner()
        self.transport = Transport()
        self.wire = Wire(self.loop, PLACE, self.owner)
        self.wire.connection_made(self.transport)

    def call(self, made: type[Call] = Call) -> Call:
        return made(self.loop.create_future(), PING, self.loop.time(), 1.0)

    def send(self, count: int) -> list[Call]:
        calls = [self.call() for _ in range(count)]
        for call in calls:
            self.wire.send(call)
        return calls


async def next_turn() -> None:
    await asyncio.sleep(0)


async def test_a_lone_call_is_written_at_once() -> None:
    """A call while nothing is under way does not wait for the next turn of the loop."""
    bench = Bench()
    bench.send(1)

    assert bench.transport.written == [PING]


async def test_calls_of_one_turn_are_one_write() -> None:
    """While a call is under way, all calls of a turn are written together in the next one."""
    bench = Bench()
    bench.send(1)
    await next_turn()
    bench.send(99)
    assert bench.transport.written == [PING]
    await next_turn()

    assert bench.transport.written == [PING, PING * 99]
    await next_turn()
    assert len(bench.transport.written) == 2


async def test_replies_go_to_calls_in_order() -> None:
    """Each reply is the oldest unanswered call's, however the bytes are cut."""
    bench = Bench()
    calls = bench.send(3)
    for byte in b":1\r\n$3\r\ntwo\r\n*2\r\n:3\r\n$-1\r\n":
        bench.wire.data_received(bytes([byte]))

    assert [call.future.result() for call in calls] == [1, b"two", [3, None]]


async def test_a_cancelled_call_drops_only_itself() -> None:
    """Its reply is read and thrown away, and the next one is for the next call."""
    bench = Bench()
    first, second, third = bench.send(3)
    second.future.cancel()
    bench.wire.data_received(b":1\r\n:2\r\n:3\r\n")

    assert (first.future.result(), third.future.result()) == (1, 3)
    assert not bench.wire.waiting


async def test_an_error_is_for_the_owner() -> None:
    """An error reply is told with its call, and those after it are answered as usual."""
    bench = Bench()
    first, second = bench.send(2)
    bench.wire.data_received(b"-NOSCRIPT No matching script.\r\n:2\r\n")

    assert bench.owner.refusals == [(first, "NOSCRIPT No matching script.")]
    assert second.future.result() == 2


async def test_an_error_inside_a_reply_is_a_value() -> None:
    """Only a reply that is an error as a whole is told; in a list it is one of the items."""
    bench = Bench()
    (call,) = bench.send(1)
    bench.wire.data_received(b"*2\r\n:1\r\n-ERR inside\r\n")

    one, error = call.future.result()
    assert one == 1
    assert isinstance(error, ServerError)
    assert bench.owner.refusals == []


async def test_a_loss_tells_apart_what_was_written() -> None:
    """Written calls fail with an unknown outcome; those of the turn that is not over are handed back, in order."""
    bench = Bench()
    first, second = bench.send(2)
    await next_turn()
    third, fourth = bench.send(2)
    bench.wire.connection_lost(ConnectionResetError("reset by peer"))

    for call in (first, second):
        error = call.future.exception()
        assert isinstance(error, LinkError)
        assert error.sent
        assert "redis.example:6379 was lost: reset by peer" in str(error)
    assert not third.future.done()
    assert bench.owner.losses == [
        ([third, fourth], True, "the connection to redis.example:6379 was lost: reset by peer")
    ]
    await next_turn()
    assert bench.transport.written == [PING, PING]


async def test_a_cancelled_call_is_handed_back_and_a_failed_one_is_not() -> None:
    """Cancelling takes back the interest in a reply, not the call; what has failed is not to be made any more."""
    bench = Bench()
    bench.send(1)
    cancelled, failed = bench.send(2)
    cancelled.future.cancel()
    failed.fail("too late", sent=False)
    bench.wire.drop("no reason")

    assert bench.owner.losses == [([cancelled], True, "no reason")]


async def test_a_loss_is_told_once() -> None:
    """Dropping a wire, and then hearing of its end, is one loss."""
    bench = Bench()
    bench.wire.drop("no reason")
    bench.wire.connection_lost(None)
    bench.wire.drop("another reason")

    assert bench.transport.aborted
    assert bench.owner.losses == [([], False, "no reason")]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the Redis protocol"),
        (b":1\r\n:2\r\n", "has replied to what it was not asked"),
    ],
)
async def test_what_is_not_the_protocol_ends_the_connection(data: bytes, says: str) -> None:
    """Bytes that are no reply, or a reply to no call, leave nothing that could be trusted."""
    bench = Bench()
    bench.send(1)
    bench.wire.data_received(data)

    assert bench.transport.aborted
    ((_, _, reason),) = bench.owner.losses
    assert says in reason


async def test_an_answer_in_time_clears_a_suspicion_once() -> None:
    """A suspected wire tells of the first reply that somebody waited for, and only of that."""
    bench = Bench()
    late, first, second = bench.send(3)
    late.fail("too late", sent=True)
    bench.wire.suspect = True
    bench.wire.data_received(b":1\r\n")
    assert bench.owner.recoveries == 0
    bench.wire.data_received(b":2\r\n")
    bench.wire.data_received(b":3\r\n")

    assert bench.owner.recoveries == 1
    assert (first.future.result(), second.future.result()) == (2, 3)


async def test_what_trails_a_call_can_be_taken_back() -> None:
    """The trailing calls right behind the answered one are given out; their replies are thrown away."""
    bench = Bench()
    bench.send(1)
    trailing = [bench.call(Trailing), bench.call(Trailing)]
    for call in trailing:
        bench.wire.send(call)
    (other,) = bench.send(1)
    bench.wire.send(bench.call(Trailing))
    bench.wire.data_received(b"-NOSCRIPT No matching script.\r\n")

    assert bench.wire.take_trailing() == trailing
    bench.wire.data_received(b":0\r\n:0\r\n:4\r\n")
    assert not trailing[0].future.done()
    assert other.future.result() == 4
    assert len(bench.wire.waiting) == 1


async def test_a_failure_that_nobody_asks_for_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    """Futures that were let go and failed log nothing when they are collected."""
    bench = Bench()
    calls = bench.send(3)
    bench.wire.drop("no reason")
    del calls, bench
    await next_turn()

    assert caplog.records == []
