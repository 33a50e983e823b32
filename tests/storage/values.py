"""Short ways to say what the storage tests are about: meters, claims, and the verbs with one bundle."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Protocol

from asgi_llm_guard.claims import (
    Bundle,
    Claim,
    Ended,
    Granted,
    Meter,
    Receipt,
    Refused,
    Rule,
    Settled,
    Settlement,
    Unit,
)
from asgi_llm_guard.claims import meter_key as key_of
from asgi_llm_guard.storage.base import LAPSE_MS, TOMBSTONE_MS, Storage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
CENT: Final = 10_000_000
DOLLAR: Final = 1_000_000_000

START: Final = datetime(2027, 1, 15, 8, tzinfo=UTC)
START_MS: Final = int(START.timestamp()) * 1000

ME: Final = "process-1"
OTHER: Final = "process-2"

# One window of every kind, none of which moves by itself within the minute after START.
WINDOWS: Final[dict[str, Window]] = {
    "lifetime": Lifetime(HOUR_MS),
    "renewed": Lifetime(HOUR_MS, renew=True),
    "rolling": Rolling(DAY_MS),
    "calendar": Calendar("day"),
    "sliding": Sliding(HOUR_MS, 60),
    "bucket": Bucket(DAY_MS, 100),
    "slots": Slots(),
    "distinct": Distinct(HOUR_MS),
}


class Make(Protocol):
    """Makes a new, empty storage of the kind that the test runs on."""

    def __call__(
        self, clock: FrozenClock, *, lapse_ms: int = LAPSE_MS, tombstone_ms: int = TOMBSTONE_MS
    ) -> Storage: ...


def meter(
    window: Window,
    limit: int | None = 100,
    *,
    subject: str = "s",
    enforce: bool = True,
    refund: bool = False,
    policy: str = "policy",
) -> Meter:
    """A meter in `window`; `refund`: nothing stays charged when the owner of a hold dies."""
    return Meter(
        key=key_of(policy, Unit.NANOUSD, window, subject),
        policy=policy,
        scope="user",
        subject=subject,
        unit=Unit.NANOUSD,
        rule=Rule.BUDGET,
        limit=limit,
        window=window,
        enforce=enforce,
        expiry_charge="nothing" if refund else "hold",
    )


def sized(window: Window, limit: int) -> Window:
    """`window`, or a bucket that `limit` units fill."""
    return Bucket(window.period_ms, limit) if isinstance(window, Bucket) else window


def claim(on: Meter, amount: int = 1, member: str | None = None) -> Claim:
    """A claim; on a `Distinct` meter of the id `member`, or else `id`."""
    if isinstance(on.window, Distinct) and member is None:
        member = "id"
    return Claim(on, amount, member)


def draft(call_id: str, *, cost: int | None = None, at_ms: int = START_MS) -> UsageRecord:
    """What is known of a call at admission, `cost` being its estimate."""
    return UsageRecord(call_id=call_id, at_ms=at_ms, caller="team", model="m", estimate_nanousd=cost)


def record(call_id: str, cost: int, *, at_ms: int = START_MS) -> UsageRecord:
    """What a settlement writes down."""
    return UsageRecord(call_id=call_id, at_ms=at_ms, caller="team", model="m", cost_nanousd=cost)


async def ask(
    storage: Storage, call_id: str, *claims: Claim, owner: str = ME, draft: UsageRecord | None = None
) -> Granted | Refused | Ended:
    """Reserve one bundle."""
    return await storage.reserve(owner, ((Bundle(call_id, claims, draft),),))


async def take(
    storage: Storage, call_id: str, *claims: Claim, owner: str = ME, draft: UsageRecord | None = None
) -> tuple[Receipt, ...]:
    """Reserve one bundle that fits; gives its receipts."""
    answer = await ask(storage, call_id, *claims, owner=owner, draft=draft)
    assert isinstance(answer, Granted), answer
    return answer.receipts


async def refuse(storage: Storage, call_id: str, *claims: Claim, owner: str = ME) -> tuple[Receipt, ...]:
    """Reserve one bundle that does not fit; gives the states."""
    answer = await ask(storage, call_id, *claims, owner=owner)
    assert isinstance(answer, Refused), answer
    return answer.states[0]


async def settle(
    storage: Storage,
    call_id: str,
    *actuals: int | None,
    record: UsageRecord | None = None,
    receipts: tuple[Receipt, ...] = (),
) -> Settled:
    """Settle one call id."""
    (settled,) = await storage.settle((Settlement(call_id, actuals, record, receipts),))
    return settled


async def level(storage: Storage, on: Meter) -> tuple[int, int]:
    """Used and held."""
    (reading,) = await storage.read((on,))
    return reading.used, reading.held


async def state_of(storage: Storage) -> list[bytes]:
    """Everything a storage knows, without the instant of the export. Equal lists, equal states."""
    lines = [line async for line in storage.export()]
    return sorted(lines[1:-1])
