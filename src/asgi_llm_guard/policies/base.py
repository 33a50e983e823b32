"""The policy protocol: pure rules from a context and a call to claims. No I/O, no clock of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from asgi_llm_guard.claims import Claim, Meter, Reading
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied, Refusal

__all__ = [
    "AgentAware",
    "CacheDirective",
    "Candidates",
    "Configured",
    "DepartmentAware",
    "DeploymentFilter",
    "Eligibility",
    "Leased",
    "Listing",
    "Metered",
    "Policy",
    "Quotas",
    "Sampled",
    "SessionAware",
    "Verdict",
]


class CacheDirective(msgspec.Struct, frozen=True):
    """Whether, and under which partition, an answer may be kept."""

    allowed: bool
    partition: str = ""
    """Answers are only ever shared inside one partition."""
    ttl_s: int | None = None
    reason: str = ""
    """Why it is not allowed, for people to read."""
    names: tuple[str, ...] = ()
    """What may be revoked: `caller:…`, `user:…`, `kb:…`. Answers of before its revocation are not found any more."""


class Verdict(msgspec.Struct, frozen=True):
    """What one policy asks for."""

    claims: tuple[Claim, ...] = ()
    refusal: Refusal | None = None
    """The policy refuses by itself; its claims are not asked for."""
    cache: CacheDirective | None = None
    shadow_refusal: Refusal | None = None
    """What a policy in shadow would have refused by itself; changes nothing."""


@runtime_checkable
class Policy(Protocol):
    """A rule. Built once, asked for every request or call that it counts."""

    @property
    def name(self) -> str:
        """Names the policy in refusals, headers, metrics and storage keys."""
        ...

    @property
    def counts(self) -> Literal["calls", "requests"]:
        """`requests`: asked once for each guarded request. `calls`: asked for each LLM call."""
        ...

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:
        """What this policy asks for.

        `call` is `None` when a request has described no call yet: a policy on calls then claims what
        one call costs whatever it is (an iteration), and nothing that depends on the call.
        Verdicts and claims are values: the same ones may be returned again and again.
        """
        ...


@runtime_checkable
class AgentAware(Protocol):
    """A policy whose limit may depend on the agent."""

    def with_agents(self, agents: Mapping[str, Mapping[str, object]], /) -> Policy:
        """This policy with the guard's agent registry."""
        ...


class Quotas(Protocol):
    """What departments may use, which operators may change."""

    def lay_over(self, quotas: Mapping[str, Any], /) -> None:
        """Have these win, department by department, in place of those that did before."""
        ...


@runtime_checkable
class DepartmentAware(Protocol):
    """A policy that keeps to the quotas of departments."""

    @property
    def book(self) -> Quotas: ...


@runtime_checkable
class SessionAware(Protocol):
    """A policy whose refusals name where session ids are read from."""

    def with_sources(self, sources: Sequence[str], /) -> Policy:
        """This policy with the names of the headers and fields."""
        ...


@runtime_checkable
class Sampled(Protocol):
    """A policy that can tell beforehand what it claims on. Storages that keep only some kinds of meters ask for it."""

    def samples(self) -> tuple[Meter, ...]:
        """One meter of each kind that it may claim on, of a subject without a name; none where it never claims."""
        ...


@runtime_checkable
class Configured(Protocol):
    """A policy with limits of subjects that its configuration names: a bounded set, whoever calls."""

    def configured(self) -> tuple[Meter, ...]:
        """Their meters, as they are now. None where subjects are known by requests only."""
        ...


@runtime_checkable
class Metered(Protocol):
    """A policy that can tell the meters of one subject without a call of theirs: for operators."""

    def scopes(self) -> tuple[str, ...]:
        """The scopes in which it counts; none where it never claims."""
        ...

    def meters_of(self, scope: str, subject: str, *, caller: str | None = None) -> tuple[Meter, ...]:
        """The meters of `subject`, as people name it; none in scopes in which it does not count.

        Limits that depend on more than the subject (an agent's, a key's own) are those for everybody else.
        `caller`: whose session it is.
        """
        ...


@runtime_checkable
class Leased(Protocol):
    """A policy that may have chunks of its meters leased to workers."""

    @property
    def leased(self) -> bool:
        """Whether it has: else its guard has no need of leases."""
        ...


@runtime_checkable
class Listing(Protocol):
    """A policy that knows models one by one which may be called."""

    def listed(self, context: Context, call: Call, *, others: bool) -> tuple[str, ...]:
        """Those that the caller may be told of: on their own lists, with `others` on everybody's."""
        ...


class Candidates(Protocol):
    """Deployments with their providers."""

    @property
    def providers(self) -> tuple[str, ...]: ...


class Eligibility(Protocol):
    """Which deployments may be called."""

    @property
    def deployments(self) -> tuple[object, ...]: ...

    def denied(self, now_ms: int, /) -> Denied | None:
        """The refusal if none is left."""
        ...


@runtime_checkable
class DeploymentFilter(Protocol):
    """A policy that can tell which deployments are under budget."""

    def resolve(self, deployments: object, /) -> Candidates: ...

    def meters(self, providers: Sequence[str], /) -> Mapping[str, Meter]:
        """The meters to read, in one batch."""
        ...

    def eligible(
        self, deployments: object, readings: Mapping[str, Reading], meters: Mapping[str, Meter] | None = None, /
    ) -> Eligibility:
        """`meters`: those that were read, under the limits that hold now; `None`: as `meters` gives them."""
        ...
