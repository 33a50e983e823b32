"""The usage store fails: nothing that costs money passes, it is said once, and it is over when the store is back."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.decorator.values import BOUND, CONTEXT
from tests.middleware.asgi import websocket
from tests.middleware.values import Provider, ask, guarded, new_guard

from asgi_llm_guard import Budget, Iterations, LimitExceeded, ModelAllow, RateLimit
from asgi_llm_guard import guarded as guarded_function
from asgi_llm_guard.claims import Ended, Granted, Refused
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Event, StorageFailed, StorageRecovered
from asgi_llm_guard.storage.base import Plan
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage

pytestmark = pytest.mark.anyio


class Unreliable(MemoryStorage):
    """A storage that fails while it is told to, before or after it has done its work."""

    failing: str | None = None
    answer: Any = None

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        if self.failing == "before":
            raise StorageError("no connection")
        answer = await super().reserve(owner, plans)
        if self.failing == "after":
            raise StorageError("the connection was lost")
        return answer if self.answer is None else self.answer


Break = Callable[[Path], Awaitable[Callable[[], None]]]


async def locked(path: Path) -> Callable[[], None]:
    """Another process holds the file."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other.close


async def deleted(path: Path) -> Callable[[], None]:
    for each in path.parent.iterdir():
        each.unlink()
    return lambda: None


@pytest.mark.parametrize("fail", [locked, deleted])
async def test_sqlite_file_that_cannot_be_used(tmp_path: Path, fail: Break) -> None:
    """C7: with the SQLite file locked by somebody else, or gone, a call is refused with 503 and not dispatched."""
    storage = SqliteStorage(tmp_path / "guard.db", timeout_s=0.05)
    guard = new_guard(Budget("$1/1d", per="caller"), storage=storage)
    provider = Provider()
    app = guarded(provider, guard)
    assert (await ask(app)).status == 200
    release = await fail(storage.path)
    exchange = await ask(app)
    release()
    assert (exchange.status, exchange.json["error"]["code"]) == (503, "guard_unavailable")
    assert exchange.headers["retry-after"] == "1"
    assert len(provider.bodies) == 1
    await storage.aclose()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_closed_storage(tmp_path: Path, kind: str) -> None:
    """C7: a storage that was closed refuses with 503: by the middleware, the decorator and a WebSocket alike."""
    storage = MemoryStorage() if kind == "memory" else SqliteStorage(tmp_path / "guard.db")
    guard = new_guard(Iterations(5, on_outage="deny"), storage=storage)
    app = guarded(Provider(), guard)
    await storage.aclose()
    assert (await ask(app)).status == 503
    handshake = await websocket("/ws", headers=[(b"x-session-id", b"s")]).run(app)
    assert [message["type"] for message in handshake.sent] == ["websocket.close"]
    assert handshake.sent[0]["code"] == 1013

    @guarded_function(guard=guard, context=CONTEXT, **BOUND)
    async def call() -> None:
        raise AssertionError

    with pytest.raises(LimitExceeded) as caught:
        await call()
    assert caught.value.denied.code == "guard_unavailable"


async def test_what_needs_no_store_is_decided_without_it() -> None:
    """A refusal that no counter is needed for stays what it is, and requests that claim nothing pass."""
    storage = Unreliable()
    storage.failing = "before"
    guard = new_guard(ModelAllow(["openai/other"]), Iterations(5), storage=storage)
    assert (await ask(guarded(Provider(), guard))).status == 403
    assert (await ask(guarded(Provider(), guard), method="GET")).status == 200


@pytest.mark.parametrize("failing", ["before", "after"])
async def test_one_event_per_outage(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is one event and one log line, however many requests it refuses; so is its end."""
    storage, events = Unreliable(), list[Event]()
    policies = Iterations(100, on_outage="deny"), RateLimit("100/hour", per="caller")
    guard = new_guard(*policies, storage=storage, observers=[events.append])
    app = guarded(Provider(), guard)
    for outage in range(2):
        storage.failing = failing
        assert [(await ask(app)).status for _ in range(5)] == [503] * 5
        storage.failing = None
        assert [(await ask(app)).status for _ in range(2)] == [200] * 2
        told = [event for event in events if isinstance(event, (StorageFailed, StorageRecovered))]
        assert [type(event) for event in told] == [StorageFailed, StorageRecovered] * (outage + 1)
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2
    await guard.heartbeat()
    assert await storage.open_holds() == 0
    assert len(await storage.records()) == 4


async def test_answer_that_nobody_knows() -> None:
    """Conformance 42: an answer of the store that means neither yes nor no refuses the call."""
    storage = Unreliable()
    storage.answer = Ended("call", "unknown", 0)
    app = guarded(Provider(), new_guard(Iterations(5), storage=storage))
    assert (await ask(app)).status == 503


async def test_observers_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An observer that raises is logged; the answer, the settlement and the other observers are as without it."""
    seen: list[str] = []

    def broken(event: Event) -> None:
        raise KeyError("a bug in an observer")

    def working(event: Event) -> None:
        seen.append(type(event).__name__)

    guard = new_guard(Iterations(1), observers=[broken, working])
    app = guarded(Provider(), guard)
    assert [(await ask(app)).status for _ in range(2)] == [200, 429]
    assert seen == ["Admission", "CallEnded", "SettledCall", "Refused"]
    assert len([record for record in caplog.records if "observer raised" in record.getMessage()]) == 4
