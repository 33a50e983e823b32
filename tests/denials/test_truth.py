"""Retry-After, held against a real storage: waiting that long makes the request fit, and a second less does not."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.denials.values import NOW_MS, meter

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Refused, Rule, Settlement, Unit
from asgi_llm_guard.denials import deny
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding

LIMIT = 10
METERS = {
    "sliding": meter(Rule.RATE, LIMIT, window=Sliding(60_000, 60)),
    "sliding, coarse": meter(Rule.RATE, LIMIT, window=Sliding(90_000, 4)),
    "bucket": meter(Rule.RATE, 7, window=Bucket(60_000, LIMIT)),
    "rolling": meter(Rule.BUDGET, LIMIT, window=Rolling(86_400_000)),
    "calendar": meter(Rule.QUOTA, LIMIT, window=Calendar("month", "America/New_York")),
    "lifetime": meter(Rule.ITERATIONS, LIMIT, window=Lifetime(3_600_000)),
    "lifetime, renewed": meter(Rule.ITERATIONS, LIMIT, window=Lifetime(3_600_000, renew=True)),
    "rolling tokens": meter(Rule.RATE, LIMIT, unit=Unit.TOKENS, window=Rolling(1_700)),
}


class Host:
    """A storage and its clock, asked one claim at a time; what is granted is settled at once, as it was held."""

    def __init__(self) -> None:
        self.clock = FrozenClock(NOW_MS)
        self._storage = MemoryStorage(clock=self.clock)
        self._numbers = count()
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.close()

    def ask(self, *claims: Claim) -> Granted | Refused:
        bundle = Bundle(f"call-{next(self._numbers)}", claims)
        answer = self._runner.run(self._storage.reserve("owner", [[bundle]]))
        assert isinstance(answer, Granted | Refused)
        if isinstance(answer, Granted):
            self._storage.settle([Settlement(bundle.call_id, (None,) * len(claims))])
        return answer


STEPS = st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, LIMIT)), min_size=1, max_size=12)


@pytest.mark.parametrize("on", [pytest.param(on, id=name) for name, on in METERS.items()])
@given(steps=STEPS)
def test_retry_after_is_true(on: Meter, steps: list[tuple[int, int]]) -> None:
    """Whenever a claim is refused, it fits after exactly the wait that we tell, and not a second earlier."""
    with Host() as host:
        for wait_ms, amount in steps:
            host.clock.advance(ms=wait_ms)
            answer = host.ask(Claim(on, amount))
            if isinstance(answer, Refused):
                wait_s = deny(answer, None).retry_after_s
                assert wait_s is not None
                host.clock.advance(seconds=wait_s - 1)
                assert isinstance(host.ask(Claim(on, amount)), Refused)
                host.clock.advance(seconds=1)
                assert isinstance(host.ask(Claim(on, amount)), Granted)


@given(steps=STEPS)
def test_retry_after_is_true_for_several_claims(steps: list[tuple[int, int]]) -> None:
    """The wait for a plan of several claims is long enough for the slowest of them."""
    with Host() as host:
        for wait_ms, amount in steps:
            host.clock.advance(ms=wait_ms)
            claims = [Claim(METERS[name], amount) for name in ("sliding, coarse", "bucket")]
            answer = host.ask(*claims)
            if isinstance(answer, Refused):
                host.clock.advance(seconds=deny(answer, None, jitter=lambda wait_s: wait_s).retry_after_s or 0)
                assert isinstance(host.ask(*claims), Granted)


def test_retry_after_is_true_for_ids() -> None:
    """A flood of sessions: a new one is admitted once the oldest has been forgotten."""
    on = meter(Rule.IDS, 2, window=Distinct(60_000))
    with Host() as host:
        for member in ("a", "b"):
            assert isinstance(host.ask(Claim(on, 1, member)), Granted)
            host.clock.advance(seconds=7)
        answer = host.ask(Claim(on, 1, "c"))
        assert isinstance(answer, Refused)
        denied = deny(answer, None)
        assert (denied.code, denied.retry_after_s) == ("session_overflow", 46)
        host.clock.advance(seconds=46)
        assert isinstance(host.ask(Claim(on, 1, "c")), Granted)


@pytest.mark.parametrize("on", [pytest.param(on, id=name) for name, on in METERS.items()])
def test_no_wait_is_told_for_what_can_never_fit(on: Meter) -> None:
    """A1, C5: an amount above the limit is refused for good on every window, and says so."""
    with Host() as host:
        answer = host.ask(Claim(on, LIMIT + 1))
    assert isinstance(answer, Refused)
    denied = deny(answer, None)
    assert (denied.code, denied.retry, denied.retry_after_s) == ("request_exceeds_budget", False, None)
