"""Values that the tests of the policies share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from asgi_llm_guard.claims import Bundle, Claim, Granted, Refused, Settlement
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.money import NANO
from asgi_llm_guard.policies import Policy
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS

ALICE = Context(
    caller="key-1", user="alice", departments=("research",), agent="researcher", session="s-1", tags=("chat",)
)
NOBODY = Context()


def call(model: str = "gpt-5", *, usd: float | None = 1, tokens: int = 100, provider: str | None = "openai") -> Call:
    """A call whose upper bounds are these."""
    cost = None if usd is None else round(usd * NANO)
    return Call(provider=provider, model=model, input_tokens=tokens, cost_nanousd=cost)


def claims(policy: Policy, context: Context = ALICE, described: Call | None = None) -> tuple[Claim, ...]:
    """What the policy claims; it must not refuse."""
    verdict = policy.plan(context, described, 0)
    assert verdict.refusal is None
    assert verdict.shadow_refusal is None
    return verdict.claims


def keys(policy: Policy, context: Context = ALICE, described: Call | None = None) -> tuple[str, ...]:
    """The meters that the policy claims on."""
    return tuple(claim.meter.key for claim in claims(policy, context, described))


class Bench:
    """Policies over a storage in memory, with a clock that stands still."""

    def __init__(
        self, *policies: Policy, storage: MemoryStorage | None = None, clock: FrozenClock | None = None
    ) -> None:
        self.policies = policies
        self.clock = clock or FrozenClock()
        self.storage = storage or MemoryStorage(clock=self.clock)

    async def reserve(self, context: Context = ALICE, described: Call | None = None) -> Granted | Refused:
        """Reserve what all policies claim."""
        return await self.reserve_claims(
            [each for policy in self.policies for each in claims(policy, context, described)]
        )

    async def reserve_claims(self, wanted: Sequence[Claim]) -> Granted | Refused:
        self.call_id = f"call-{next(_ids)}"
        outcome = await self.storage.reserve("test", [[Bundle(self.call_id, tuple(wanted))]])
        assert isinstance(outcome, (Granted, Refused))
        return outcome

    async def admits(self, context: Context = ALICE, described: Call | None = None) -> bool:
        """Whether the call is admitted. What it takes stays taken."""
        return isinstance(await self.reserve(context, described), Granted)

    async def spend(self, actual: int, context: Context = ALICE, described: Call | None = None) -> None:
        """Make a call whose every claim is settled with this amount."""
        outcome = await self.reserve(context, described)
        assert isinstance(outcome, Granted)
        await self.storage.settle([Settlement(self.call_id, (actual,) * len(outcome.receipts))])


_ids = count()
