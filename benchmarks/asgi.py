"""What a guarded request costs inside one process, beside a bare Starlette endpoint and beside other limiters.

    python -m benchmarks.asgi [rounds] [requests per round]

Blocks are short, so that a busy machine interrupts few of them.

Every contender answers the same request: a chat completion of 1 KB, which the endpoint parses and answers
with a JSON body that reports its usage. Each driver builds an ASGI scope, sends the body in one message and
takes the answer; there is no socket. "Added" is to the bare endpoint of the same round. The guarded contenders
hold six claims and the bound of live session ids, read the body, meter the answer, settle, and send the
`RateLimit` fields.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import limits
import limits.aio.storage
import limits.aio.strategies
import msgspec
import slowapi
import slowapi.middleware
import uvloop
from benchmarks._harness import Result, compare_async, table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as Endpoint

from asgi_llm_guard import Budget, Concurrency, Guard, GuardMiddleware, Iterations, ProviderBudget, RateLimit, Route
from asgi_llm_guard.identity.scope_user import ScopeUser
from asgi_llm_guard.policies.base import Policy

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH: Final = "/v1/chat/completions"
BODY: Final = json.dumps(
    {
        "model": "gpt-4o-mini",
        "max_tokens": 256,
        "temperature": 0.2,
        "messages": [
            {"role": "system", "content": "You answer in one short sentence, and say so when you do not know."},
            {"role": "user", "content": "Which of these rivers is the longest, and where does it end? " * 13},
        ],
    }
).encode()
ANSWER: Final = {
    "id": "chatcmpl-7f3a",
    "object": "chat.completion",
    "created": 1_795_000_000,
    "model": "gpt-4o-mini",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "The second one. " * 8}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 233, "completion_tokens": 33, "total_tokens": 266},
}
HEADERS: Final = [
    (b"host", b"llm.example"),
    (b"user-agent", b"bench/1"),
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(BODY)),
    (b"authorization", b"Bearer sk-bench"),
    (b"x-session-id", b"run-42"),
]
USER: Final = SimpleNamespace(is_authenticated=True, identity="alice")
MANY: Final = 10**9
"""A limit that no run reaches."""


async def complete(request: Request) -> JSONResponse:
    """The endpoint that is guarded."""
    body = await request.json()
    assert body["model"]
    return JSONResponse(ANSWER)


def endpoint() -> Starlette:
    return Starlette(routes=[Endpoint(PATH, complete, methods=["POST"])])


# ------------------------------------------------------------------------------- contenders


def noop(app: App) -> App:
    """The least that a pure ASGI middleware does."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return call


class _Asked(msgspec.Struct):
    model: str
    max_tokens: int


class _Used(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Answered(msgspec.Struct):
    usage: _Used


def floor(app: App) -> App:
    """The same work by hand, for this one request and without any of the rules: what no guard goes below.

    Reads and replays the body, adds to six counters, watches the answer, corrects the counters, adds two headers.
    """
    counters = dict.fromkeys(("session", "provider", "day", "month", "rate", "slots"), 0)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        asked = msgspec.json.decode(body, type=_Asked)
        bound = (len(body) * 150 + asked.max_tokens * 600) // 1000
        for name in counters:
            if counters[name] + bound > MANY**2:
                raise RuntimeError(name)
            counters[name] += bound
        kept = b""

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch(message: Message) -> None:
            nonlocal kept
            if message["type"] == "http.response.start":
                left = MANY - counters["rate"]
                fields = [(b"ratelimit-policy", b'"rpm";q=60;w=60'), (b"ratelimit", b'"rpm";r=%d;t=31' % left)]
                message["headers"] = [*message["headers"], *fields]
            else:
                kept += message["body"]
                used = msgspec.json.decode(kept, type=_Answered).usage
                cost = (used.prompt_tokens * 150 + used.completion_tokens * 600) // 1000
                for name in counters:
                    counters[name] += cost - bound
            await send(message)

        await app(scope, replay, watch)

    return call


def six() -> list[Policy]:
    """Six claims: one iteration, three amounts of money, one request, one slot."""
    return [
        Iterations(MANY),
        ProviderBudget({"openai": "$1000000/1d"}),
        Budget(["$1000000/daily", "$1000000/monthly"], per="user"),
        RateLimit(f"{MANY}/minute"),
        Concurrency(1000),
    ]


def guarded(app: App, *, storage: str = "memory://", dialect: str | None = "openai") -> App:
    guard = Guard(six(), storage=storage, identity=ScopeUser())
    return GuardMiddleware(app, guard, routes=[Route(PATH, dialect=dialect)])


def limited(app: App, number: int) -> App:
    """The `limits` package behind the smallest middleware: `number` limits in turn, no headers, no refunds."""
    strategy = limits.aio.strategies.FixedWindowRateLimiter(limits.aio.storage.MemoryStorage())
    items = [limits.parse(f"{MANY}/{period}") for period in ("minute", "hour", "day", "month")[:number]]

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        user = scope["user"].identity
        for item in items:
            if not await strategy.hit(item, user):
                raise RuntimeError(user)
        await app(scope, receive, send)

    return call


def slow(*, middleware: bool) -> App:
    """slowapi, with its limit on the endpoint or in its ASGI middleware."""
    limiter = slowapi.Limiter(
        key_func=lambda request: request.scope["user"].identity,
        default_limits=[f"{MANY}/minute"] if middleware else [],
    )

    async def handler(request: Request) -> JSONResponse:
        return await complete(request)

    route = handler if middleware else limiter.limit(f"{MANY}/minute")(handler)
    app = Starlette(routes=[Endpoint(PATH, route, methods=["POST"])])
    app.state.limiter = limiter
    if middleware:
        app.add_middleware(slowapi.middleware.SlowAPIASGIMiddleware)
    return app


# -------------------------------------------------------------------------------- the driver


def client(app: App) -> Callable[[], Awaitable[None]]:
    """Sends one request, and takes the answer."""
    head: dict[str, object] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
    }
    head |= {"path": PATH, "raw_path": PATH.encode(), "root_path": "", "query_string": b""}
    head |= {"client": ("203.0.113.9", 4711), "server": ("llm.example", 80), "user": USER}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    async def operation() -> None:
        scope: Scope = {**head, "headers": HEADERS, "state": {}}
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": BODY, "more_body": False}

        await app(scope, receive, send)

    return operation


def contenders(folder: str) -> dict[str, App]:
    sqlite = f"sqlite:///{Path(folder, 'guard.db').resolve()}"
    return {
        "bare Starlette": endpoint(),
        "pure ASGI no-op": noop(endpoint()),
        "floor: six counters by hand": floor(endpoint()),
        "**guard, memory, six claims**": guarded(endpoint()),
        "guard, memory, body not read": guarded(endpoint(), dialect=None),
        "guard, SQLite, six claims": guarded(endpoint(), storage=sqlite),
        "limits.aio memory, 1 limit": limited(endpoint(), 1),
        "limits.aio memory, 4 limits": limited(endpoint(), 4),
        "slowapi @limit, 1 limit": slow(middleware=False),
        "slowapi ASGI middleware, 1 limit": slow(middleware=True),
    }


def added(results: Sequence[Result]) -> str:
    """What each contender adds to the first one, as a Markdown table: quiet to quiet, and the median over rounds."""
    base = results[0]
    lines = ["| | added, quiet (p10) | added, median | ratio, quiet | ratio, median |", "|---|---|---|---|---|"]
    for result in results[1:]:
        pairs = zip(result.samples_s, base.samples_s, strict=True)
        quiet_s, median_s = result.quiet_s - base.quiet_s, statistics.median([own - bare for own, bare in pairs])
        ratios = f"{result.quiet_s / base.quiet_s:.2f} | {statistics.median(result.ratios):.2f}"
        lines.append(f"| {result.name} | {quiet_s * 1e6:.1f} µs | {median_s * 1e6:.1f} µs | {ratios} |")
    return "\n".join(lines)


async def measure(rounds: int, requests: int) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        apps = contenders(folder)
        operations = {name: client(app) for name, app in apps.items()}
        for operation in operations.values():
            for _ in range(50):
                await operation()
        results = await compare_async(operations, operations=requests, rounds=rounds)
        print(table(results, title=f"One request at a time, {rounds} rounds of {requests} requests"))
        print(f"\n{added(results)}\n")
        few = {name: operations[name] for name in operations if "slowapi" not in name}
        results = await compare_async(few, operations=512, tasks=64, rounds=max(5, rounds // 8))
        print(table(results, title="64 requests in flight: wall time per request"))
        for app in apps.values():
            if isinstance(app, GuardMiddleware):
                await app.guard.aclose()


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:]]
    rounds, requests = (*numbers, *(200, 50)[len(numbers) :])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(rounds, requests))


if __name__ == "__main__":
    main()
