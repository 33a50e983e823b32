"""Requests that are repeated with one `Idempotency-Key`: made once, charged once, answered alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from tests.decorator.values import ledger
from tests.idempotency.conftest import ROUTES, Serve
from tests.middleware.asgi import JSON_HEADERS, Exchange
from tests.middleware.values import ASK, CHAT, EVENTS, SSE_HEADERS, Provider, ask, raises

from asgi_llm_guard import Context, GuardMiddleware, Iterations, QuotaBook, RateLimit, Route
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.idempotency import entry_key, fingerprint
from asgi_llm_guard.replays import CLAIM_MS, Replays
from asgi_llm_guard.settings import RouteSettings
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Entries
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

OTHER = {**ASK, "max_tokens": 49}


def keyed(key: str = "k-1", caller: str | None = "alice", *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    named = [] if caller is None else [(b"x-caller", caller.encode())]
    return [*named, (b"idempotency-key", key.encode()), *more]


def body(exchange: Exchange) -> tuple[int, str, bytes]:
    return exchange.status, exchange.headers["content-type"], exchange.body


class Slow(Provider):
    """Answers when it is let."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked_once = asyncio.Event()
        self.let = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked_once.set()
        await self.let.wait()
        await super().__call__(scope, receive, send)


async def test_five_repetitions_are_one_charge(serve: Serve) -> None:
    """T19, S13: five repetitions of a request are one call of the provider, one record, one answer byte for byte."""
    provider = Provider(headers=[*JSON_HEADERS, (b"x-request-id", b"r-7"), (b"set-cookie", b"a=b")])
    app = serve(provider, RateLimit("1/hour", per="caller"))
    first = await ask(app, headers=keyed())
    again = [await ask(app, headers=keyed()) for _ in range(5)]
    assert first.status == 200
    assert {body(each) for each in again} == {body(first)}
    assert len(provider.bodies) == 1
    assert [outcome for outcome, _ in await ledger(app.guard)] == ["measured"]
    assert "idempotency-replayed" not in first.headers
    for each in again:
        assert each.headers["idempotency-replayed"] == "true"
        assert each.headers["x-request-id"] == "r-7"
        assert each.headers["content-length"] == str(len(first.body))
        assert "set-cookie" not in each.headers


async def test_a_stream_that_was_cut_off_is_not_kept(serve: Serve) -> None:
    """T8: a stream that the guard ended at its deadline is no answer, though nobody can tell by its form."""
    provider = Stuck()
    rules = StreamRules(total_s=0.01)
    app = serve(
        provider, Iterations(9, per="caller"), routes=[Route("/talk", dialect=None, idempotency=True, streams=rules)]
    )
    first, again = [await ask(app, headers=keyed(), path="/talk") for _ in range(2)]
    assert (first.status, first.body) == (200, b"the first half")
    assert "idempotency-replayed" not in again.headers
    assert provider.asked == 2


class Stuck:
    """Begins a stream, and does not go on."""

    def __init__(self) -> None:
        self.asked = 0
        self.begun = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"the first half", "more_body": True})
        self.begun.set()
        await asyncio.Event().wait()


async def test_a_stream_that_was_stopped_is_not_kept(serve: Serve) -> None:
    """S8: a stream that a stop has ended is no answer for those who ask again when it is lifted."""
    provider = Stuck()
    app = serve(provider, Iterations(9, per="caller"), routes=[Route("/talk", dialect=None, idempotency=True)])
    running = asyncio.create_task(ask(app, headers=keyed(), path="/talk"))
    async with asyncio.timeout(60):
        await provider.begun.wait()
        app.guard.set_stops([Stop(scope="caller", subject="alice")])
        first = await running
        app.guard.set_stops([])
        provider.begun.clear()
        running = asyncio.create_task(ask(app, headers=keyed(), path="/talk"))
        await provider.begun.wait()
        app.guard.set_stops([Stop(scope="all")])
        again = await running
    assert first.body.startswith(b"the first half")
    assert "idempotency-replayed" not in again.headers
    assert provider.asked == 2


async def test_nothing_is_given_again_to_those_who_are_stopped(serve: Serve) -> None:
    """S8: a stop refuses repetitions, too, and they have their answer again when it is lifted."""
    provider = Provider()
    app = serve(provider)
    first = await ask(app, headers=keyed())
    for stop in (Stop(scope="caller", subject="alice"), Stop(scope="model", subject="openai/test-model")):
        app.guard.set_stops([stop])
        refused = await ask(app, headers=keyed())
        assert (refused.status, "idempotency-replayed" in refused.headers) == (403, False)
    app.guard.set_stops([])
    again = await ask(app, headers=keyed())
    assert (body(again), again.headers["idempotency-replayed"]) == (body(first), "true")
    assert len(provider.bodies) == 1


async def test_an_answer_without_a_body_is_repeated_without_one(serve: Serve) -> None:
    """S13: a 204 is repeated as one: it may not tell the length of a body (RFC 9110 §8.6)."""
    app = serve(Provider([b""], status=204, headers=[]))
    exchanges = [await ask(app, headers=keyed()) for _ in range(2)]
    for exchange in exchanges:
        assert (exchange.status, exchange.body) == (204, b"")
        assert "content-length" not in exchange.headers
    assert exchanges[1].headers["idempotency-replayed"] == "true"


async def test_two_tenants_with_one_key(serve: Serve) -> None:
    """T19: the same key of two tenants is two entries, each with its own answer and its own charge."""
    app = serve(answer_by_caller)
    tenants = [await ask(app, headers=keyed(caller=name)) for name in ("alice", "bob")]
    repeated = [await ask(app, headers=keyed(caller=name)) for name in ("alice", "bob")]
    assert [each.json for each in tenants] == [each.json for each in repeated] == [{"for": "alice"}, {"for": "bob"}]
    assert len(await ledger(app.guard)) == 2
    users = [await ask(app, headers=keyed("k-2", "alice", (b"x-user", user))) for user in (b"u1", b"u2")]
    assert all("idempotency-replayed" not in each.headers for each in users)


def test_ids_of_any_letters() -> None:
    """S13: a verified id that has half of a character is an id like others."""
    keys = {entry_key(Context(caller=name, route=CHAT), "POST", b"k") for name in ("\ud800", "\ud801", "?", "a")}
    assert len(keys) == 4


async def answer_by_caller(scope: Any, receive: Any, send: Any) -> None:
    caller = dict(scope["headers"])[b"x-caller"].decode()
    await Provider([json.dumps({"for": caller}).encode()])(scope, receive, send)


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "in flight"])
async def test_another_body_under_the_same_key(serve: Serve, answered: bool) -> None:
    """T19: a key with another body is a 422, whether the first request is answered or not; nothing is charged."""
    provider = Slow()
    app = serve(provider)
    first = asyncio.create_task(ask(app, headers=keyed()))
    await provider.asked_once.wait()
    if answered:
        provider.let.set()
        await first
    refused = await ask(app, OTHER, headers=keyed())
    assert (refused.status, refused.json["error"]["code"]) == (422, "invalid_request")
    assert refused.headers["x-should-retry"] == "false"
    provider.let.set()
    assert (await first).status == 200
    assert len(provider.bodies) == len(await ledger(app.guard)) == 1


async def test_repetitions_wait_for_the_first(serve: Serve) -> None:
    """S13: what comes while the first is still being answered waits for it, on every worker, and gets its answer."""
    provider = Slow()
    apps = [serve(provider) for _ in range(2)]
    first = asyncio.create_task(ask(apps[0], headers=keyed()))
    await provider.asked_once.wait()
    others = [asyncio.create_task(ask(app, headers=keyed())) for app in apps * 2]
    done, _ = await asyncio.wait(others, timeout=0.05)
    assert not done
    provider.let.set()
    answers = await asyncio.gather(first, *others)
    assert len({body(each) for each in answers}) == 1
    assert len(provider.bodies) == 1
    assert len(await ledger(apps[0].guard)) == 1


async def test_waiting_has_an_end(serve: Serve) -> None:
    """A repetition that has waited for long enough is told to come again soon, by a status that clients retry."""
    provider = Slow()
    app = serve(provider)
    app.replays = Replays(app.guard.storage, app.guard.engine.new_id, wait_s=0.02)
    first = asyncio.create_task(ask(app, headers=keyed()))
    await provider.asked_once.wait()
    told = await ask(app, headers=keyed())
    assert (told.status, told.headers["retry-after"]) == (429, "1")
    assert "x-should-retry" not in told.headers
    provider.let.set()
    assert (await first).status == 200


async def test_stream_is_given_again(serve: Serve) -> None:
    """A stream that came to its end is given again byte for byte, in one piece."""
    provider = Provider(EVENTS, headers=SSE_HEADERS)
    app = serve(provider)
    first, again = [await ask(app, {**ASK, "stream": True}, headers=keyed()) for _ in range(2)]
    assert first.body == again.body == b"".join(EVENTS)
    assert again.headers["content-type"] == "text/event-stream"
    assert len(provider.bodies) == len(await ledger(app.guard)) == 1


NOT_KEPT: dict[str, Callable[[], Provider]] = {
    "server error": lambda: Provider([b"{}"], status=500),
    "client error": lambda: Provider([b'{"error":{"message":"no","type":"invalid_request_error"}}'], status=400),
    "error in mid-stream": lambda: Provider(
        [EVENTS[0], b'data: {"error":{"message":"no","type":"server_error"}}\n\n'], headers=SSE_HEADERS
    ),
    "stream that broke off": lambda: Provider(EVENTS[:1], headers=SSE_HEADERS),
    "too long": lambda: Provider([b"[" + b" " * 600_000, b" " * 600_000 + b"]"]),
    "compressed stream": lambda: Provider(EVENTS, headers=(*SSE_HEADERS, (b"content-encoding", b"gzip"))),
}


@pytest.mark.parametrize("kind", NOT_KEPT)
async def test_what_is_not_kept(serve: Serve, kind: str) -> None:
    """Errors, streams that broke off and what is too long are passed on, and made anew when they are repeated."""
    provider = NOT_KEPT[kind]()
    app = serve(provider)
    answers = [await ask(app, headers=keyed()) for _ in range(2)]
    assert len(provider.bodies) == 2
    assert answers[0].body == answers[1].body
    assert "idempotency-replayed" not in answers[1].headers


@pytest.mark.parametrize("status", [199, 301, 404, 500])
async def test_only_successes_are_kept(serve: Serve, status: int) -> None:
    """On routes whose answers are not read, the status alone tells a success."""
    provider = Provider([b"page"], status=status)
    app = serve(provider, routes=[Route("/raw", idempotency=True, dialect=None)])
    for _ in range(2):
        await ask(app, headers=keyed(), path="/raw")
    assert len(provider.bodies) == 2


async def test_refusals_are_not_kept(serve: Serve, clock: FrozenClock) -> None:
    """A refusal of ours is no answer to keep: the same key passes once there is room."""
    provider = Provider()
    app = serve(provider, RateLimit("1/minute", per="caller"))
    await ask(app, headers=keyed("k-1"))
    assert (await ask(app, headers=keyed("k-2"))).status == 429
    clock.advance(seconds=120)
    passed = await ask(app, headers=keyed("k-2"))
    assert (passed.status, len(provider.bodies)) == (200, 2)


async def test_refusal_inside_is_not_kept(serve: Serve) -> None:
    """A handler that was refused and one that failed let go of the key at once."""
    failing = serve(raises(lambda: RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        await ask(failing, headers=keyed())
    provider = Provider()
    working = GuardMiddleware(provider, failing.guard, routes=ROUTES)
    assert (await ask(working, headers=keyed())).status == 200
    assert len(provider.bodies) == 1


async def test_client_that_left(serve: Serve) -> None:
    """A request whose task is cancelled lets go of the key; the repetition is made."""
    provider = Slow()
    app = serve(provider)
    first = asyncio.create_task(ask(app, headers=keyed()))
    await provider.asked_once.wait()
    first.cancel()
    await asyncio.wait((first,))
    provider.let.set()
    assert (await ask(app, headers=keyed())).status == 200


async def test_anonymous_keys_mean_nothing(serve: Serve) -> None:
    """T19: without a verified caller nobody owns a key, so each request is made."""
    provider = Provider()
    app = serve(provider)
    answers = [await ask(app, headers=keyed(caller=None)) for _ in range(2)]
    assert [each.status for each in answers] == [200, 200]
    assert len(provider.bodies) == 2


@pytest.mark.parametrize(
    ("path", "method", "query", "same"),
    [(CHAT, "POST", b"", True), (CHAT, "PUT", b"", False), (CHAT, "GET", b"", False), ("/other", "POST", b"", False)],
)
async def test_a_key_belongs_to_a_route(serve: Serve, path: str, method: str, query: bytes, same: bool) -> None:
    """A key on another route or with another method is another key; reading methods know none."""
    provider = Provider()
    app = serve(provider, routes=[Route(CHAT, idempotency="1h"), Route("/other", idempotency="1h")])
    await ask(app, headers=keyed())
    second = await ask(app, headers=keyed(), path=path, method=method)
    assert second.status == 200
    assert len(provider.bodies) == (1 if same else 2)


async def test_routes_that_did_not_ask_for_it(serve: Serve) -> None:
    """It is opt-in: elsewhere the header passes unread."""
    provider = Provider()
    app = serve(provider, routes=[Route(CHAT), Route("/other", idempotency=True)])
    for _ in range(2):
        await ask(app, headers=keyed())
    assert len(provider.bodies) == 2


async def test_bodies_that_are_not_read_otherwise(serve: Serve) -> None:
    """On a route without a dialect, requests with a key are read and passed on byte for byte, JSON or not."""
    provider = Provider()
    app = serve(provider, routes=[Route("/raw", idempotency=True, dialect=None)])
    for content in (b"\xff\x00", b"\xff\x00", b"\xff\x01"):
        await ask(app, content, headers=keyed(), path="/raw")
    assert provider.bodies == [b"\xff\x00"]
    app.guard.max_body_bytes = 1
    assert (await ask(app, b"\xff\x00", headers=keyed("k-2"), path="/raw")).status == 413


async def test_answers_are_forgotten(serve: Serve, clock: FrozenClock) -> None:
    """After the route's time the key is free again."""
    provider = Provider()
    app = serve(provider, routes=[Route(CHAT, idempotency="1h")])
    await ask(app, headers=keyed())
    clock.advance(seconds=3599)
    await ask(app, headers=keyed())
    assert len(provider.bodies) == 1
    clock.advance(seconds=2)
    await ask(app, headers=keyed())
    assert len(provider.bodies) == 2


@pytest.mark.parametrize(
    "key", ["", "two words", '"unclosed', '""', "ü", "a,b", "x" * 256, '"a" "b"', '"tab\t"'], ids=ascii
)
async def test_malformed_keys(serve: Serve, key: str) -> None:
    """What is no key is a 400, and is not passed on."""
    provider = Provider()
    app = serve(provider)
    headers = [(b"x-caller", b"alice"), (b"idempotency-key", key.encode())]
    refused = await ask(app, headers=headers)
    assert (refused.status, provider.bodies) == (400, [])


async def test_two_keys(serve: Serve) -> None:
    """The header twice is a 400, also with the same value: hops may read either."""
    app = serve(Provider())
    assert (await ask(app, headers=keyed("k", "alice", (b"idempotency-key", b"k")))).status == 400


async def test_quoted_keys_are_the_same(serve: Serve) -> None:
    """A key is what it says, quoted or not, with escapes or without."""
    provider = Provider()
    app = serve(provider)
    for key in ("k-1", '"k-1"', " k-1 "):
        assert (await ask(app, headers=keyed(key))).status == 200
    assert (await ask(app, headers=keyed('"a \\"b\\""'))).status == 200
    assert len(provider.bodies) == 2


class Away(MemoryStorage):
    """Counts, and does not keep entries just now."""

    def entries(self, space: str, bounds: Any = None) -> Any:
        return AwayEntries(super().entries(space, bounds))


class AwayEntries:
    def __init__(self, entries: Entries) -> None:
        self.bounds = entries.bounds

    async def begin(self, *_: Any, **__: Any) -> None:
        raise StorageError("no connection")


async def test_storage_is_away(serve: Serve) -> None:
    """Where it cannot be promised that a request is made once, it is refused; without a key it is made."""
    provider = Provider()
    app = serve(provider, storage=Away())
    refused = await ask(app, headers=keyed())
    assert (refused.status, refused.headers["retry-after"], provider.bodies) == (503, "1", [])
    assert (await ask(app, headers=[(b"x-caller", b"alice")])).status == 200


class Plain:
    """A storage that keeps no entries."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        if name == "entries":
            raise AttributeError(name)
        return getattr(self._storage, name)


def test_configuration() -> None:
    """A time that is none, and a storage that keeps nothing, are refused when the application is built."""
    for wrong in ("soon", "31d", 5, "0s"):
        with pytest.raises(ConfigurationError, match="idempotency"):
            Route(CHAT, idempotency=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cannot keep answers"):
        Replays(Plain(MemoryStorage()), lambda: "id")


async def test_answer_of_another_version(serve: Serve) -> None:
    """What cannot be read any more is forgotten, and the request is made."""
    provider = Provider()
    app = serve(provider)
    assert app.replays is not None
    flights = app.replays.flights
    key = entry_key(Context(caller="alice", route=CHAT), "POST", b"k-1")
    await flights.entries.begin(key, "t", claim_ms=1000, note=fingerprint(CHAT, b"", json.dumps(ASK).encode()))
    await flights.store(key, "t", b"\xc1", ttl_ms=60_000)
    assert (await ask(app, headers=keyed())).status == 200
    assert len(provider.bodies) == 1
    assert (await ask(app, headers=keyed())).headers["idempotency-replayed"] == "true"


class Counted:
    """Entries that say when a claim is taken or prolonged."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self.bounds = entries.bounds
        self.begun = asyncio.Event()

    async def begin(self, *args: Any, **options: Any) -> Any:
        found = await self._entries.begin(*args, **options)
        self.begun.set()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entries, name)


async def test_a_slow_request_keeps_its_key(clock: FrozenClock, serve: Serve) -> None:
    """A request that takes longer than a claim prolongs it, so that it is still the only one."""
    provider = Slow()
    app = serve(provider)
    app.replays = replays = Replays(app.guard.storage, app.guard.engine.new_id, wait_s=0, claim_ms=90)
    replays.flights.entries = counted = Counted(replays.flights.entries)
    first = asyncio.create_task(ask(app, headers=keyed()))
    await provider.asked_once.wait()
    for _ in range(4):
        counted.begun.clear()
        await counted.begun.wait()
        clock.advance(ms=60)
    assert (await ask(app, headers=keyed())).status == 429
    provider.let.set()
    assert (await first).status == 200
    assert len(provider.bodies) == 1


async def test_worker_that_died(clock: FrozenClock, serve: Serve) -> None:
    """A key whose worker died is free again when its claim has ended."""
    provider = Provider()
    app = serve(provider)
    app.replays = Replays(app.guard.storage, app.guard.engine.new_id, wait_s=0)
    key = entry_key(Context(caller="alice", route=CHAT), "POST", b"k-1")
    note = fingerprint(CHAT, b"", json.dumps(ASK).encode())
    await app.replays.flights.entries.begin(key, "died", claim_ms=CLAIM_MS, note=note)
    assert (await ask(app, headers=keyed())).status == 429
    clock.advance(ms=CLAIM_MS)
    assert (await ask(app, headers=keyed())).status == 200


def test_settings() -> None:
    """A route in a settings file asks for it as one in code does."""
    route = RouteSettings.model_validate({"path": CHAT, "idempotency": "1h"}).build(QuotaBook())
    assert route.idempotency == "1h"
    with pytest.raises(ValidationError, match="idempotency"):
        RouteSettings.model_validate({"path": CHAT, "idempotency": "soon"})
