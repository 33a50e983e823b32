"""What operators do with a guard while it runs: stop, raise, look, reset, and put another configuration in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asgi_llm_guard.agents import AgentRegistry
from asgi_llm_guard.chores import Chores
from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.configuration import UNSET, Configuration, Unset, check_routes
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.denials.statuses import check_statuses
from asgi_llm_guard.draining import Draining
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard_arguments import check_agents, check_extractor, check_resolver, check_stream_rules
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.identity.extract import DEFAULT_SESSION, Extractor
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import AgentAware, Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.routes import Route
from asgi_llm_guard.standing import ResetMeter, Standing, claimed_meters, meters_of, reset_meter, standing_of
from asgi_llm_guard.stops import Stop, Stops
from asgi_llm_guard.stream_rules import StreamRules

__all__ = ["Operated"]


class Operated:
    """The part of a `Guard` that operators use; what it has is set up there."""

    clock: Clock
    configuration: Configuration
    """What requests, jobs and calls that begin now go by."""
    _agents: AgentRegistry
    _engine: Engine
    _draining: Draining
    _routes: dict[str, tuple[Policy, ...]]

    def _set_prices(self, prices: PriceBook) -> None:
        raise NotImplementedError

    @property
    def policies(self) -> tuple[Policy, ...]:
        """What is asked, in this order."""
        return self.configuration.policies

    @policies.setter
    def policies(self, policies: Sequence[Policy]) -> None:
        self.configuration = msgspec.structs.replace(self.configuration, policies=tuple(policies))

    @property
    def identity(self) -> Resolver | None:
        """Who says who asks."""
        return self.configuration.identity

    @property
    def session(self) -> Extractor:
        """Where the session id is read from."""
        return self.configuration.session

    @property
    def session_declared(self) -> bool:
        """Whether somebody has said where."""
        return self.configuration.session_declared

    @property
    def streams(self) -> StreamRules:
        """What holds for streamed answers."""
        return self.configuration.streams

    @property
    def chores(self) -> Chores:
        """What is done from time to time beside the calls."""
        return self._engine.chores

    def set_agents(self, agents: Mapping[str, Mapping[str, object]]) -> None:
        """From the next call on, these are the agents that code or a file says; what is administered stays laid over them.

        Raises:
            ConfigurationError: an entry is malformed; nothing was changed.
        """
        agents = check_agents(agents)
        for policy in self._known_policies():
            if isinstance(policy, AgentAware):
                policy.with_agents(agents)  # for what it has to say against them
        self._agents.replace(agents)

    def replace(
        self,
        *,
        policies: Sequence[Policy] | None = None,
        identity: Resolver | Unset | None = UNSET,
        session: Extractor | None = None,
        streams: StreamRules | None = None,
        routes: Sequence[Route] | None = None,
        agents: Mapping[str, Mapping[str, object]] | None = None,
        prices: PriceBook | None = None,
        statuses: Mapping[str, int] | None = None,
        **fixed: object,
    ) -> None:
        """Go by another configuration, from any thread. What is `None`, or not given, stays.

        Policies, identity, session, streams and routes change in one step: a request or job that begins sees all of the
        new ones or all of the old ones, and goes on under those to its end. Agents, prices and statuses are looked up
        whenever they are needed, and hold from the next call on. Counters are kept: a policy of the same name and window
        counts on. `routes` take the place of those of every `GuardMiddleware` of this guard.

        Raises:
            ConfigurationError: something is wrong, or cannot change while the service runs (the storage, for example);
                nothing was changed.
        """
        if fixed:
            raise ConfigurationError(
                f"replace: {', '.join(sorted(fixed))} cannot change while the service runs; start it again"
            )
        if not isinstance(identity, Unset):
            check_resolver(identity)
        if session is not None:
            check_extractor("session", session)
        check_stream_rules(streams)
        checked = None if statuses is None else check_statuses(statuses)
        check_routes(routes)
        if prices is not None and not isinstance(prices, PriceBook):
            raise ConfigurationError(f"replace: prices must be a PriceBook, got {prices!r}")
        engine, now = self._engine, self.configuration
        bound = now.policies if policies is None else engine.bindings.bind_later(policies)
        extra = {route.path: engine.bindings.bind_later(route.extra) for route in routes or ()}
        if agents is not None:
            agents = check_agents(agents)
            for policy in bound:
                if isinstance(policy, AgentAware):
                    policy.with_agents(agents)
        if prices is not None:
            self._set_prices(prices)  # the last that may refuse
        engine.bindings.know(bound, instead_of=now.policies)  # first: what is administered is laid over their quotas
        self.configuration = Configuration(
            bound,
            now.identity if isinstance(identity, Unset) else identity,
            session or now.session,
            now.session_declared if session is None else session is not DEFAULT_SESSION,
            streams or now.streams,
            now.routes if routes is None else tuple(routes),
        )
        if routes is not None:
            before, self._routes = self._routes, extra
            engine.bindings.know(_all(extra), instead_of=_all(before))
        if agents is not None:
            self._agents.replace(agents)
        if checked is not None:
            engine.telling.statuses = checked

    def set_raises(self, raises: Sequence[Raise]) -> None:
        """From now on these limits are higher, each until it ends, and no others but administered ones
        (`docs/operations.md`).

        Raises:
            ConfigurationError: one of them cannot be: of a bucket, or in a unit that its policy does not count.
        """
        self._engine.overrides.set_raises(raises, self._known_policies())

    def set_stops(self, stops: Sequence[Stop]) -> None:
        """From now on these may call no more, each until it ends, and no others but those that administration data stop;
        what is running of theirs ends.

        New requests and calls are refused (`stopped`, 403). Streams get their dialect's last event, their connections
        to providers are closed, and what they used is charged.

        Raises:
            ConfigurationError: one of them is no `Stop`.
        """
        self._engine.overrides.set_stops(stops)

    def stop(self, stop: Stop) -> int:
        """End what is running in this process and matches, now and once; gives how many requests and jobs that were.

        Nothing is refused afterwards: see `set_stops`.
        """
        return self._draining.open.stop(Stops((stop,)))

    async def standing(self, context: Context, call: Call | None = None) -> Standing:
        """How somebody stands: every limit that a request of theirs, and with `call` such a call, would claim on, of the
        guard and of the route that `context` names. Takes nothing.

        Raises:
            StorageError: the storage does not answer.
        """
        now_ms, engine = self.clock.now_ms(), self._engine
        policies = (*self.policies, *self._routes.get(context.route or "", ()))
        meters = claimed_meters(policies, context, call, now_ms)
        rows = standing_of(meters, await engine.storage.read(meters), engine.overrides.raises, now_ms)
        refusal = engine.overrides.stopped(context, call) or ask(policies, context, call, now_ms).refusal
        return Standing(
            rows=tuple(rows),
            now_ms=now_ms,
            refused_by=None if refusal is None else refusal.policy,
            message="" if refusal is None else refusal.message,
        )

    async def meters_of(
        self, scope: str, subject: str = "", *, caller: str | None = None
    ) -> list[tuple[Meter, Reading]]:
        """Every meter of one subject over all policies, those of routes and functions as far as they were met, with
        its state. `scope`: as policies say `per`, or `deployment`; a session needs its `caller`.

        The name `anonymous` means those who are not verified. Limits are those that hold now, raises included.

        Raises:
            ConfigurationError: nothing is counted in that scope, or a name is missing.
            StorageError: the storage does not answer.
        """
        meters = meters_of(self._known_policies(), scope, subject, caller)
        readings = await self._engine.storage.read(meters)
        return list(zip(self.raised(meters), readings, strict=True))

    async def reset(
        self, scope: str, subject: str = "", *, caller: str | None = None, policies: Sequence[str] = ()
    ) -> list[ResetMeter]:
        """Set what one subject has used to zero; what is held stays held. `policies`: only theirs, by name.

        Gives what was there before. Meters that only watch are set to zero, too.

        Raises:
            ConfigurationError: as `meters_of`, or no meter of that subject is one of those policies'.
            StorageError: the storage does not answer.
        """
        found = [
            (meter, reading)
            for meter, reading in await self.meters_of(scope, subject, caller=caller)
            if not policies or meter.policy in policies
        ]
        if not found and policies:
            raise ConfigurationError(f"policies: none of {', '.join(policies)} counts per {scope!r}")
        await self._engine.storage.reset([meter for meter, _ in found])
        return [reset_meter(meter, reading) for meter, reading in found]

    def _known_policies(self) -> list[Policy]:
        own = {(type(policy).__name__, policy.name) for policy in self.policies}
        seen = tuple(self._engine.bindings.seen.items())  # at once: other threads may bind more of them meanwhile
        return [*self.policies, *(policy for kind, policy in seen if kind not in own)]

    def know_route(self, template: str, policies: Sequence[Policy]) -> None:
        """These policies of a route are asked in addition to the guard's."""
        self._routes[template] = tuple(policies)

    def raised(self, meters: Sequence[Meter], /) -> tuple[Meter, ...]:
        """The meters under the limits that hold now: some may be raised for a while."""
        return self._engine.overrides.raised(meters)


def _all(policies: Mapping[str, Sequence[Policy]]) -> list[Policy]:
    """The policies of all routes."""
    return [policy for extra in policies.values() for policy in extra]
