"""Department quotas: which models, how many tokens and how much money, each day and each month."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, get_args

from asgi_llm_guard.claims import Durable, Meter, OnOutage, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import from_nano, to_nano
from asgi_llm_guard.policies._scoped import NOTHING, ExpiryCharge, ScopedPolicy, Subject, amounts, quoted
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import cents, parse_lease, whole
from asgi_llm_guard.policies.models import ModelList
from asgi_llm_guard.windows import Calendar

__all__ = ["DepartmentQuota", "Quota", "QuotaBook"]

Unknown = Literal["allow", "deny"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DepartmentQuota:
    """What one department may use. `None`: no limit of that kind; 0 blocks everything.

    Raises:
        ConfigurationError: a value is malformed; a cost limit is given in dollars and in cents.
    """

    models: Iterable[str] | None = None
    """The models it may call, as in `ModelAllow`; the empty list allows none, `None` all."""
    daily_tokens: int | str | None = None
    monthly_tokens: int | str | None = None
    daily_cost: Decimal | float | str | None = None
    """US dollars; a `Decimal` once it is built."""
    monthly_cost: Decimal | float | str | None = None
    daily_cost_cents: Decimal | float | str | None = None
    """Another way to give `daily_cost`; `None` once it is built."""
    monthly_cost_cents: Decimal | float | str | None = None
    tz: str = "UTC"
    """The IANA time zone in which days and months begin."""

    def __post_init__(self) -> None:
        if self.models is not None:
            object.__setattr__(self, "models", ModelList(self.models).entries)
        for period in "daily", "monthly":
            tokens = getattr(self, f"{period}_tokens")
            if tokens is not None:
                object.__setattr__(self, f"{period}_tokens", whole(tokens, name=f"{period}_tokens"))
            nano = self._cost(f"{period}_cost")
            object.__setattr__(self, f"{period}_cost", None if nano is None else from_nano(nano))
            object.__setattr__(self, f"{period}_cost_cents", None)
        Calendar("day", self.tz)

    def _cost(self, name: str) -> int | None:
        dollars, in_cents = getattr(self, name), getattr(self, f"{name}_cents")
        if dollars is not None and in_cents is not None:
            raise ConfigurationError(f"{name}: given in dollars ({dollars!r}) and in cents ({in_cents!r}); keep one")
        if in_cents is not None:
            return cents(in_cents, name=f"{name}_cents")
        return None if dollars is None else to_nano(dollars, name=name)


_FIELDS: Final = tuple(field.name for field in fields(DepartmentQuota))


class _Snapshot(NamedTuple):
    version: int
    quotas: Mapping[str, DepartmentQuota]


class QuotaBook:
    """The quotas of all departments; may be changed while requests are served, from any thread.

    A change holds from the next call on. What was used before stays counted, so that a changed
    limit is no fresh one.

    Raises:
        ConfigurationError: an entry is malformed; nothing was changed.
    """

    __slots__ = ("__weakref__", "_laid_over", "_lock", "_own", "_snapshot")

    def __init__(self, quotas: Mapping[str, DepartmentQuota | Mapping[str, object]] | None = None) -> None:
        self._lock = threading.Lock()
        self._own = _read(quotas or {})
        self._laid_over: Mapping[str, DepartmentQuota] = {}
        self._snapshot = _Snapshot(1, self._own)

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._snapshot.version

    @property
    def snapshot(self) -> tuple[int, Mapping[str, DepartmentQuota]]:
        """The version and the quotas of one instant; the mapping never changes."""
        return self._snapshot

    def get(self, department: str) -> DepartmentQuota | None:
        return self._snapshot.quotas.get(department)

    def set(self, department: str, quota: DepartmentQuota | Mapping[str, object]) -> None:
        """Add a department, or replace its quota."""
        entry = _read({department: quota})
        with self._lock:
            self._replace({**self._own, **entry})

    def remove(self, department: str) -> None:
        """Forget a department; one that is not there is no error."""
        with self._lock:
            self._replace({name: quota for name, quota in self._own.items() if name != department})

    def replace_all(self, quotas: Mapping[str, DepartmentQuota | Mapping[str, object]]) -> None:
        """Put these in the place of all, in one step."""
        entries = _read(quotas)
        with self._lock:
            self._replace(entries)

    def lay_over(self, quotas: Mapping[str, DepartmentQuota | Mapping[str, object]]) -> None:
        """Have these win, department by department, over the book's own, in place of those that did before.

        What is `set` and `remove`d is the book's own. For administration data: see `docs/administration.md`.
        """
        entries = _read(quotas)
        with self._lock:
            if entries != self._laid_over:
                self._laid_over = entries
                self._replace(self._own)

    def _replace(self, own: Mapping[str, DepartmentQuota]) -> None:
        self._own = own
        quotas = MappingProxyType({**own, **self._laid_over})
        self._snapshot = _Snapshot(self._snapshot.version + 1, quotas)


class _Department(NamedTuple):
    """What is asked of a call for the sake of one department."""

    name: str
    known: bool
    models: ModelList | None
    money: tuple[Meter, ...]
    tokens: tuple[Meter, ...]

    @property
    def may_refuse(self) -> bool:
        return not self.known or self.models is not None


class _Departments(NamedTuple):
    """What is asked for the sake of all departments of one context."""

    refusing: tuple[_Department, ...]
    """Those that may refuse whatever is left."""
    money: tuple[Meter, ...]
    tokens: tuple[Meter, ...]


class Quota(ScopedPolicy[_Departments]):
    """The quotas of every department of the caller: all must allow the model and have enough left, and all are charged in full.

    Without departments nothing is checked.

    Args:
        book: the quotas; changes to it hold at once.
        unknown: a department that is not in the book is refused (`deny`: 403), since one that was
            mistyped or forgotten would otherwise spend without limit; or `allow`: it has no quota.
        on_outage: what becomes of calls while the store does not answer (`docs/outages.md`).
        lease: so much (`"$1"`, or `1000` tokens) may a worker take of a quota at a time and admit from it
            without asking (`docs/leases.md`). Quotas that are lower than it are not leased.
        durable: what must have a claim before it counts as granted (`docs/storage.md`).

    Raises:
        ConfigurationError: a setting is malformed.
    """

    __slots__ = ("book", "unknown")

    def __init__(
        self,
        book: QuotaBook,
        *,
        unknown: Unknown = "deny",
        name: str = "quota",
        status: int | None = None,
        expiry_charge: ExpiryCharge = "hold",
        on_outage: OnOutage = "deny",
        lease: int | str | None = None,
        durable: Durable | None = None,
    ) -> None:
        super().__init__(
            per="department",
            name=name,
            counts="calls",
            status=status,
            expiry_charge=expiry_charge,
            on_outage=on_outage,
            leases=None if lease is None else dict([parse_lease(lease, name=f"{name}.lease")]),
            durable=durable,
        )
        if not isinstance(book, QuotaBook):
            raise ConfigurationError(f"{name}: expected a QuotaBook, got {book!r}; build one with QuotaBook({{…}})")
        if unknown not in get_args(Unknown):
            raise ConfigurationError(f"{name}: unknown must be 'allow' or 'deny', got {unknown!r}")
        self.book = book
        self.unknown: Unknown = unknown

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """The call's upper bound, from every quota of every department."""
        if call is None or not context.departments:
            return NOTHING
        version, quotas = self.book.snapshot
        key = (version, context.departments)
        asked = self._memo.get(key)
        if asked is None:
            subjects = self._subjects(context, call)
            asked = self._keep(key, self._build(subjects, quotas), subjects)
        for department in asked.refusing:
            model = None if department.models is None else department.models.forbidden(call)
            if not department.known or model is not None:
                return self._forbidden(department, model or "")
        _, money, tokens = asked
        if money and call.cost_nanousd is None:
            return self._unpriced(call, scope="department", subject=money[0].subject)
        claims = amounts(tokens, call.total_tokens) + amounts(money, call.cost_nanousd or 0)
        return Verdict(claims) if claims else NOTHING

    def configured(self) -> tuple[Meter, ...]:
        """The meters of all departments in the book."""
        _, quotas = self.book.snapshot
        subjects = self._subjects(Context(departments=tuple(quotas)), None)
        departments = [self._department(subject, quotas.get(subject.name)) for subject in subjects]
        return tuple(meter for each in departments for meter in (*each.money, *each.tokens))

    def _forbidden(self, department: _Department, model: str) -> Verdict:
        if not department.known:
            return self._refuse(
                "quota_exceeded",
                f"{self.name}: no quota is set for the department {quoted(department.name)}. Have one set.",
                scope="department",
                subject=department.name,
                status=403,
            )
        return self._refuse(
            "model_not_allowed",
            f"{self.name}: the model {quoted(model or '')} is not allowed for the department "
            f"{quoted(department.name)}. Ask for another one, or have it put on the department's list.",
            scope="department",
            subject=department.name,
            allowed=() if department.models is None else department.models.entries,
        )

    def _build(self, subjects: tuple[Subject, ...], quotas: Mapping[str, DepartmentQuota]) -> _Departments:
        departments = [self._department(subject, quotas.get(subject.name)) for subject in subjects]
        return _Departments(
            refusing=tuple(each for each in departments if each.may_refuse),
            money=tuple(meter for each in departments for meter in each.money),
            tokens=tuple(meter for each in departments for meter in each.tokens),
        )

    def _meters_of(self, scope: str, subject: Subject) -> tuple[Meter, ...]:  # noqa: ARG002 - it counts in one
        department = self._department(subject, self.book.get(subject.name))
        return (*department.money, *department.tokens)

    def _department(self, subject: Subject, quota: DepartmentQuota | None) -> _Department:
        if quota is None:
            return _Department(subject.name, self.unknown == "allow", None, (), ())
        day, month = Calendar("day", quota.tz), Calendar("month", quota.tz)
        cost, tokens = (quota.daily_cost, quota.monthly_cost), (quota.daily_tokens, quota.monthly_tokens)
        return _Department(
            subject.name,
            known=True,
            models=None if quota.models is None else ModelList(quota.models),
            money=self._meters(subject, Unit.NANOUSD, zip((day, month), map(_nanousd, cost), strict=True)),
            tokens=self._meters(subject, Unit.TOKENS, zip((day, month), map(_tokens, tokens), strict=True)),
        )

    def _meters(self, subject: Subject, unit: Unit, limits: Iterable[tuple[Calendar, int | None]]) -> tuple[Meter, ...]:
        return tuple(
            self._meter(
                "department",
                subject,
                unit=unit,
                rule=Rule.QUOTA,
                limit=limit,
                window=window,
                expiry_charge=self.expiry_charge,
            )
            for window, limit in limits
            if limit is not None
        )


def _nanousd(cost: Decimal | float | str | None) -> int | None:
    return None if cost is None else to_nano(cost)


def _tokens(tokens: int | str | None) -> int | None:
    return None if tokens is None else whole(tokens, name="tokens")


def _read(quotas: Mapping[str, DepartmentQuota | Mapping[str, object]]) -> Mapping[str, DepartmentQuota]:
    entries = {}
    for department, quota in quotas.items():
        if not isinstance(department, str) or not department.strip():
            raise ConfigurationError(f"quotas: expected the name of a department, got {department!r}")
        where = f"quotas[{department!r}]"
        if isinstance(quota, DepartmentQuota):
            entries[department] = quota
        elif isinstance(quota, Mapping):
            odd = [key for key in quota if key not in _FIELDS]
            if odd:
                raise ConfigurationError(
                    f"{where}: unknown {', '.join(map(repr, odd))}; known are {', '.join(_FIELDS)}"
                )
            try:
                entries[department] = DepartmentQuota(**quota)  # type: ignore[arg-type]  # checked field by field
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}.{error}") from None
        else:
            raise ConfigurationError(f"{where}: expected a DepartmentQuota or a mapping of its fields, got {quota!r}")
    return MappingProxyType(entries)
