"""Budgets: how much money, or how many tokens, one subject may spend in a period."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from asgi_llm_guard.claims import Durable, Meter, OnOutage, Reading, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.denials.wording import provider_lines, utc
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies._scoped import NOTHING, ExpiryCharge, Per, ScopedPolicy, Subject, amounts
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import LIMIT_GRAMMAR, Limit, check_lease, parse_lease, parse_limits, ttl_ms
from asgi_llm_guard.policies.providers import canonical_model, canonical_provider, provider_of
from asgi_llm_guard.windows import Lifetime, leasable

__all__ = ["Budget", "Candidates", "Eligibility", "ProviderBudget"]

_SESSION_TTL: Final = "1d"
_LIFELONG: Final = "36500d"
_OTHERS: Final = "*"


class _Meters(NamedTuple):
    """The meters of all subjects of one context and call, by unit."""

    money: tuple[Meter, ...]
    tokens: tuple[Meter, ...]


class Budget(ScopedPolicy[_Meters]):
    """At most so much money or so many tokens per subject: the upper bound of each call must fit.

    `limits` is one limit (`"$5/1d"`, `"200000 tokens/daily"`), a list of them (several windows at
    once: all must fit), or, where subjects differ, a mapping from the subject's name to either
    (`{"research": "$50/1d", "*": "$5/1d"}`; `*` is everyone else; who is in neither has no limit).
    Durations start at the first call, calendar periods follow `tz`, and a limit without a period
    holds until its subject has been idle for `ttl`.

    All departments and all tags of a context are charged in full. Without a user the caller is
    meant. Where a context has no session, agent, department or tag, or a call no known provider,
    nothing is claimed. Tags and sessions are as trustworthy as their source: give the caller a
    limit of its own beside them.

    Args:
        ttl: for limits without a period, whole seconds or a duration. Unless set: one day for
            sessions, a century for all others.
        renew: whether the `ttl` runs from the last call (idle) or from the first.
        expiry_charge: `nothing` gives money and tokens back when a worker dies; not strict, since
            the provider may have billed the call.
        on_outage: what becomes of calls while the store does not answer (`docs/outages.md`).
        lease: so much (`"$1"`, or `1000` tokens) may a worker take at a time and admit from it without
            asking (`docs/leases.md`); not per session.
        durable: what must have a claim before it counts as granted (`docs/storage.md`).

    Raises:
        ConfigurationError: a setting is malformed.
    """

    __slots__ = ("_by_subject", "_limits")

    def __init__(
        self,
        limits: str | Limit | Sequence[str | Limit] | Mapping[str, object],
        *,
        per: Per = "user",
        tz: str = "UTC",
        ttl: str | int | None = None,
        renew: bool = True,
        name: str | None = None,
        status: int | None = None,
        expiry_charge: ExpiryCharge = "hold",
        on_outage: OnOutage = "deny",
        lease: int | str | None = None,
        durable: Durable | None = None,
    ) -> None:
        name = f"{per}_budget" if name is None else name
        super().__init__(
            per=per,
            name=name,
            counts="calls",
            status=status,
            expiry_charge=expiry_charge,
            on_outage=on_outage,
            leases=None if lease is None else dict([parse_lease(lease, name=f"{name}.lease")]),
            durable=durable,
        )
        if ttl is None:
            ttl = _SESSION_TTL if per == "session" else _LIFELONG
        lifetime = Lifetime(ttl_ms(ttl, name=f"{self.name}.ttl"), renew)
        self._by_subject: dict[str, tuple[Limit, ...]] = {}
        if isinstance(limits, Mapping):
            self._limits: tuple[Limit, ...] = ()
            self._read_mapping(limits, lifetime, tz)
        else:
            self._limits = parse_limits(limits, lifetime=lifetime, tz=tz, name=self.name)
        for unit, amount in self._leases.items():
            all_limits = (*self._limits, *(limit for limits in self._by_subject.values() for limit in limits))
            leased = [limit.amount for limit in all_limits if limit.unit is unit]
            if not leased:
                kind = "dollars" if unit is Unit.NANOUSD else "tokens"
                raise ConfigurationError(f"{name}.lease: no limit is in {kind}, got {lease!r}")
            check_lease(amount, leased, name=f"{name}.lease", unit=unit)
            if not all(leasable(limit.window) for limit in all_limits if limit.unit is unit):
                raise ConfigurationError(f"{name}: with renew=True every call must reach the store; leave lease out")

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """The call's upper bound, from every meter of every subject."""
        if call is None:
            return NOTHING
        key = self._identify(context, call)
        meters = self._memo.get(key)
        if meters is None:
            subjects = self._subjects(context, call)
            meters = self._keep(key, self._build(subjects), subjects)
        money, tokens = meters
        if not money:
            return Verdict(amounts(tokens, call.total_tokens)) if tokens else NOTHING
        cost = call.cost_nanousd
        if cost is None:
            return self._unpriced(call, scope=money[0].scope, subject=money[0].subject)
        claims = amounts(money, cost)
        return Verdict(claims + amounts(tokens, call.total_tokens) if tokens else claims)

    def configured(self) -> tuple[Meter, ...]:
        """The meter of everybody, or those of the departments and agents that the limits name."""
        names = tuple(self._by_subject)
        subjects: tuple[Subject, ...] = ()
        if self.per == "global":
            subjects = self._subjects(Context(), None)
        elif self.per == "department":
            subjects = self._subjects(Context(departments=names), None)
        elif self.per == "agent":
            subjects = tuple(found for name in names for found in self._subjects(Context(agent=name), None))
        money, tokens = self._build(subjects)
        return (*money, *tokens)

    def _read_mapping(self, limits: Mapping[str, object], lifetime: Lifetime, tz: str) -> None:
        if not limits:
            raise ConfigurationError(f"{self.name}: expected a limit for at least one {self.per}, got an empty mapping")
        if self.per == "global":
            raise ConfigurationError(
                f"{self.name}: per='global' has one subject, so a mapping is not possible: {limits!r}"
            )
        for subject, value in limits.items():
            where = f"{self.name}[{subject!r}]"
            name = self._canonical(subject)
            if name is None:
                raise ConfigurationError(f"{where}: expected the name of a {self.per}, or '*' for all others")
            if value is None:
                raise ConfigurationError(f"{where}: has no limit; expected {LIMIT_GRAMMAR}")
            if name in self._by_subject:
                raise ConfigurationError(f"{where}: {self.per} {name!r} is there already, in another spelling")
            self._by_subject[name] = parse_limits(value, lifetime=lifetime, tz=tz, name=where)
        self._limits = self._by_subject.pop(_OTHERS, ())

    def _canonical(self, subject: object) -> str | None:
        if not isinstance(subject, str) or not subject.strip():
            return None
        if subject == _OTHERS:
            return subject
        if self.per == "provider":
            return canonical_provider(subject)
        return canonical_model(subject) if self.per == "model" else subject

    def _subjects(self, context: Context, call: Call | None) -> tuple[Subject, ...]:
        subjects = super()._subjects(context, call)
        if subjects or self.per != "provider" or call is None:
            return subjects
        provider, _ = provider_of(call.model, known=self._by_subject)
        return () if provider is None else (Subject(provider, ("provider", provider)),)

    def _build(self, subjects: tuple[Subject, ...]) -> _Meters:
        meters = [
            self._limit_meter(subject, limit)
            for subject in subjects
            for limit in self._by_subject.get(subject.name, self._limits)
        ]
        return _Meters(
            money=tuple(meter for meter in meters if meter.unit is Unit.NANOUSD),
            tokens=tuple(meter for meter in meters if meter.unit is Unit.TOKENS),
        )

    def _meters_of(self, scope: str, subject: Subject) -> tuple[Meter, ...]:  # noqa: ARG002 - it counts in one
        meters = self._build((subject,))
        return (*meters.money, *meters.tokens)

    def _limit_meter(self, subject: Subject, limit: Limit) -> Meter:
        return self._meter(
            self.per,
            subject,
            unit=limit.unit,
            rule=Rule.BUDGET if limit.unit is Unit.NANOUSD else Rule.QUOTA,
            limit=limit.amount,
            window=limit.window,
            expiry_charge=self.expiry_charge,
        )


# --------------------------------------------------------------------------------- providers


@dataclass(frozen=True, slots=True)
class Candidates:
    """Deployments with their providers, told once for each."""

    pairs: tuple[tuple[object, str | None], ...]
    """The deployment as it was given, and its provider; `None` where that cannot be told."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Every provider among them, once, in order."""
        return tuple(dict.fromkeys(provider for _, provider in self.pairs if provider is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligibility:
    """Which deployments may be called."""

    policy: str
    status: int | None
    """The policy's own status for refusals, if it has one."""
    deployments: tuple[object, ...]
    """Those whose provider is under its budget, has none, or cannot be told; in the given order."""
    unparsable: tuple[object, ...]
    """Those whose provider cannot be told. They are among `deployments`."""
    spent: tuple[tuple[Meter, Reading], ...]
    """The budgets in which nothing is left, and their state."""

    @property
    def resets_at_ms(self) -> int | None:
        """When the first of the spent budgets starts anew; `None` if none does by itself."""
        return min((each.resets_at_ms for _, each in self.spent if each.resets_at_ms is not None), default=None)

    def denied(self, now_ms: int) -> Denied | None:
        """The refusal if no deployment is left; `None` if one is, or if there was none to begin with.

        Each provider's spend, limit and reset are in `details`; the message names no figures, since
        budgets of providers are not the caller's to read.
        """
        if self.deployments or not self.spent:
            return None
        resets_at_ms = self.resets_at_ms
        money = any(meter.unit is Unit.NANOUSD for meter, _ in self.spent)
        names = ", ".join(meter.subject for meter, _ in self.spent)
        reset = "" if resets_at_ms is None else f" The soonest reset is at {utc(resets_at_ms)}."
        return Denied(
            policy=self.policy,
            code="budget_exhausted" if money else "quota_exceeded",
            message=f"The budget is exceeded for every provider that could be called: {names}.{reset}",
            status=self.status or (402 if money else 429),
            retry=False,
            retry_after_s=None if resets_at_ms is None else max(0, -((now_ms - resets_at_ms) // 1000)),
            scope="provider",
            subject=names,
            unit=self.spent[0][0].unit,
            resets_at_ms=resets_at_ms,
            violated=(self.policy,),
            details=provider_lines(self.spent, disclose="all"),
            now_ms=now_ms,
        )


class ProviderBudget(Budget):
    """A budget for each provider, and a filter for lists of deployments.

    `{"openai": "$100/1d"}`, `{"openai": {"budget_limit": 100, "time_period": "1d"}}` or
    `{"openai": Limit(…)}`. One without `budget_limit` is counted and not limited. Providers may be
    written in any known way (`AZURE_OPENAI`, `azure`). Those that are not listed have no budget.

    As a policy it reserves each call's upper bound from its provider's budget, so that several
    instances together cannot overshoot. To choose among deployments, read all meters in one batch:

        candidates = policy.resolve(deployments)
        meters = policy.meters(candidates.providers)
        readings = dict(zip(meters, await storage.read(list(meters.values()))))
        policy.eligible(candidates, readings).deployments

    Raises:
        ConfigurationError: a provider has no value, or a malformed one, or is there twice.
    """

    __slots__ = ()

    def __init__(
        self,
        budgets: Mapping[str, object],
        *,
        tz: str = "UTC",
        ttl: str | int | None = None,
        renew: bool = True,
        name: str = "provider_budget",
        status: int | None = None,
        expiry_charge: ExpiryCharge = "hold",
        on_outage: OnOutage = "deny",
        lease: int | str | None = None,
        durable: Durable | None = None,
    ) -> None:
        if not isinstance(budgets, Mapping):
            raise ConfigurationError(f"{name}: expected a mapping such as {{'openai': '$100/1d'}}, got {budgets!r}")
        for provider, value in budgets.items():
            if provider == _OTHERS or (isinstance(value, Sequence) and not isinstance(value, str)):
                raise ConfigurationError(
                    f"{name}[{provider!r}]: expected one provider and one limit, got {value!r}; "
                    "for more windows add a second ProviderBudget with another name"
                )
        super().__init__(
            budgets,
            per="provider",
            tz=tz,
            ttl=ttl,
            renew=renew,
            name=name,
            status=status,
            expiry_charge=expiry_charge,
            on_outage=on_outage,
            lease=lease,
            durable=durable,
        )

    @property
    def providers(self) -> tuple[str, ...]:
        """Those that are listed, by their canonical names."""
        return tuple(self._by_subject)

    def resolve(self, deployments: object) -> Candidates:
        """The provider of each deployment. Takes a list or a single one; never raises.

        A deployment is a text (`openai/gpt-5`), or a mapping or an object with `provider` or
        `custom_provider`, else `litellm_params.model`, `model` or `model_name`, and `api_base`.
        """
        single = isinstance(deployments, (str, Mapping)) or not isinstance(deployments, Sequence)
        items: Sequence[object] = (deployments,) if single else deployments  # type: ignore[assignment]
        return Candidates(tuple((item, self._provider(item)) for item in items))

    def meters(self, providers: Sequence[str]) -> dict[str, Meter]:
        """The meter of each of these providers that has a budget, to be read in one batch."""
        meters = {}
        for given in providers:
            provider = canonical_provider(given)
            if provider is not None and provider in self._by_subject:
                meters[provider] = self._limit_meter(
                    Subject(provider, ("provider", provider)), self._by_subject[provider][0]
                )
        return meters

    def eligible(
        self, deployments: object, readings: Mapping[str, Reading], meters: Mapping[str, Meter] | None = None
    ) -> Eligibility:
        """Keep the deployments whose provider is under its budget by these readings.

        A provider without a budget stays, and so does a deployment whose provider cannot be told. A
        provider is over when nothing is left, holds of open calls included. A budget of 0 is
        always over.

        Args:
            deployments: `Candidates`, or what `resolve` takes.
            readings: for each provider of `meters` the state of its meter; a missing one counts as unused.
            meters: the meters under other limits than their own: raised ones.
        """
        candidates = deployments if isinstance(deployments, Candidates) else self.resolve(deployments)
        spent = {
            provider: (meter, reading)
            for provider, meter in (self.meters(candidates.providers) if meters is None else meters).items()
            for reading in (readings.get(provider, _UNUSED),)
            if meter.limit is not None and reading.used + reading.held >= meter.limit
        }
        return Eligibility(
            policy=self.name,
            status=self.status,
            deployments=tuple(
                item for item, provider in candidates.pairs if not self._enforce or provider not in spent
            ),
            unparsable=tuple(item for item, provider in candidates.pairs if provider is None),
            spent=tuple(spent.values()),
        )

    def _provider(self, deployment: object) -> str | None:
        if isinstance(deployment, str):
            return provider_of(deployment, known=self._by_subject)[0]
        params = _field(deployment, "litellm_params")
        for source in deployment, params:
            for name in "provider", "custom_provider", "custom_llm_provider":
                provider = canonical_provider(_field(source, name))
                if provider is not None:
                    return provider
        host = _field(params, "api_base") or _field(deployment, "api_base")
        for source, name in (params, "model"), (deployment, "model"), (deployment, "model_name"):
            model = _field(source, name)
            if isinstance(model, str):
                return provider_of(model, host=host, known=self._by_subject)[0]
        return provider_of(None, host=host)[0]


_UNUSED: Final = Reading(0, 0, None)


def _field(source: object, name: str) -> object:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
