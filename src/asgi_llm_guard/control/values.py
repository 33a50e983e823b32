"""What is administered: departments, agents, keys, prices, knowledge bases, raises and stops, each a checked value.

Every value is checked by what checks the same thing in code (`DepartmentQuota`, `PriceBook`, `ApiKey`, the agents of a
guard, `Raise`, `Stop`), so that nothing can be administered that could not be configured, and the other way round.

Rule 1: a value that was built is sound; nobody checks it again.

Rule 2: as data, a limit is a number or the word `unlimited`. Nothing (`null`) is neither, and is refused: a form that
lost a field must not clear a limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import msgspec

from asgi_llm_guard.control.numbers import check_sizes, told
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import IdentityError, check_params, clean
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing.overrides import parse as parse_prices
from asgi_llm_guard.stops import Stop

if TYPE_CHECKING:
    from asgi_llm_guard.identity.keys import ApiKey

__all__ = [
    "KINDS",
    "MAX_INSTANT_MS",
    "UNLIMITED",
    "Agent",
    "Department",
    "Key",
    "Kind",
    "KnowledgeBase",
    "Price",
    "Value",
    "check_instant",
    "check_kind",
    "check_name",
    "name_of",
    "plain",
]

Kind = Literal["department", "agent", "key", "price", "knowledge_base", "raise", "stop"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

UNLIMITED: Final = "unlimited"
"""How a limit that there is not is written."""

MAX_INSTANT_MS: Final = 253_402_300_799_999
"""The end of the year 9999: later instants are mistakes in the unit."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_COSTS: Final = ("daily_cost", "monthly_cost")
_TOKENS: Final = ("daily_tokens", "monthly_tokens")
_NONE: Final[Mapping[str, object]] = MappingProxyType({})
_PREFIX: Final = re.compile(r"[\x21-\x7e]{1,24}", re.ASCII)
_MOST_PRICE: Final = 64
_MOST_LIST: Final = 1_000
_MOST_DEPTH: Final = 8


class Department(msgspec.Struct, frozen=True, kw_only=True):
    """The quota of a department, as `DepartmentQuota`. `None`: no limit of that kind; 0 blocks everything.

    Raises:
        ConfigurationError: a field is malformed; the message names it.
    """

    name: str
    models: tuple[str, ...] | None = None
    """The models it may call; none at all with the empty one, `None` all."""
    daily_tokens: int | None = None
    monthly_tokens: int | None = None
    daily_cost: Decimal | None = None
    """US dollars; also what `money.to_nano` reads (`"$5"`)."""
    monthly_cost: Decimal | None = None
    tz: str = "UTC"
    """The IANA time zone in which days and months begin."""

    def __post_init__(self) -> None:
        from asgi_llm_guard.policies.quota import DepartmentQuota

        where = _where("department", self.name, self)
        try:
            models = None if self.models is None else _texts("models", self.models)
            quota = DepartmentQuota(
                models=models, tz=self.tz, **{name: getattr(self, name) for name in _COSTS + _TOKENS}
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None
        _set(self, "models", None if quota.models is None else tuple(quota.models))
        for name in _COSTS + _TOKENS:
            _set(self, name, getattr(quota, name))

    @property
    def quota(self) -> dict[str, object]:
        """The department's entry in a `QuotaBook`."""
        return {name: getattr(self, name) for name in ("models", *_TOKENS, *_COSTS, "tz")}


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of an agent, as in `Guard(agents=...)`.

    Raises:
        ConfigurationError: a field is malformed; the message names it.
    """

    name: str
    max_iterations: int | Literal["unlimited"] | None = None
    """How many calls a session of the agent may make; `None`: nothing is said, so the caller's or the policy's own
    limit holds."""
    params: Mapping[str, object] = _NONE
    """For policies of your own; names begin with `x_`."""

    def __post_init__(self) -> None:
        where = _where("agent", self.name, self)
        if self.max_iterations is not None and self.max_iterations != UNLIMITED:
            checked = check_params({"max_iterations": self.max_iterations}, prefix=f"{where}: ")
            _set(self, "max_iterations", checked["max_iterations"])
        _set(self, "params", _own_params(self.params, where))

    @property
    def limits(self) -> dict[str, object]:
        """The agent's entry in a registry of agents."""
        limits = dict(self.params)
        if self.max_iterations is not None:
            limits["max_iterations"] = None if self.max_iterations == UNLIMITED else self.max_iterations
        return limits


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """An API key: who shows it is this caller. The key itself is nowhere; see `Control.new_key`.

    Raises:
        ConfigurationError: a field is malformed; the message names it.
    """

    id: str
    prefix: str
    """How the key begins, for people who look for it."""
    digest: str
    """From `ApiKeys.hash`; never shown."""
    caller: str
    user: str | None = None
    departments: tuple[str, ...] = ()
    agent: str | None = None
    tags: tuple[str, ...] = ()
    params: Mapping[str, object] = _NONE
    """Limits that belong to the key: `max_iterations`, and names that begin with `x_`."""
    created_ms: int = 0
    expires_at_ms: int | None = None
    """From this instant on it is not known any more; `None`: it does not end by itself."""
    revoked_ms: int | None = None
    """When it was revoked; `None`: it was not."""
    replaces: str | None = None
    """The id of the key that it was made to take the place of."""

    def __post_init__(self) -> None:
        where = _where("key", self.id, self)
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(f"{where}: prefix: expected 1 to 24 visible ASCII characters")
        check_instant(f"{where}: created_ms", self.created_ms)
        for name in "expires_at_ms", "revoked_ms":
            if getattr(self, name) is not None:
                check_instant(f"{where}: {name}", getattr(self, name))
        if self.replaces is not None:
            check_name("key", self.replaces, field="replaces")
        for name in "departments", "tags":
            _set(self, name, _texts(f"{where}: {name}", getattr(self, name)))
        _json(self.params, f"{where}: params")
        _set(self, "params", MappingProxyType(plain(self.record().params)))

    def __repr__(self) -> str:
        return f"Key(id={self.id!r}, prefix={self.prefix!r}, caller={self.caller!r})"

    def ends_ms(self) -> int | None:
        """When it is not known any more, whichever the reason; `None`: it does not end by itself."""
        ends = [at for at in (self.expires_at_ms, self.revoked_ms) if at is not None]
        return min(ends, default=None)

    def is_active(self, now_ms: int) -> bool:
        """Whether it is known at that instant."""
        ends = self.ends_ms()
        return ends is None or now_ms < ends

    def record(self) -> ApiKey:
        """The key as a record of `ApiKeys`."""
        from asgi_llm_guard.identity.keys import ApiKey

        ends = self.ends_ms()
        return ApiKey(
            id=self.id,
            digest=self.digest,
            caller=self.caller,
            user=self.user,
            departments=self.departments,
            agent=self.agent,
            tags=self.tags,
            params=self.params,
            expires_at=None if ends is None else _EPOCH + timedelta(milliseconds=ends),
        )


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """The price of a model, as an override of `PriceBook`.

    Raises:
        ConfigurationError: a rate is malformed, or there is none; the message names it.
    """

    model: str
    """`provider/model`, `provider/*`, or a bare model."""
    entry: Mapping[str, object]
    """Rates by their names, in $: see `PriceBook.snapshot`."""
    from_ms: int | None = None
    """From when on it holds; `None`: at once."""
    until_ms: int | None = None
    """Until when it holds; `None`: until it is changed."""

    def __post_init__(self) -> None:
        where = _where("price", self.model, self)
        if not isinstance(self.entry, Mapping) or len(self.entry) > _MOST_PRICE:
            raise ConfigurationError(f"{where}: entry: expected rates such as {{'input': 2.5, 'output': 10}}")
        parse_prices({self.model: self.entry})
        _set(self, "entry", MappingProxyType({name: _exact(rate) for name, rate in self.entry.items()}))
        for name in "from_ms", "until_ms":
            if getattr(self, name) is not None:
                check_instant(f"{where}: {name}", getattr(self, name))
        if self.from_ms is not None and self.until_ms is not None and self.until_ms <= self.from_ms:
            raise ConfigurationError(f"{where}: until_ms must be after from_ms, got {self.until_ms} and {self.from_ms}")

    def holds(self, now_ms: int) -> bool:
        """Whether it is the price at that instant."""
        return (self.from_ms is None or self.from_ms <= now_ms) and (self.until_ms is None or now_ms < self.until_ms)


class KnowledgeBase(msgspec.Struct, frozen=True, kw_only=True):
    """Whether answers from a knowledge base may be kept, as in the settings of `CacheScope`.

    Raises:
        ConfigurationError: a field is malformed, or answers are to be kept without an `acl`.
    """

    id: str
    cache: bool = False
    acl: str | None = None
    """A digest of its access list: what was kept under another one is not given."""
    version: str | None = None
    """Of its documents, likewise; `None`: they never change, or are revoked."""

    def __post_init__(self) -> None:
        where = _where("knowledge_base", self.id, self)
        if not isinstance(self.cache, bool):
            raise ConfigurationError(f"{where}: cache: expected true or false, got {told(self.cache)}")
        if isinstance(self.version, int) and not isinstance(self.version, bool):
            _set(self, "version", str(self.version))
        for name in "acl", "version":
            if getattr(self, name) is not None:
                check_name("knowledge_base", getattr(self, name), field=f"{self.id!r}: {name}")
        if self.cache and self.acl is None:
            raise ConfigurationError(
                f"{where}: acl is missing; answers are only kept where it is known who may see the documents"
            )


Value = Department | Agent | Key | Price | KnowledgeBase | Raise | Stop


def name_of(value: Value) -> str:
    """What the value is administered by: its name, id or model."""
    if isinstance(value, (Department, Agent)):
        return value.name
    return value.model if isinstance(value, Price) else value.id


def plain(item: object) -> Any:
    """As it comes back from JSON: tables, lists, texts and numbers; exact amounts as text."""
    if isinstance(item, Decimal):
        return format(item, "f")
    if isinstance(item, Mapping):
        return {name: plain(each) for name, each in item.items()}
    if isinstance(item, (list, tuple)):
        return [plain(each) for each in item]
    return item


# ----------------------------------------------------------------------------------- checks


def check_kind(kind: object) -> Kind:
    """The kind.

    Raises:
        ConfigurationError: there is none of that name.
    """
    for known in KINDS:
        if kind == known:
            return known
    raise ConfigurationError(f"kind: expected one of {', '.join(KINDS)}, got {told(kind)}")


def check_name(kind: Kind, name: object, *, field: str = "name") -> str:
    """The name of an entry: visible text of at most 256 characters, without spaces around it.

    Raises:
        ConfigurationError: anything else.
    """
    try:
        if isinstance(name, str) and clean(name, field) == name:
            return name
    except IdentityError as error:
        raise ConfigurationError(f"{kind}: {error.message}") from None
    raise ConfigurationError(f"{kind}: {field}: expected a non-empty text without spaces around it, got {told(name)}")


def check_instant(name: str, value: object) -> int:
    """An instant in ms since the epoch.

    Raises:
        ConfigurationError: not a whole number, negative, or after the year 9999.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INSTANT_MS:
        raise ConfigurationError(f"{name}: expected milliseconds since 1970 (until the year 9999), got {told(value)}")
    return value


def _where(kind: Kind, name: object, value: msgspec.Struct) -> str:
    where = f"{kind} {check_name(kind, name)!r}"
    check_sizes(value, where)
    return where


def _set(value: msgspec.Struct, name: str, to: object) -> None:
    msgspec.structs.force_setattr(value, name, to)


def _texts(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        raise ConfigurationError(f"{name}: expected a list of texts, got {told(values)}")
    if len(values) > _MOST_LIST:
        raise ConfigurationError(f"{name}: at most {_MOST_LIST} of them, got {len(values)}")
    return tuple(values)


def _own_params(params: object, where: str) -> Mapping[str, object]:
    if not isinstance(params, Mapping) or not all(isinstance(name, str) and name.startswith("x_") for name in params):
        raise ConfigurationError(f"{where}: params: names of your own begin with x_, got {told(params)}")
    _json(params, f"{where}: params")
    return MappingProxyType(plain(params))


def _json(value: object, where: str, depth: int = 0) -> None:
    """Refuse what does not come back from JSON as it was."""
    if depth > _MOST_DEPTH:
        raise ConfigurationError(f"{where}: nested more than {_MOST_DEPTH} deep")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigurationError(f"{where}: expected texts as names, got {told(name)}")
            _encodable(name, where)
            _json(item, f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _json(item, where, depth + 1)
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):  # noqa: PLR0124 - NaN alone differs from itself
            raise ConfigurationError(f"{where}: expected a finite number, got {told(value)}")
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**53 - 1:
            raise ConfigurationError(f"{where}: numbers are whole up to 2^53 - 1, got one of {value.bit_length()} bits")
    elif isinstance(value, str):
        _encodable(value, where)
    elif value is not None and not isinstance(value, bool):
        raise ConfigurationError(f"{where}: expected text, numbers, lists or tables, got a {type(value).__name__}")


def _encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{where}: has half of a character in it") from None


def _exact(rate: object) -> Any:
    """A rate as it is kept: whole numbers as they are, all else as text, since a float of JSON is no price."""
    if isinstance(rate, int):
        return rate
    return rate.strip() if isinstance(rate, str) else str(rate)
