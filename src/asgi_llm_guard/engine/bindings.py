"""Binding policies to a guard: told of its agents and sessions, accepted by its storage, and known by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.engine.store import Store
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.base import AgentAware, Leased, Policy, SessionAware

__all__ = ["Bindings", "Follows"]

_MOST_SEEN: Final = 1_000


class Follows(Protocol):
    """Follows what operators change while calls are made."""

    async def closed(self) -> Refusal | None:
        """Why nothing may be admitted yet; `None`: something may."""
        ...

    def bound(self, policy: Policy, /) -> None:
        """A policy was bound: what it keeps to is followed from now on."""
        ...

    def forked(self) -> None:
        """This is a child process now: nothing runs in it yet."""
        ...


class Bindings:
    """The policies of one guard, those of its routes and functions among them.

    Args:
        agents: limits by agent.
        sources: the names that a session id may come under.
    """

    def __init__(self, store: Store, agents: Mapping[str, Mapping[str, object]], sources: Sequence[str]) -> None:
        self.seen: dict[tuple[str, str], Policy] = {}
        """Policies that were bound, by their kind and name: those of routes and functions among them."""
        self.follower: Follows | None = None
        """Who is told of every policy that is bound."""
        self._store = store
        self._agents = agents
        self._sources = sources

    def bind(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """`policies`, told of the agents and of where session ids come from.

        Raises:
            ConfigurationError: something else is among them, or one that the storage cannot keep.
        """
        bound = self._bound(policies)
        if self._store.selective is None and self._store.leasing is None and _lease(bound):
            self._store.lease()
        self.know(bound)
        return bound

    def bind_later(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """As `bind`, while calls are admitted. Nothing is changed by it: `know` those that come to be in force.

        Raises:
            ConfigurationError: as `bind`; or they are the first that lease, which cannot begin with calls that are open.
        """
        bound = self._bound(policies)
        if self._store.leasing is None and _lease(bound):
            raise ConfigurationError("lease: no policy had any when the service was started; start it again")
        return bound

    def know(self, policies: Sequence[Policy], *, instead_of: Sequence[Policy] = ()) -> None:
        """These that were bound are in force, and those that they replace are not any more."""
        for policy in instead_of:
            key = type(policy).__name__, policy.name
            if self.seen.get(key) is policy:
                del self.seen[key]
        for policy in policies:
            if self.follower is not None:
                self.follower.bound(policy)
            if len(self.seen) < _MOST_SEEN:  # names may be made up for each job
                self.seen[type(policy).__name__, policy.name] = policy

    def _bound(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        # The types first: whether something is a `Policy` takes longer to see than all the rest of a call without any.
        if not isinstance(policies, (tuple, list)) and (
            isinstance(policies, Policy) or not isinstance(policies, Sequence)
        ):
            raise ConfigurationError(f"policies: expected a list such as [Iterations(25)], got {policies!r}")
        bound: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise ConfigurationError(f"policies: expected policies such as Iterations(25), got {policy!r}")
            known: Policy = policy
            if isinstance(known, AgentAware):
                known = known.with_agents(self._agents)
            if isinstance(known, SessionAware):
                known = known.with_sources(self._sources)
            bound.append(known)
        if bound and self._store.selective is not None:
            self._store.selective.check(bound)
        return tuple(bound)


def _lease(policies: Sequence[Policy]) -> bool:
    return any(isinstance(policy, Leased) and policy.leased for policy in policies)
