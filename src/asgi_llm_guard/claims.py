"""What policies ask of storages, and what storages answer: the one place where the two meet.

A policy asks with a `Claim`: take `amount` of a `Meter`. Claims that settle together form a
`Bundle` under one call id; a plan is an ordered list of bundles that is granted whole or
refused whole. A storage answers with one `Receipt` for every claim.

Amounts are whole numbers: calls, tokens, nano-USD, slots or ids, from 0 to 2^53 - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Literal

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Window, leasable

__all__ = [
    "ATTEMPT_SCOPE",
    "Bundle",
    "Claim",
    "Durable",
    "Ended",
    "Granted",
    "Heartbeat",
    "Meter",
    "OnOutage",
    "Plan",
    "Reading",
    "Receipt",
    "Refused",
    "Rule",
    "Settled",
    "Settlement",
    "Unit",
    "escape",
    "meter_key",
]


ATTEMPT_SCOPE: Final = "deployment"
"""The scope of meters that every attempt of a call takes for itself, calls and slots included: each request counts
where it is sent."""

OnOutage = Literal["deny", "allow", "local"]
Durable = Literal["replica", "disk"]


class Unit(StrEnum):
    """What a meter counts."""

    CALLS = "calls"
    TOKENS = "tokens"
    NANOUSD = "nanousd"
    SLOTS = "slots"
    IDS = "ids"


class Rule(StrEnum):
    """What kind of limit refuses; decides the status and the code of the refusal."""

    RATE = "rate"
    SLOTS = "slots"
    ITERATIONS = "iterations"
    QUOTA = "quota"
    BUDGET = "budget"
    IDS = "ids"


class Meter(msgspec.Struct, frozen=True, kw_only=True):
    """One counter under one limit. Built by a policy, once per subject, and shared by its claims."""

    key: str
    """The counter's name in storage, without the namespace; see `meter_key`."""
    policy: str
    """The name of the policy that claims on it."""
    scope: str
    """What the limit is for: `session`, `user`, `caller`, `department`, `agent`, `model`, `provider`, `tag`,
    `global`, or two of them: `department:user`."""
    subject: str
    """Which one of them, for people to read; empty for `global`."""
    unit: Unit
    rule: Rule
    limit: int | None
    """Granted while `used + held + amount <= limit`. 0 blocks everything. `None`: counted, without a limit."""
    window: Window
    kind: int = 0
    """`window.kind`, kept here because storages dispatch on it; filled in by construction."""
    enforce: bool = True
    """`False` (shadow): a misfit refuses nothing; taken iff it fits and the plan is granted."""
    expiry_charge: Literal["hold", "nothing"] = "hold"
    """What stays charged when the owner of a hold dies: the held amount, or nothing (not strict: a dead
    worker may have been billed). Slots are always freed."""
    owned: bool = False
    """The caller owns the scope (session, user, caller): a refusal may show limit, used and held."""
    status: int | None = None
    """The status of a refusal by this meter; `None`: by the table in `docs/denials.md`."""
    on_outage: OnOutage = "deny"
    """What becomes of claims on this meter while the store does not answer: see `docs/outages.md`."""
    lease: int = 0
    """Above 0: a worker may hold this much of the meter at a time and admit from it without a trip. See `docs/leases.md`."""
    durable: Durable | None = None
    """What must have a claim before it counts as granted: a `replica`, or the server's `disk`. `None`: its memory.
    Stores that are not Redis keep their one promise and ignore it."""

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 <= self.limit <= MAX_AMOUNT:
            raise ConfigurationError(f"{self.policy}: limit must be from 0 to {MAX_AMOUNT}, got {self.limit}")
        if not 0 <= self.lease <= MAX_AMOUNT:
            raise ConfigurationError(f"{self.policy}: lease must be from 0 to {MAX_AMOUNT}, got {self.lease}")
        if self.lease and not leasable(self.window):
            raise ConfigurationError(
                f"{self.policy}: a lease cannot be spent later than it was taken where a bucket drains, use renews "
                f"the window, or slots or ids are counted; leave lease out"
            )
        if isinstance(self.window, Bucket) and (self.limit is None or self.limit * self.window.period_ms > 2**52):
            raise ConfigurationError(
                f"{self.policy}: a bucket's limit x period must be at most 2^52 to be exact, "
                f"got {self.limit} x {self.window.period_ms} ms"
            )
        if self.kind != self.window.kind:
            msgspec.structs.force_setattr(self, "kind", self.window.kind)


class Claim(msgspec.Struct, frozen=True, gc=False):
    """Take `amount` of `meter`."""

    meter: Meter
    amount: int
    member: str | None = None
    """The id to be counted, for meters with a `Distinct` window only."""


class Bundle(msgspec.Struct, frozen=True):
    """Claims that settle together, under one call id."""

    call_id: str
    """Unique over all processes and restarts; names the hold, its settlement and its usage record."""
    claims: tuple[Claim, ...]
    """No two on the same meter."""
    draft: UsageRecord | None = None
    """What is known of the call at admission: the record that is appended should its owner die.
    `None` for bundles that no usage record belongs to (rates and slots of a request)."""


Plan = Sequence[Bundle]


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The state of one claim's meter at the moment of the answer, and what was taken."""

    claim: Claim
    taken: bool
    """Whether the amount is held by this call. `False` in refusals, and for shadow claims that did not fit."""
    fits: bool
    """Whether this claim on its own fits."""
    used: int
    """Settled, without this claim. For a `Bucket`: the backlog in whole units, rounded up, less `held`."""
    held: int
    """Held by other open calls, without this claim."""
    pin: int
    """Which instance of the window is charged: its start in ms (`Lifetime`, `Rolling`, `Calendar`), the
    sub-bucket's number (`Sliding`), the instant of the claim (`Bucket`), 0 (`Slots`, `Distinct`)."""
    resets_at_ms: int | None
    """When the window's instance ends; for `Sliding` and `Bucket`, when this claim would fit if nothing
    else came; `None` where no time brings it back (`Slots`, or an amount above the limit)."""


class Granted(msgspec.Struct, frozen=True):
    """Every claim of one plan was taken (shadow claims: iff they fit)."""

    receipts: tuple[Receipt, ...]
    """In claim order, over all bundles of the plan."""
    now_ms: int
    """The storage's clock."""
    plan: int = 0
    """Which of the offered plans."""
    replayed: bool = False
    """The call ids were granted before and are still open: the same receipts again, nothing taken twice."""


class Refused(msgspec.Struct, frozen=True):
    """No plan fits, and nothing has changed."""

    states: tuple[tuple[Receipt, ...], ...]
    """For every offered plan the state of every claim, in order."""
    now_ms: int


class Ended(msgspec.Struct, frozen=True):
    """The call id is spent: its hold was settled, cancelled or expired before. Nothing has changed."""

    call_id: str
    reason: Literal["settled", "cancelled", "expired", "unknown"]
    now_ms: int


class Settlement(msgspec.Struct, frozen=True):
    """What a call really used. Applied once per call id; later ones change nothing."""

    call_id: str
    actuals: tuple[int | None, ...]
    """One for each claim of the bundle, in order. `None`: what is held. May exceed the held amount.
    Empty: nothing was used, whatever the hold's claims are."""
    record: UsageRecord | None = None
    """Appended to the ledger in the same atomic step; `None`: no record (a cancelled call)."""
    receipts: tuple[Receipt, ...] = ()
    """The receipts of the hold. With them, a hold that the store has lost is charged all the same."""
    debits: tuple[Claim, ...] = ()
    """Charged as used to the current window instances without having been held: what turned out only
    afterwards (a call that was not described before it was made). Applied with the settlement, once."""


class Settled(msgspec.Struct, frozen=True):
    """What a settlement did."""

    call_id: str
    status: Literal["settled", "late", "lost", "duplicate", "cancelled"]
    """`settled`: the hold was replaced. `late`: the hold had expired; `actual - held` was debited where
    positive. `lost`: the store did not know the hold; the actuals were charged by the given receipts.
    `duplicate`: settled before, nothing changed. `cancelled`: nothing was known of the call and nothing
    was given to charge; a reserve that arrives later is refused with `Ended`."""
    overages: tuple[int, ...] = ()
    """For each claim how much of the actual amount lies above the held amount; 0 for most."""


class Heartbeat(msgspec.Struct, frozen=True):
    """The answer to a heartbeat."""

    lapsed: bool
    """This owner had lapsed, and its holds were expired."""
    expired: tuple[str, ...]
    """The call ids of all holds (of any owner) that this heartbeat expired."""
    now_ms: int
    owners: int = 1
    """How many owners are alive, this one included: by it a process divides what is left while the store is away."""


class Reading(msgspec.Struct, frozen=True):
    """The state of one meter, without claiming anything."""

    used: int
    held: int
    resets_at_ms: int | None


def escape(part: str) -> str:
    """`part` with the characters escaped that separate the parts of a key, or that storages give a meaning."""
    if part.isalnum():
        return part
    return part.replace("%", "%25").replace(":", "%3A").replace("{", "%7B").replace("}", "%7D")


def meter_key(policy: str, unit: Unit, window: Window, *subject: str) -> str:
    """The storage key of a meter: policy, unit, window, then the parts of the subject, escaped.

    Another kind of window is another meter; another limit is not (except for a bucket's rate,
    which the caller adds to the subject).
    """
    return ":".join((escape(policy), unit.value, window.code, *map(escape, subject)))
