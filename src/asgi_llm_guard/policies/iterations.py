"""How many LLM calls one session may make: the brake for an agent that does not stop by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, Self, get_args

from asgi_llm_guard.agents import AgentRegistry
from asgi_llm_guard.claims import Claim, Durable, Meter, OnOutage, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies._scoped import NOTHING, Counts, ExpiryCharge, Per, ScopedPolicy, Subject, caller_subject
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import check_lease, ttl_ms, whole
from asgi_llm_guard.windows import Lifetime, leasable

__all__ = ["Iterations", "max_iterations"]

Missing = Literal["allow", "principal", "reject"]

_SOURCES: Final = (
    "header x-litellm-session-id",
    "header x-session-id",
    "body metadata.session_id",
    "body litellm_metadata.session_id",
)
_PARAM: Final = "max_iterations"
# Markers beside the limits 0, 1, 2, … and None (no limit).
_UNSET: Final = -1
_MALFORMED: Final = -2


def max_iterations(value: object, *, name: str = _PARAM) -> int | None:
    """A limit on iterations as keys and agents are loaded with: a whole number, also as text, or `None` for none.

    Raises:
        ConfigurationError: anything else.
    """
    return None if value is None else whole(value, name=name)


class Iterations(ScopedPolicy[Verdict]):
    """At most `limit` calls per session (or another scope), from the first call on for `ttl`.

    The first that names a limit wins: the context's agent in the agent registry
    (`max_iterations`), the caller's own parameters (`Context.params["max_iterations"]`), `limit`.
    `None` in any of them means: no limit, and nothing is counted. A caller's parameter is checked
    where it is loaded (`max_iterations`); one that is malformed all the same refuses every call.

    Args:
        limit: the default; a whole number, also as text. 0 blocks everything.
        per: whose calls are counted together.
        ttl: whole seconds or a duration; the count starts anew this long after its first call.
        renew: counted from the last admitted call instead, so a longer loop gets no fresh count.
        missing: what happens without a session id: `allow` counts nothing, `principal` counts all
            such calls of one caller together, `reject` refuses (400) and names where the id is read.
        agents: entries of the agent registry that win over the guard's.
        on_outage: what becomes of calls while the store does not answer (`docs/outages.md`).
        lease: so many calls may a worker take at a time and admit without asking (`docs/leases.md`); not per session.
        durable: what must have a call before it counts as granted (`docs/storage.md`).

    Raises:
        ConfigurationError: a setting is malformed.
    """

    __slots__ = ("_agents", "_limit", "_own_agents", "_session_required", "_sources", "_window", "missing")

    def __init__(
        self,
        limit: int | str | None = None,
        *,
        per: Per = "session",
        ttl: str | int = "1h",
        renew: bool = False,
        missing: Missing = "allow",
        agents: Mapping[str, Mapping[str, object]] | None = None,
        name: str = "iterations",
        status: int | None = None,
        counts: Counts = "calls",
        expiry_charge: ExpiryCharge = "hold",
        on_outage: OnOutage = "local",
        lease: int | str | None = None,
        durable: Durable | None = None,
    ) -> None:
        self._limit = max_iterations(limit, name=f"{name}.limit")
        super().__init__(
            per=per,
            name=name,
            counts=counts,
            status=status,
            expiry_charge=expiry_charge,
            on_outage=on_outage,
            leases=None if lease is None else {Unit.CALLS: check_lease(lease, (self._limit,), name=f"{name}.lease")},
            durable=durable,
        )
        if missing not in get_args(Missing):
            raise ConfigurationError(f"{name}: missing must be 'allow', 'principal' or 'reject', got {missing!r}")
        if missing != "allow" and per != "session":
            raise ConfigurationError(f"{name}: missing={missing!r} is about sessions, but per is {per!r}")
        self.missing: Missing = missing
        self._window = Lifetime(ttl_ms(ttl, name=f"{name}.ttl"), renew)
        if lease is not None and not leasable(self._window):
            raise ConfigurationError(f"{name}: with renew=True every call must reach the store; leave lease out")
        self._own_agents = _agent_limits(agents or {}, name)
        self._agents = AgentRegistry()
        self._sources: tuple[str, ...] = _SOURCES
        self._session_required: Verdict | None = None

    def with_agents(self, agents: Mapping[str, Mapping[str, object]]) -> Self:
        """A copy that knows the agent registry, and follows an `AgentRegistry`; entries given to this policy itself win.

        Raises:
            ConfigurationError: an entry is no mapping, or its `max_iterations` is malformed.
        """
        _agent_limits(agents, self.name)
        return self._copy(_agents=agents if isinstance(agents, AgentRegistry) else AgentRegistry(agents))

    def with_sources(self, sources: Sequence[str]) -> Self:
        """A copy whose `session_required` refusal names these as the places where a session id is read."""
        return self._copy(_sources=tuple(sources))

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """One iteration, whatever the call is."""
        params = context.params
        own = _own_limit(params) if params else _UNSET
        version, agents = self._agents.snapshot
        key = (self._identify(context, call), context.agent, own, version)
        verdict = self._memo.get(key)
        if verdict is None:
            return self._first(key, context, call, own, agents)
        return verdict

    def scopes(self) -> tuple[str, ...]:
        """Sessions, and the callers of those without one where they count together."""
        return (self.per, "caller") if self.missing == "principal" else (self.per,)

    def _meters_of(self, scope: str, subject: Subject) -> tuple[Meter, ...]:
        agent = Context(agent=subject.name) if scope == "agent" else Context()
        limit = self._resolve(agent, _UNSET, self._agents.snapshot[1])
        return (self._iterations(scope, subject, limit),)

    def _copy(self, **changes: object) -> Self:
        return super()._copy(_session_required=None, **changes)

    def _first(
        self,
        key: tuple[object, ...],
        context: Context,
        call: Call | None,
        own: int | None,
        agents: Mapping[str, Mapping[str, object]],
    ) -> Verdict:
        subjects = self._subjects(context, call)
        if not subjects and self.missing == "reject":
            if self._session_required is None:
                self._session_required = self._refuse(
                    "session_required",
                    f"A session id is required. Send one as any of: {', '.join(self._sources)}.",
                    scope="session",
                    status=400,
                )
            return self._session_required
        limit = self._resolve(context, own, agents)
        if limit is None:
            return self._keep(key, NOTHING, subjects)
        if limit == _MALFORMED:
            verdict = self._refuse(
                "session_iterations_exhausted",
                f"The {_PARAM} of this caller is not a whole number, so every call is refused until it is corrected.",
                scope=self.per,
            )
            return self._keep(key, verdict, subjects)
        scope: str = self.per
        if not subjects and self.missing == "principal":
            scope, subjects = "caller", (caller_subject(context),)
        return self._keep(key, self._verdict(scope, subjects, limit), subjects)

    def _verdict(self, scope: str, subjects: tuple[Subject, ...], limit: int) -> Verdict:
        if not subjects:
            return NOTHING
        return Verdict(tuple(Claim(self._iterations(scope, subject, limit), 1) for subject in subjects))

    def _iterations(self, scope: str, subject: Subject, limit: int | None) -> Meter:
        return self._meter(
            scope,
            subject,
            unit=Unit.CALLS,
            rule=Rule.ITERATIONS,
            limit=limit,
            window=self._window,
            expiry_charge=self.expiry_charge,
        )

    def _resolve(self, context: Context, own: int | None, agents: Mapping[str, Mapping[str, object]]) -> int | None:
        agent = context.agent
        if agent is not None and agent in self._own_agents:
            return self._own_agents[agent]
        if agent is not None and _PARAM in agents.get(agent, ()):
            return max_iterations(agents[agent][_PARAM])
        return self._limit if own == _UNSET else own


def _own_limit(params: Mapping[str, object]) -> int | None:
    if _PARAM not in params:
        return _UNSET
    try:
        return max_iterations(params[_PARAM])
    except ConfigurationError:
        return _MALFORMED


def _agent_limits(agents: Mapping[str, Mapping[str, object]], name: str) -> dict[str, int | None]:
    limits = {}
    for agent, entry in agents.items():
        if not isinstance(entry, Mapping):
            raise ConfigurationError(
                f"{name}.agents[{agent!r}]: expected a mapping such as {{'{_PARAM}': 25}}, got {entry!r}"
            )
        if _PARAM in entry:
            limits[agent] = max_iterations(entry[_PARAM], name=f"agents[{agent!r}].{_PARAM}")
    return limits
