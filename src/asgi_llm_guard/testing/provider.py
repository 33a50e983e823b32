"""A provider that answers as it is told, and keeps a bill."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
from starlette.types import Receive, Scope, Send

from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.testing.behaviour import GOOD, Behaviour, ConnectionCut
from asgi_llm_guard.testing.bill import DEFAULT_PRICE, Bill, Price
from asgi_llm_guard.testing.gates import Changes, Gate
from asgi_llm_guard.testing.messages import hung_up, lifespan, read_body, send_body, send_event, send_json, start
from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.openai_chat import (
    chunk,
    completion,
    error_body,
    error_type,
    parse,
    sell,
    tool_call,
    usage_body,
)
from asgi_llm_guard.usage import Usage

__all__ = ["FakeProvider"]


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
        default: Behaviour = GOOD,
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
        self._changes = Changes()
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
        caller, ready, ended = asyncio.get_running_loop(), asyncio.Event(), Changes()
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

        log, quiet = logging.getLogger("uvicorn.error"), NoCuts()
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
            await lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        route = (scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        body = await read_body(receive)
        if body is None:
            return
        if route == ("GET", "/v1/models"):
            await send_json(send, 200, self._models())
        elif route == ("POST", "/v1/chat/completions"):
            await self._complete(scope, body, receive, send)
        else:
            await send_json(send, 404, error_body(f"no such route: {route[0]} {route[1]}", "invalid_request_error"))

    def _models(self) -> dict[str, object]:
        names = () if self._prices is None or callable(self._prices) else self._prices
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "fake"} for name in names]}

    async def _complete(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        try:
            request = parse(scope, body)
        except msgspec.DecodeError as error:
            await send_json(send, 400, error_body(str(error), "invalid_request_error"))
            return
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            behaviour = self._next(request)
        sale = sell(f"chatcmpl-{number}", request, behaviour)
        answer = asyncio.create_task(self._answer(sale, send))
        left = asyncio.create_task(hung_up(receive))
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

    def _charge(self, sale: Sale, *, whole: bool) -> None:
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

    async def _answer(self, sale: Sale, send: Send) -> None:
        behaviour = sale.behaviour
        if behaviour.waits:
            await (behaviour.gate or self.gate).step()
        if sale.status != 200:
            sale.complete = True
            error = error_body(f"the fake provider answers {sale.status}", error_type(sale.status), behaviour.code)
            await send_json(send, sale.status, error, headers=behaviour.headers)
        elif sale.stream:
            await self._answer_stream(sale, send)
        else:
            await self._answer_json(sale, send)

    async def _answer_json(self, sale: Sale, send: Send) -> None:
        behaviour = sale.behaviour
        if behaviour.paced:
            await (behaviour.gate or self.gate).step()
        if not behaviour.content:
            sale.complete = True
            await send_body(send, 200, b"", sale.headers)
            return
        sale.produce_all()
        body = msgspec.json.encode(completion(sale))
        if behaviour.cut_after is not None:
            await start(send, 200, (*sale.headers, ("content-length", str(len(body)))))
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            raise ConnectionCut("the provider cuts a JSON body in the middle")
        sale.complete = True
        if not behaviour.valid:
            body = body[: len(body) // 2]
        await send_body(send, 200, body, sale.headers)
        sale.reported = behaviour.usage and behaviour.valid

    async def _answer_stream(self, sale: Sale, send: Send) -> None:
        await start(send, 200, (*sale.headers, ("content-type", "text/event-stream; charset=utf-8")))
        if sale.behaviour.content:
            await self._send_chunks(sale, send)
        sale.complete = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunks(self, sale: Sale, send: Send) -> None:
        behaviour = sale.behaviour
        gate = (behaviour.gate or self.gate) if behaviour.paced else None
        for choice, position, word in sale.chunks():
            if sale.produced == behaviour.cut_after:
                raise ConnectionCut(f"the provider cuts a stream after {sale.produced} chunks")
            if sale.produced == behaviour.fail_after:
                await send_event(send, error_body("the fake provider fails inside the stream", "server_error"))
                return
            if gate is not None:
                await gate.step()
            sale.started = True
            sale.produced += 1
            if not behaviour.valid and sale.produced == 1:
                await send_event(send, b'{"id":')
                continue
            delta: dict[str, object] = {} if position else {"role": "assistant"}
            delta |= {"content": word} if behaviour.tool is None else {"tool_calls": [tool_call(sale, word, position)]}
            await send_event(send, chunk(sale, choice, delta))
        if behaviour.cut_after is not None:
            raise ConnectionCut("the provider cuts a stream before its end")
        if gate is not None:
            await gate.step()
        for choice in range(sale.choices):
            await send_event(send, chunk(sale, choice, {}, finish=sale.finish))
        if sale.usage_wanted and behaviour.usage and behaviour.valid:
            await send_event(send, {**chunk(sale, 0, {}), "choices": [], "usage": usage_body(sale)})
            sale.reported = True
        await send_event(send, b"[DONE]")


class NoCuts(logging.Filter):
    """Keeps the cuts that a test asked for out of the server's error log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ConnectionCut))
