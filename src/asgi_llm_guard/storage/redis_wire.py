"""One connection to one server: calls go out in order, replies come back in the same order.

redis-py opens the connection (TLS, AUTH, SELECT, the client's name) and is done then: its transport
is taken over, so that many calls share the connection and a cancelled one does not close it.

Rule 1: a call is handed over when `send` returns. While nothing is under way it is written at once;
else all calls of one turn of the event loop are one write.

Rule 2: each reply belongs to the oldest call that has none. A call that nobody waits for any more
keeps its place; its reply is thrown away.

Rule 3: when the connection is lost, calls that were written have an unknown outcome, and calls that
were not are handed back to the owner.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, Final, Protocol, cast

from asgi_llm_guard.errors import NotInstalledError, StorageError
from asgi_llm_guard.storage.redis_address import Address, Endpoint

try:
    import hiredis
except ImportError as error:  # pragma: no cover - the tests install it
    raise NotInstalledError("RedisStorage", "redis") from error

from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

__all__ = [
    "Call",
    "Internal",
    "LinkError",
    "Owner",
    "ServerError",
    "Trailing",
    "Wire",
    "ask",
    "ask_once",
    "fail",
    "open_wire",
    "pack",
]

pack: Final = cast("Callable[[tuple[Any, ...]], bytes]", hiredis.pack_command)
"""The bytes of one command."""

_NOTHING: Final = object()


class LinkError(StorageError):
    """A call got no reply, or the reply is an error.

    `sent` False: the call was surely not executed. True: it may have been.
    """

    def __init__(self, message: str, *, sent: bool, code: str = "") -> None:
        super().__init__(message)
        self.sent = sent
        self.code = code
        """The first word of the server's error, such as `OOM`; empty if it did not answer."""


class ServerError(Exception):
    """An error that a server replied, as it wrote it."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]


class Call:
    """A command under way, and the future of its reply."""

    __slots__ = ("asking", "at", "future", "packed", "slot", "timeout_s", "tries")

    internal = False
    """Of the link itself: errors are for whoever sent it, and are not looked at."""
    trailing = False
    """Means something only right behind the call before it: it is repeated when that one is."""

    def __init__(self, future: asyncio.Future[Any], packed: bytes, at: float, timeout_s: float, slot: int = 0) -> None:
        self.future = future
        self.packed = packed
        self.at = at
        """When it was handed over, by `time.monotonic`."""
        self.timeout_s = timeout_s
        self.slot = slot
        """Of its key, in a cluster; else 0."""
        self.tries = 0
        """How often a server sent it back."""
        self.asking = False
        """It is for a node that does not have the slot yet, and has to be told so just before."""

    @property
    def wanted(self) -> bool:
        """Whether it is still to be sent. A cancelled one is: it was handed over, only its reply is not wanted."""
        return not self.future.done() or self.future.cancelled()

    def fail(self, message: str, *, sent: bool, code: str = "") -> None:
        fail(self.future, LinkError(message, sent=sent, code=code))


class Internal(Call):
    __slots__ = ()
    internal = True


class Trailing(Call):
    __slots__ = ()
    trailing = True


def fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Marks it as seen. Who lets a future go does not want to know, and thousands of lines in a log
        # would say what one change of the link's state says.
        future.exception()


class Owner(Protocol):
    """Who hears what is not an ordinary reply."""

    def refused(self, wire: Wire, call: Call, error: ServerError) -> None:
        """The reply to a call is an error."""

    def recovered(self, wire: Wire) -> None:
        """A call was answered in time, while `suspect` was set."""

    def lost(self, wire: Wire, unwritten: Sequence[Call], *, pending: bool, reason: str) -> None:
        """The connection is gone. `pending`: some calls were under way."""


class Wire(asyncio.Protocol):
    """A connection that has been taken over. See the rules at the top of this file."""

    __slots__ = (
        "_buffer",
        "_call_soon",
        "_closed",
        "_flushing",
        "_lost",
        "_make_future",
        "_owner",
        "_reader",
        "_streams",
        "_transport",
        "_write",
        "endpoint",
        "since",
        "suspect",
        "waiting",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, owner: Owner) -> None:
        self.endpoint = endpoint
        self.since = monotonic()
        self.waiting: deque[Call] = deque()
        """Handed over, oldest first; some at the end may not be written yet."""
        self.suspect = False
        self._owner = owner
        self._reader = hiredis.Reader(replyError=ServerError, notEnoughData=_NOTHING)
        self._buffer: list[bytes] = []
        self._flushing = False
        self._call_soon = loop.call_soon
        self._make_future = loop.create_future
        self._closed = loop.create_future()
        self._lost = False

    def take(self, connection: AbstractConnection) -> None:
        """Take the transport from a connection of redis-py that is set up and idle."""
        writer = connection._writer  # noqa: SLF001 - there is no public way to the transport
        if writer is None:
            raise LinkError("redis: redis-py has connected, but shows no connection; is its version known?", sent=False)
        # A writer that is collected closes its transport, so it lives as long as this wire. Without
        # them redis-py takes its connection for closed, and leaves it alone.
        self._streams = (connection._reader, writer)  # noqa: SLF001
        connection._reader = connection._writer = None  # noqa: SLF001
        writer.transport.set_protocol(self)
        self.connection_made(writer.transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._write = self._transport.write

    def send(self, call: Call) -> None:
        waiting = self.waiting
        if waiting:
            waiting.append(call)
            self._buffer.append(call.packed)
            if not self._flushing:
                self._flushing = True
                self._call_soon(self._flush)
        else:
            waiting.append(call)
            self._write(call.packed)

    def take_trailing(self) -> list[Call]:
        """The calls right behind the one that was answered last, which mean nothing without it.

        They were sent as well; what they are answered is for nobody.
        """
        taken: list[Call] = []
        while len(taken) < len(self.waiting) and (call := self.waiting[len(taken)]).trailing:
            self.waiting[len(taken)] = Internal(self._make_future(), b"", call.at, call.timeout_s)
            taken.append(call)
        return taken

    def _flush(self) -> None:
        self._flushing = False
        if self._buffer:
            data = b"".join(self._buffer)
            self._buffer.clear()
            self._write(data)

    def data_received(self, data: bytes) -> None:
        waiting, gets = self.waiting, self._reader.gets
        in_time = False
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _NOTHING:
                call = waiting.popleft()
                if type(reply) is ServerError:
                    in_time = in_time or not call.future.done()
                    self._owner.refused(self, call, reply)
                elif not call.future.done():
                    in_time = True
                    call.future.set_result(reply)
        except hiredis.ProtocolError as error:
            self.drop(f"{self.endpoint} does not speak the Redis protocol: {error}")
        except IndexError:  # no call is waiting
            self.drop(f"{self.endpoint} has replied to what it was not asked")
        if in_time and self.suspect:
            self.suspect = False
            self._owner.recovered(self)

    def eof_received(self) -> None:
        """The server has closed its side; then the transport closes ours."""

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        self._end(f"the connection to {self.endpoint} was lost{f': {exc}' * bool(exc)}")

    def drop(self, reason: str) -> None:
        """Close at once, without waiting for anything."""
        self._transport.abort()
        self._end(reason)

    async def aclose(self, within_s: float) -> None:
        """Close in good order, or at least within some seconds, or as soon as this is cancelled."""
        self._transport.close()
        try:
            await asyncio.wait((self._closed,), timeout=within_s)
        finally:
            if not self._closed.done():
                self._transport.abort()
            self._end("the link was closed")

    @property
    def lost(self) -> bool:
        return self._lost

    def _end(self, reason: str) -> None:
        if self._lost:
            return
        self._lost = True
        calls = list(self.waiting)
        written = len(calls) - len(self._buffer)
        self.waiting.clear()
        self._buffer.clear()
        pending = False
        for call in calls[:written]:
            if not call.future.done():
                pending = True
                unknown = "" if call.internal else "; what became of the call is unknown"
                call.fail(f"redis: {reason}{unknown}", sent=True)
        unwritten = [call for call in calls[written:] if call.wanted]
        self._owner.lost(self, unwritten, pending=pending, reason=reason)


async def open_wire(address: Address, endpoint: Endpoint, owner: Owner) -> Wire:
    """Connect and log in. Nothing is retried.

    Raises:
        LinkError: it did not work; says why.
    """
    loop = asyncio.get_running_loop()
    # Every setting is named: the defaults (retries, timeouts, protocol) differ between releases.
    settings: dict[str, Any] = {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "client_name": address.client_name,
        "socket_timeout": address.connect_timeout_s,
        "socket_connect_timeout": address.connect_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "health_check_interval": 0,
        "protocol": 2,
        "decode_responses": False,
    }
    connection: AbstractConnection
    if not endpoint.port:
        connection = UnixDomainSocketConnection(path=endpoint.host, **settings)
    else:
        settings |= {"host": endpoint.host, "port": endpoint.port, "socket_keepalive": True}
        settings["socket_keepalive_options"] = None
        if address.tls is None:
            connection = Connection(**settings)
        else:
            connection = SSLConnection(**settings)
            connection.ssl_context.context = address.tls
    wire = Wire(loop, endpoint, owner)
    try:
        async with asyncio.timeout(address.connect_timeout_s):
            await connection.connect()  # type: ignore[no-untyped-call]
        wire.take(connection)
    except BaseException as error:
        await connection.disconnect(nowait=True)
        if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
            raise LinkError(
                f"redis: {endpoint} refused the user or password: {error}; check those in the URL",
                sent=False,
                code="WRONGPASS",
            ) from None
        if isinstance(error, exceptions.TimeoutError | TimeoutError):
            raise LinkError(
                f"redis: {endpoint} could not be reached within {address.connect_timeout_s:g} s", sent=False
            ) from None
        if isinstance(error, exceptions.RedisError | OSError | UnicodeError):
            raise LinkError(f"redis: {endpoint} could not be reached: {error}", sent=False) from error
        raise
    return wire


async def ask(wire: Wire, commands: Iterable[tuple[Any, ...]], within_s: float) -> list[Any]:
    """Send some commands at once and wait for all replies; errors are among the replies.

    Raises:
        LinkError: they did not all come in time; then the wire is dropped.
    """
    loop = asyncio.get_running_loop()
    calls = [Internal(loop.create_future(), pack(command), monotonic(), within_s) for command in commands]
    for call in calls:
        wire.send(call)
    futures = [call.future for call in calls]
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.gather(*futures, return_exceptions=True)
    except TimeoutError:
        wire.drop(f"{wire.endpoint} did not answer within {within_s:g} s")
        raise LinkError(f"redis: {wire.endpoint} did not answer within {within_s:g} s", sent=False) from None
    except asyncio.CancelledError:
        wire.drop("the link was closed")
        raise


async def ask_once(address: Address, endpoint: Endpoint, *command: bytes | str | int) -> Any:
    """Connect, ask one thing, and close. For questions so rare that nothing is to be kept for them.

    Raises:
        LinkError: no answer, or an error.
    """
    wire = await open_wire(address, endpoint, _Nobody())
    (reply,) = await ask(wire, [command], address.connect_timeout_s)
    await wire.aclose(address.connect_timeout_s)
    if isinstance(reply, ServerError):
        raise LinkError(f"redis: {endpoint} answered: {reply}", sent=False, code=reply.code)
    if isinstance(reply, LinkError):
        raise reply
    return reply


class _Nobody:
    """Owns a wire whose user hears of everything from the answer."""

    def refused(self, wire: Wire, call: Call, error: ServerError) -> None:  # noqa: ARG002
        fail(call.future, error)

    def recovered(self, wire: Wire) -> None:
        """Nothing was suspected."""

    def lost(self, wire: Wire, unwritten: Sequence[Call], *, pending: bool, reason: str) -> None:  # noqa: ARG002
        for call in unwritten:
            call.fail(f"redis: {reason}", sent=False)
