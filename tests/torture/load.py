"""The load: six policies on one guard, and calls that end in every way there is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.torture.truth import Kind

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, ProviderBudget, Quota, QuotaBook, RateLimit
from asgi_llm_guard.claims import Meter
from asgi_llm_guard.context import Call
from asgi_llm_guard.events import Observer
from asgi_llm_guard.money import from_nano
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.base import Storage

__all__ = ["DEPARTMENTS", "MOST_COST", "PROVIDERS", "Load", "Meters", "Planned", "Task", "cost_nanousd", "new_guard"]

PROVIDERS: Final = ("openai", "anthropic", "mistral")
DEPARTMENTS: Final = tuple(f"department-{n}" for n in range(8))
USERS: Final = 40
SESSIONS_PER_S: Final = 40

# In nano-USD per token. The guard is told the same in $ per million.
INPUT_PRICE: Final = 1_000
OUTPUT_PRICE: Final = 4_000
_PRICES: Final = PriceBook.snapshot(
    overrides={f"{provider}/torture": {"input": 1, "output": 4} for provider in PROVIDERS}
)
_MOST_INPUT: Final = 400
_MOST_OUTPUT: Final = 600
MOST_COST: Final = _MOST_INPUT * INPUT_PRICE + _MOST_OUTPUT * OUTPUT_PRICE
MEAN_COST: Final = 800_000
"""Of one call, about."""
MEAN_TOKENS: Final = 420
LEASED_CALLS: Final = 20
"""So many calls fit into a chunk, about."""


def cost_nanousd(input_tokens: int, output_tokens: int) -> int:
    """What the provider bills: worked out here, and not by the guard."""
    return input_tokens * INPUT_PRICE + output_tokens * OUTPUT_PRICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The limits, in proportion to how many calls there is money for."""

    seed: int
    calls: int
    """The global budget pays for about so many calls; when it is spent, the load is over."""

    @property
    def budget_nanousd(self) -> int:
        return self.calls * MEAN_COST

    @property
    def provider_nanousd(self) -> int:
        """For each period and provider: spent in a part of it."""
        return max(self.calls // 6, 20) * MEAN_COST

    provider_period_ms: int = 2_000
    leased: bool = False
    """Processes take chunks of money, tokens and rates, and admit from them without asking."""

    def department_tokens(self, number: int) -> int:
        """For each day: some departments run dry early, some never."""
        share = self.calls * MEAN_TOKENS * 3 // 2 // len(DEPARTMENTS)
        return share * (2 + number) // 6

    iterations: int = 20
    rate: int = 50
    rate_period_ms: int = 2_000
    slots: int = 6

    def policies(self) -> tuple[Policy, ...]:
        quotas = {name: {"daily_tokens": self.department_tokens(n)} for n, name in enumerate(DEPARTMENTS)}
        providers = {
            name: {
                "budget_limit": from_nano(self.provider_nanousd),
                "time_period": f"{self.provider_period_ms // 1000}s",
            }
            for name in PROVIDERS
        }
        rate = f"{self.rate} per {self.rate_period_ms // 1000} seconds"
        return (
            Iterations(self.iterations, ttl="1d", on_outage="deny"),
            Budget(
                f"${from_nano(self.budget_nanousd)}",
                per="global",
                name="everything",
                renew=not self.leased,
                lease=self._lease("$", MEAN_COST),
            ),
            ProviderBudget(providers, name="providers", lease=self._lease("$", MEAN_COST)),
            Quota(QuotaBook(quotas), lease=self._lease("tokens", MEAN_TOKENS)),
            RateLimit(rate, per="user", name="rate", on_outage="deny", lease=5 if self.leased else None),
            Concurrency(self.slots, per="user", name="slots", on_outage="deny"),
        )

    def _lease(self, unit: str, amount: int) -> str | None:
        if not self.leased:
            return None
        chunk = LEASED_CALLS * amount
        return f"${from_nano(chunk)}" if unit == "$" else f"{chunk} {unit}"


def new_guard(load: Load, storage: Storage, *observers: Observer) -> Guard:
    return Guard(
        load.policies(), storage=storage, prices=_PRICES, observers=observers, hold_wait_s=0.03, session_limit=100_000
    )


class Meters:
    """The meters of the load, by what they are for."""

    def __init__(self, load: Load) -> None:
        self._policies = load.policies()
        self.everything = self._of("everything")
        self.providers = tuple(self._of("providers", provider=name) for name in PROVIDERS)
        self.departments = tuple(self._of("quota", departments=(name,)) for name in DEPARTMENTS)
        self.rates = tuple(self._of("rate", user=user) for user in range(USERS))
        self.slots = tuple(self._of("slots", user=user) for user in range(USERS))

    def session(self, session: int) -> Meter:
        return self._of("iterations", session=session)

    def watched(self) -> tuple[Meter, ...]:
        """All that there is a fixed number of."""
        return (self.everything, *self.providers, *self.departments, *self.rates, *self.slots)

    def _of(
        self,
        policy: str,
        *,
        user: int = 0,
        session: int = 0,
        provider: str = PROVIDERS[0],
        departments: tuple[str, ...] = (),
    ) -> Meter:
        context = Context(caller=_caller(session), user=_user(user), departments=departments, session=_session(session))
        call = Call(provider=provider, model="torture", input_tokens=1, output_tokens=1, cost_nanousd=1)
        asked = ask(self._policies, context, call, 0)
        for claim in (*asked.requests, *asked.calls):
            if claim.meter.policy.startswith(policy):
                return claim.meter
        raise LookupError(f"no claim of {policy!r} among {asked}")


def _caller(session: int) -> str:
    return f"caller-{session % 5}"


def _user(user: int) -> str:
    return f"user-{user}"


def _session(session: int) -> str:
    return f"session-{session}"


class Planned(NamedTuple):
    """One call, and what will become of it."""

    kind: Kind
    provider: int
    bound_input: int
    bound_output: int
    input_tokens: int
    output_tokens: int
    latency_s: float
    inside: bool
    """It is made inside another call, whose hold it takes over."""

    @property
    def model(self) -> str:
        return f"{PROVIDERS[self.provider]}/torture"

    @property
    def bill(self) -> tuple[int, int]:
        """Cost and tokens that the provider bills. Where nobody hears how much it was, the worst: the bound."""
        if self.kind in {Kind.ERROR, Kind.NOT_SENT}:
            return 0, 0
        if self.kind is Kind.MEASURED:
            return cost_nanousd(self.input_tokens, self.output_tokens), self.input_tokens + self.output_tokens
        return cost_nanousd(self.bound_input, self.bound_output), self.bound_input + self.bound_output


_KINDS: Final = (Kind.MEASURED, Kind.UNMETERED, Kind.ERROR, Kind.UNKNOWN, Kind.NOT_SENT)
_WEIGHTS: Final = (86, 4, 4, 3, 3)


class Task:
    """What one task of a worker does, from a seed of its own."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def job(self, age_s: float) -> tuple[Context, int, int, int]:
        """Who asks: the context, and its session, user and departments (a bit for each) as numbers."""
        rng = self.random
        session = int(age_s * SESSIONS_PER_S) + rng.randrange(SESSIONS_PER_S)
        user = rng.randrange(USERS)
        mask = 1 << rng.randrange(len(DEPARTMENTS))
        if rng.random() < 0.25:
            mask |= 1 << rng.randrange(len(DEPARTMENTS))
        departments = tuple(name for n, name in enumerate(DEPARTMENTS) if mask >> n & 1)
        context = Context(caller=_caller(session), user=_user(user), departments=departments, session=_session(session))
        return context, session, user, mask

    def patience_s(self) -> float | None:
        """After how long the client leaves; mostly never."""
        return self.random.uniform(0.0005, 0.02) if self.random.random() < 0.04 else None

    def calls(self) -> list[Planned]:
        return [self._call() for _ in range(self.random.choice((1, 1, 1, 2, 3)))]

    def _call(self) -> Planned:
        rng = self.random
        bound_input, bound_output = rng.randint(50, _MOST_INPUT), rng.randint(50, _MOST_OUTPUT)
        return Planned(
            rng.choices(_KINDS, _WEIGHTS)[0],
            rng.randrange(len(PROVIDERS)),
            bound_input,
            bound_output,
            rng.randint(bound_input // 2, bound_input),
            rng.randint(1, bound_output),
            rng.uniform(0.05, 0.2) if rng.random() < 0.03 else rng.uniform(0.001, 0.008),
            rng.random() < 0.15,
        )

    def outer(self) -> Planned:
        """The call around one that is made inside."""
        return self._call()
