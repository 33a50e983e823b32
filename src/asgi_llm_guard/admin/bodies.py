"""What the API is sent and what it answers with: the types that the OpenAPI document is made of."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from asgi_llm_guard.admin.recent import Told
from asgi_llm_guard.money import MAX_AMOUNT

__all__ = [
    "AgentFields",
    "AuditRow",
    "BudgetRow",
    "Change",
    "DepartmentFields",
    "Ended",
    "EntryRow",
    "HealthRow",
    "KeyMade",
    "KeyRow",
    "KnowledgeBaseFields",
    "NewKey",
    "NewRaise",
    "NewStop",
    "OpenCallRow",
    "PriceFields",
    "Problem",
    "RefusalCountRow",
    "Refusals",
    "Reset",
    "ResetRow",
    "Rotation",
    "SessionRow",
    "UsageAnswer",
    "UsageGroup",
]

_MAX_DOLLARS: Final = 9_007_199

Text = Annotated[str, Meta(min_length=1, max_length=256)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, description="For the audit.")]
Whole = Annotated[int, Meta(ge=0, le=MAX_AMOUNT)]
Instant = Annotated[int, Meta(ge=0, le=253_402_300_799_999, description="Milliseconds since 1970.")]
Dollars = (
    Annotated[int, Meta(ge=0, le=_MAX_DOLLARS)]
    | Annotated[float, Meta(ge=0, le=_MAX_DOLLARS)]
    | Annotated[
        str, Meta(pattern=r"^(\$?[0-9]{1,7}(\.[0-9]{1,9})?|unlimited)$", description="`12.50`, or `unlimited`.")
    ]
)
Lasting = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,3}(s|m|h|d|w|mo)$", description="`30m`, `12h`, `7d`.")]
Expected = Annotated[
    int,
    Meta(
        ge=0, le=MAX_AMOUNT, description="The version that was seen; 0: it must not be there. Another one answers 409."
    ),
]


class DepartmentFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The quota of a department. What is left out stays as it is; `unlimited` takes a limit away."""

    models: list[Text] | Literal["unlimited"] | UnsetType = UNSET
    daily_tokens: Whole | Literal["unlimited"] | UnsetType = UNSET
    monthly_tokens: Whole | Literal["unlimited"] | UnsetType = UNSET
    daily_cost: Dollars | UnsetType = UNSET
    monthly_cost: Dollars | UnsetType = UNSET
    tz: str | UnsetType = UNSET


class AgentFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The limits of an agent. `params`: of your own policies; names begin with `x_`."""

    max_iterations: Whole | Literal["unlimited"] | UnsetType = UNSET
    params: dict[str, Any] | UnsetType = UNSET


class PriceFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The price of a model, in US dollars for a million tokens: `{"input": "2.50", "output": "10"}`."""

    entry: dict[str, Dollars]
    from_ms: Instant | UnsetType = UNSET
    until_ms: Instant | UnsetType = UNSET


class KnowledgeBaseFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whether answers from a knowledge base are kept, and under which access list and version."""

    cache: bool | UnsetType = UNSET
    acl: Text | UnsetType = UNSET
    version: Text | UnsetType = UNSET


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of one entry."""

    value: dict[str, Any]
    reason: Reason
    expected: Expected | UnsetType = UNSET


class NewStop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ends calls that match, and refuses new ones."""

    scope: Literal["caller", "user", "session", "agent", "department", "model", "all"]
    subject: Annotated[str, Meta(max_length=256)] = ""
    caller: Text | UnsetType = UNSET
    lasts: Lasting | UnsetType = UNSET
    reason: Reason


Amount = (
    Whole
    | Annotated[float, Meta(ge=0, le=_MAX_DOLLARS)]
    | Annotated[str, Meta(pattern=r"^\$?[0-9]{1,16}(\.[0-9]{1,9})?$", description="`12.50`, or `20000000`.")]
)


class NewRaise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises a limit for a while."""

    policy: Text
    unit: Literal["usd", "tokens", "calls", "slots"]
    amount: Amount
    lasts: Lasting
    scope: Text | UnsetType = UNSET
    subject: Text | UnsetType = UNSET
    caller: Text | UnsetType = UNSET
    reason: Reason


class Reset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sets what was used of the limits of one subject to zero."""

    scope: Text
    subject: Annotated[str, Meta(max_length=256)] = ""
    caller: Text | UnsetType = UNSET
    policies: list[Text] = []
    reason: Reason


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key for a caller."""

    caller: Text
    user: Text | UnsetType = UNSET
    departments: list[Text] = []
    agent: Text | UnsetType = UNSET
    tags: list[Text] = []
    params: dict[str, Any] = {}
    lasts: Lasting | UnsetType = UNSET
    reason: Reason


class Rotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new key for the caller of another one, which goes on for `overlap`."""

    overlap: Lasting = "1d"
    reason: Reason


class EntryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of administration data."""

    name: str
    version: int
    value: dict[str, Any]


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A key, without what could be used of it."""

    id: str
    version: int
    active: bool
    value: dict[str, Any]


class KeyMade(msgspec.Struct, frozen=True, kw_only=True):
    """A new key. It is shown this once."""

    secret: str
    id: str


class UsageGroup(msgspec.Struct, frozen=True, kw_only=True):
    """What was used by one group. `unpriced` of its `records` have no known cost, and are not in `cost_usd`."""

    key: list[str | None]
    records: int
    calls: int
    cost_usd: str
    unpriced: int
    tokens: int
    input_tokens: int
    output_tokens: int
    estimated: int
    cached: int
    errors: int


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Usage from `since_ms` until before `until_ms`. `total` counts every record once, whatever `by` is."""

    since_ms: int
    until_ms: int
    tz: str
    by: list[str]
    rows: list[UsageGroup]
    total: UsageGroup


class BudgetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One limit. Amounts of money are text in US dollars, all others numbers as text in `unit`."""

    policy: str
    scope: str
    subject: str
    unit: str
    window: str
    limit: str
    used: str
    held: str
    remaining: str
    forecast: str | None
    resets_at_ms: int | None
    enforce: bool


class OpenCallRow(msgspec.Struct, frozen=True, kw_only=True):
    """A call that is not over."""

    call_id: str
    at_ms: int
    caller: str | None
    user: str | None
    session: str | None
    agent: str | None
    departments: list[str]
    model: str | None
    held_usd: str | None


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session that made calls lately."""

    caller: str | None
    session: str | None
    agent: str | None
    departments: list[str]
    first_ms: int
    last_ms: int
    calls: int
    cost_usd: str
    open: int


class RefusalCountRow(msgspec.Struct, frozen=True, kw_only=True):
    """How often a policy refused within an hour."""

    hour_ms: int
    policy: str
    scope: str
    code: str
    route: str | None
    count: int


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of all processes, and the latest refusals of the one that answers."""

    counts: list[RefusalCountRow]
    """The latest hours first."""
    next_until_ms: int | None
    """There are more: ask again with this as `until_ms`. `null`: these are all."""
    latest: list[Told]


class ResetRow(msgspec.Struct, frozen=True, kw_only=True):
    """A limit that was reset, and what had been used of it, in `unit`."""

    policy: str
    scope: str
    subject: str
    unit: str
    used: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A stop that holds from now on."""

    id: str
    ended_here: int
    """Requests of the process that answers which were ended at once."""


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done, or tried."""

    seq: int
    at_ms: int
    verb: str
    target: str
    name: str
    role: str
    address: str
    reason: str
    refused: str | None
    old: Any = None
    new: Any = None


class HealthRow(msgspec.Struct, frozen=True, kw_only=True):
    """How the guard of the process that answers is."""

    ready: bool
    storage: str
    details: dict[str, Any]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    field: str | UnsetType = UNSET
