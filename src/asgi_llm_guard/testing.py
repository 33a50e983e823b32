"""Fakes for tests, of this package and of its users: a clock, an LLM provider with a bill, clients that leave,
a storage that goes away.

Nothing here sleeps or waits for the time of day. What has to wait, waits for a `Gate`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, Self

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_llm_guard.claims import Bundle, Ended, Granted, Heartbeat, Meter, Plan, Reading, Refused, Settled, Settlement
from asgi_llm_guard.errors import ConfigurationError, DataLost, NotInstalledError, StorageError
from asgi_llm_guard.storage.base import Pending, Storage
from asgi_llm_guard.usage import Usage, UsageRecord

if TYPE_CHECKING:
    import httpx2

__all__ = [
    "DEFAULT_PRICE",
    "Behaviour",
    "Bill",
    "ConnectionCut",
    "Disconnect",
    "FakeProvider",
    "FakeRequest",
    "FrozenClock",
    "Gate",
    "OutageStorage",
    "Price",
    "asgi_client",
    "kill_self",
]

_NEW_YEAR: Final = datetime(2026, 1, 1, tzinfo=UTC)
_CREATED: Final = int(_NEW_YEAR.timestamp())


# ------------------------------------------------------------------------------------ clock


class FrozenClock:
    """A clock that stands still until it is moved, forwards or backwards."""

    def __init__(self, at: int | datetime = _NEW_YEAR) -> None:
        """`at`: milliseconds since the epoch, or an aware `datetime`."""
        self._now_ms = _instant_ms(at)

    def now_ms(self) -> int:
        return self._now_ms

    def advance(self, *, seconds: float = 0, ms: int = 0) -> None:
        """Move by so much; negative steps back, as a host's clock may."""
        self._now_ms += round(seconds * 1000) + ms

    def set(self, at: int | datetime) -> None:
        self._now_ms = _instant_ms(at)


def _instant_ms(at: int | datetime) -> int:
    if isinstance(at, int):
        return at
    if at.tzinfo is None:
        raise ConfigurationError(f"at: expected an aware datetime, got {at!r}; give it a tzinfo such as datetime.UTC")
    return round(at.timestamp() * 1000)


# ------------------------------------------------------------------------------------ gates


class _Changes:
    """Wakes whoever waits for a condition, in whichever thread and event loop they wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def tell(self) -> None:
        """Something changed: look again."""
        with self._lock:
            waiting = tuple(self._waiting)
        for loop, event in waiting:
            with suppress(RuntimeError):  # its loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(event.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._lock:  # registered before the first look, so that no change is missed
            self._waiting.add(entry)
        try:
            while not condition():
                await event.wait()
                event.clear()
        finally:
            with self._lock:
                self._waiting.discard(entry)


class Gate:
    """Closed until released: by steps, or for good. Works across threads and event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes = _Changes()
        self._steps: float = 0

    def release(self, steps: int | None = None) -> None:
        """Let `steps` more steps through, whoever comes first; `None`: everything, from here on."""
        with self._lock:
            self._steps += math.inf if steps is None else steps
        self._changes.tell()

    async def step(self) -> None:
        """Wait for one step, and take it."""
        await self._changes.until(self._take)

    def _take(self) -> bool:
        with self._lock:
            if self._steps < 1:
                return False
            self._steps -= 1
            return True


# --------------------------------------------------------------------------------- provider


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one token costs, in nano-USD. $1 per million tokens is 1000 nano-USD per token."""

    input: int
    output: int
    cache_read: int = 0
    """For the part of the input that was read from the provider's cache."""

    def cost_nanousd(self, usage: Usage) -> int:
        cached = usage.cache_read_tokens or 0
        fresh = (usage.input_tokens or 0) - cached
        return fresh * self.input + cached * self.cache_read + (usage.output_tokens or 0) * self.output


DEFAULT_PRICE: Final = Price(input=150, output=600, cache_read=75)
"""$0.15 and $0.60 per million tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """One line of the provider's bill: what a call really cost, whether or not its client was told."""

    id: str
    model: str
    input_tokens: int
    """All input, cache reads included."""
    output_tokens: int
    """All output, reasoning included: what was produced, even if nobody was there to read it."""
    cache_read_tokens: int
    reasoning_tokens: int
    cost_nanousd: int
    reported: bool
    """Whether the usage was sent to the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRequest:
    """A request for a chat completion, as it arrived."""

    headers: Mapping[str, str]
    """Names in lower case."""
    body: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def messages(self) -> Sequence[Mapping[str, object]]:
        return list(self.body["messages"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a `FakeProvider` does with one request. Start from one of the named ones; `replace` combines them."""

    text: str | None = None
    """The answer; a token is a word. `None`: an echo of the last message."""
    tool: tuple[str, Mapping[str, object]] | None = None
    """Call this function with these arguments instead of answering; a token is a word of their JSON."""
    output_tokens: int | None = None
    """An answer of exactly so many tokens, reasoning not included, even if the request allows fewer."""
    input_tokens: int | None = None
    """`None`: counted from the messages; see `FakeProvider`."""
    cache_read_tokens: int = 0
    reasoning_tokens: int = 0
    """Come on top of the words of the answer, once per request."""
    usage: bool = True
    """Whether the answer says what it used. A stream does so only if it is asked to, whatever is said here."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    code: str | None = None
    """Of the error, if `status` is one."""
    content: bool = True
    """`False`: an answer without a body, or a stream without an event."""
    valid: bool = True
    """`False`: a JSON body that breaks off though the response is complete; a stream whose first event does,
    and that never says what it used."""
    cut_after: int | None = None
    """Drop the connection after so many chunks of the stream, or in the middle of a JSON body."""
    fail_after: int | None = None
    """Send an error event after so many chunks of the stream; a JSON request gets it as status 500."""
    waits: bool = False
    """Wait for the gate before answering anything."""
    paced: bool = False
    """Wait for the gate before every chunk of the stream, or before the JSON body."""
    gate: Gate | None = None
    """`None`: the gate that `FakeProvider.release` opens."""

    @classmethod
    def answer(
        cls,
        text: str | None = None,
        *,
        output_tokens: int | None = None,
        input_tokens: int | None = None,
        cache_read_tokens: int = 0,
        reasoning_tokens: int = 0,
    ) -> Self:
        """A good answer, with these counts."""
        return cls(
            text=text,
            output_tokens=output_tokens,
            input_tokens=input_tokens,
            cache_read_tokens=cache_read_tokens,
            reasoning_tokens=reasoning_tokens,
        )

    @classmethod
    def call_tool(cls, name: str, **arguments: object) -> Self:
        """Not an answer yet: the model wants this function called with these arguments."""
        return cls(tool=(name, arguments))

    @classmethod
    def error(cls, status: int, *, code: str | None = None, retry_after: float | str | None = None) -> Self:
        """An error, not billed. `retry_after`: the value of the header, in seconds or as a date."""
        headers = () if retry_after is None else (("retry-after", str(retry_after)),)
        return cls(status=status, code=code, headers=headers)

    @classmethod
    def slow(cls, *, gate: Gate | None = None) -> Self:
        """One step of the gate for every chunk. Billed for what was produced when the client left."""
        return cls(paced=True, gate=gate)

    @classmethod
    def hang(cls, *, gate: Gate | None = None) -> Self:
        """No byte of an answer before one step of the gate.

        If the client leaves first, a stream is billed for its input, a JSON answer in full:
        providers do not stop generating it because nobody waits any more.
        """
        return cls(waits=True, gate=gate)

    @classmethod
    def cut(cls, *, after_chunks: int = 0) -> Self:
        """The connection drops after so many chunks; billed for them, unreported."""
        return cls(cut_after=after_chunks)

    @classmethod
    def stream_error(cls, *, after_chunks: int = 0) -> Self:
        """An error inside the stream after so many chunks, under status 200; billed for them, unreported."""
        return cls(fail_after=after_chunks)

    @classmethod
    def no_usage(cls) -> Self:
        """A good answer that does not say what it used; billed."""
        return cls(usage=False)

    @classmethod
    def empty(cls) -> Self:
        """Status 200 and nothing else; billed for the input."""
        return cls(content=False)

    @classmethod
    def malformed(cls) -> Self:
        """Status 200 and broken JSON; billed in full, unreported."""
        return cls(valid=False)


_GOOD: Final = Behaviour()


class ConnectionCut(ConnectionError):  # noqa: N818 - the field's word for it
    """A `FakeProvider` drops the connection. Under a server clients see a network error; in-process, this."""


@dataclass(slots=True)
class _Sale:
    """A call that is being answered: what has been produced so far."""

    id: str
    request: FakeRequest
    behaviour: Behaviour
    words: Sequence[str]
    finish: str
    input_tokens: int
    produced: int = 0
    started: bool = False
    reported: bool = False
    complete: bool = False
    """The last message of the answer is being sent."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return (*self.behaviour.headers, ("x-request-id", self.id))

    @property
    def status(self) -> int:
        failing = self.behaviour.fail_after is not None and not self.stream
        return 500 if failing else self.behaviour.status

    def chunks(self) -> Iterator[tuple[int, int, str]]:
        """Choice, position and text of every chunk, in order."""
        for choice in range(self.choices):
            for position, word in enumerate(self.words):
                yield choice, position, word if position == len(self.words) - 1 else f"{word} "

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def choices(self) -> int:
        choices = self.request.body.get("n")
        return choices if isinstance(choices, int) and choices > 0 else 1

    @property
    def stream(self) -> bool:
        return self.request.body.get("stream") is True

    @property
    def usage_wanted(self) -> bool:
        options = self.request.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def produce_all(self) -> None:
        self.started = True
        self.produced = len(self.words) * self.choices

    def usage(self) -> Usage:
        reasoning = self.behaviour.reasoning_tokens if self.started else 0
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.produced + reasoning,
            cache_read_tokens=self.behaviour.cache_read_tokens,
            reasoning_tokens=reasoning,
            model=self.model,
        )


class FakeProvider:
    """An LLM provider that speaks OpenAI chat completions and keeps a bill. An ASGI app, or a server with `serve`.

    Answers are deterministic: an echo of the last message, one word per token and per chunk,
    as many as the request allows. Input is billed at a token for every four bytes of text,
    three for each message and three for the answer's opening.

    What a request meets is the first of: the next behaviour of the script, the first `when`
    that matches, the default. Any key is accepted.
    """

    def __init__(
        self,
        *,
        prices: Mapping[str, Price] | Callable[[str, Usage], int] | None = None,
        default: Behaviour = _GOOD,
    ) -> None:
        """`prices`: by model, and other models do not exist; or what a model's usage costs, in nano-USD;
        `None`: every model exists at `DEFAULT_PRICE`."""
        self.bill: list[Bill] = []
        """One line for each billed call, in the order in which they ended."""
        self.requests: list[FakeRequest] = []
        """Every well-formed request for a chat completion, whatever it met."""
        self.disconnects = 0
        """How many clients left before their answer was complete."""
        self.gate = Gate()
        self._prices = prices
        self._default = default
        self._script: deque[Behaviour] = deque()
        self._rules: list[tuple[Callable[[FakeRequest], bool], Behaviour]] = []
        self._changes = _Changes()
        self._lock = threading.Lock()
        self._open: set[asyncio.Task[None]] = set()

    @property
    def calls(self) -> int:
        """How many requests for a chat completion came in, retries and errors included."""
        return len(self.requests)

    @property
    def open(self) -> int:
        """How many of them are being answered."""
        return len(self._open)

    @property
    def total_nanousd(self) -> int:
        return sum(line.cost_nanousd for line in self.bill)

    def script(self, *behaviours: Behaviour) -> None:
        """Meet the next requests with these, one each, in order of arrival."""
        self._script.extend(behaviours)

    def when(self, condition: Callable[[FakeRequest], bool], behaviour: Behaviour) -> None:
        """Meet every request that the condition holds for with `behaviour`; the first such rule counts."""
        self._rules.append((condition, behaviour))

    def release(self, steps: int | None = None) -> None:
        """Let slow and hanging answers go on; see `Gate.release`."""
        self.gate.release(steps)

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 10) -> None:
        """Wait until the condition on this provider's state holds. Works from every thread and event loop.

        Raises:
            TimeoutError: it did not, for `timeout_s`; the message shows the state.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._changes.until(condition)
        except TimeoutError:
            raise TimeoutError(
                f"the condition did not hold within {timeout_s} s: "
                f"{self.calls} calls, {self.open} open, {self.disconnects} disconnects, {len(self.bill)} billed"
            ) from None

    async def idle(self, *, timeout_s: float = 10) -> None:
        """Wait until no request is being answered, and everything is on the bill."""
        await self.until(lambda: not self._open, timeout_s=timeout_s)

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[str]:
        """Serve on a free loopback port, in a thread of its own; gives the `base_url` for SDKs (`…/v1`).

        On exit, answers that are not complete are cut.

        Raises:
            NotInstalledError: uvicorn is missing.
        """
        try:
            import uvicorn
        except ImportError as error:
            raise NotInstalledError("FakeProvider.serve", "testing") from error
        caller, ready, ended = asyncio.get_running_loop(), asyncio.Event(), _Changes()
        stopping = threading.Event()

        async def run(listener: socket.socket) -> None:
            config = uvicorn.Config(self, lifespan="off", ws="none", log_config=None, access_log=False)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            # A few turns: the server offers a flag, and no event.
            while not server.started and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            caller.call_soon_threadsafe(ready.set)
            await ended.until(stopping.is_set)
            server.should_exit = True
            while not serving.done():
                self._cut_open_answers()
                await asyncio.wait({serving}, timeout=0.02)
            await serving

        log, quiet = logging.getLogger("uvicorn.error"), _NoCuts()
        log.addFilter(quiet)
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                thread = asyncio.create_task(asyncio.to_thread(asyncio.run, run(listener)))
                try:
                    await ready.wait()
                    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
                finally:
                    stopping.set()
                    ended.tell()
                    await thread
        finally:
            log.removeFilter(quiet)

    def _cut_open_answers(self) -> None:
        loop = asyncio.get_running_loop()
        for task in tuple(self._open):
            if task.get_loop() is loop:
                task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        route = (scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        body = await _read_body(receive)
        if body is None:
            return
        if route == ("GET", "/v1/models"):
            await _send_json(send, 200, self._models())
        elif route == ("POST", "/v1/chat/completions"):
            await self._complete(scope, body, receive, send)
        else:
            await _send_json(send, 404, _error_body(f"no such route: {route[0]} {route[1]}", "invalid_request_error"))

    def _models(self) -> dict[str, object]:
        names = () if self._prices is None or callable(self._prices) else self._prices
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "fake"} for name in names]}

    async def _complete(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        try:
            request = _parse(scope, body)
        except msgspec.DecodeError as error:
            await _send_json(send, 400, _error_body(str(error), "invalid_request_error"))
            return
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            behaviour = self._next(request)
        sale = _sale(f"chatcmpl-{number}", request, behaviour)
        answer = asyncio.create_task(self._answer(sale, send))
        left = asyncio.create_task(_left(receive))
        self._open.add(answer)
        self._changes.tell()
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if sale.complete:  # the last message is on its way: that, too, ends in http.disconnect
                await asyncio.wait({answer})
        finally:
            unfinished = not answer.done()
            left.cancel()
            answer.cancel()
            outcome, _ = await asyncio.gather(answer, left, return_exceptions=True)
            with self._lock:
                self.disconnects += unfinished
                self._charge(sale, whole=unfinished and not sale.stream)
                self._open.discard(answer)
            self._changes.tell()
        if isinstance(outcome, asyncio.CancelledError) and not unfinished:
            raise ConnectionCut("the provider stops")
        if isinstance(outcome, Exception):
            raise outcome

    def _next(self, request: FakeRequest) -> Behaviour:
        if not callable(self._prices) and self._prices is not None and request.model not in self._prices:
            return Behaviour.error(404, code="model_not_found")
        if self._script:
            return self._script.popleft()
        return next((behaviour for condition, behaviour in self._rules if condition(request)), self._default)

    def _charge(self, sale: _Sale, *, whole: bool) -> None:
        if sale.status != 200:
            return
        if whole and sale.behaviour.content:
            sale.produce_all()
        usage = sale.usage()
        if callable(self._prices):
            cost = self._prices(sale.model, usage)
        else:
            cost = (self._prices or {}).get(sale.model, DEFAULT_PRICE).cost_nanousd(usage)
        self.bill.append(
            Bill(
                id=sale.id,
                model=sale.model,
                input_tokens=usage.input_tokens or 0,
                output_tokens=usage.output_tokens or 0,
                cache_read_tokens=usage.cache_read_tokens or 0,
                reasoning_tokens=usage.reasoning_tokens or 0,
                cost_nanousd=cost,
                reported=sale.reported,
            )
        )

    async def _answer(self, sale: _Sale, send: Send) -> None:
        behaviour = sale.behaviour
        if behaviour.waits:
            await (behaviour.gate or self.gate).step()
        if sale.status != 200:
            sale.complete = True
            error = _error_body(f"the fake provider answers {sale.status}", _error_type(sale.status), behaviour.code)
            await _send_json(send, sale.status, error, headers=behaviour.headers)
        elif sale.stream:
            await self._answer_stream(sale, send)
        else:
            await self._answer_json(sale, send)

    async def _answer_json(self, sale: _Sale, send: Send) -> None:
        behaviour = sale.behaviour
        if behaviour.paced:
            await (behaviour.gate or self.gate).step()
        if not behaviour.content:
            sale.complete = True
            await _send_body(send, 200, b"", sale.headers)
            return
        sale.produce_all()
        body = msgspec.json.encode(_completion(sale))
        if behaviour.cut_after is not None:
            await _start(send, 200, (*sale.headers, ("content-length", str(len(body)))))
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            raise ConnectionCut("the provider cuts a JSON body in the middle")
        sale.complete = True
        if not behaviour.valid:
            body = body[: len(body) // 2]
        await _send_body(send, 200, body, sale.headers)
        sale.reported = behaviour.usage and behaviour.valid

    async def _answer_stream(self, sale: _Sale, send: Send) -> None:
        await _start(send, 200, (*sale.headers, ("content-type", "text/event-stream; charset=utf-8")))
        if sale.behaviour.content:
            await self._send_chunks(sale, send)
        sale.complete = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunks(self, sale: _Sale, send: Send) -> None:
        behaviour = sale.behaviour
        gate = (behaviour.gate or self.gate) if behaviour.paced else None
        for choice, position, word in sale.chunks():
            if sale.produced == behaviour.cut_after:
                raise ConnectionCut(f"the provider cuts a stream after {sale.produced} chunks")
            if sale.produced == behaviour.fail_after:
                await _send_event(send, _error_body("the fake provider fails inside the stream", "server_error"))
                return
            if gate is not None:
                await gate.step()
            sale.started = True
            sale.produced += 1
            if not behaviour.valid and sale.produced == 1:
                await _send_event(send, b'{"id":')
                continue
            delta: dict[str, object] = {} if position else {"role": "assistant"}
            delta |= {"content": word} if behaviour.tool is None else {"tool_calls": [_tool_call(sale, word, position)]}
            await _send_event(send, _chunk(sale, choice, delta))
        if behaviour.cut_after is not None:
            raise ConnectionCut("the provider cuts a stream before its end")
        if gate is not None:
            await gate.step()
        for choice in range(sale.choices):
            await _send_event(send, _chunk(sale, choice, {}, finish=sale.finish))
        if sale.usage_wanted and behaviour.usage and behaviour.valid:
            await _send_event(send, {**_chunk(sale, 0, {}), "choices": [], "usage": _usage_body(sale)})
            sale.reported = True
        await _send_event(send, b"[DONE]")


class _NoCuts(logging.Filter):
    """Keeps the cuts that a test asked for out of the server's error log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ConnectionCut))


# ----------------------------------------------------------------------- provider: messages


class _Essentials(msgspec.Struct):
    """What a request cannot do without."""

    model: str
    messages: Annotated[list[dict[str, object]], msgspec.Meta(min_length=1)]
    stream: bool = False


def _parse(scope: Scope, body: bytes) -> FakeRequest:
    """Raises `msgspec.DecodeError` for what no provider would take."""
    msgspec.json.decode(body, type=_Essentials)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return FakeRequest(headers=headers, body=msgspec.json.decode(body))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return " ".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _sale(call_id: str, request: FakeRequest, behaviour: Behaviour) -> _Sale:
    texts = [_text(message.get("content")) for message in request.messages]
    counted = sum(math.ceil(len(text.encode()) / 4) + 3 for text in texts) + 3
    words = (behaviour.text if behaviour.text is not None else f"Echo: {texts[-1]}").split()
    allowed = request.body.get("max_completion_tokens") or request.body.get("max_tokens")
    finish = "stop"
    if behaviour.tool is not None:
        words, finish = json.dumps(behaviour.tool[1]).split(" "), "tool_calls"
    elif behaviour.output_tokens is not None:
        words = [f"word{number}" for number in range(1, behaviour.output_tokens + 1)]
    elif isinstance(allowed, int) and allowed < len(words):
        words, finish = words[:allowed], "length"
    return _Sale(
        id=call_id,
        request=request,
        behaviour=behaviour,
        words=words,
        finish=finish,
        input_tokens=counted if behaviour.input_tokens is None else behaviour.input_tokens,
    )


def _usage_body(sale: _Sale) -> dict[str, object]:
    usage = sale.usage()
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _completion(sale: _Sale) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": " ".join(sale.words)}
    if sale.behaviour.tool is not None:
        message |= {"content": None, "tool_calls": [_tool_call(sale, " ".join(sale.words))]}
    body: dict[str, object] = {
        "id": sale.id,
        "object": "chat.completion",
        "created": _CREATED,
        "model": sale.model,
        "choices": [
            {"index": choice, "message": message, "finish_reason": sale.finish} for choice in range(sale.choices)
        ],
    }
    if sale.behaviour.usage:
        body["usage"] = _usage_body(sale)
    return body


def _tool_call(sale: _Sale, arguments: str, position: int | None = None) -> dict[str, object]:
    """A whole call of the tool, or a part of it in a stream: only the first names the function."""
    assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
    named = {"id": f"call-{sale.id}", "type": "function"}
    if position is None:
        return {**named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
    if position == 0:
        return {"index": 0, **named, "function": {"name": sale.behaviour.tool[0], "arguments": arguments}}
    return {"index": 0, "function": {"arguments": arguments}}


def _chunk(sale: _Sale, choice: int, delta: Mapping[str, object], *, finish: str | None = None) -> dict[str, object]:
    chunk: dict[str, object] = {
        "id": sale.id,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": sale.model,
        "choices": [{"index": choice, "delta": delta, "finish_reason": finish}],
        "obfuscation": "x" * (sale.produced % 7),  # real streams are padded to lengths that tell nothing
    }
    if sale.usage_wanted:
        chunk["usage"] = None
    return chunk


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _error_body(message: str, kind: str, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# --------------------------------------------------------------------------- provider: ASGI


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; `None` if the client left first."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, headers: Sequence[tuple[str, str]]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_body(send: Send, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
    length = ("content-length", str(len(body)))
    await _start(send, status, (*headers, length, ("content-type", "application/json")))
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send_json(send: Send, status: int, body: object, *, headers: Sequence[tuple[str, str]] = ()) -> None:
    await _send_body(send, status, msgspec.json.encode(body), headers)


async def _send_event(send: Send, data: bytes | Mapping[str, object]) -> None:
    encoded = data if isinstance(data, bytes) else msgspec.json.encode(data)
    await send({"type": "http.response.body", "body": b"data: " + encoded + b"\n\n", "more_body": True})


# ------------------------------------------------------------------------ leaving and dying


class Disconnect:
    """An ASGI app whose client leaves once it has been sent so many messages of the response.

    From then on the app receives `http.disconnect` (or `websocket.disconnect`), and what it sends
    raises `OSError`, as servers of ASGI 2.4 do, or goes nowhere (`raises=False`), as older ones.
    With `after_messages=0` the client leaves as soon as the request has been read.
    """

    def __init__(self, app: ASGIApp, *, after_messages: int, raises: bool = True) -> None:
        self._app = app
        self._after = after_messages
        self._raises = raises

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()
        sent = 0

        async def leaving_receive() -> Message:
            message = None if gone.is_set() else await _first(receive, gone)
            if message is None:
                return {"type": f"{scope['type']}.disconnect"}
            if self._after == 0 and not message.get("more_body", False):
                gone.set()
            return message

        async def leaving_send(message: Message) -> None:
            nonlocal sent
            if gone.is_set():
                if self._raises:
                    raise OSError("the client has left")
                return
            await send(message)
            sent += 1
            if sent == self._after:
                gone.set()

        await self._app(scope, leaving_receive, leaving_send)


async def _first(receive: Receive, gone: asyncio.Event) -> Message | None:
    """The next message, or `None` if the client leaves before it comes."""
    message, leaving = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({message, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return message.result() if message.done() else None
    finally:
        message.cancel()
        leaving.cancel()


class OutageStorage:
    """A storage that goes away, loses its answers or its data, and comes back, when the test says so.

    Around any `Storage`, which does all the work. With `breaker` it says by itself that it is away, as storages
    behind a wire do after a few failures, so that guards do not even try.
    """

    def __init__(self, inner: Storage, *, breaker: bool = False) -> None:
        self.inner = inner
        self.attempts = 0
        """How many operations were tried while it was away."""
        self._breaker = breaker
        self._mode: Literal["up", "down", "silent"] = "up"
        self._still_up = 0
        self._unanswered = 0
        self._epoch = 0
        self._accepted = 0

    def down(self, *, after: int = 0, unanswered: int = 0) -> None:
        """Nothing reaches the store any more. Before that, `after` operations still work, and then so many reach it
        of which nobody learns what became of them.
        """
        self._mode, self._still_up, self._unanswered = "down", after, unanswered

    def lose_replies(self, *, after: int = 0) -> None:
        """Everything reaches the store, and after so many operations nobody learns what became of them."""
        self._mode, self._still_up = "silent", after

    def up(self) -> None:
        """It answers again."""
        self._mode = "up"

    def lose_data(self, fresh: Storage) -> None:
        """`fresh` takes the place of the store, as after a flush or a restart without a disk."""
        self.inner = fresh
        self._epoch += 1

    @property
    def lost(self) -> bool:
        """Whether its data was lost, and nobody has accepted that."""
        return self._epoch != self._accepted

    def available(self) -> bool:
        return self._mode != "down" or not self._breaker

    @property
    def epoch(self) -> str:
        return str(self._accepted)

    async def accept_loss(self) -> None:
        async with self._reached():
            self._accepted = self._epoch

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        async with self._reached(decides=True):
            return await self.inner.reserve(owner, plans)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        async with self._reached(decides=True):
            return await self.inner.amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        mode = self._next()
        if mode == "down":
            return _Failed(_nobody_there())
        pending = self.inner.settle(settlements)
        return _Failed(_no_answer()) if mode == "silent" else pending

    async def heartbeat(self, owner: str) -> Heartbeat:
        async with self._reached():
            return await self.inner.heartbeat(owner)

    async def retire(self, owner: str) -> None:
        async with self._reached():
            await self.inner.retire(owner)

    async def read(self, meters: Sequence[Meter]) -> tuple[Reading, ...]:
        async with self._reached():
            return await self.inner.read(meters)

    async def reset(self, meters: Sequence[Meter]) -> None:
        async with self._reached():
            await self.inner.reset(meters)

    async def records(self, *, since_ms: int = 0, limit: int | None = None) -> Sequence[UsageRecord]:
        async with self._reached():
            return await self.inner.records(since_ms=since_ms, limit=limit)

    async def export(self) -> AsyncIterator[bytes]:
        async with self._reached():
            async for line in self.inner.export():
                yield line

    async def load(self, lines: Iterable[bytes]) -> None:
        async with self._reached():
            await self.inner.load(lines)

    async def open_holds(self) -> int:
        async with self._reached():
            return await self.inner.open_holds()

    async def aclose(self) -> None:
        await self.inner.aclose()

    @asynccontextmanager
    async def _reached(self, *, decides: bool = False) -> AsyncGenerator[None]:
        mode = self._next()
        if mode == "down":
            raise _nobody_there()
        if decides and self.lost:
            raise DataLost("the store is not the one that it was")
        yield
        if mode == "silent":
            raise _no_answer()

    def _next(self) -> Literal["up", "down", "silent"]:
        if self._mode == "up":
            return "up"
        if self._still_up:
            self._still_up -= 1
            return "up"
        self.attempts += 1
        if self._mode == "down" and self._unanswered:
            self._unanswered -= 1
            return "silent"
        return self._mode


def _nobody_there() -> StorageError:
    error = StorageError("nobody is there")
    error.sent = False
    return error


def _no_answer() -> StorageError:
    return StorageError("no answer came back")


class _Failed:
    """A settlement whose outcome is not known."""

    def __init__(self, error: StorageError) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:  # noqa: ARG002 - see Pending
        raise self._error

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        callback(self)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        raise self._error
        yield  # pragma: no cover - makes this a generator; never reached


def kill_self() -> NoReturn:
    """End this process as `kill -9` does: nothing is flushed, no `finally` runs. For subprocesses of tests."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: nobody survives SIGKILL")


def asgi_client(app: ASGIApp, *, base_url: str = "http://testserver") -> httpx2.AsyncClient:
    """A client that calls the app in this process. Answers arrive whole: streams need `FakeProvider.serve`.

    Raises:
        NotInstalledError: httpx2 is missing.
    """
    try:
        import httpx2
    except ImportError as error:
        raise NotInstalledError("asgi_client", "httpx") from error
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=base_url)
