"""Learned outputs: quantiles that hold, in bounded memory, by an injected clock; and what a guard holds by them."""

from __future__ import annotations

import math
import random
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard import Budget, Context, Guard, Usage
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded
from asgi_llm_guard.learning import LearnedOutput
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

NOW_MS = 1_800_000_000_000
WEEK_MS = 7 * 86_400_000
CALL = Call(provider="openai", model="m", output_tokens=4_096)


def learned(quantile: str, lengths: list[int], *, call: Call = CALL, at_ms: int = NOW_MS) -> LearnedOutput:
    """What was learned from answers of these lengths."""
    found = LearnedOutput(quantile)
    for tokens in lengths:
        found.observe("/chat", call, Usage(output_tokens=tokens), at_ms)
    return found


@pytest.mark.parametrize(("quantile", "least"), [("p50", 4), ("p90", 20), ("p95", 40), ("p99", 200), ("p99.9", 2_000)])
def test_nothing_is_learned_from_few_answers(quantile: str, least: int) -> None:
    """Twice as many answers have to be seen as one longer one is expected among; before that, the bound is held."""
    assert LearnedOutput(quantile).least == least
    assert learned(quantile, [7] * (least - 1)).output_tokens("/chat", CALL, NOW_MS) is None
    assert learned(quantile, [7] * least).output_tokens("/chat", CALL, NOW_MS) == 7


def test_routes_and_models_are_learned_apart() -> None:
    """What one route's answers of one model are like says nothing of another route, model or provider."""
    found = learned("p50", [7] * 100)
    for route, provider, model in (("/other", "openai", "m"), ("/chat", "azure", "m"), ("/chat", "openai", "n")):
        call = Call(provider=provider, model=model, output_tokens=4_096)
        assert found.output_tokens(route, call, NOW_MS) is None
    assert found.output_tokens("/chat", CALL, NOW_MS) == 7


def test_answers_that_were_cut_off_are_longer_than_any_other() -> None:
    """T4: answers that ended at their limit do not teach that answers are as short as the limit."""
    limited = Call(provider="openai", model="m", output_tokens=50, max_output_tokens=50)
    found = learned("p90", [7] * 85)
    for _ in range(15):
        found.observe("/chat", limited, Usage(output_tokens=50), NOW_MS)
    assert found.output_tokens("/chat", CALL, NOW_MS) is None
    for _ in range(51):
        found.observe("/chat", limited, Usage(output_tokens=7), NOW_MS)
    assert found.output_tokens("/chat", CALL, NOW_MS) == 7
    assert learned("p50", [2**24] * 10).output_tokens("/chat", CALL, NOW_MS) is None


def test_choices_are_learned_one_by_one() -> None:
    """What several choices used together is divided among them, rounded up, and held for as many as are asked for."""
    two = Call(provider="openai", model="m", output_tokens=100, choices=2)
    found = learned("p50", [7] * 10, call=two)
    assert found.output_tokens("/chat", CALL, NOW_MS) == 4
    assert found.output_tokens("/chat", two, NOW_MS) == 8


def test_what_was_seen_is_forgotten() -> None:
    """Answers count for the week in which they were seen and the one after it, by the clock that is given."""
    week_ms = NOW_MS // WEEK_MS * WEEK_MS
    found = learned("p50", [1_000] * 10, at_ms=week_ms)
    assert found.output_tokens("/chat", CALL, week_ms + 2 * WEEK_MS - 1) is not None
    for _ in range(11):
        found.observe("/chat", CALL, Usage(output_tokens=7), week_ms + WEEK_MS)
    assert found.output_tokens("/chat", CALL, week_ms + 2 * WEEK_MS) == 7
    assert found.output_tokens("/chat", CALL, week_ms) == 7  # a clock that was set back changes nothing
    assert found.output_tokens("/chat", CALL, week_ms + 3 * WEEK_MS) is None
    other = learned("p50", [1_000] * 10, at_ms=week_ms)
    assert other.output_tokens("/chat", CALL, week_ms + 2 * WEEK_MS) is None


def test_what_is_forgotten_is_learned_anew() -> None:
    """After a time without answers nothing is left of those before, and so many are needed as in the beginning."""
    week_ms = NOW_MS // WEEK_MS * WEEK_MS
    found = learned("p50", [1_000] * 10, at_ms=week_ms)
    for number in range(4):
        assert found.output_tokens("/chat", CALL, week_ms + 3 * WEEK_MS) is None, number
        found.observe("/chat", CALL, Usage(output_tokens=7), week_ms + 3 * WEEK_MS)
    assert found.output_tokens("/chat", CALL, week_ms + 3 * WEEK_MS) == 7
    unasked = learned("p50", [1_000] * 10, at_ms=week_ms)
    for _ in range(4):
        unasked.observe("/chat", CALL, Usage(output_tokens=7), week_ms + 3 * WEEK_MS)
    assert unasked.output_tokens("/chat", CALL, week_ms + 3 * WEEK_MS) == 7


@pytest.mark.parametrize("tokens", [*range(70), 127, 128, 1_023, 1_024, 4_095, 100_000, 2**24 - 1])
def test_every_length_is_within_its_bucket(tokens: int) -> None:
    """W4: answers of one length are held for by at least that, and at most an eighth more."""
    held = learned("p50", [tokens] * 4).output_tokens("/chat", CALL, NOW_MS)
    assert held is not None
    assert tokens <= held <= tokens + tokens // 8


def test_what_changes_is_noticed() -> None:
    """A quantile follows what is seen, without being worked out for every answer."""
    found = learned("p90", [10] * 1_000)
    assert found.output_tokens("/chat", CALL, NOW_MS) == 10
    for _ in range(500):
        found.observe("/chat", CALL, Usage(output_tokens=12), NOW_MS)
        found.output_tokens("/chat", CALL, NOW_MS)
    assert found.output_tokens("/chat", CALL, NOW_MS) == 12


def test_when_it_is_worked_out_again() -> None:
    """A quantile is worked out again when a 64th more was seen, so that most calls find it ready."""
    found = learned("p50", [10] * 33 + [12] * 31)
    held = []
    for _ in range(6):
        held.append(found.output_tokens("/chat", CALL, NOW_MS))
        found.observe("/chat", CALL, Usage(output_tokens=12), NOW_MS)
    assert held == [10, 10, 10, 10, 12, 12]  # at 67 answers it would be 12


@pytest.mark.parametrize("tokens", [None, -1, 1.5, True, "7"])
def test_what_is_no_count_teaches_nothing(tokens: object) -> None:
    """T23: an answer without a believable count of its output is passed over."""
    found = LearnedOutput("p50")
    for _ in range(10):
        found.observe("/chat", CALL, Usage(output_tokens=tokens), NOW_MS)  # type: ignore[arg-type]
    assert found.output_tokens("/chat", CALL, NOW_MS) is None


def test_memory_is_bounded() -> None:
    """T9: beyond so many pairs of route and model, the one that was not seen for longest is forgotten."""
    found = LearnedOutput("p50", keys=10)
    for number in range(5_000):
        call = Call(provider="openai", model=f"junk-{number}", output_tokens=9)
        found.observe(None, call, Usage(output_tokens=7), NOW_MS)
        found.observe("/chat", CALL, Usage(output_tokens=7), NOW_MS)
        assert found.output_tokens(None, Call(model=f"asked-{number}"), NOW_MS) is None
    assert len(found) == 10
    assert found.output_tokens("/chat", CALL, NOW_MS) == 7
    lengths = found._seen[("/chat", "openai", "m")]
    assert lengths._total == 5_000  # seen all the time, so never forgotten
    assert sys.getsizeof(lengths._counts) < 2_048
    plain = LearnedOutput("p50")
    for number in range(1_001):
        plain.observe(None, Call(model=f"m-{number}"), Usage(output_tokens=7), NOW_MS)
    assert len(plain) == 1_000


def test_threads_may_learn_together() -> None:
    """Observations of several threads all count."""
    found = LearnedOutput("p50")

    def learn() -> None:
        for _ in range(500):
            found.observe("/chat", CALL, Usage(output_tokens=7), NOW_MS)

    threads = [threading.Thread(target=learn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found._seen[("/chat", "openai", "m")]._total == 2_000


@pytest.mark.parametrize("quantile", ["p49", "p100", "p5", "99", "P99", "p99.99", "", None, 0.99, True])
def test_quantiles_are_checked(quantile: object) -> None:
    """A quantile that is none is refused when the guard is made."""
    with pytest.raises(ConfigurationError, match=r"learn_output: expected a quantile from 'p50' to 'p99.9', got"):
        LearnedOutput(quantile)  # type: ignore[arg-type]
    if quantile is not None:
        with pytest.raises(ConfigurationError, match="learn_output"):
            Guard(learn_output=quantile)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ a guard

#: $1 per million tokens in, $2 per million out.
MODEL = "openai/test-model"
PRICES = PriceBook.snapshot(overrides={"openai/test-model": {"input": 1, "output": 2}})
CONTEXT = Context(caller="acme", route="/chat")


def new_guard(limit: str = "$1/1d") -> tuple[Guard, MemoryStorage]:
    clock = FrozenClock(NOW_MS)
    storage = MemoryStorage(clock=clock)
    return Guard(
        [Budget(limit, per="caller")], storage=storage, clock=clock, prices=PRICES, learn_output="p90"
    ), storage


async def one_call(guard: Guard, output_tokens: int) -> None:
    async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=0, max_output_tokens=4_000) as call:
        call.record(Usage(input_tokens=0, output_tokens=output_tokens))


async def held(guard: Guard, max_output_tokens: int = 4_000) -> int:
    """Nano-USD that a call holds."""
    policy = guard.policies[0]
    async with (
        guard.open(CONTEXT),
        guard.call(model=MODEL, input_tokens=0, max_output_tokens=max_output_tokens) as call,
    ):
        assert call.call is not None
        (claim,) = policy.plan(CONTEXT, call.call, guard.clock.now_ms()).claims
        (reading,) = await guard.storage.read([claim.meter])
        call.release()
        return reading.held


async def test_a_guard_holds_what_it_has_learned() -> None:
    """W4, C10: once enough was seen, a call holds what most answers cost, and a longer one is charged in full."""
    guard, storage = new_guard()
    for _ in range(19):
        await one_call(guard, 100)
    assert await held(guard) == 4_000 * 2_000
    await one_call(guard, 100)
    learned_tokens = 103  # the bucket of 100
    assert await held(guard) == learned_tokens * 2_000
    await one_call(guard, 3_000)
    (longer,) = [record for record in await storage.records() if record.cost_nanousd == 3_000 * 2_000]
    assert longer.estimate_nanousd == learned_tokens * 2_000
    await guard.aclose()


async def test_a_guard_never_holds_more_than_the_bound() -> None:
    """T4: a request's own limit below what was learned is what is held."""
    guard, _ = new_guard()
    for _ in range(20):
        await one_call(guard, 100)
    assert await held(guard, 30) == 30 * 2_000
    await guard.aclose()


async def test_a_guard_that_was_not_told_to_learn_holds_the_bound() -> None:
    """Without `learn_output` every call holds its bound, whatever was seen."""
    clock = FrozenClock(NOW_MS)
    guard = Guard([Budget("$1/1d", per="caller")], clock=clock, prices=PRICES)
    for _ in range(30):
        await one_call(guard, 100)
    assert await held(guard) == 4_000 * 2_000
    await guard.aclose()


async def side_by_side(guard: Guard) -> None:
    async with (
        guard.open(CONTEXT),
        guard.call(model=MODEL, input_tokens=0, max_output_tokens=4_000) as first,
        guard.open(CONTEXT),
        guard.call(model=MODEL, input_tokens=0, max_output_tokens=4_000) as second,
    ):
        first.record(Usage(input_tokens=0, output_tokens=10))
        second.record(Usage(input_tokens=0, output_tokens=10))


async def test_more_calls_fit_at_once() -> None:
    """W4: what is learned admits calls side by side that the bound refuses."""
    fresh, _ = new_guard("$0.01/1d")  # a call is bounded by $0.008
    with pytest.raises(LimitExceeded):
        await side_by_side(fresh)
    guard, _ = new_guard("$0.01/1d")
    for _ in range(20):
        await one_call(guard, 10)
    await side_by_side(guard)
    await fresh.aclose()
    await guard.aclose()


def test_shuffled_observations_give_the_same() -> None:
    """What is held depends on what was seen, not on its order."""
    lengths = [random.Random(5).randrange(5_000) for _ in range(500)]
    backwards = learned("p95", lengths[::-1]).output_tokens("/chat", CALL, NOW_MS)
    assert learned("p95", lengths).output_tokens("/chat", CALL, NOW_MS) == backwards


@given(
    lengths=st.lists(st.integers(0, 2**24 - 1), min_size=200, max_size=400),
    quantile=st.sampled_from(["p50", "p90", "p95", "p99"]),
)
def test_a_quantile_is_never_below_the_true_one(lengths: list[int], quantile: str) -> None:
    """W4: at least the asked share of the answers was no longer than what is held, and that is within an eighth of it."""
    held = learned(quantile, lengths).output_tokens("/chat", CALL, NOW_MS)
    assert held is not None
    share = float(quantile[1:]) / 100
    true = sorted(lengths)[math.ceil(share * len(lengths)) - 1]
    assert true <= held <= true + true / 8 + 1
