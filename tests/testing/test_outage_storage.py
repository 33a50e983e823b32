"""The storage that goes away: what reaches the store, and what its callers learn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tests.storage.values import claim, meter

from asgi_llm_guard.claims import Bundle, Granted, Reading, Settled, Settlement
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.base import Interruptible, LossAware, Pending
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage
from asgi_llm_guard.windows import Rolling

pytestmark = pytest.mark.anyio

METER = meter(Rolling(60_000), 100)
SETTLED = [Settlement("call", (2,))]


@pytest.fixture
def storage() -> OutageStorage:
    return OutageStorage(MemoryStorage(clock=FrozenClock()))


async def export(storage: OutageStorage) -> list[bytes]:
    return [line async for line in storage.export()]


def reserve(storage: OutageStorage, call_id: str = "call") -> Awaitable[object]:
    return storage.reserve("me", [[Bundle(call_id, (claim(METER, 3),))]])


OPERATIONS: dict[str, Callable[[OutageStorage], Awaitable[object]]] = {
    "reserve": reserve,
    "amend": lambda storage: storage.amend("me", Bundle("call", (claim(METER, 4),))),
    "settle": lambda storage: storage.settle(SETTLED),
    "heartbeat": lambda storage: storage.heartbeat("me"),
    "read": lambda storage: storage.read([METER]),
    "reset": lambda storage: storage.reset([METER]),
    "records": lambda storage: storage.records(limit=1),
    "open_holds": lambda storage: storage.open_holds(),
    "retire": lambda storage: storage.retire("me"),
    "export": export,
}


async def test_passes_everything_on(storage: OutageStorage) -> None:
    """While it is up, it is the storage that it stands around."""
    assert isinstance(await reserve(storage), Granted)
    assert await storage.open_holds() == 1
    assert await storage.read([METER]) == (Reading(0, 3, FrozenClock().now_ms() + 60_000),)
    for name, operation in OPERATIONS.items():
        if name != "reserve":
            await operation(storage)
    copy = OutageStorage(MemoryStorage(clock=FrozenClock()))
    await copy.load(await export(storage))
    assert await export(copy) == await export(storage)
    assert storage.attempts == 0
    await storage.aclose()
    with pytest.raises(StorageError, match="closed"):
        await storage.open_holds()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_away(storage: OutageStorage, name: str) -> None:
    """While it is down, nothing reaches the store, and who asks learns that."""
    await reserve(storage)
    before = await export(storage)
    storage.down()
    with pytest.raises(StorageError) as raised:
        await OPERATIONS[name](storage)
    assert not raised.value.sent
    assert storage.attempts == 1
    storage.up()
    assert await export(storage) == before


@pytest.mark.parametrize("name", ["reserve", "amend", "settle", "retire"])
@pytest.mark.parametrize("lose", [OutageStorage.lose_replies, lambda storage: storage.down(unanswered=1)])
async def test_without_answer(storage: OutageStorage, name: str, lose: Callable[[OutageStorage], None]) -> None:
    """With its answers lost, the store does what it was asked, and nobody learns it."""
    if name != "reserve":
        await reserve(storage)
    before = await export(storage)
    lose(storage)
    with pytest.raises(StorageError) as raised:
        await OPERATIONS[name](storage)
    assert raised.value.sent
    storage.up()
    assert await export(storage) != before


async def test_settlement_without_answer(storage: OutageStorage) -> None:
    """A settlement that fails is done at once, in every way of asking for it."""
    storage.down()
    pending = storage.settle(SETTLED)
    assert pending.done()
    told: list[Pending[tuple[Settled, ...]]] = []
    pending.add_done_callback(told.append)
    assert told == [pending]
    with pytest.raises(StorageError, match="nobody is there"):
        pending.result()


async def test_goes_away_later(storage: OutageStorage) -> None:
    """It goes away after as many operations as it was told."""
    storage.down(after=2)
    await reserve(storage, "one")
    await reserve(storage, "two")
    with pytest.raises(StorageError):
        await reserve(storage, "three")
    storage.lose_replies(after=1)
    await reserve(storage, "four")
    with pytest.raises(StorageError):
        await reserve(storage, "five")
    storage.up()
    assert await storage.open_holds() == 4


async def test_what_it_knows_of_itself() -> None:
    """It says that it is away only if it was told to know."""
    for breaker in (False, True):
        storage = OutageStorage(MemoryStorage(), breaker=breaker)
        assert storage.available()
        storage.down()
        assert storage.available() is not breaker
        storage.up()
        assert storage.available()
        assert isinstance(storage, Interruptible)


async def test_lost_data(storage: OutageStorage) -> None:
    """With its data lost it decides nothing until that is accepted, and goes by the new data from then on."""
    assert isinstance(storage, LossAware)
    await reserve(storage)
    epoch = storage.epoch
    storage.lose_data(MemoryStorage(clock=FrozenClock()))
    for name in ("reserve", "amend"):
        with pytest.raises(DataLost):
            await OPERATIONS[name](storage)
    assert storage.lost
    assert storage.epoch == epoch
    assert await storage.settle(SETTLED) == (Settled("call", "cancelled"),)
    await storage.accept_loss()
    assert storage.epoch != epoch
    assert isinstance(await reserve(storage, "another"), Granted)
    assert await storage.open_holds() == 1
