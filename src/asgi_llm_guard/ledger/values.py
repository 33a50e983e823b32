"""What the ledger is asked, and what it answers. Money is whole nano-USD, instants are milliseconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Generic, Literal, TypeVar, get_args

import msgspec

from asgi_llm_guard.errors import ConfigurationError, GuardError
from asgi_llm_guard.usage_rows import is_writable
from asgi_llm_guard.windows import Calendar, duration_ms

__all__ = [
    "AMOUNTS",
    "DIMENSIONS",
    "FILTERS",
    "OTHER",
    "TIMES",
    "Amounts",
    "Difference",
    "Dimension",
    "Filter",
    "NotKeptError",
    "Order",
    "Page",
    "Reconciliation",
    "RecordQuery",
    "RefusalCount",
    "RefusalQuery",
    "Retained",
    "Retention",
    "SessionUsage",
    "UsageQuery",
    "UsageReport",
    "UsageRow",
    "check_instant",
    "check_limit",
    "check_period",
]

T = TypeVar("T")

Dimension = Literal[
    "department",
    "agent",
    "user",
    "caller",
    "model",
    "provider",
    "route",
    "deployment",
    "tag",
    "outcome",
    "session",
    "hour",
    "day",
    "month",
]
Filter = Literal[
    "department",
    "agent",
    "user",
    "caller",
    "model",
    "provider",
    "route",
    "deployment",
    "tag",
    "outcome",
    "session",
    "call_id",
    "request_id",
]
Order = Literal["cost", "calls", "key"]

DIMENSIONS: Final[tuple[str, ...]] = get_args(Dimension)
FILTERS: Final[tuple[str, ...]] = get_args(Filter)
TIMES: Final = ("hour", "day", "month")

OTHER: Final = "other"
"""The policy under which refusals are counted that were too many different ones in their hour."""


class NotKeptError(GuardError):
    """The rows that would answer are no longer kept: retention has removed them. The message says since when."""


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over records. What a record does not know adds nothing, and is counted apart where it matters."""

    records: int = 0
    calls: int = 0
    """First attempts: a call that was tried three times is three records and one call."""
    cost_nanousd: int = 0
    """Of the records whose cost is known; see `unpriced`."""
    unpriced: int = 0
    """Records whose cost is unknown. They are not free: `cost_nanousd` is what is known without them."""
    tokens: int = 0
    """As charged to token meters."""
    input_tokens: int = 0
    """As measured, cache reads and writes included. Calls that the response cache answered add none."""
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: int = 0
    """Records that were charged by an estimate or by their hold, because nothing was measured."""
    cached: int = 0
    """Records of calls that the response cache answered."""
    errors: int = 0
    """Records of calls that the provider refused, or that got no answer."""
    latency_ms_sum: int = 0
    latency_count: int = 0
    first_token_ms_sum: int = 0
    first_token_count: int = 0

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            **{name: getattr(self, name) + getattr(other, name) for name in AMOUNTS},
        )


AMOUNTS: Final = Amounts.__struct_fields__


# ------------------------------------------------------------------------------------- usage


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the records that were admitted from `since_ms` until before `until_ms`.

    Raises:
        ConfigurationError: a dimension, a zone or a limit that there is not.
    """

    since_ms: int
    until_ms: int
    by: tuple[Dimension, ...] = ()
    """One row for each combination of these. By `department` and by `tag` a record counts in full in each of its own."""
    where: Mapping[str, str | None] = {}
    """Only records with this value; `None`: only those without one. Any `Filter`."""
    tz: str = "UTC"
    """The IANA zone whose hours, days and months `by` means."""
    order: Order = "cost"
    """`cost`, `calls`: the largest first; `key`: by key, so by time where time comes first."""
    limit: int = 1000
    """At most that many rows; `UsageReport.left_out` says how many there are beyond it."""

    def __post_init__(self) -> None:
        check_period(self.since_ms, self.until_ms)
        for name in self.by:
            if name not in DIMENSIONS:
                raise ConfigurationError(f"by: expected some of {', '.join(DIMENSIONS)}, got {name!r}")
        if len(set(self.by)) != len(self.by):
            raise ConfigurationError(f"by: names a dimension twice: {', '.join(self.by)}")
        _filters(self.where)
        if self.order not in get_args(Order):
            raise ConfigurationError(f"order: expected cost, calls or key, got {self.order!r}")
        check_limit("limit", self.limit)
        Calendar("day", self.tz)


class UsageRow(msgspec.Struct, frozen=True):
    key: tuple[str | None, ...]
    """In the order of `by`. `None`: records without one. Hours are `2026-03-29T03:00+02:00`, days `2026-03-29`,
    months `2026-03`."""
    amounts: Amounts


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    rows: tuple[UsageRow, ...]
    total: Amounts
    """Counts each record once, whatever `by`: it may be less than the sum of the rows, never less than a row."""
    left_out: int = 0
    """How many rows there are beyond the limit; they are in the total."""


# ------------------------------------------------------------------------------------ records


class RecordQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Single records that were admitted from `since_ms` until before `until_ms`.

    Raises:
        ConfigurationError: a filter or a limit that there is not.
    """

    since_ms: int = 0
    until_ms: int = 2**53 - 1
    where: Mapping[str, str | None] = {}
    """As in `UsageQuery`."""
    limit: int = 100
    """Of a page, or of a batch of a stream."""
    after: str | None = None
    """`Page.next` of the page before; `None`: from the start."""

    def __post_init__(self) -> None:
        check_period(self.since_ms, self.until_ms)
        _filters(self.where)
        check_limit("limit", self.limit)
        if self.after is not None:
            self.position()

    def position(self) -> tuple[int, int] | None:
        """The instant and the row that `after` names."""
        if self.after is None:
            return None
        at, _, row = self.after.partition("-")
        if not (at.isascii() and at.isdigit() and row.isascii() and row.isdigit() and max(len(at), len(row)) < 19):
            raise ConfigurationError(f"after: expected what the page before gave as `next`, got {self.after!r}")
        return int(at), int(row)


class Page(msgspec.Struct, Generic[T], frozen=True):
    items: tuple[T, ...]
    next: str | None
    """`RecordQuery.after` of the next page; `None`: this is the last."""


class SessionUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one session of a caller has used since the instant that was asked for."""

    caller: str | None
    session: str
    user: str | None = None
    """Of its last call, as the agent and the departments."""
    agent: str | None
    departments: tuple[str, ...]
    first_ms: int
    last_ms: int
    """When its last call was admitted."""
    calls: int
    cost_nanousd: int
    unpriced: int
    tokens: int


# ----------------------------------------------------------------------------------- refusals


class RefusalCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often a policy has refused in one hour. Refusals are never records."""

    hour_ms: int
    policy: str
    scope: str
    code: str
    route: str | None = None
    count: int = 1


class RefusalQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of the hours that begin from `since_ms` until before `until_ms`, the latest first.

    Raises:
        ConfigurationError: a period that ends before it begins, or a limit that is none.
    """

    since_ms: int
    until_ms: int
    policy: str | None = None
    scope: str | None = None
    route: str | None = None
    limit: int = 10_000

    def __post_init__(self) -> None:
        check_period(self.since_ms, self.until_ms)
        for name in ("policy", "scope", "route"):
            _writable(name, getattr(self, name))
        check_limit("limit", self.limit)


# ---------------------------------------------------------------------------------- retention


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How long the ledger keeps what; durations such as `400d`, `None`: for ever. Whole UTC days go.

    Raises:
        ConfigurationError: not a duration.
    """

    raw: str | None = "400d"
    """Single records. They go only after they were rolled up."""
    hours: str | None = "400d"
    """Sums per hour: what days in other zones than UTC, and parts of days, are made of."""
    days: str | None = None
    """Sums per day, without callers and users."""
    people: str | None = "400d"
    """Sums per day by caller and user."""
    refusals: str | None = "400d"

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            self.lasts_ms(name)

    def lasts_ms(self, name: str) -> int | None:
        text: str | None = getattr(self, name)
        return None if text is None else duration_ms(text, name=f"retention.{name}")


class Retained(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows retention has removed."""

    raw: int = 0
    hours: int = 0
    days: int = 0
    people: int = 0
    refusals: int = 0


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A roll-up that does not say what the records say."""

    day_ms: int
    """The UTC day."""
    table: str
    amount: str
    records: int
    """What the records sum up to."""
    rolled_up: int
    """What the roll-up says."""


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    since_ms: int
    """The UTC days that were compared: rounded out from what was asked for, and cut where records are no longer kept."""
    until_ms: int
    total: Amounts
    """Of the records."""
    differences: tuple[Difference, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.differences


def check_period(since_ms: int, until_ms: int) -> None:
    """Refuse what is no period.

    Raises:
        ConfigurationError: an instant before 1970 or after the year 287,000, or an end before the beginning.
    """
    for name, value in (("since_ms", since_ms), ("until_ms", until_ms)):
        check_instant(name, value, least=0)
    if until_ms < since_ms:
        raise ConfigurationError(f"until_ms: {until_ms} lies before since_ms, {since_ms}")


def _filters(where: Mapping[str, str | None]) -> None:
    for name, value in where.items():
        if name not in FILTERS:
            raise ConfigurationError(f"where: expected some of {', '.join(FILTERS)}, got {name!r}")
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(
                f"where.{name}: expected text, or None for records without one, got {_shown(value)}"
            )
        _writable(f"where.{name}", value)


def _writable(name: str, value: str | None) -> None:
    if value is not None and not is_writable(value):
        raise ConfigurationError(f"{name}: no record has NUL or half of a surrogate pair in it, got {value!r}")


def check_instant(name: str, value: int, *, least: int = -(2**53)) -> None:
    """Refuse what is no instant.

    Raises:
        ConfigurationError: before `least` or after the year 287,000.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
        raise ConfigurationError(f"{name}: expected milliseconds since 1970, got {_shown(value)}")


def check_limit(name: str, value: int) -> None:
    """Refuse a number of rows that is none.

    Raises:
        ConfigurationError: not a whole number from 1 to 10,000,000.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10_000_000:
        raise ConfigurationError(f"{name}: expected a whole number from 1 to 10000000, got {_shown(value)}")


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__} of too many digits to be shown"
