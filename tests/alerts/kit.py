"""What the tests of alerts are about: a receiver of webhooks, and guards that spend."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

from asgi_llm_guard import Context, Guard, Usage
from asgi_llm_guard.alerts import Webhook, verify
from asgi_llm_guard.alerts.message import TIMESTAMP_HEADER
from asgi_llm_guard.events import Alert, Event
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.secret import Secret

SECRET = "whsec-0123456789abcdef"
HERE = ("127.0.0.0/8",)


class Received(NamedTuple):
    line: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def check(self, *secrets: str) -> None:
        """See that it was signed with one of these."""
        verify(self.body, self.headers, secrets, now_s=float(self.headers[TIMESTAMP_HEADER]))


class Receiver:
    """A tiny HTTP server on the loopback: answers what it is told to, first to last, then 204."""

    def __init__(self, *answers: bytes | int | None, tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        """A status, a whole answer, or `None`: the connection is closed without one."""
        self.got: list[Received] = []
        self.connections = 0
        self.port = 0
        self._tls = tls
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/hook?token=canary-url-token"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), 2)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.got.append(Received(line, headers, body))
            answer = self.answers.pop(0) if self.answers else 204
            if isinstance(answer, int):
                answer = f"HTTP/1.1 {answer} Told\r\ncontent-length: 0\r\nlocation: /elsewhere\r\n\r\n".encode()
            if answer is not None:
                writer.write(answer)
                await writer.drain()
        writer.close()
        with contextlib.suppress(Exception):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def receiving(*answers: bytes | int | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(*answers, tls=tls)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()


@contextlib.contextmanager
def receiving_in_thread() -> Iterator[Receiver]:
    """For tests that wait for other processes."""
    loop, receiver = asyncio.new_event_loop(), Receiver()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(receiver.start(), loop).result(10)
    try:
        yield receiver
    finally:
        asyncio.run_coroutine_threadsafe(receiver.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def hook(receiver: Receiver, **options: Any) -> Webhook:
    """A webhook to a receiver, which is asked again at once."""
    options = {"secret": Secret(SECRET), "allow": HERE, "first_retry_s": 0.005, **options}
    return Webhook(receiver.url, **options)


PRICES = PriceBook.snapshot(overrides={"test/m": {"input": 1_000, "output": 0}})  # a dollar for 1,000 tokens


async def spend(guard: Guard, dollars: float, *, caller: str = "ann", held: float | None = None) -> None:
    """A call that costs so much; it holds as much, or `held`."""
    hold = dollars if held is None else held
    async with (
        guard.open(Context(caller=caller)),
        guard.call(model="test/m", input_tokens=round(hold * 1000), max_output_tokens=1) as call,
    ):
        call.record(Usage(input_tokens=round(dollars * 1000), output_tokens=0))


def alerts_in(seen: list[Event]) -> list[Alert]:
    return [event for event in seen if isinstance(event, Alert)]
