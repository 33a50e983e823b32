"""A TCP proxy on loopback that does to connections what networks and dying servers do.

    with FaultProxy(server.url) as proxy:
        storage = RedisStorage(proxy.url)
        proxy.to_client.delay_ms = 50       # every reply takes 50 ms longer
        proxy.cut_at_reply(of="EVALSHA")    # the next script is executed, and its reply never arrives
        proxy.heal()

It has a thread and an event loop of its own, so synchronous and asynchronous tests can use it alike, and what is set
is in force when the call returns. It passes bytes on in whole RESP values as long as a stream is RESP, which is how it
counts requests and replies; anything else (TLS, HTTP) passes as it comes, and is not counted in values.

To change the order of what two connections do, put a proxy before each, and hold one of them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

from tests.ports import HOST, free_port

PATIENCE_S: Final = 60.0
"""How long the proxy's own loop, or what a test awaits, may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a proxy has seen since it began."""

    connections: int = 0
    open: int = 0
    """Connections that have ended on neither side."""
    cuts: int = 0
    """Traps of `cut_at_request` and `cut_at_reply` that have sprung."""
    requests: int = 0
    """Whole ones from clients, passed on or not."""
    replies: int = 0
    """Whole ones from the server, passed on or not: so many requests have been executed."""
    bytes_to_server: int = 0
    """Passed on; neither dropped nor still held."""
    bytes_to_client: int = 0
    bytes_dropped: int = 0


class Frame(NamedTuple):
    """One RESP value, or some bytes of something else."""

    data: bytes
    kind: bytes
    """RESP's first byte; empty if this is something else."""
    name: str = ""
    """Of a request: its command, in capitals."""


class Frames:
    """Cuts a stream of RESP into values. From the first byte on that is not RESP, everything passes as it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._opaque = False
        self._begin()

    def _begin(self) -> None:
        self._at = 0
        self._missing = 1
        self._kind = b""
        self._name = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The values that these bytes make whole."""
        self._buffer += data
        while self._step():
            if self._missing == 0:
                yield Frame(bytes(self._buffer[: self._at]), self._kind, self._name.decode("ascii", "replace").upper())
                del self._buffer[: self._at]
                self._begin()
        if self._opaque and self._buffer:
            yield Frame(bytes(self._buffer), b"")
            self._buffer.clear()

    def _step(self) -> bool:
        """Go over one scalar, or the head of an aggregate; false if it is not all there."""
        kind = bytes(self._buffer[self._at : self._at + 1])
        self._opaque = self._opaque or kind not in b"+-:_,#($!=*~>%|"
        newline = self._buffer.find(b"\r\n", self._at)
        if self._opaque or newline < 0:
            return False
        end = newline + 2
        size = int(self._buffer[self._at + 1 : newline]) if kind in b"$!=*~>%|" else 0
        if kind in b"$!=" and size >= 0:
            if len(self._buffer) < end + size + 2:
                return False
            self._name = self._name or bytes(self._buffer[end : end + size])
            end += size + 2
        elif kind in b"*~>":
            self._missing += max(size, 0)
        elif kind in b"%|":
            self._missing += 2 * size + (kind == b"|")  # an attribute stands before the value that it is about
        self._kind = self._kind or kind
        self._missing -= 1
        self._at = end
        return True


class Lane:
    """What happens to the bytes that go one way, on every connection. Set its attributes at any time."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._open = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        self.delay_ms = 0.0
        """Each byte arrives so much later, however many are on the way."""
        self.drop = False
        """Swallow everything, the end of the stream included; connections that lost something are lost for good."""
        self.sizes: tuple[int, ...] = ()
        """Break what passes into packets of these sizes, over and over. `(1,)`: byte by byte."""
        self.pause_ms = 1.0
        """Between those packets."""
        self._open.set()

    def hold(self) -> None:
        """Keep back what has not yet passed, until `release()`."""
        self._proxy.call(self._open.clear)

    def release(self) -> None:
        self._proxy.call(self._open.set)

    def end(self) -> None:
        """Half-close: who receives on this lane sees the end of the stream; the other lane goes on."""
        self._proxy.call(lambda: self._proxy.end(self))

    async def opened(self) -> None:
        await self._open.wait()

    def packets(self, data: bytes) -> Iterator[bytes]:
        at = 0
        for size in itertools.cycle(self.sizes or (len(data),)):
            yield data[at : at + size]
            at += size
            if at >= len(data):
                return


@dataclass(slots=True, kw_only=True)
class _Trap:
    """Waits for requests of one command, or of any."""

    of: str | None = None
    skip: int = 0
    """So many pass before it springs."""
    times: float = 0
    """So many times it springs."""
    answer: bytes = b""

    def springs(self, name: str) -> bool:
        if not self.times or self.of not in {None, name}:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class _Asked(NamedTuple):
    """A request whose reply is due."""

    name: str
    answer: bytes | None
    """The reply, if it does not come from the server."""


def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close without the usual farewell: the other side has an error, not an end."""
    if not writer.transport.is_closing():
        no_farewell = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_farewell)
        writer.transport.abort()


class _End:
    """Stands in a queue behind the last bytes."""


_EOF: Final = _End()
_CUT: Final = _End()

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One client, and the connection to the server that was made for it."""

    def __init__(self, proxy: FaultProxy, client: _Stream, server: _Stream) -> None:
        self.lost: set[Lane] = set()
        self._proxy = proxy
        self._client = client
        self._server = server
        self._asked: deque[_Asked] = deque()
        self._deaf = False
        self._queues: dict[Lane, asyncio.Queue[tuple[float, bytes] | _End]] = {
            lane: asyncio.Queue() for lane in (proxy.to_server, proxy.to_client)
        }

    async def run(self) -> None:
        """Until both ways have ended, or one of them broke."""
        proxy, leave = self._proxy, _reset
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._requests())
                ways.create_task(self._replies())
                ways.create_task(self._send(proxy.to_server, self._server[1]))
                ways.create_task(self._send(proxy.to_client, self._client[1]))
            leave = _close
        except* OSError:
            pass  # one side is gone, and the other has to see it
        finally:
            leave(self._server[1])
            leave(self._client[1])

    def end(self, lane: Lane, how: _End = _EOF) -> None:
        self._queues[lane].put_nowait(how)

    def _pass(self, lane: Lane, data: bytes) -> None:
        if data:
            self._queues[lane].put_nowait((asyncio.get_running_loop().time(), data))

    async def _requests(self) -> None:
        proxy, frames = self._proxy, Frames()
        while data := await self._client[0].read(65_536):
            passed = b""
            for frame in frames.feed(data):
                if not frame.kind:
                    passed += frame.data
                    continue
                proxy.note(requests=1)
                if proxy.at_request.springs(frame.name):
                    self._pass(proxy.to_server, passed + frame.data[: len(frame.data) // 2])
                    self.end(proxy.to_server)
                    self._deaf = True
                    _reset(self._client[1])
                    proxy.note(cuts=1)
                    return
                answer = proxy.at_answer.answer if proxy.at_answer.springs(frame.name) else None
                self._asked.append(_Asked(frame.name, answer))
                passed += frame.data if answer is None else b""
            self._pass(proxy.to_server, passed)
            self._pass(proxy.to_client, self._answers())
        self.end(proxy.to_server)

    async def _replies(self) -> None:
        proxy, frames = self._proxy, Frames()
        while data := await self._server[0].read(65_536):
            passed = b""
            for frame in frames.feed(data):
                if frame.kind in {b"", b">"}:  # not RESP, or a push, which answers nothing
                    passed += frame.data
                    continue
                name = self._asked.popleft().name if self._asked else ""
                if proxy.at_reply.springs(name):
                    self._pass(proxy.to_client, passed)
                    self.end(proxy.to_client, _CUT)
                    proxy.note(replies=1, cuts=1)
                    return
                passed += frame.data + self._answers()
                proxy.note(replies=1)
            self._pass(proxy.to_client, passed)
        self.end(proxy.to_client)

    def _answers(self) -> bytes:
        """The replies that are the proxy's to give, now that all before them have been given."""
        given = b""
        while self._asked and self._asked[0].answer is not None:
            given += self._asked.popleft().answer or b""
        return given

    async def _send(self, lane: Lane, writer: asyncio.StreamWriter) -> None:
        loop, proxy = asyncio.get_running_loop(), self._proxy
        while isinstance(item := await self._queues[lane].get(), tuple):
            at, data = item
            await asyncio.sleep(at + lane.delay_ms / 1000 - loop.time())
            await lane.opened()
            if lane.drop:
                self.lost.add(lane)
            if lane in self.lost or (self._deaf and lane is proxy.to_client):
                proxy.note(bytes_dropped=len(data))
                continue
            for packet in lane.packets(data):
                proxy.passed(lane, len(packet))  # before anybody can have it
                writer.write(packet)
                await writer.drain()
                if lane.sizes:
                    await asyncio.sleep(lane.pause_ms / 1000)
        await lane.opened()
        if lane.drop or lane in self.lost:
            self.lost.add(lane)
            await asyncio.Event().wait()
        if item is _CUT:
            writer.close()  # after what is still in its buffer
            await writer.wait_closed()
            raise ConnectionAbortedError("cut")
        if not writer.transport.is_closing():
            writer.write_eof()


class FaultProxy:
    """Stands before one server, and lets everything pass until it is told otherwise; `heal()` undoes all of it."""

    def __init__(self, url: str) -> None:
        """`url`: of the server, as a client would be given it; `proxy.url` is the same with the proxy's port."""
        parts = urlsplit(url)
        if parts.port is None:
            raise ValueError(f"{url!r} names no port; give the URL of one server that listens on TCP")
        self.host = HOST
        self.port = free_port()
        self.url = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.port}")).geturl()
        self.to_server = Lane(self)
        self.to_client = Lane(self)
        self.at_request, self.at_reply, self.at_answer = _Trap(), _Trap(), _Trap()
        self._target = (parts.hostname, parts.port)
        self._counts = Counts()
        self._changed = threading.Condition()
        self._links: dict[asyncio.Task[None], _Link | None] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._listener: asyncio.Server | None = None
        self._closed: asyncio.Event

    # --------------------------------------------------------------------------------------- faults

    def cut_at_reply(self, nth: int = 1, *, of: str | None = None) -> None:
        """Close the connection in place of the n-th reply from now on, once: executed, and nobody hears of it.

        `of`: only replies to this command count, such as "EVALSHA". Replies before it are delivered.
        """
        self.at_reply = _Trap(of=of, skip=nth - 1, times=1)

    def cut_at_request(self, nth: int = 1, *, of: str | None = None) -> None:
        """Reset the connection in the middle of the n-th request from now on, once: not executed.

        The requests before it are executed, but their replies may not arrive.
        """
        self.at_request = _Trap(of=of, skip=nth - 1, times=1)

    def answer(self, reply: bytes, *, of: str | None = None, times: float = math.inf) -> None:
        """Give this RESP value as the reply to the next requests, which the server never sees."""
        self.at_answer = _Trap(of=of, times=times, answer=reply)

    def cut(self) -> None:
        """Reset all connections."""
        self.call(lambda: self._cut(list(self._links)))

    def refuse(self) -> None:
        """Refuse connections from now on; those that are open stay so."""
        self.call(self._refuse)

    def heal(self) -> None:
        """Let everything pass again, and reset the connections that have lost something: TCP leaves no gaps."""

        async def heal() -> None:
            await self._cut([task for task, link in self._links.items() if link is not None and link.lost])
            self.at_request, self.at_reply, self.at_answer = _Trap(), _Trap(), _Trap()
            self.to_server.reset()
            self.to_client.reset()
            await self._listen()

        self.call(heal)

    # -------------------------------------------------------------------------------------- counting

    @property
    def counts(self) -> Counts:
        return self._counts

    def wait_for(self, reached: Callable[[Counts], bool], *, within_s: float = PATIENCE_S) -> Counts:
        """Until the counts are so.

        Raises:
            TimeoutError: not within the time; with the counts.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: reached(self._counts), within_s):
                raise TimeoutError(f"not within {within_s:g} s; {self._counts}")
            return self._counts

    async def until(self, reached: Callable[[Counts], bool]) -> Counts:
        """`wait_for`, in an event loop."""
        return await asyncio.to_thread(self.wait_for, reached)

    def note(self, **more: int) -> None:
        with self._changed:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})
            self._changed.notify_all()

    def passed(self, lane: Lane, size: int) -> None:
        if lane is self.to_server:
            self.note(bytes_to_server=size)
        else:
            self.note(bytes_to_client=size)

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="fault-proxy", daemon=True)
        self._thread.start()
        if not ready.wait(PATIENCE_S):
            raise TimeoutError(f"the proxy before {self._target} did not start within {PATIENCE_S:g} s")
        return self

    def close(self) -> None:
        """Reset all connections, and end the thread."""
        if self._thread is not None:
            self.call(self._closed.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def call(self, act: Callable[[], Awaitable[object] | object]) -> None:
        """Do something in the proxy's loop, and come back when it is done."""

        async def run() -> None:
            done = act()
            if isinstance(done, Awaitable):
                await done

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S)

    def end(self, lane: Lane) -> None:
        for link in self._links.values():
            if link is not None:
                link.end(lane)

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        await self._listen()
        ready.set()
        await self._closed.wait()
        self._refuse()
        await self._cut(list(self._links))

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, self.host, self.port)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _cut(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def forget(task: asyncio.Task[None]) -> None:
            _reset(writer)
            del self._links[task]
            self.note(open=-1)

        task = self._loop.create_task(self._serve((reader, writer)))
        self._links[task] = None
        self.note(connections=1, open=1)
        task.add_done_callback(forget)

    async def _serve(self, client: _Stream) -> None:
        try:
            server = await asyncio.open_connection(*self._target)
        except OSError:
            return  # and the client is cut
        task = asyncio.current_task()
        assert task is not None
        link = self._links[task] = _Link(self, client, server)
        await link.run()
