"""What the tests of shards are about: meters whose subject says in which shard they lie, and shards that can fail."""

from __future__ import annotations

from collections.abc import Sequence

from tests.storage.leases_kit import Waiting
from tests.storage.values import DAY_MS, START, level, meter

from asgi_llm_guard.claims import Bundle, Ended, Granted, Meter, Plan, Refused, Settled, Settlement
from asgi_llm_guard.storage.base import LAPSE_MS, Pending
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sharded import ShardedStorage
from asgi_llm_guard.testing import FrozenClock, OutageStorage
from asgi_llm_guard.windows import Rolling, Window

SHARDS = 3


def place(key: str) -> int:
    """The shard that the subject begins with: `2-anything`. Others, which are no meters, have their own."""
    number = key.split(":")[3].partition("-")[0]
    return int(number) if number.isdigit() else 1


def lies_in(shard: int, limit: int | None = 10, *, window: Window | None = None, name: str = "m") -> Meter:
    """A meter of one shard."""
    return meter(window or Rolling(DAY_MS), limit, subject=f"{shard}-{name}")


class Counted(Waiting):
    """A shard that says what it was asked for, and may be made to wait."""

    def __init__(self, *, clock: FrozenClock) -> None:
        super().__init__(clock=clock)
        self.asked: list[str] = []

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        self.asked.append("reserve")
        return await super().reserve(owner, plans)

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        self.asked.append("amend")
        return await super().amend(owner, bundle)

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        self.asked.append("settle")
        return super().settle(settlements)


class Shards:
    """Shards in memory, each of which may go away, and the storages of several processes over them."""

    def __init__(self, clock: FrozenClock | None = None, *, lapse_ms: int = LAPSE_MS) -> None:
        self.clock = clock or FrozenClock(START)
        self.stores = [MemoryStorage(clock=self.clock, lapse_ms=lapse_ms) for _ in range(SHARDS)]
        self.shards = [OutageStorage(store) for store in self.stores]

    def process(self) -> ShardedStorage:
        """The storage as one process sees it."""
        return ShardedStorage(self.shards, place=place)

    async def levels(self, *meters: Meter) -> list[tuple[int, int]]:
        """Used and held of each meter, as its store knows them."""
        return [await level(self.stores[place(one.key)], one) for one in meters]

    async def held(self) -> int:
        """How many holds there are in all stores, groups included."""
        return sum([await store.open_holds() for store in self.stores])
