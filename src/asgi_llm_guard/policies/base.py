"""The policy protocol: pure rules from a context and a call to claims. No I/O, no clock of their own."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from asgi_llm_guard.claims import Claim
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal

__all__ = ["CacheDirective", "Policy", "Verdict"]


class CacheDirective(msgspec.Struct, frozen=True):
    """Whether, and under which partition, an answer may be kept."""

    allowed: bool
    partition: str = ""
    """Answers are only ever shared inside one partition."""
    ttl_s: int | None = None
    reason: str = ""
    """Why it is not allowed, for people to read."""


class Verdict(msgspec.Struct, frozen=True):
    """What one policy asks for."""

    claims: tuple[Claim, ...] = ()
    refusal: Refusal | None = None
    """The policy refuses by itself; its claims are not asked for."""
    cache: CacheDirective | None = None
    shadow_refusal: Refusal | None = None
    """What a policy in shadow would have refused by itself; changes nothing."""


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
