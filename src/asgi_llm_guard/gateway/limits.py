"""What one deployment may be asked for: its rates, its own budget, its calls at a time.

A policy like any other. Its claims ride in the same trip as those of all policies, so that several instances
together never send a deployment more than it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from asgi_llm_guard.claims import Claim, Meter, OnOutage, Rule, Unit, meter_key
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import Limit, parse_limits, whole
from asgi_llm_guard.windows import Lifetime, Sliding, Slots, Window

__all__ = ["DeploymentLimit", "DeploymentLimits"]

_MINUTE: Final = Sliding(60_000)
_LIFELONG: Final = Lifetime(36_500 * 86_400_000, renew=True)
_NOTHING: Final = Verdict()
_LONGEST_NAME: Final = 200


class DeploymentLimit(msgspec.Struct, frozen=True, kw_only=True):
    """What one deployment may be asked for. `None`: as much as one likes; 0 blocks everything.

    Raises:
        ConfigurationError: a figure is no whole number from 0.
    """

    rpm: int | None = None
    """Requests in any 60 seconds, each attempt counted."""
    tpm: int | None = None
    """Tokens in any 60 seconds: the upper bound of each call must fit."""
    budgets: tuple[Limit, ...] = ()
    """Money or tokens, in windows of any length."""
    max_parallel: int | None = None
    """Calls at a time."""

    def __post_init__(self) -> None:
        for field in ("rpm", "tpm", "max_parallel"):
            value = getattr(self, field)
            if value is not None:
                msgspec.structs.force_setattr(self, field, whole(value, name=field))

    @classmethod
    def of(
        cls, *, rpm: object = None, tpm: object = None, budget: object = None, max_parallel: object = None
    ) -> DeploymentLimit:
        """The same as a configuration has it: numbers also as text, `"$10/1d"` for a budget, a list of budgets, or
        mappings such as `{"budget_limit": 10, "time_period": "1d"}`.

        Raises:
            ConfigurationError: a figure is malformed, or two budgets are over the same window.
        """
        budgets = () if budget is None else parse_limits(budget, lifetime=_LIFELONG, name="budget")
        return cls(rpm=rpm, tpm=tpm, budgets=budgets, max_parallel=max_parallel)  # type: ignore[arg-type]  # read by `__post_init__`


class _Meters(NamedTuple):
    ones: tuple[Claim, ...]
    """What every call takes, whatever it is."""
    tokens: tuple[Meter, ...]
    money: tuple[Meter, ...]

    @property
    def all(self) -> tuple[Meter, ...]:
        return (*(claim.meter for claim in self.ones), *self.tokens, *self.money)


class DeploymentLimits:
    """The limits of all deployments, by their names. Claims for calls that name one, and for no others.

    Deployments may be added, changed and removed while calls are made; what was counted of one that is removed
    counts again if it comes back.

    Args:
        on_outage: what becomes of calls while the store does not answer (`docs/outages.md`). Unless set: rates and
            calls at a time count locally, budgets refuse.

    Raises:
        ConfigurationError: a limit or a name is malformed.
    """

    counts: Literal["calls", "requests"] = "calls"

    def __init__(
        self,
        limits: Mapping[str, DeploymentLimit] | None = None,
        *,
        name: str = "deployment_limits",
        on_outage: OnOutage | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ConfigurationError(f"name: expected a non-empty text, got {name!r}")
        if on_outage not in (None, "deny", "allow", "local"):
            raise ConfigurationError(f"{name}: on_outage must be 'deny', 'allow' or 'local', got {on_outage!r}")
        self.name = name
        self.on_outage = on_outage
        self._limits: dict[str, DeploymentLimit] = {}
        self._meters: dict[str, _Meters] = {}
        for deployment, limit in (limits or {}).items():
            self.put(deployment, limit)

    def __repr__(self) -> str:
        return f"<DeploymentLimits {self.name!r}: {', '.join(self._limits) or 'none'}>"

    def put(self, deployment: str, limit: DeploymentLimit) -> None:
        """From now on these are the limits of `deployment`. From any thread.

        Raises:
            ConfigurationError: the name is not a text of 1 to 200 characters, or `limit` is something else.
        """
        if not isinstance(deployment, str) or not deployment.strip() or len(deployment) > _LONGEST_NAME:
            raise ConfigurationError(
                f"{self.name}: a deployment is named by a text of 1 to {_LONGEST_NAME} characters, got {deployment!r}"
            )
        if not isinstance(limit, DeploymentLimit):
            raise ConfigurationError(f"{self.name}[{deployment!r}]: expected a DeploymentLimit, got {limit!r}")
        meters = self._build(deployment, limit)
        self._limits[deployment] = limit
        self._meters[deployment] = meters

    def remove(self, deployment: str) -> None:
        """From now on `deployment` has no limits. One that has none stays as it is."""
        self._meters.pop(deployment, None)
        self._limits.pop(deployment, None)

    def limit(self, deployment: str) -> DeploymentLimit | None:
        """The limits of a deployment; `None`: it has none."""
        return self._limits.get(deployment)

    def meters(self, deployments: Iterable[str]) -> dict[str, tuple[Meter, ...]]:
        """All meters of these deployments, to be read in one batch; nothing for those without limits."""
        return {name: known.all for name in deployments if (known := self._meters.get(name)) is not None}

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """One request, one slot, and the upper bound of the call's tokens and cost."""
        if call is None or call.deployment is None:
            return _NOTHING
        meters = self._meters.get(call.deployment)
        if meters is None:
            return _NOTHING
        claims = [*meters.ones, *(_claim(meter, call.total_tokens) for meter in meters.tokens)]
        if meters.money:
            if call.cost_nanousd is None:
                return Verdict(refusal=self._unpriced(call, call.deployment))
            claims += [_claim(meter, call.cost_nanousd) for meter in meters.money]
        return Verdict(tuple(claims))

    def scopes(self) -> tuple[str, ...]:
        """Deployments."""
        return ("deployment",)

    def meters_of(self, scope: str, subject: str, *, caller: str | None = None) -> tuple[Meter, ...]:  # noqa: ARG002 - see Metered
        """The meters of one deployment."""
        known = self._meters.get(subject) if scope == "deployment" else None
        return () if known is None else known.all

    def samples(self) -> tuple[Meter, ...]:
        """One meter of each kind; they may be there later, even if no deployment has such a limit yet."""
        return self._build("", DeploymentLimit.of(rpm=1, tpm=1, max_parallel=1, budget="$1/1d")).all

    def _unpriced(self, call: Call, deployment: str) -> Refusal:
        return Refusal(
            policy=self.name,
            code="model_unpriced",
            message=(
                f"{self.name}: no price is known for the model {call.model[:_LONGEST_NAME]!r}, and what the deployment "
                f"{deployment!r} may cost is limited. Have its price added, or its budget removed."
            ),
            scope="deployment",
            subject=deployment,
        )

    def _build(self, deployment: str, limit: DeploymentLimit) -> _Meters:
        ones = []
        if limit.rpm is not None:
            ones.append(self._one(deployment, Unit.CALLS, Rule.RATE, limit.rpm, _MINUTE))
        if limit.max_parallel is not None:
            ones.append(self._one(deployment, Unit.SLOTS, Rule.SLOTS, limit.max_parallel, Slots()))
        tokens = []
        if limit.tpm is not None:
            tokens.append(self._meter(deployment, Unit.TOKENS, Rule.RATE, limit.tpm, _MINUTE))
        money = []
        for each in limit.budgets:
            if each.unit is Unit.NANOUSD:
                money.append(self._meter(deployment, each.unit, Rule.BUDGET, each.amount, each.window))
            else:
                tokens.append(self._meter(deployment, each.unit, Rule.QUOTA, each.amount, each.window))
        return _Meters(tuple(ones), tuple(tokens), tuple(money))

    def _one(self, deployment: str, unit: Unit, rule: Rule, limit: int, window: Window) -> Claim:
        return Claim(self._meter(deployment, unit, rule, limit, window), 1)

    def _meter(self, deployment: str, unit: Unit, rule: Rule, limit: int | None, window: Window) -> Meter:
        lasting = rule is Rule.BUDGET or rule is Rule.QUOTA
        return Meter(
            key=meter_key(self.name, unit, window, "deployment", deployment),
            policy=self.name,
            scope="deployment",
            subject=deployment,
            unit=unit,
            rule=rule,
            limit=limit,
            window=window,
            on_outage=self.on_outage or ("deny" if lasting else "local"),
        )


def _claim(meter: Meter, amount: int) -> Claim:
    """A limit of 0 blocks what costs nothing, too."""
    return Claim(meter, amount or (1 if meter.limit == 0 else 0))
