"""What happens inside the guard, told to observers: for telemetry, alerts and tests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from asgi_llm_guard.claims import Granted, Settled, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord

__all__ = [
    "Admission",
    "Alert",
    "AttemptEnded",
    "BacklogFull",
    "CacheHit",
    "CacheMiss",
    "CallEnded",
    "ConfigurationChanged",
    "ConfigurationRejected",
    "DataLost",
    "Event",
    "Expired",
    "Observer",
    "RecordsLost",
    "Refused",
    "SettledCall",
    "ShadowMisfit",
    "SlotOverrun",
    "StorageFailed",
    "StorageRecovered",
    "UsageAnomaly",
    "emit",
]

_log = logging.getLogger("asgi_llm_guard")


class Admission(msgspec.Struct, frozen=True):
    """A request or a call was admitted."""

    context: Context
    call: Call | None
    granted: Granted
    degraded: bool = False
    """The storage did not answer, and this process decided by itself: see `docs/outages.md`."""
    call_id: str | None = None
    """What the call's record is going to be named by; `None`: a request, and no call. A call inside it that takes its
    hold over has the same."""


class Refused(msgspec.Struct, frozen=True):
    """A request or a call was refused."""

    context: Context
    call: Call | None
    denied: Denied


class ShadowMisfit(msgspec.Struct, frozen=True):
    """A policy in shadow would have refused."""

    context: Context
    call: Call | None
    policy: str
    requested: int
    used: int
    held: int
    limit: int


class SettledCall(msgspec.Struct, frozen=True):
    """A call was settled: what was charged, and what the storage did."""

    record: UsageRecord
    settled: Settled


class CallEnded(msgspec.Struct, frozen=True, kw_only=True):
    """A call, or an attempt of one, is over: told where it ended, before it is settled, and once. Instants are in ms."""

    context: Context
    call: Call | None
    """`None`: it was not described."""
    call_id: str
    outcome: Outcome
    usage: Usage | None = None
    """What is known to have been used."""
    cost_nanousd: int | None = None
    """What is charged, which is what was held where nothing else is known; `None`: that has no price."""
    failure: str | None = None
    """The class of the error that it ended in, or the kind of error that its provider answered."""
    attempt: int = 1
    """Which attempt of its call it was, counted from 1."""
    began_ms: int
    first_ms: int | None = None
    """When the first part of the answer came."""
    ended_ms: int
    streamed: bool = False
    """It was answered in parts."""
    gaps_s: tuple[float, ...] = ()
    """How long each part took to come after the one before it; of many, as `gaps.Gaps` keeps them."""


class Expired(msgspec.Struct, frozen=True):
    """Holds of owners that died were expired and charged."""

    call_ids: tuple[str, ...]


class SlotOverrun(msgspec.Struct, frozen=True):
    """A live call lost its slot because its process missed its heartbeats, and could not take it again."""

    call_id: str
    policies: tuple[str, ...]


class UsageAnomaly(msgspec.Struct, frozen=True):
    """A report of usage that cannot be: below zero, or far above what the call can have used. It is not charged as told."""

    context: Context
    call: Call | None
    usage: Usage
    """As it was reported."""
    tokens: int | None
    """What is charged instead; `None`: what was held."""
    cost_nanousd: int | None
    """What is charged instead; `None`: what was held."""


class CacheHit(msgspec.Struct, frozen=True):
    """A call was answered with an answer that was kept: no provider was asked, and nothing is charged."""

    context: Context
    call: Call | None
    age_ms: int
    """Since it was stored."""
    waited: bool
    """It was made by another call at the same time, which this one has waited for."""


class CacheMiss(msgspec.Struct, frozen=True):
    """A call was looked up, and no answer was found for it."""

    context: Context
    call: Call | None
    reason: str = ""
    """Why it was not looked for, or is not going to be kept, for people to read. Empty: it will be kept if it can be."""


class AttemptEnded(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway has asked a deployment, and its answer is over. Times are in milliseconds from the sending."""

    context: Context
    call: Call | None
    deployment: str
    model: str
    """`provider/model`, as it was asked for there."""
    number: int
    """Which attempt of its call it was, counted from 1."""
    failure: str | None = None
    """The class of the error; `None`: it went well."""
    status: int | None = None
    """`None`: no answer came."""
    outcome: Outcome | None = None
    """What it is charged as."""
    usage: Usage | None = None
    """What the provider said was used; `None`: nothing."""
    connected_ms: float | None = None
    """Until the head of the answer."""
    first_ms: float | None = None
    """Until the first of its text."""
    total_ms: float | None = None


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """A counter has crossed a threshold, or is used up too fast. Told by one process of all, once per period."""

    id: str
    """The same for every delivery of this alert, whichever process makes it. Says nothing of whom it is about."""
    kind: Literal["threshold", "burn_rate"]
    policy: str
    scope: str
    subject: str
    unit: Unit
    threshold: float
    """In percent of the limit; of a burn rate, how many times as fast as what would just last."""
    at_ms: int
    limit: int
    used: int
    held: int
    resets_at_ms: int | None
    spent: int | None = None
    """Of a burn rate: what was used during the last `window_ms`, as far as this process saw it."""
    window_ms: int | None = None
    shadow: bool = False
    """The policy only watches: nothing is refused."""


class StorageFailed(msgspec.Struct, frozen=True):
    """The storage stopped answering. Sent once per outage, not once per request."""

    error: str


class StorageRecovered(msgspec.Struct, frozen=True):
    """The storage answers again."""


class DataLost(msgspec.Struct, frozen=True):
    """The storage answers, but what it knew is gone. Sent once for each loss."""

    error: str
    decision: str
    """What the guard does about it: `deny`, `accept` or `rebuild`."""


class ConfigurationChanged(msgspec.Struct, frozen=True):
    """The files that a guard follows have changed, and what they say holds."""

    version: str
    """Names their content."""


class ConfigurationRejected(msgspec.Struct, frozen=True):
    """The files that a guard follows have changed, and what they say does not hold. Sent once for each content."""

    version: str
    """What still holds."""
    error: str
    """What is wrong; names the file, the line and the key, and no secret."""


class BacklogFull(msgspec.Struct, frozen=True):
    """So many settlements wait for the storage that cancellations are dropped. Sent once per outage.

    What was used is kept, however much it is. A dropped cancellation leaves its hold, if there is one, until
    this process ends; then it is charged.
    """

    waiting: int


class RecordsLost(msgspec.Struct, frozen=True):
    """Usage records were dropped from a stream before they were drained: the ledger will never have them.

    Sent once for each loss, over all processes. What was charged for them is charged.
    """

    stream: str
    records: int


Event = (
    Admission
    | Refused
    | ShadowMisfit
    | CallEnded
    | SettledCall
    | Expired
    | SlotOverrun
    | StorageFailed
    | StorageRecovered
    | DataLost
    | BacklogFull
    | RecordsLost
    | CacheHit
    | CacheMiss
    | ConfigurationChanged
    | ConfigurationRejected
    | UsageAnomaly
    | AttemptEnded
    | Alert
)


class Observer(Protocol):
    """Is told every event, on the path that caused it: be quick, or hand it on.

    That may be a thread of the storage (`SettledCall`, with SQLite) or of synchronous code: be safe to call
    from any.
    """

    def __call__(self, event: Event, /) -> None: ...


def emit(observers: Sequence[Observer], event: Event) -> None:
    """Tell every observer. One that raises is logged and changes nothing."""
    for observer in observers:
        try:
            observer(event)
        except Exception:  # noqa: BLE001 - observers are code of others
            _log.exception("an observer raised on %s; the event is otherwise handled", type(event).__name__)
