"""What the policies share: names and shadow, scopes and their subjects, and a bounded memory of meters.

Its subjects are named in `subjects.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Final, Generic, Literal, NamedTuple, Self, TypeVar, get_args

from asgi_llm_guard.claims import Claim, Durable, Meter, OnOutage, Rule, Unit, meter_key
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Code, Refusal
from asgi_llm_guard.denials.statuses import check_status
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.providers import canonical_model, canonical_provider, provider_of, qualified
from asgi_llm_guard.policies.subjects import ANONYMOUS, PART_LENGTH, Subject, bounded, callers_named, sessions_named
from asgi_llm_guard.windows import Window

__all__ = [
    "ANONYMOUS",
    "MEMO_SIZE",
    "NOTHING",
    "NamedPolicy",
    "Per",
    "Scope",
    "ScopedPolicy",
    "Subject",
    "amounts",
    "call_provider",
    "is_owned",
    "quoted",
]

Per = Literal[
    "user",
    "session",
    "caller",
    "agent",
    "department",
    "model",
    "provider",
    "tag",
    "global",
    "department:user",
    "caller:model",
    "user:model",
    "department:model",
]
ExpiryCharge = Literal["hold", "nothing"]
Counts = Literal["calls", "requests"]
Leases = Mapping[Unit, int]

NOTHING: Final = Verdict()
MEMO_SIZE: Final = 4096
"""How many subjects a policy remembers the meters of. A flood of ids makes it forget, never grow."""

_SHADOW: Final = ".shadow"
_OWNED: Final = frozenset({"session", "user", "caller", "department:user", "caller:model", "user:model"})
_SHARED: Final = (ANONYMOUS,)  # the parts of a subject that nobody owns: all who are not verified

V = TypeVar("V")


class Memo(dict[Hashable, V]):
    """A dict that is emptied when it is full. Safe under threads: each step is one dict operation."""

    __slots__ = ()

    def keep(self, key: Hashable, value: V) -> V:
        if len(self) >= MEMO_SIZE:
            self.clear()
        self[key] = value
        return value


# ------------------------------------------------------------------------------------ scopes


class Scope(NamedTuple):
    """How a scope is found in a context and a call."""

    identify: Callable[[Context, Call | None], Hashable]
    """A cheap value that is equal only for equal subjects."""
    subjects: Callable[[Context, Call | None], tuple[Subject, ...]]
    """Who is meant; nobody where the scope is absent."""
    needs_call: bool = False


def caller_subject(context: Context) -> Subject:
    """The verified caller, or the one that all unverified requests share."""
    if context.caller is None:
        return Subject(ANONYMOUS, (ANONYMOUS,))
    return Subject(context.caller, ("caller", context.caller))


def _user(context: Context, _call: Call | None) -> tuple[Subject, ...]:
    if context.user is None:
        return (caller_subject(context),)
    return (Subject(context.user, ("user", context.user)),)


def _session(context: Context, _call: Call | None) -> tuple[Subject, ...]:
    if context.session is None:
        return ()
    return (Subject(context.session, (*caller_subject(context).parts, "session", context.session)),)


def _each(kind: str, names: Iterable[str | None]) -> tuple[Subject, ...]:
    return tuple(Subject(name, (kind, name)) for name in dict.fromkeys(names) if name is not None)


def call_provider(call: Call) -> str | None:
    """The canonical provider of a call: as it is given, else by the model's name."""
    return canonical_provider(call.provider) or provider_of(call.model)[0]


_SCOPES: Final[dict[str, Scope]] = {
    "global": Scope(lambda _context, _call: None, lambda _context, _call: (Subject("", ("global",)),)),
    "caller": Scope(lambda context, _call: context.caller, lambda context, _call: (caller_subject(context),)),
    "user": Scope(lambda context, _call: (context.user, context.caller), _user),
    "session": Scope(lambda context, _call: (context.caller, context.session), _session),
    "agent": Scope(lambda context, _call: context.agent, lambda context, _call: _each("agent", (context.agent,))),
    "department": Scope(
        lambda context, _call: context.departments, lambda context, _call: _each("department", context.departments)
    ),
    "tag": Scope(lambda context, _call: context.tags, lambda context, _call: _each("tag", context.tags)),
    "model": Scope(
        lambda _context, call: (call.provider, call.model) if call is not None else None,
        lambda _context, call: _each("model", (qualified(call.provider, call.model),) if call is not None else ()),
        needs_call=True,
    ),
    "provider": Scope(
        lambda _context, call: (call.provider, call.model) if call is not None else None,
        lambda _context, call: _each("provider", (call_provider(call),) if call is not None else ()),
        needs_call=True,
    ),
}


def _both(one: str, other: str) -> Scope:
    """Each subject of one scope together with each of another: a member of a team, a model for a key."""
    first, second = _SCOPES[one], _SCOPES[other]

    def identify(context: Context, call: Call | None) -> Hashable:
        return first.identify(context, call), second.identify(context, call)

    def subjects(context: Context, call: Call | None) -> tuple[Subject, ...]:
        return tuple(
            Subject(f"{a.name}:{b.name}", (*a.parts, *b.parts))
            for a in first.subjects(context, call)
            for b in second.subjects(context, call)
        )

    return Scope(identify, subjects, needs_call=first.needs_call or second.needs_call)


for _per in ("department:user", "caller:model", "user:model", "department:model"):
    _SCOPES[_per] = _both(*_per.split(":"))


# ---------------------------------------------------------------------------------- policies


class NamedPolicy:
    """The name of a policy, what it counts, its shadow, and what all of its meters have in common."""

    __slots__ = ("_enforce", "_leases", "counts", "durable", "name", "on_outage", "status")

    def __init__(
        self,
        *,
        name: str,
        counts: Counts,
        status: int | None,
        on_outage: OnOutage = "deny",
        leases: Leases | None = None,
        durable: Durable | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ConfigurationError(f"name: expected a non-empty text, got {name!r}")
        if name.endswith(_SHADOW):
            raise ConfigurationError(f"name: {_SHADOW!r} at the end is what shadows are called; got {name!r}")
        if counts not in get_args(Counts):
            raise ConfigurationError(f"{name}: counts must be 'calls' or 'requests', got {counts!r}")
        if status is not None:
            check_status(status, name=f"{name}.status")
        if on_outage not in get_args(OnOutage):
            raise ConfigurationError(f"{name}: on_outage must be 'deny', 'allow' or 'local', got {on_outage!r}")
        if durable is not None and durable not in get_args(Durable):
            raise ConfigurationError(f"{name}: durable must be 'replica', 'disk' or None, got {durable!r}")
        self.on_outage: OnOutage = on_outage
        self.durable: Durable | None = durable
        self._leases: Leases = leases or {}
        self.name = name
        self.counts: Counts = counts
        self.status = status
        self._enforce = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def leased(self) -> bool:
        """Whether workers may take chunks of its meters."""
        return self._enforce and bool(self._leases)

    def shadow(self) -> Self:
        """A copy that only watches: meters of its own that refuse nothing, refusals that are events."""
        if not self._enforce:
            return self
        return self._copy(name=f"{self.name}{_SHADOW}", _enforce=False)

    def _copy(self, **changes: object) -> Self:
        """A copy with these attributes changed, and nothing remembered."""
        twin = copy.copy(self)
        for attribute, value in changes.items():
            setattr(twin, attribute, value)
        return twin

    def _refuse(
        self,
        code: Code,
        message: str,
        *,
        scope: str = "global",
        subject: str = "",
        status: int | None = None,
        allowed: tuple[str, ...] = (),
        owned: bool = False,
    ) -> Verdict:
        refusal = Refusal(
            policy=self.name,
            code=code,
            message=message,
            scope=scope,
            subject=subject,
            status=status if self.status is None else self.status,
            allowed=allowed,
            owned=owned,
        )
        return Verdict(refusal=refusal) if self._enforce else Verdict(shadow_refusal=refusal)

    def _unpriced(self, call: Call, *, scope: str, subject: str) -> Verdict:
        return self._refuse(
            "model_unpriced",
            f"{self.name}: no price is known for the model {quoted(qualified(call.provider, call.model))}, and what "
            "a call may cost is limited. Ask for another model, or have its price added.",
            scope=scope,
            subject=subject,
        )

    def _meter(
        self,
        scope: str,
        subject: Subject,
        *,
        unit: Unit,
        rule: Rule,
        limit: int | None,
        window: Window,
        expiry_charge: ExpiryCharge = "hold",
        key_suffix: tuple[str, ...] = (),
    ) -> Meter:
        lease = self._leases.get(unit, 0) if self._enforce else 0
        return Meter(
            key=meter_key(self.name, unit, window, *map(bounded, subject.parts), *key_suffix),
            policy=self.name,
            scope=scope,
            subject=subject.name,
            unit=unit,
            rule=rule,
            limit=limit,
            window=window,
            enforce=self._enforce,
            expiry_charge=expiry_charge,
            owned=is_owned(scope, subject),
            status=self.status,
            on_outage=self.on_outage if self._enforce else "allow",
            # A limit of one subject (an agent's, a department's of tomorrow) may be lower than the chunk.
            lease=lease if limit is not None and lease <= limit else 0,
            durable=self.durable,
        )


class ScopedPolicy(NamedPolicy, Generic[V]):
    """A policy whose limits hold for each subject of one scope. It remembers a `V` for each subject."""

    __slots__ = ("_identify", "_memo", "_scope", "expiry_charge", "per")

    def __init__(
        self,
        *,
        per: Per,
        name: str,
        counts: Counts,
        status: int | None,
        expiry_charge: ExpiryCharge = "hold",
        on_outage: OnOutage = "deny",
        leases: Leases | None = None,
        durable: Durable | None = None,
    ) -> None:
        super().__init__(name=name, counts=counts, status=status, on_outage=on_outage, leases=leases, durable=durable)
        if not isinstance(per, str) or per not in _SCOPES:
            raise ConfigurationError(f"{name}: per must be one of {', '.join(_SCOPES)}, got {per!r}")
        if expiry_charge not in get_args(ExpiryCharge):
            raise ConfigurationError(f"{name}: expiry_charge must be 'hold' or 'nothing', got {expiry_charge!r}")
        self._scope = _SCOPES[per]
        if self._scope.needs_call and counts == "requests":
            raise ConfigurationError(f"{name}: per={per!r} is known for calls only; use counts='calls'")
        if leases and per == "session":
            raise ConfigurationError(
                f"{name}: a session's limit is not worth a lease, which is for meters that many share; leave lease out"
            )
        self.per: Per = per
        self.expiry_charge: ExpiryCharge = expiry_charge
        self._identify = self._scope.identify
        self._memo: Memo[V] = Memo()

    def _copy(self, **changes: object) -> Self:
        return super()._copy(_memo=Memo(), **changes)

    def scopes(self) -> tuple[str, ...]:
        """The scopes in which it counts."""
        return (self.per,)

    def meters_of(self, scope: str, subject: str, *, caller: str | None = None) -> tuple[Meter, ...]:
        """The meters of one subject; see `Metered`."""
        if scope not in self.scopes():
            return ()
        return tuple(meter for each in subjects_named(scope, subject, caller) for meter in self._meters_of(scope, each))

    def _meters_of(self, scope: str, subject: Subject) -> Iterable[Meter]:  # noqa: ARG002 - for policies that claim
        return ()

    def _subjects(self, context: Context, call: Call | None) -> tuple[Subject, ...]:
        return self._scope.subjects(context, call)

    def _keep(self, key: Hashable, value: V, subjects: tuple[Subject, ...]) -> V:
        """Remember `value`, unless the ids behind it are so long that remembering many would cost memory."""
        if all(len(part) <= PART_LENGTH for subject in subjects for part in subject.parts):
            self._memo.keep(key, value)
        return value


def subjects_named(per: str, name: str, caller: str | None) -> tuple[Subject, ...]:
    """Those that people mean by a name in a scope; several, where the name is not enough to tell them apart."""
    first, both, second = per.partition(":")
    if both:
        parts = name.split(":")
        return tuple(
            Subject(name, (*one.parts, *other.parts))
            for at in range(1, len(parts))  # names may have colons of their own
            for one in subjects_named(first, ":".join(parts[:at]), None)
            for other in subjects_named(second, ":".join(parts[at:]), None)
        )
    match per:
        case "global":
            return (Subject("", ("global",)),)
        case "caller":
            return callers_named(name)
        case "user":  # who has no user counts as their caller
            return (Subject(name, ("user", name)), *callers_named(name))
        case "session":
            return () if caller is None else sessions_named(caller, name)
        case "model":
            model = canonical_model(name)
            return (Subject(model, ("model", model)),)
        case "provider":
            provider = canonical_provider(name) or name
            return (Subject(provider, ("provider", provider)),)
        case _:
            return (Subject(name, (per, name)),)


def amounts(meters: tuple[Meter, ...], amount: int) -> tuple[Claim, ...]:
    """The same amount of every meter. A limit of 0 blocks what costs nothing, too."""
    if amount:
        if len(meters) == 1:  # as it mostly is
            return (Claim(meters[0], amount),)
        return tuple([Claim(meter, amount) for meter in meters])
    return tuple([Claim(meter, 1 if meter.limit == 0 else 0) for meter in meters])


def quoted(text: str) -> str:
    """Text from a request, for a message: in quotes and not longer than is readable."""
    return repr(text if len(text) <= PART_LENGTH else text[:PART_LENGTH] + "…")


def is_owned(scope: str, subject: Subject) -> bool:
    """Whether the caller owns what is counted, and may know of it."""
    return scope in _OWNED and not _is_shared(scope, subject.parts)


def _is_shared(scope: str, parts: tuple[str, ...]) -> bool:
    """Whether it stands for all who are not verified, alone or together with another subject (of two parts)."""
    return parts == _SHARED or (":" in scope and len(parts) < 4)
