"""A provider that answers as it is told, and keeps a bill."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from asgi_llm_guard.testing.behaviour import GOOD, Behaviour, ConnectionCut
from asgi_llm_guard.testing.bill import DEFAULT_PRICE, Attempt, Bill, Price
from asgi_llm_guard.testing.gates import Changes, Gate
from asgi_llm_guard.testing.hosts import Platform, platform_of
from asgi_llm_guard.testing.messages import Reply, hung_up, lifespan, read_body
from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.serving import Serving
from asgi_llm_guard.testing.speech import SPEECHES, Call, Fault, Speech, Streaming, UnreadableError
from asgi_llm_guard.testing.speech.base import dump
from asgi_llm_guard.testing.speech.openai_chat import OpenAIChat
from asgi_llm_guard.usage import Usage

__all__ = ["FakeProvider"]

_OPENAI: Final = OpenAIChat()
_JSON: Final = "application/json"


class FakeProvider:
    """An LLM provider that speaks every dialect and keeps a bill. An ASGI app, or a server with `serve`.

    The path of a request says which API it is for. Answers are deterministic: an echo of the last message, one
    word per token and per chunk, as many as the request allows. Input is billed at a token for every four bytes
    of text, three for each message and three for the answer's opening.

    What a request meets is the first of: the next behaviour of the script, the first `when`
    that matches, the default. Any key is accepted.
    """

    def __init__(
        self,
        *,
        prices: Mapping[str, Price] | Callable[[str, Usage], int] | None = None,
        default: Behaviour = GOOD,
        platform: Platform = "openai",
    ) -> None:
        """`prices`: by model, and other models do not exist; or what a model's usage costs, in nano-USD;
        `None`: every model exists at `DEFAULT_PRICE`. `platform`: who is meant by paths that several share, if
        the host of a request does not say."""
        self.bill: list[Bill] = []
        """One line for each billed call, in the order in which they ended."""
        self.attempts: list[Attempt] = []
        """One line for each of `requests`, billed or not, in the order in which they ended."""
        self.requests: list[FakeRequest] = []
        """Every well-formed request for something that a model makes, whatever it met."""
        self.others: list[str] = []
        """Method and path of what was none: lists of models, counts of tokens, what nobody could read."""
        self.disconnects = 0
        """How many clients left before their answer was complete."""
        self.gate = Gate()
        self._prices = prices
        self._default = default
        self._platform = platform
        self._script: deque[Behaviour] = deque()
        self._rules: list[tuple[Callable[[FakeRequest], bool], Behaviour]] = []
        self._changes = Changes()
        self._lock = threading.Lock()
        self._open: set[asyncio.Task[None]] = set()

    @property
    def calls(self) -> int:
        """How many requests for something that a model makes came in, retries and errors included."""
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

    def serve(self) -> Serving:
        """Serve on a free loopback port, in a thread of its own: `with` or `async with`. Gives the `base_url` for
        SDKs of OpenAI (`…/v1`); its `root` is the one for others.

        On exit, answers that are not complete are cut.

        Raises:
            NotInstalledError: uvicorn is missing.
        """
        return Serving(self, stop=self._cut_open_answers)

    def _cut_open_answers(self) -> None:
        loop = asyncio.get_running_loop()
        for task in tuple(self._open):
            if task.get_loop() is loop:
                task.cancel()

    # --------------------------------------------------------------------------------- ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        body = await read_body(receive)
        if body is None:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        platform = platform_of(headers.get("host", ""), self._platform)
        heard = self._find(method, path, platform)
        if heard is None:
            self.others.append(f"{method} {path}")
            await self._say_something_else(method, path, Reply(send))
            return
        speech, named = heard
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        call = Call(platform=platform, path=path, query=query, headers=headers, raw=body, named=named)
        try:
            request = speech.read(call)
        except UnreadableError as error:
            self.others.append(f"{method} {path}")
            await self._refuse(speech, Fault(status=400, message=str(error)), Reply(send))
            return
        if speech.free:
            self.others.append(f"{method} {path}")
            free = _sale(speech, 0, request, GOOD)
            await Reply(send).whole(200, speech.whole(free)[0], kind=_JSON)
            return
        await self._meet(speech, request, receive, send)

    @staticmethod
    def _find(method: str, path: str, platform: str) -> tuple[Speech, Mapping[str, str]] | None:
        """Who speaks on this path, and what it says of the request."""
        for speech in SPEECHES if method == "POST" else ():
            named = speech.hears(path, platform)
            if named is not None:
                return speech, named
        return None

    async def _say_something_else(self, method: str, path: str, reply: Reply) -> None:
        if (method, path) == ("GET", "/v1/models"):
            names = () if self._prices is None or callable(self._prices) else self._prices
            listed = [{"id": name, "object": "model", "owned_by": "fake"} for name in names]
            await reply.whole(200, dump({"object": "list", "data": listed}), kind=_JSON)
            return
        await self._refuse(_OPENAI, Fault(status=404, message=f"no such route: {method} {path}"), reply)

    @staticmethod
    async def _refuse(speech: Speech, fault: Fault, reply: Reply) -> None:
        body, headers = speech.error(fault)
        await reply.whole(fault.status, dump(body), kind=_JSON, headers=headers)

    # ------------------------------------------------------------------------------- a call

    async def _meet(self, speech: Speech, request: FakeRequest, receive: Receive, send: Send) -> None:
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            behaviour = self._next(request)
        sale = _sale(speech, number, request, behaviour)
        answer = asyncio.create_task(self._answer(speech, sale, send))
        leaving = asyncio.create_task(hung_up(receive))
        self._open.add(answer)
        self._changes.tell()
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sale.complete:  # the last message is on its way: that, too, ends in http.disconnect
                await asyncio.wait({answer})
        finally:
            unfinished = not answer.done()
            leaving.cancel()
            answer.cancel()
            outcome, _ = await asyncio.gather(answer, leaving, return_exceptions=True)
            with self._lock:
                self.disconnects += unfinished
                self._open.discard(answer)
            self._write_down(speech, sale, left=unfinished)
        if isinstance(outcome, asyncio.CancelledError) and not unfinished:
            raise ConnectionCut("the provider stops")
        if isinstance(outcome, Exception):
            raise outcome

    def _next(self, request: FakeRequest) -> Behaviour:
        if not callable(self._prices) and self._prices is not None and request.model not in self._prices:
            return Behaviour.refuse("unknown_model")
        if self._script:
            return self._script.popleft()
        return next((behaviour for condition, behaviour in self._rules if condition(request)), self._default)

    def _write_down(self, speech: Speech, sale: Sale, *, left: bool = False) -> None:
        """Put the attempt on the books, once: before the end of its answer is sent, so that whoever has seen the end
        finds it there.
        """
        with self._lock:
            if not sale.written:
                sale.written = True
                self._enter(speech, sale, left=left)
        self._changes.tell()

    def _enter(self, speech: Speech, sale: Sale, *, left: bool) -> None:
        request = sale.request
        if sale.status == 200 and left and not request.stream and sale.behaviour.content:
            sale.produce_all()  # nobody waits any more, and it is generated all the same
        line = None
        if sale.status == 200:
            line = self._line(sale, speech.consumed(sale))
            self.bill.append(line)
        self.attempts.append(
            Attempt(
                number=sale.number,
                id=sale.id,
                dialect=request.dialect,
                path=request.path,
                model=request.model,
                stream=request.stream,
                status=sale.status,
                retry=_retry(request.headers),
                left=left,
                words=sale.words[: sale.produced],
                bill=line,
            )
        )

    def _line(self, sale: Sale, usage: Usage) -> Bill:
        if callable(self._prices):
            cost = self._prices(sale.model, usage)
        else:
            cost = (self._prices or {}).get(sale.model, DEFAULT_PRICE).cost_nanousd(usage)
        return Bill(
            id=sale.id,
            dialect=sale.request.dialect,
            path=sale.request.path,
            model=sale.model,
            usage=usage,
            cost_nanousd=cost,
            reported=sale.reported,
        )

    # ------------------------------------------------------------------------------ answers

    async def _answer(self, speech: Speech, sale: Sale, send: Send) -> None:
        behaviour = sale.behaviour
        accepted = sale.request.headers.get("accept-encoding", "")
        reply = Reply(send, zipped=behaviour.encoding == "gzip" and "gzip" in accepted and behaviour.content)
        if behaviour.waits:
            await (behaviour.gate or self.gate).step()
        if sale.status != 200:
            self._end(speech, sale, told=False)
            body, headers = speech.error(speech.fault(behaviour, status=sale.status))
            await reply.whole(sale.status, dump(body), kind=_JSON, headers=(*_headers(speech, sale), *headers))
        elif sale.request.stream and isinstance(speech, Streaming):
            await self._stream(speech, sale, reply)
        else:
            await self._whole(speech, sale, reply)

    async def _whole(self, speech: Speech, sale: Sale, reply: Reply) -> None:
        behaviour, headers = sale.behaviour, _headers(speech, sale)
        if behaviour.paced:
            await (behaviour.gate or self.gate).step()
        if not behaviour.content:
            self._end(speech, sale, told=False)
            await reply.whole(200, b"", kind=_JSON, headers=headers)
            return
        sale.produce_all()
        body, kind = speech.whole(sale)
        headers = (*headers, *speech.counts(sale))
        if behaviour.cut_after is not None:
            await reply.half(200, body, kind=kind, headers=headers)
            raise ConnectionCut("the provider cuts a JSON body in the middle")
        self._end(speech, sale, told=speech.tells(sale))
        if not behaviour.valid:
            body = body[: len(body) // 2]
        await reply.whole(200, body, kind=kind, headers=headers)

    async def _stream(self, speech: Streaming, sale: Sale, reply: Reply) -> None:
        await reply.begin(kind=speech.begins(sale), headers=_headers(speech, sale))
        if sale.behaviour.content:
            await self._send_chunks(speech, sale, reply)
        else:
            self._end(speech, sale, told=False)
        await reply.end()

    async def _send_chunks(self, speech: Streaming, sale: Sale, reply: Reply) -> None:
        behaviour = sale.behaviour
        gate = (behaviour.gate or self.gate) if behaviour.paced else None
        for choice, position, word in sale.chunks():
            if sale.produced == behaviour.cut_after:
                raise ConnectionCut(f"the provider cuts a stream after {sale.produced} chunks")
            if sale.produced == behaviour.fail_after:
                await self._fail(speech, sale, reply)
                return
            if gate is not None:
                await gate.step()
            await self._open_stream(speech, sale, reply)
            sale.produced += 1
            if not behaviour.valid and sale.produced == 1:
                await reply.write(speech.breaking(sale))
                continue
            await reply.write(speech.piece(sale, choice, position, word))
        if behaviour.cut_after is not None:
            raise ConnectionCut("the provider cuts a stream before its end")
        if behaviour.fail_after is not None:
            await self._fail(speech, sale, reply)
            return
        if gate is not None:
            await gate.step()
        await self._open_stream(speech, sale, reply)
        *events, last = speech.closing(sale)
        for event in events:
            await reply.write(event)
        self._end(speech, sale, told=speech.tells(sale))  # clients leave when they have seen the last event
        await reply.write(last)

    async def _fail(self, speech: Streaming, sale: Sale, reply: Reply) -> None:
        self._end(speech, sale, told=False)
        await reply.write(speech.failing(sale))

    def _end(self, speech: Speech, sale: Sale, *, told: bool) -> None:
        """The last of an answer is about to be sent."""
        sale.complete, sale.reported = True, told
        self._write_down(speech, sale)

    @staticmethod
    async def _open_stream(speech: Streaming, sale: Sale, reply: Reply) -> None:
        """What comes before the first word, once."""
        if not sale.started:
            sale.started = True
            for event in speech.opening(sale):
                await reply.write(event)


def _sale(speech: Speech, number: int, request: FakeRequest, behaviour: Behaviour) -> Sale:
    words, finish = speech.words(request, behaviour)
    failing = behaviour.fail_after is not None and not request.stream
    return Sale(
        id=f"{speech.id_prefix}{number}",
        number=number,
        request=request,
        behaviour=behaviour,
        words=words,
        finish=finish,
        status=500 if failing else speech.status(behaviour),
    )


def _headers(speech: Speech, sale: Sale) -> tuple[tuple[str, str], ...]:
    named = ((speech.id_header, sale.id),) if speech.id_header else ()
    return (*sale.behaviour.headers, *named)


def _retry(headers: Mapping[str, str]) -> int | None:
    """How many attempts went before: as SDKs made by Stainless count them, or those of AWS."""
    count = headers.get("x-stainless-retry-count", "")
    if count.isdecimal():
        return int(count)
    for part in headers.get("amz-sdk-request", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == "attempt" and value.isdecimal():
            return int(value) - 1
    return None
