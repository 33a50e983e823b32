"""Bodies behind the middleware: replayed as they came, changed where a route asks for it, metered as they pass."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from tests.decorator.values import ANSWER, USED, event, ledger
from tests.middleware.asgi import JSON_HEADERS, request
from tests.middleware.values import ASK, CHAT, EVENTS, SSE_HEADERS, Provider, ask, guarded, new_guard

from asgi_llm_guard import Budget, Iterations, Route
from asgi_llm_guard.testing import Gate

pytestmark = pytest.mark.anyio

BUDGET = Budget("$1/1d", per="caller")
ODD = b'{ "model":"test-model" ,\r\n"max_tokens":5e0, "messages" : [], "x":"\\u00e9\\ud83d\\ude00", "n":1 }'


@pytest.mark.parametrize("size", [1, 2, 7, 1_000_000], ids=lambda size: f"pieces of {size}")
async def test_body_is_replayed(size: int) -> None:
    """Byte for byte, whatever the pieces that it came in."""
    body = json.dumps({**ASK, "x": "é" * 300}, ensure_ascii=False, indent=1).encode()
    provider = Provider()
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    exchange = await request(CHAT, body=pieces, headers=JSON_HEADERS).run(guarded(provider, new_guard(BUDGET)))
    assert exchange.status == 200
    assert provider.bodies == [body]


async def test_empty_messages_before_and_between() -> None:
    """Empty pieces of a body are no end of it."""
    body = json.dumps(ASK).encode()
    provider = Provider()
    pieces = [b"", body[:5], b"", b"", body[5:], b""]
    await request(CHAT, body=pieces, headers=JSON_HEADERS).run(guarded(provider, new_guard(BUDGET)))
    assert provider.bodies == [body]


async def test_body_of_other_routes_is_not_read() -> None:
    """Where no dialect is declared or recognised, the application reads the body itself, empty or not, JSON or not."""
    for body in (b"", b"not json", ODD):
        provider = Provider()
        exchange = request("/other", body=body)
        app = guarded(provider, new_guard(Iterations(5)), routes=[Route("/other"), Route(CHAT, dialect=None)])
        assert (await exchange.run(app)).status == 200
        assert (await request(CHAT, body=body).run(app)).status == 200
        assert provider.bodies == [body, body]


async def test_largest_body() -> None:
    """A body of exactly the limit passes; one byte more is a 413, before it has been read to its end, and says both."""
    limit = 8 * 1024 * 1024
    head = json.dumps(ASK)[:-1].encode() + b', "x": "'
    provider = Provider()
    app = guarded(provider, new_guard(Iterations(5)))
    body = head + b"x" * (limit - len(head) - 2) + b'"}'
    assert (await request(CHAT, body=body).run(app)).status == 200
    assert provider.bodies == [body]

    pieces = [head, *([b"x" * 1_000_000] * 50)]
    exchange = await request(CHAT, body=pieces).run(app)
    assert (exchange.status, exchange.json["error"]["code"]) == (413, "body_too_large")
    assert exchange.received == 10
    read = len(head) + 8 * 1_000_000 + 1_000_000
    said = f"at least {read} bytes, and this route reads {limit}; send a shorter one"
    assert said in exchange.json["error"]["message"]
    assert len(provider.bodies) == 1


async def test_declared_length_beyond_the_limit() -> None:
    """A declared length beyond the limit is a 413 without reading anything."""
    exchange = request(CHAT, body=b"{}", headers=[(b"content-length", b"99999999999")])
    await exchange.run(guarded(Provider(), new_guard()))
    assert (exchange.status, exchange.received) == (413, 0)
    assert "at least 99999999999 bytes" in exchange.json["error"]["message"]


@pytest.mark.parametrize(
    "body, status, code",
    [
        (b"", 400, "invalid_request"),
        (b"{", 400, "invalid_request"),
        (b'{"model": "a", "model": "b"}', 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
    ],
)
async def test_unreadable_bodies(body: bytes, status: int, code: str) -> None:
    """Where a dialect is known, a body that cannot be read, or in two ways, reaches nobody and takes nothing."""
    guard = new_guard(Iterations(5))
    provider = Provider()
    exchange = await ask(guarded(provider, guard), body)
    assert (exchange.status, exchange.json["error"]["code"]) == (status, code)
    assert provider.bodies == []
    assert await ledger(guard) == []


async def test_encoded_request() -> None:
    """A compressed body cannot be read: 415 where it would have to be, passed on elsewhere."""
    provider = Provider()
    app = guarded(provider, new_guard())
    body, headers = gzip.compress(b"{}"), [(b"content-encoding", b"gzip")]
    assert (await ask(app, body, headers=headers)).status == 415
    assert (await ask(app, body, headers=headers, path="/other")).status == 200
    assert provider.bodies == [body]


async def test_client_leaves_before_its_body_is_complete() -> None:
    """A client that leaves while its body is awaited has claimed nothing, and the application never hears of it."""
    guard = new_guard(Iterations(1))
    provider = Provider()
    exchange = request(CHAT, body=[b"{", b""])
    exchange._incoming[1] = {"type": "http.disconnect"}
    await exchange.run(guarded(provider, guard))
    assert (exchange.sent, provider.bodies) == ([], [])
    assert (await ask(guarded(provider, guard))).status == 200


# ----------------------------------------------------------------------------------- clamp


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({"max_tokens": 10_000}, {"max_tokens": 1_000}),
        ({"max_completion_tokens": 10_000}, {"max_completion_tokens": 1_000}),
        (
            {"max_tokens": 10_000, "max_completion_tokens": 20_000},
            {"max_tokens": 1_000, "max_completion_tokens": 1_000},
        ),
        ({"max_tokens": 10_000, "n": 2}, {"max_tokens": 500}),
        ({"max_tokens": 10}, {"max_tokens": 10}),
        ({}, {"max_completion_tokens": 1_000}),
    ],
    ids=["lowered", "newer name", "both", "two choices", "fits", "set"],
)
async def test_clamp(limits: dict[str, int], expected: dict[str, int]) -> None:
    """`clamp` lowers the output limit to what is left, or sets one; the bill can never exceed the budget."""
    body: dict[str, Any] = {"model": "openai/test-model", "messages": [{"role": "user", "content": "hello"}], **limits}
    tokens = (await measured_input(body)) * 1_000
    guard = new_guard(Budget(f"${(tokens + 1_000 * 2_000) / 10**9:.9f}/1d", per="caller"))
    provider = Provider()
    exchange = await ask(guarded(provider, guard, routes=[Route(CHAT, clamp=True)]), body)

    assert exchange.status == 200
    given = {name: provider.asked[name] for name in ("max_tokens", "max_completion_tokens") if name in provider.asked}
    # Another limit changes the body by a few bytes, and the input is bounded by bytes.
    assert given.keys() == expected.keys()
    for name, limit in expected.items():
        assert limit - 10 <= given[name] <= limit
    headers = dict(provider.scopes[0]["headers"])
    assert int(headers[b"content-length"]) == len(provider.bodies[0])
    assert provider.asked["messages"] == body["messages"]


async def measured_input(body: dict[str, Any]) -> int:
    """How many input tokens such a body is held for."""
    guard = new_guard(Budget("$1000/1d", per="caller"))
    seen: list[Any] = []
    guard.engine.telling.observers = (seen.append,)
    await ask(guarded(Provider(), guard), body)
    call = seen[0].call
    assert call is not None
    return int(call.input_tokens)


async def test_clamp_cannot_help() -> None:
    """Where not even the input fits, `clamp` refuses as ever; without `clamp` the refusal says what would fit."""
    guard = new_guard(Budget("$0.000001/1d", per="caller"))
    exchange = await ask(guarded(Provider(), guard, routes=[Route(CHAT, clamp=True)]))
    assert exchange.status == 402

    tokens = await measured_input(ASK)
    guard = new_guard(Budget(f"${(tokens * 1_000 + 20 * 2_000) / 10**9:.9f}/1d", per="caller"))
    exchange = await ask(guarded(Provider(), guard))
    assert exchange.status == 402
    assert exchange.json["error"]["guard"]["fits_max_tokens"] == 20


async def test_clamped_stream_of_calls_never_exceeds_the_budget() -> None:
    """Calls that each use all they may get smaller, then are refused; the bill stays under the cap."""
    guard = new_guard(Budget("$0.001/1d", per="caller"))
    billed = 0

    async def greedy(scope: Any, receive: Any, send: Any) -> None:
        nonlocal billed
        asked = json.loads((await receive())["body"])
        usage = {"prompt_tokens": 10, "completion_tokens": asked["max_completion_tokens"]}
        billed += 10 * 1_000 + asked["max_completion_tokens"] * 2_000
        answer = json.dumps({**ANSWER, "usage": usage}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": list(JSON_HEADERS)})
        await send({"type": "http.response.body", "body": answer})

    app = guarded(greedy, guard, routes=[Route(CHAT, clamp=True, assumed_output_tokens=200)])
    statuses = [(await ask(app, {"model": "openai/test-model", "messages": []})).status for _ in range(10)]
    assert statuses[0] == 200
    assert statuses[-1] == 402
    assert 800_000 < billed <= 1_000_000
    assert sum(cost or 0 for _, cost in await ledger(guard)) == billed


# ---------------------------------------------------------------------------- inject_usage


async def test_injected_usage_with_a_declared_length() -> None:
    """Where the chunk with the usage is taken out, a declared length would be wrong, and goes as well."""
    extra = b'data: {"choices":[],"model":"test-model","usage":{"prompt_tokens":10,"completion_tokens":5}}\n\n'
    pieces = [event("hello"), extra, b"data: [DONE]\n\n"]
    headers = (*SSE_HEADERS, (b"content-length", b"%d" % sum(map(len, pieces))))
    guard = new_guard(BUDGET)
    provider = Provider([b"".join(pieces)], headers=headers)
    app = guarded(provider, guard, routes=[Route(CHAT, inject_usage=True)])
    exchange = await ask(app, {**ASK, "stream": True})

    assert provider.asked["stream_options"] == {"include_usage": True}
    assert int(dict(provider.scopes[0]["headers"])[b"content-length"]) == len(provider.bodies[0])
    assert exchange.body == event("hello") + b"data: [DONE]\n\n"
    assert "content-length" not in exchange.headers
    assert await ledger(guard) == [("measured", USED)]


async def test_changed_body_has_one_framing() -> None:
    """A body that is changed has its new length declared, and no other framing."""
    provider = Provider(EVENTS, headers=SSE_HEADERS)
    body = json.dumps({**ASK, "stream": True}).encode()
    headers = [*JSON_HEADERS, (b"transfer-encoding", b"chunked")]
    app = guarded(provider, new_guard(BUDGET), routes=[Route(CHAT, inject_usage=True)])
    await request(CHAT, body=[body[:9], body[9:]], headers=headers).run(app)
    seen = provider.scopes[0]["headers"]
    assert [value for name, value in seen if name == b"content-length"] == [b"%d" % len(provider.bodies[0])]
    assert not [value for name, value in seen if name == b"transfer-encoding"]


# -------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "provider, expected",
    [
        (Provider(), ("measured", USED)),
        (Provider(EVENTS, headers=SSE_HEADERS), ("measured", USED)),
        (Provider(headers=[(b"Content-Type", b"application/json; charset=utf-8")]), ("measured", USED)),
        (Provider(headers=[(b"content-type", b"text/plain")]), ("unseen", None)),
        (
            Provider([gzip.compress(b"{}")], headers=[*JSON_HEADERS, (b"Content-Encoding", b"gzip")]),
            ("unseen", None),
        ),
        (Provider([b'{"x": "', b"x" * (9 * 1024 * 1024), b'"}']), ("unmetered", None)),
    ],
    ids=["json", "stream", "charset", "text", "encoded", "too long to keep"],
)
async def test_answers_are_metered(provider: Provider, expected: tuple[str, int | None]) -> None:
    """Usage is read from bodies that can be read; from others nothing, which charges the hold. None is changed."""
    guard = new_guard(BUDGET)
    exchange = await ask(guarded(provider, guard), {**ASK, "stream": True})
    assert exchange.body == b"".join(provider.pieces)
    assert len(exchange.sent) == 1 + len(provider.pieces)
    ((outcome, cost),) = await ledger(guard)
    assert outcome == expected[0]
    assert cost == expected[1] or (expected[1] is None and cost is not None and cost > USED)


async def test_first_byte_is_never_delayed() -> None:
    """Every message of a response is passed on before the application makes the next one."""
    gate, sent = Gate(), []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        for number, piece in enumerate(EVENTS, 1):
            await gate.step()
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(EVENTS)})

    exchange = request(CHAT, body=json.dumps({**ASK, "stream": True}).encode(), headers=JSON_HEADERS)

    async def watch(message: Any) -> None:
        sent.append(message)
        gate.release(1)  # only what has arrived lets the next one be made

    app = guarded(slow, new_guard(BUDGET), routes=[Route(CHAT, inject_usage=True)])
    await app(exchange.scope, exchange.receive, watch)
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 3]
    assert b"".join(message.get("body", b"") for message in sent) == b"".join(EVENTS)


async def test_messages_are_passed_on_as_they_are() -> None:
    """Messages of extensions pass, and a file sent by its path ends the response."""
    guard = new_guard(Iterations(5))
    messages: list[dict[str, Any]] = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.pathsend", "path": "/file"},
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        assert await guard.storage.open_holds() == 0

    exchange = await request("/files").run(guarded(app, guard))
    assert [message["type"] for message in exchange.sent] == [message["type"] for message in messages]


# ------------------------------------------------------------------------------ per route


async def test_assumed_output_tokens() -> None:
    """What is held for a request without a limit of its own can be set for its route."""
    body: dict[str, Any] = {"model": "openai/test-model", "messages": []}
    for tokens in (10, 1_000):
        guard = new_guard(BUDGET)
        seen: list[Any] = []
        guard.engine.telling.observers = (seen.append,)
        await ask(guarded(Provider(), guard, routes=[Route(CHAT, assumed_output_tokens=tokens)]), body)
        assert seen[0].call.output_tokens == tokens


async def test_release_on_4xx() -> None:
    """A route that says so is charged nothing for a 4xx of its own."""
    for release, expected in ((True, []), (False, ["unseen"])):
        guard = new_guard(Iterations(5))
        app = guarded(Provider([b"{}"], status=404), guard, routes=[Route("/agents", release_on_4xx=release)])
        assert (await ask(app, path="/agents")).status == 404
        assert [outcome for outcome, _ in await ledger(guard)] == expected


async def test_declared_dialect() -> None:
    """A route may declare its dialect, whatever its path."""
    guard = new_guard(BUDGET)
    app = guarded(Provider(), guard, routes=[Route("/ask-me", dialect="openai")])
    assert (await ask(app, path="/ask-me")).status == 200
    assert await ledger(guard) == [("measured", USED)]


async def test_too_long_in_one_piece() -> None:
    """A body that is too long at once is a 413 as well, where no length was declared."""
    app = guarded(Provider(), new_guard(max_body_bytes=100))
    exchange = await request(CHAT, body=b"x" * 101).run(app)
    assert exchange.status == 413
    assert "at least 101 bytes, and this route reads 100;" in exchange.json["error"]["message"]


async def test_random_paths() -> None:
    """T9: a flood of random paths is not remembered, and each is still recognised for what it is."""
    guard = new_guard(Iterations(1))
    app = guarded(Provider(), guard)
    for number in range(1_000):
        exchange = await ask(app, b"no json", path=f"/{number}/chat/completions", session=False)
        assert exchange.status == 400
    assert len(app._dialects) <= 200


async def test_unlisted_requests_are_refused() -> None:
    """With `unlisted="deny"` another path is a 403, before anything is read or claimed."""
    guard, provider = new_guard(Iterations(1)), Provider()
    app = guarded(provider, guard, routes=[Route(CHAT)], unlisted="deny", exempt=["/hook"])
    exchange = await ask(app, path="/other")
    assert (exchange.status, exchange.json["code"]) == (403, "route_not_listed")
    assert [(await ask(app, path=path)).status for path in ("/hook", CHAT)] == [200, 200]
    assert len(provider.bodies) == 2


async def test_clamped_body_that_cannot_be_changed() -> None:
    """A body in which no limit can be lowered is refused before the application sees it, and nothing is charged."""
    model = "claude-haiku-4-5"
    body = {"model": model, "max_tokens": 100_000, "messages": [], "fallbacks": [{"model": model, "thinking": "deep"}]}
    guard = new_guard(Budget("$0.005/1d", per="caller"))
    provider = Provider()
    exchange = await request("/v1/messages", body=json.dumps(body).encode(), headers=JSON_HEADERS).run(
        guarded(provider, guard, routes=[Route("/v1/messages", clamp=True)])
    )

    assert exchange.status == 400
    assert "thinking" in exchange.json["error"]["message"]
    assert provider.bodies == []
    assert await ledger(guard) == []
