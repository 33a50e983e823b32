"""Where a call goes: the deployments of its model, in the order of the strategy, until one of them answers.

    places      who serves the model, takes its dialect, is not cooling down, and has a large enough window
    order       the strategy's
    claim       the first of them that our limits and budgets let through, in one trip with all policies
    attempt     one request, with its own money (`attempt.py`)
    step        after a failure: another one, the same one after a pause, another model, or the end (`policy.py`)

Rule 1: every attempt is checked and held for at its own model and price: allow-lists, prices and budgets hold at each.
Rule 2: a refusal of ours is no failure of a provider: it cools nothing down, and is not waited for.
Rule 3: no deployment that has failed is asked again for another model of the same call.
"""

from __future__ import annotations

import asyncio
import logging
import random as randomness
import time as clock
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.admission import Admission
from asgi_llm_guard.claims import Rule, Unit
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.denials import together
from asgi_llm_guard.engine.telling import Untold
from asgi_llm_guard.errors import ConfigurationError, ContextError, LimitExceeded
from asgi_llm_guard.gateway.attempt import Attempt, Whole
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import (
    CannotExpress,
    ContextOverflow,
    Failure,
    NoDeployment,
    ProviderFailed,
    RequestRejected,
    UnknownModel,
)
from asgi_llm_guard.gateway.failures import ErrorClass
from asgi_llm_guard.gateway.health import Cooldown, Cooldowns
from asgi_llm_guard.gateway.limits import DeploymentLimits
from asgi_llm_guard.gateway.policy import Fallbacks, RetryRules, Step
from asgi_llm_guard.gateway.providers.registry import Providers
from asgi_llm_guard.gateway.request import Place, Question
from asgi_llm_guard.gateway.resolve import Directory, Resolved
from asgi_llm_guard.gateway.running import Running
from asgi_llm_guard.gateway.stats import Run, Stats
from asgi_llm_guard.gateway.strategies import Candidate, Strategy, strategy_named
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire.peek import BodyError

__all__ = ["Found", "Router", "TierDown"]

_log = logging.getLogger("asgi_llm_guard")

_INNOCENT: Final = frozenset({"invalid", "content_policy"})


class TierDown(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a cheaper model when a budget is nearly spent.

    Raises:
        ConfigurationError: a value is malformed.
    """

    to: Mapping[str, str]
    """The cheaper model, by the name that is asked for."""
    at: float = 0.8
    """From this share of a budget on, above 0 up to 1: what is spent and held, the call included."""

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not 0 < self.at <= 1:
            raise ConfigurationError(f"TierDown.at: expected a share above 0, at most 1, got {self.at!r}")
        if not isinstance(self.to, Mapping) or not all(isinstance(x, str) and x for p in self.to.items() for x in p):
            raise ConfigurationError(f"TierDown.to: expected a cheaper model for each model, got {self.to!r}")


class Found(msgspec.Struct, frozen=True):
    """An answer, and how it was come by."""

    answer: Whole | Running
    attempt: Attempt
    failures: tuple[Failure, ...]
    """The attempts before it, in order."""
    lowered_from: str | None = None
    """The model that was asked for, if a cheaper one has answered because a budget is nearly spent."""
    waited_s: float = 0.0
    """Between attempts."""


class _Rules(NamedTuple):
    """What was said of models by their names, by the keys of those who serve them now."""

    changes: int
    """Of the directory: it was read then."""
    fallbacks: Fallbacks
    lower: Mapping[str, str]
    """As `TierDown.to`."""
    retry: Mapping[str, RetryRules]


class _Way:
    """One call on its way."""

    __slots__ = (
        "admission",
        "cooling",
        "denied",
        "failures",
        "last",
        "parent",
        "policies",
        "tried",
        "unsaid",
        "untold",
        "waited_s",
    )

    def __init__(self, admission: Admission, parent: ActiveCall | None, policies: Sequence[Policy]) -> None:
        self.admission = admission
        self.parent = parent
        self.policies = policies
        self.last: ActiveCall | None = None
        """The last attempt that was granted."""
        self.failures: list[Failure] = []
        self.denied: list[Denied] = []
        """Of those that no attempt was made at."""
        self.untold: Untold = []
        """Of these, what observers are told if the call is refused because of them."""
        self.unsaid: BodyError | CannotExpress | None = None
        """What could not be said to a deployment."""
        self.cooling: dict[str, Cooldown] = {}
        """Those that were left alone."""
        self.tried: set[tuple[str, str]] = set()
        self.waited_s = 0.0

    def call(self, place: Place) -> ActiveCall:
        """The next attempt, which has claimed nothing yet."""
        if self.last is not None:
            return self.last.attempt(place.call)
        return ActiveCall(self.admission, self.parent, self.policies, place.call)


class Router:
    """Sends calls to deployments. What it knows of them is this process's, but for limits and cooldowns."""

    def __init__(
        self,
        directory: Directory,
        *,
        providers: Providers,
        limits: DeploymentLimits,
        cooldowns: Cooldowns,
        stats: Stats,
        window_of: Callable[[Deployment], int | None],
        strategy: str | Strategy = "usage",
        fallbacks: Fallbacks | None = None,
        retry: RetryRules | None = None,
        tier_down: TierDown | None = None,
        streams: Callable[[], StreamRules] = StreamRules,
        random: randomness.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        time: Callable[[], float] = clock.perf_counter,
    ) -> None:
        if isinstance(strategy, str):
            strategy_named(strategy)
        self.directory = directory
        self.providers = providers
        self.limits = limits
        self.cooldowns = cooldowns
        self.stats = stats
        self.fallbacks = fallbacks or Fallbacks()
        self.retry = retry or RetryRules()
        self.tier_down = tier_down
        self.streams = streams
        self._window_of = window_of
        self._strategy = strategy
        self._strategies: dict[str, Strategy] = {}
        self._spelled: _Rules | None = None
        chains = (self.fallbacks.models, self.fallbacks.context, self.fallbacks.content)
        told_of = [*(name for chain in chains for name in chain), *(() if tier_down is None else tier_down.to)]
        self._told_of: Final = frozenset(name.strip().lower() for name in told_of)
        """The names that something is said of."""
        self._random = random or randomness.Random()  # noqa: S311 - spreads load; nothing secret
        self._sleep = sleep
        self._time = time

    # ---------------------------------------------------------------------------------- route

    async def route(
        self, question: Question, admission: Admission, parent: ActiveCall | None, *, fallbacks: bool = True
    ) -> Found:
        """Ask until somebody answers.

        Raises:
            LimitExceeded: our policies let nobody be asked.
            GatewayError: nobody has answered; see `gateway.errors`.
            BodyError: what is asked for cannot be said to anybody who serves the model.
        """
        inherited = admission.policies if parent is None else parent.policies
        way = _Way(admission, parent, (*inherited, self.limits))
        asked = question.model
        resolved = self.directory.resolve(asked)
        rules = self._rules()
        start = self._key(asked)
        walk = rules.fallbacks.walk(start, windows=self._windows(start), enabled=fallbacks)
        name: str | None = start
        first = True
        while name is not None:
            try:
                resolved = resolved if first else self.directory.resolve(name)
            except UnknownModel:
                name = walk.after("unavailable")
                continue
            found = await self._of_model(
                question, way, resolved, cheaper=self._cheaper(start, resolved) if first else None
            )
            if isinstance(found, Found):
                return found
            first = False
            name = walk.after(found)
        raise self._error(question, way)

    async def _of_model(
        self, question: Question, way: _Way, resolved: Resolved, *, cheaper: Resolved | None
    ) -> Found | ErrorClass | Literal["unavailable"]:
        """Ask those who serve one model. What the last of them failed with, or `unavailable`: there was nobody to ask."""
        places = self._places(question, way, resolved)
        lowered = [] if cheaper is None else self._places(question, way, cheaper)
        rules = self._rules().retry.get(resolved.key, self.retry)
        alone = len(resolved.deployments) == 1
        failure: ErrorClass | Literal["unavailable"] = "unavailable"
        above: int | None = None
        here: Place | None = None
        last: tuple[Place, Failure] | None = None
        made = 0
        while True:
            cooling = await self.cooldowns.cooling()
            open_ = [
                place
                for place in places
                if place.key not in way.tried
                and self._is_served(place)
                and (above is None or place.window is None or place.window > above)
                and not self._rests(way, place, cooling)
            ]
            if here is None and made == 0:
                short = [place for place in open_ if not question.is_too_long(place, surely=True)]
                if open_ and not short:
                    way.tried.update(place.key for place in open_)
                    return "context_overflow"
                open_ = short
            candidates = self._ordered(question, resolved, open_) if here is None else [here]
            if here is not None and not self._is_served(here):  # it was removed during the pause
                return failure
            cheap = [place for place in lowered if place.key not in way.tried and place.name not in cooling]
            granted = await self._claim(way, candidates, cheap) if candidates else None
            if granted is None:
                # The others rest, or our limits keep them: for the one that failed they are no alternative.
                step = (
                    None if last is None or here is not None else self._step(rules, *last, made=made, elsewhere=False)
                )
                if step is None or last is None:
                    return failure
                here = last[0]
                await self._pause(way, step)
                continue
            place, call, run, was_lowered = granted
            attempt = Attempt(
                *(question, place, call, run),
                health=self.cooldowns, alone=alone, rules=self.streams(), time=self._time,
            )  # fmt: skip
            try:
                answer = await attempt.make()
            except (BodyError, CannotExpress) as error:
                way.unsaid = error
                way.tried.add(place.key)
                here = None
                continue
            if not isinstance(answer, Failure):
                asked = resolved.name if was_lowered else None
                return Found(answer, attempt, tuple(way.failures), asked, way.waited_s)
            made += 1
            way.failures.append(answer)
            way.tried.add(place.key)
            way.last = call
            last = place, answer
            failure = _class(answer)
            if failure == "context_overflow" and place.window is not None:
                above = place.window if above is None else max(above, place.window)
            cooling = self.cooldowns.known()
            elsewhere = any(
                other.key not in way.tried
                and other.name not in cooling
                and (failure != "context_overflow" or _is_larger(other, place))
                for other in places
            )
            step = self._step(rules, place, answer, made=made, elsewhere=elsewhere)
            if step is None:
                return failure
            here = place if step.where == "here" else None
            await self._pause(way, step)

    def _step(self, rules: RetryRules, place: Place, failure: Failure, *, made: int, elsewhere: bool) -> Step | None:
        return rules.step(
            _class(failure),
            made=made,
            elsewhere=elsewhere,
            here=place.name not in self.cooldowns.known(),
            retry_after_s=failure.retry_after_s,
            random=self._random,
        )

    async def _pause(self, way: _Way, step: Step) -> None:
        if step.wait_s > 0:
            way.waited_s += step.wait_s
            await self._sleep(step.wait_s)
        # It was stopped meanwhile: that it is not repeated is no failure of a provider's.
        if (halted := way.admission.halted) is not None:
            raise LimitExceeded(halted)

    # ---------------------------------------------------------------------------------- names

    def others(self, name: str, resolved: Resolved) -> tuple[str, ...]:
        """The models that may answer in place of one: those that take over, and the cheaper one."""
        rules, key = self._rules(), self._key(name)
        lower = rules.lower.get(key) or rules.lower.get(resolved.key)
        return (*rules.fallbacks.models.get(key, ()), *rules.fallbacks.default, *(() if lower is None else (lower,)))

    def _rules(self) -> _Rules:
        rules, changes = self._spelled, self.directory.changes
        if rules is None or rules.changes != changes:
            rules = self._spelled = _Rules(
                changes,
                self.fallbacks.spelled(self._key),
                {self._key(name): cheaper for name, cheaper in (self.tier_down.to if self.tier_down else {}).items()},
                {self._key(name): each for name, each in self.retry.groups.items()},
            )
        return rules

    def _key(self, name: str) -> str:
        """One for all spellings of a name: of an alias that something is said of itself, else of what it stands for."""
        alias = self.directory.alias(name)
        if alias is not None and alias in self._told_of:
            return alias
        try:
            return self.directory.resolve(name).key
        except UnknownModel:
            return name

    def _is_served(self, place: Place) -> bool:
        """Whether its deployment is still there."""
        return self.directory.get(place.name) is not None

    # --------------------------------------------------------------------------------- places

    def _places(self, question: Question, way: _Way, resolved: Resolved) -> list[Place]:
        """The deployments that may be asked for a model in the dialect of the request."""
        places = []
        for deployment in resolved.deployments:
            place = question.place(deployment, self.providers.of(deployment))
            if place is None:
                if way.unsaid is None:
                    message = f"{deployment.full_model} does not take requests of {question.dialect}"
                    way.unsaid = CannotExpress("model", message)
            elif place.key not in way.tried:
                places.append(place)
        return places

    def _rests(self, way: _Way, place: Place, cooling: Mapping[str, Cooldown]) -> bool:
        cooldown = cooling.get(place.name)
        if cooldown is not None:
            way.cooling[place.name] = cooldown
        return cooldown is not None

    def _ordered(self, question: Question, resolved: Resolved, places: Sequence[Place]) -> list[Place]:
        """In the order of the strategy; those whose window is most likely too small come last."""
        if len(places) < 2:
            return list(places)
        candidates = [
            Candidate(
                name=place.name,
                weight=place.deployment.weight,
                rpm=place.deployment.rpm,
                tpm=place.deployment.tpm,
                tokens=place.call.total_tokens,
                cost_nanousd=place.call.cost_nanousd,
            )
            for place in places
        ]
        order = self._strategy_of(resolved.key).order(candidates, self.stats, self._random)
        return sorted((places[at] for at in order), key=lambda place: question.is_too_long(place, surely=False))

    def _strategy_of(self, name: str) -> Strategy:
        if not isinstance(self._strategy, str):
            return self._strategy
        found = self._strategies.get(name)
        if found is None:
            if len(self._strategies) >= 1024:  # names of deployments that serve any model
                self._strategies.clear()
            found = self._strategies[name] = strategy_named(self._strategy)
        return found

    def _windows(self, name: str) -> dict[str, int | None]:
        """The largest window of each model that may take over, as far as it is known."""
        others = self._rules().fallbacks.names
        return {each: self._window(each) for each in (name, *others)} if others else {}

    def _window(self, name: str) -> int | None:
        try:
            deployments = self.directory.resolve(name).deployments
        except UnknownModel:
            return None
        known = [self._window_of(each) for each in deployments]
        return None if None in known else max(window for window in known if window is not None)

    # ---------------------------------------------------------------------------------- claim

    async def _claim(
        self, way: _Way, places: Sequence[Place], lowered: Sequence[Place]
    ) -> tuple[Place, ActiveCall, Run, bool] | None:
        """The first that our limits let through, granted. `None`: none is."""
        offered = [*places, *lowered]
        # Before anything is awaited: of many calls that are made at once, each has to see where the others go.
        run = self.stats.begin(places[0].name, places[0].call.total_tokens)
        call = way.call(places[0])
        try:
            denied = await call.claim_any([(way.policies, place.call) for place in offered], untold=way.untold)
        except BaseException:
            run.drop()
            raise
        if denied:
            run.drop()
            way.denied += denied
            return None
        granted = None if call.call is None else (call.call.deployment, call.call.model)
        at = next(number for number, place in enumerate(offered) if place.key == granted)
        was_lowered = at >= len(places)
        if lowered and not was_lowered and self._nearly_spent(call):
            try:
                cheaper = await self._lowered(call, lowered)
            except BaseException:
                call.discard()
                run.drop()
                raise
            if cheaper is not None:
                at, was_lowered = len(places) + cheaper, True
        place = offered[at]
        if place is not places[0]:
            run.move(place.name, place.call.total_tokens)
        return place, call, run, was_lowered

    def _cheaper(self, key: str, resolved: Resolved) -> Resolved | None:
        """Those who serve the model that is asked when a budget is nearly spent."""
        rules = self._rules()
        name = rules.lower.get(key) or rules.lower.get(resolved.key)
        try:
            return None if name is None else self.directory.resolve(name)
        except UnknownModel:  # its last deployment was removed
            return None

    def _nearly_spent(self, call: ActiveCall) -> bool:
        assert self.tier_down is not None  # noqa: S101 - there is a cheaper model
        hold = call.hold
        return hold is not None and any(
            receipt.claim.meter.unit is Unit.NANOUSD
            and receipt.claim.meter.rule is Rule.BUDGET
            and receipt.claim.meter.limit is not None
            and receipt.used + receipt.held + receipt.claim.amount > self.tier_down.at * receipt.claim.meter.limit
            for receipt in hold.receipts
        )

    async def _lowered(self, call: ActiveCall, places: Sequence[Place]) -> int | None:
        for at, place in enumerate(places):
            try:
                await call.amend(place.call, told=False)
            except LimitExceeded:
                continue
            except ContextError:  # its hold has expired meanwhile, and is charged
                return None
            return at
        return None

    # --------------------------------------------------------------------------------- errors

    def _error(self, question: Question, way: _Way) -> Exception:
        """Why nobody has answered."""
        failures = way.failures
        if failures and failures[-1].kind in _INNOCENT:
            return RequestRejected(failures)
        if any(each.kind == "context_overflow" for each in failures):
            told = next(each for each in reversed(failures) if each.kind == "context_overflow")
            said = f": {told.message}" if told.message else ""
            return ContextOverflow(f"the input is larger than the context window{said}", failures)
        if failures:
            waits = [each.retry_after_s for each in failures if each.retry_after_s is not None]
            return ProviderFailed(failures, retry_after_s=-int(-min(waits) // 1) if waits else None)
        if way.denied:
            way.admission.engine.telling.denied_any(way.admission.context, way.untold)
            return LimitExceeded(together(way.denied, disclose=way.admission.engine.disclose))
        if way.unsaid is not None and not way.cooling:
            return way.unsaid
        if way.cooling:
            now_ms = way.admission.engine.clock.now_ms()
            left_s = min(cooldown.left_s(now_ms) for cooldown in way.cooling.values())
            names = ", ".join(f"{name} ({cooldown.error})" for name, cooldown in way.cooling.items())
            return NoDeployment(
                f"every deployment of {question.model!r} rests after failures: {names}",
                retry_after_s=-int(-left_s // 1),
            )
        return ContextOverflow(f"the input is larger than the context window of every deployment of {question.model!r}")


def _class(failure: Failure) -> ErrorClass:
    return failure.kind  # type: ignore[return-value]  # attempts name no others


def _is_larger(place: Place, than: Place) -> bool:
    return place.window is None or than.window is None or place.window > than.window
