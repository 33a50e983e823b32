"""The fault proxy does to connections what its methods say, in front of a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hiredis
import pytest
from tests.fault_proxy import FaultProxy, Frames
from tests.servers import OwnRedis, RedisServer


class Client:
    """One connection through a proxy, which says and hears RESP."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.link = socket.create_connection((proxy.host, proxy.port), timeout=30)
        self.reader = hiredis.Reader(notEnoughData=Ellipsis)
        self.sizes: list[int] = []
        """How many bytes came each time that some came."""

    def close(self) -> None:
        self.link.close()

    def say(self, *commands: tuple[Any, ...]) -> None:
        """Send all of them at once."""
        self.link.sendall(b"".join(hiredis.pack_command(command) for command in commands))

    def hear(self) -> Any:
        """The next reply.

        Raises:
            EOFError: the connection ended in order.
            ConnectionResetError: it was reset.
        """
        while (reply := self.reader.gets()) is Ellipsis:
            data = self.link.recv(65_536)
            if not data:
                raise EOFError
            self.sizes.append(len(data))
            self.reader.feed(data)
        return reply

    def ask(self, *command: Any) -> Any:
        self.say(command)
        return self.hear()

    def silent(self) -> bool:
        """Whether nothing has arrived, not even an end."""
        self.link.settimeout(0.02)
        try:
            self.link.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.link.settimeout(5)
        return False

    def lost(self) -> bool:
        """Whether the connection has ended, in whatever way."""
        try:
            return self.link.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def proxy(fault_proxy: Callable[[str], FaultProxy], redis_server: RedisServer) -> FaultProxy:
    return fault_proxy(redis_server.url)


@pytest.fixture
def connect(proxy: FaultProxy) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(proxy))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    return connect()


def test_passes_everything_by_default(client: Client, proxy: FaultProxy, namespace: str) -> None:
    """Without faults, a client notices nothing, and requests, replies and bytes are counted."""
    value = bytes(range(256)) * 1_000

    client.say(("SET", namespace, value), ("GET", namespace), ("DEL", namespace, "no-such-key"), ("GET", namespace))

    assert [client.hear() for _ in range(4)] == [b"OK", value, 1, None]
    counts = proxy.counts
    assert (counts.connections, counts.open, counts.requests, counts.replies) == (1, 1, 4, 4)
    assert (counts.bytes_to_server > len(value), counts.bytes_dropped) == (True, 0)
    assert counts.bytes_to_client == sum(client.sizes)


def test_the_url_is_the_servers_with_the_proxys_port() -> None:
    """`url` keeps the credentials, the path and the options of the server's."""
    proxy = FaultProxy("redis://:se:cret@127.0.0.1:6379/0?x=127.0.0.1:6379")

    assert proxy.url == f"redis://:se:cret@127.0.0.1:{proxy.port}/0?x=127.0.0.1:6379"


def test_a_url_without_a_port_is_refused() -> None:
    """A proxy stands before one TCP port."""
    with pytest.raises(ValueError, match="names no port"):
        FaultProxy("unix:///tmp/redis.sock")


@pytest.mark.parametrize("way", ["to_server", "to_client"])
def test_delays(client: Client, proxy: FaultProxy, way: str) -> None:
    """Each way can be slow, and a second request on the way does not make it slower."""
    getattr(proxy, way).delay_ms = 30.0
    began = time.monotonic()

    client.say(("PING",))
    client.say(("PING",))
    replies = [client.hear(), client.hear()]

    assert replies == [b"PONG", b"PONG"]
    assert 0.03 <= time.monotonic() - began < 5


def test_dropped_replies(client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str) -> None:
    """With `drop`, requests are executed and nothing is heard; `heal` resets the connections that lost something."""
    proxy.to_client.drop = True

    client.say(("SET", namespace, "done"))
    proxy.wait_for(lambda counts: counts.bytes_dropped == len(b"+OK\r\n"))

    assert (redis_server.call("GET", namespace), client.silent()) == (b"done", True)
    proxy.heal()
    assert client.lost()


def test_dropped_requests(client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str) -> None:
    """With `to_server.drop`, nothing is executed."""
    proxy.to_server.drop = True

    client.say(("SET", namespace, "done"))
    proxy.wait_for(lambda counts: counts.bytes_dropped > 0)

    assert redis_server.call("GET", namespace) is None


def test_a_connection_that_lost_something_stays_lost(client: Client, proxy: FaultProxy) -> None:
    """With `drop` unset again, no later reply is taken for the one that was lost."""
    proxy.to_client.drop = True
    client.say(("ECHO", "lost"))
    proxy.wait_for(lambda counts: counts.bytes_dropped > 0)
    proxy.to_client.drop = False

    client.say(("ECHO", "later"))
    proxy.wait_for(lambda counts: counts.replies == 2)

    assert client.silent()


def test_connections_that_lost_nothing_survive_healing(connect: Callable[[], Client], proxy: FaultProxy) -> None:
    """`heal` leaves connections alone on which nothing was dropped, and those made while some were dropped work."""
    idle, busy = connect(), connect()
    assert (idle.ask("PING"), busy.ask("PING")) == (b"PONG", b"PONG")
    proxy.to_client.drop = True
    busy.say(("PING",))
    proxy.wait_for(lambda counts: counts.bytes_dropped > 0)

    proxy.heal()

    assert (busy.lost(), idle.ask("PING"), connect().ask("PING")) == (True, b"PONG", b"PONG")


def test_held_replies_arrive_when_released(client: Client, proxy: FaultProxy) -> None:
    """`hold` keeps replies back, in order, until `release`."""
    proxy.to_client.hold()
    client.say(("ECHO", "a"), ("ECHO", "b"))
    proxy.wait_for(lambda counts: counts.replies == 2)
    assert client.silent()

    proxy.to_client.release()

    assert [client.hear(), client.hear()] == [b"a", b"b"]


def test_held_requests_are_executed_when_released(
    client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """`to_server.hold` keeps requests from being executed until they are released; `heal` releases as well."""
    proxy.to_server.hold()
    client.say(("SET", namespace, "done"))
    proxy.wait_for(lambda counts: counts.requests == 1)
    assert (redis_server.call("GET", namespace), client.silent()) == (None, True)

    proxy.heal()

    assert (client.hear(), redis_server.call("GET", namespace)) == (b"OK", b"done")


def test_cut_at_reply(
    client: Client, connect: Callable[[], Client], proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """The n-th reply is not heard, those before it are, and all requests are executed; and it happens once."""
    proxy.cut_at_reply(2)

    client.say(("ECHO", "first"), ("INCR", namespace), ("INCR", namespace))

    assert client.hear() == b"first"
    assert client.lost()
    assert (redis_server.call("GET", namespace), proxy.counts.cuts) == (b"2", 1)
    again = connect()
    assert [again.ask("ECHO", word) for word in ("a", "b", "c")] == [b"a", b"b", b"c"]


def test_cut_at_the_reply_to_a_command(
    client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """`of` counts the replies to one command only, whatever stands between them."""
    proxy.cut_at_reply(2, of="INCR")

    client.say(("INCR", namespace), ("PING",), ("ECHO", "x"))
    assert [client.hear() for _ in range(3)] == [1, b"PONG", b"x"]
    client.say(("incr", namespace))

    assert client.lost()
    assert redis_server.call("GET", namespace) == b"2"


def test_pushes_answer_nothing(client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str) -> None:
    """What a server says unasked, in RESP3, passes, and is no reply to what is asked next."""
    client.say(("HELLO", 3), ("CLIENT", "TRACKING", "ON"), ("GET", namespace))
    assert [client.hear() for _ in range(3)][1:] == [b"OK", None]
    redis_server.call("SET", namespace, "changed")
    assert client.hear() == [b"invalidate", [namespace.encode()]]
    assert proxy.counts.replies == 3

    proxy.cut_at_reply(of="ECHO")
    client.say(("PING",), ("ECHO", "a"))

    assert client.hear() == b"PONG"
    assert client.lost()


def test_cut_at_request(client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str) -> None:
    """The n-th request is not executed, those before it are, and those after it are not."""
    proxy.cut_at_request(3, of="INCR")

    client.say(*[("INCR", namespace)] * 5)

    with pytest.raises((EOFError, ConnectionResetError)):
        for _ in range(3):
            client.hear()
    proxy.wait_for(lambda counts: counts.open == 0)
    assert (redis_server.call("GET", namespace), proxy.counts.cuts) == (b"2", 1)


def test_answers_in_the_servers_place(
    client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """`answer` gives its reply in the order of the requests, which the server does not see, and `times` times."""
    proxy.answer(b"-LOADING not yet\r\n", of="INCR", times=2)

    client.say(("INCR", namespace), ("ECHO", "a"), ("INCR", namespace), ("INCR", namespace))
    replies = [client.hear() for _ in range(4)]

    assert [str(reply) for reply in replies] == ["LOADING not yet", "b'a'", "LOADING not yet", "1"]
    assert redis_server.call("GET", namespace) == b"1"


def test_answers_until_healed(client: Client, proxy: FaultProxy) -> None:
    """Without `times` and `of`, every request is answered so until `heal`."""
    proxy.answer(b"-OOM no\r\n")
    assert {str(client.ask("PING")) for _ in range(5)} == {"OOM no"}

    proxy.heal()

    assert client.ask("PING") == b"PONG"


def test_cut_resets_all_connections(connect: Callable[[], Client], proxy: FaultProxy) -> None:
    """`cut` is a reset for every client, and new connections work at once."""
    clients = [connect(), connect()]
    assert [client.ask("PING") for client in clients] == [b"PONG", b"PONG"]

    proxy.cut()

    for client in clients:
        with pytest.raises(ConnectionResetError):
            client.hear()
    assert connect().ask("PING") == b"PONG"


def test_refuse(client: Client, connect: Callable[[], Client], proxy: FaultProxy) -> None:
    """`refuse` keeps new connections out and leaves the others; `heal` lets new ones in at the same port."""
    assert client.ask("PING") == b"PONG"

    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect()
    assert client.ask("PING") == b"PONG"

    proxy.heal()
    assert connect().ask("PING") == b"PONG"


def test_half_close_towards_the_client(
    client: Client, proxy: FaultProxy, redis_server: RedisServer, namespace: str
) -> None:
    """`to_client.end`: the client sees the end, and what it says is still executed."""
    assert client.ask("PING") == b"PONG"

    proxy.to_client.end()
    with pytest.raises(EOFError):
        client.hear()
    client.say(("SET", namespace, "done"))
    proxy.wait_for(lambda counts: counts.replies == 2)

    assert redis_server.call("GET", namespace) == b"done"


def test_half_close_towards_the_server(client: Client, proxy: FaultProxy) -> None:
    """`to_server.end`: the server sees the end and closes, and the client sees that."""
    assert client.ask("PING") == b"PONG"

    proxy.to_server.end()

    with pytest.raises(EOFError):
        client.hear()


def test_drips(client: Client, proxy: FaultProxy) -> None:
    """`sizes = (1,)`: what is said arrives whole, byte by byte."""
    proxy.to_client.sizes = (1,)

    come_in(client, [1] * len(b"$12\r\ntwelve bytes\r\n"), "twelve bytes")


def come_in(client: Client, sizes: list[int], said: str) -> None:
    """Ask until what is said comes in these pieces first: a client that is kept waiting finds several of them at once."""
    for _ in range(1_000):
        client.sizes.clear()
        assert client.ask("ECHO", said) == said.encode()
        if client.sizes[: len(sizes)] == sizes:
            return
    raise AssertionError(f"never came in pieces of {sizes}; the last time: {client.sizes}")


def test_splits(client: Client, proxy: FaultProxy, namespace: str) -> None:
    """`sizes` breaks what passes at these points, over and over, on either way."""
    proxy.to_server.sizes = (1, 5)
    proxy.to_client.sizes = (3, 4)
    proxy.to_client.pause_ms = 5.0

    come_in(client, [3, 4, 3, 4], namespace)


def test_the_end_of_either_side_reaches_the_other(
    own_redis: OwnRedis, fault_proxy: Callable[[str], FaultProxy]
) -> None:
    """A killed server cuts the client, a client that goes is gone for the server, and a dead server answers nobody."""
    server = own_redis()
    proxy = fault_proxy(server.url)
    gone, client = Client(proxy), Client(proxy)
    assert (gone.ask("PING"), client.ask("PING")) == (b"PONG", b"PONG")

    gone.close()
    proxy.wait_for(lambda counts: counts.open == 1)
    server.kill()

    assert client.lost()
    client.close()
    with pytest.raises((EOFError, ConnectionResetError)), contextlib.closing(Client(proxy)) as late:
        late.hear()


def test_what_is_not_resp_passes_as_it_comes(fault_proxy: Callable[[str], FaultProxy]) -> None:
    """Bytes of another protocol are passed on, counted, held and cut, but not told apart."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            link, _ = server.accept()
            with link, contextlib.suppress(ConnectionResetError):
                while data := link.recv(100):
                    link.sendall(data.upper())

        thread = threading.Thread(target=echo)
        thread.start()
        proxy = fault_proxy(f"http://127.0.0.1:{server.getsockname()[1]}")
        with socket.create_connection((proxy.host, proxy.port), timeout=30) as link:
            for text in (b"get / http\r\n", b"*1\r\n"):
                link.sendall(text)
                assert link.recv(100) == text.upper()
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                link.recv(1)
        thread.join()

    assert (proxy.counts.requests, proxy.counts.replies, proxy.counts.bytes_to_server) == (0, 0, 16)


def test_closing_ends_the_thread_and_all_connections(redis_server: RedisServer) -> None:
    """After the `with` block nobody listens, and no thread is left."""
    with FaultProxy(redis_server.url) as proxy:
        client = Client(proxy)
        assert client.ask("PING") == b"PONG"

    assert client.lost()
    client.close()
    with pytest.raises(ConnectionRefusedError):
        Client(proxy)
    assert "fault-proxy" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.anyio
async def test_works_beside_an_event_loop(redis_server: RedisServer, namespace: str) -> None:
    """An asynchronous test can steer a proxy that its own loop talks to, and await what it has seen."""
    async with FaultProxy(redis_server.url) as proxy:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        proxy.to_client.hold()
        writer.write(hiredis.pack_command(("ECHO", namespace)))  # type: ignore[arg-type]
        await proxy.until(lambda counts: counts.replies == 1)
        proxy.to_client.release()
        assert await reader.readline() == f"${len(namespace)}\r\n".encode()
        writer.close()
        await writer.wait_closed()


def test_a_wait_in_vain_tells_the_counts(proxy: FaultProxy) -> None:
    """The error says what was seen."""
    with pytest.raises(TimeoutError, match="requests=0"):
        proxy.wait_for(lambda counts: counts.requests == 1, within_s=0.01)


def test_resp3_values_are_found_at_any_split() -> None:
    """Nested and typed values, nulls, attributes and pushes are cut where they end, wherever the packets end."""
    values = [
        b"*2\r\n$4\r\necho\r\n$4\r\n*1\r\n\r\n",
        b"%2\r\n+a\r\n*2\r\n:1\r\n$-1\r\n+b\r\n~1\r\n,1.5\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"|1\r\n+ttl\r\n:3\r\n*1\r\n#t\r\n",
        b">2\r\n$10\r\ninvalidate\r\n_\r\n",
        b"=7\r\ntxt:abc\r\n",
        b"!3\r\nERR\r\n",
        b"(12345678901234567890\r\n",
    ]
    stream = b"".join(values)

    for size in (1, 2, 3, 7, len(stream)):
        frames = Frames()
        found = [frame for at in range(0, len(stream), size) for frame in frames.feed(stream[at : at + size])]
        assert [frame.data for frame in found] == values
        assert [frame.kind for frame in found] == [value[:1] for value in values]
        assert found[0].name == "ECHO"
