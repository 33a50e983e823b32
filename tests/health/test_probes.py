"""`/healthz` and `/readyz`: what they say, what they ask, and that nothing stands in their way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.control.kit import Hanging
from tests.middleware.asgi import Exchange, request, start, websocket

from asgi_llm_guard import Budget, Guard, GuardMiddleware, Iterations, RateLimit, Route
from asgi_llm_guard.claims import Heartbeat
from asgi_llm_guard.control import Control
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

CANARY = "canary-4711"


class Beating(MemoryStorage):
    """Counts its heartbeats, and answers them as it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.beats = 0
        self.ahead_ms = 0
        self.error: Exception | None = None
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def heartbeat(self, owner: str) -> Heartbeat:
        self.beats += 1
        self.asked.set()
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        beat = await super().heartbeat(owner)
        return Heartbeat(beat.lapsed, beat.expired, beat.now_ms + self.ahead_ms, beat.owners)


async def get(app: Any, path: str = "/readyz", **options: Any) -> Exchange:
    return await request(path, **{"method": "GET", **options}).run(app)


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def storage(clock: FrozenClock) -> Beating:
    return Beating(clock=clock)


@pytest.fixture
def guard(clock: FrozenClock, storage: Beating) -> Guard:
    return Guard([Iterations(1)], storage=storage, clock=clock)


async def test_alive(guard: Guard, storage: Beating) -> None:
    """M16: `/healthz` is 200 whatever the storage does, and asks nobody."""
    app = guard.health_app()
    storage.error = StorageError("away")

    exchange = await get(app, "/healthz")

    assert (exchange.status, exchange.json) == (200, {"status": "ok"})
    assert storage.beats == 0


async def test_ready(guard: Guard) -> None:
    """M16: with a storage that answers, `/readyz` is 200 and names each check."""
    exchange = await get(guard.health_app())

    assert exchange.status == 200
    checks = {"storage": "ok", "service": "ok", "clock": "ok", "prices": "ok", "control": "ok"}
    assert exchange.json == {"status": "ready", "checks": checks, "prices_days": exchange.json["prices_days"]}
    assert exchange.headers["cache-control"] == "no-store"


async def test_storage_is_asked_rarely(guard: Guard, storage: Beating, clock: FrozenClock) -> None:
    """M16: while a heartbeat was answered in the last 15 seconds, no probe is a trip; later, one is."""
    app = guard.health_app()
    for _ in range(100):
        assert (await get(app)).status == 200
    assert storage.beats == 1
    clock.advance(seconds=15)
    assert (await get(app)).status == 200
    assert storage.beats == 2


async def test_probes_wait_together(guard: Guard, storage: Beating) -> None:
    """M16: probes that come while the storage is asked wait for that one answer."""
    app = guard.health_app()
    storage.answers.clear()
    probes = [asyncio.ensure_future(get(app)) for _ in range(20)]
    await storage.asked.wait()
    storage.answers.set()

    assert [exchange.status for exchange in await asyncio.gather(*probes)] == [200] * 20
    assert storage.beats == 1


async def test_storage_that_hangs(guard: Guard, storage: Beating) -> None:
    """M16: a storage that does not answer within a second is not ready, and is left alone for the next five."""
    app = guard.health_app()
    storage.answers.clear()

    first, second = await get(app), await get(app)

    assert (first.status, first.json["checks"]["storage"]) == (503, "slow")
    assert (second.status, second.json["checks"]["storage"]) == (503, "slow")
    assert storage.beats == 1


async def test_storage_comes_back(guard: Guard, storage: Beating, clock: FrozenClock) -> None:
    """M16: a storage that fails is not ready; once it answers again, it is."""
    app = guard.health_app()
    storage.error = StorageError(f"connection to {CANARY} refused")
    failed = await get(app)
    storage.error = None
    clock.advance(seconds=5)
    back = await get(app)

    assert (failed.status, failed.json["checks"]["storage"]) == (503, "failed")
    assert CANARY not in failed.body.decode()
    assert back.status == 200


async def test_storage_that_breaks(guard: Guard, storage: Beating) -> None:
    """M16: a driver that breaks in an unforeseen way is not ready, and no error of the probe."""
    app = guard.health_app()
    storage.error = ZeroDivisionError(CANARY)

    exchange = await get(app)

    assert exchange.status == 503
    assert CANARY not in exchange.body.decode()


def test_loops_come_and_go(guard: Guard, storage: Beating, clock: FrozenClock) -> None:
    """M16: a probe that was cut off with its event loop does not stand in the way of the next."""
    app = guard.health_app()
    storage.answers.clear()
    loop = asyncio.new_event_loop()
    cut_off = loop.create_task(get(app))
    loop.run_until_complete(asyncio.wait([cut_off], timeout=0.01))
    storage.answers.set()
    clock.advance(seconds=5)

    assert asyncio.run(get(app)).status == 200
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.wait([cut_off]))
    loop.close()


async def test_draining(guard: Guard) -> None:
    """M16: an instance that is going down is not ready, and still alive."""
    app = guard.health_app()
    await guard.drain(0)

    exchange = await get(app)

    assert (exchange.status, exchange.json["checks"]["service"]) == (503, "draining")
    assert (await get(app, "/healthz")).status == 200


async def test_administration_that_was_never_loaded(clock: FrozenClock) -> None:
    """M16: while no administration data were loaded an instance is not ready; asking begins to load them."""
    control = Control("sqlite://:memory:")
    hanging = Hanging(control)
    guard = Guard(control=hanging, clock=clock)  # type: ignore[arg-type]  # it does what is asked of one
    app = guard.health_app()
    first = await get(app)
    assert guard.follower is not None
    hanging.answers.set()
    while await guard.follower.closed():
        pass
    then = await get(app)
    await guard.aclose()
    await control.aclose()

    assert (first.status, first.json["checks"]["control"]) == (503, "missing")
    assert then.status == 200


async def test_clock_apart(guard: Guard, storage: Beating) -> None:
    """M16: a clock that is half a minute from the storage's is not ready."""
    storage.ahead_ms = 30_001

    exchange = await get(guard.health_app())

    assert (exchange.status, exchange.json["checks"]["clock"]) == (503, "skewed")


async def test_old_prices(guard: Guard, clock: FrozenClock) -> None:
    """M16: prices older than the service allows are not ready; how old they are is shown in any case."""
    clock.advance(seconds=4_000 * 86_400)

    judged, shown = await get(guard.health_app(max_price_age="90d")), await get(guard.health_app())

    assert (judged.status, judged.json["checks"]["prices"]) == (503, "stale")
    assert shown.status == 200
    assert shown.json["prices_days"] == judged.json["prices_days"] > 90


@pytest.mark.parametrize("at", ["", "/ops"])
async def test_never_blocked(clock: FrozenClock, at: str) -> None:
    """M16: no route, rate, budget or `unlisted` stands in the way of probes, and they take nothing of them."""
    guard = Guard([Iterations(0), RateLimit("1/hour", per="global"), Budget("$0", per="global")], clock=clock)
    inner = Starlette(routes=[Mount(at, guard.health_app(at=at))])
    everything = Route("/{rest:path}", methods=["GET", "POST"])
    app = GuardMiddleware(inner, guard, routes=[everything], unlisted="deny")

    blocked = await get(app, f"{at}/elsewhere")
    probes = [await get(app, f"{at}{path}") for path in ("/healthz", "/readyz") * 20]

    assert blocked.status >= 400
    assert {exchange.status for exchange in probes} == {200}


async def test_only_those_paths(guard: Guard) -> None:
    """M16: what lies beside the probes is guarded as before."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(scope["path"])

    guard.health_app(at="/ops")
    guarded = GuardMiddleware(app, guard, routes=[Route("/v1/chat")], unlisted="deny")
    for path in ("/ops/healthz/", "/OPS/healthz", "/ops//healthz", "/healthz", "/ops/../ops/healthz", "/ops/healthz/x"):
        assert (await request(path).run(guarded)).status == 403


async def test_other_requests(guard: Guard) -> None:
    """M16: HEAD has no body, other methods and paths are 405 and 404, and WebSockets are closed."""
    app = guard.health_app()

    head = await get(app, "/healthz", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    post = await get(app, "/readyz", method="POST")
    assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")
    assert (await get(app, "/readyz/more")).status == 404
    assert (await websocket("/readyz").run(app)).sent == [{"type": "websocket.close", "code": 1000}]


async def test_by_itself(guard: Guard) -> None:
    """M16: it may be served on a port of its own."""
    assert [message["type"] for message in await start(guard.health_app())] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "ops"}, "at must be a path"),
        ({"at": "/ops/"}, "at must be a path"),
        ({"max_price_age": "soon"}, "max_price_age"),
        ({"max_clock_skew_s": 0}, "max_clock_skew_s"),
        ({"max_clock_skew_s": True}, "max_clock_skew_s"),
    ],
)
def test_wrong_settings(guard: Guard, options: dict[str, Any], message: str) -> None:
    """M16: what cannot be is said when the app is made."""
    with pytest.raises(ConfigurationError, match=message):
        guard.health_app(**options)
