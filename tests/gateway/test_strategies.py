"""Which deployment comes first, by simulation: the spread is what the strategy promises."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.stats import Run, Stats
from asgi_llm_guard.gateway.strategies import STRATEGIES, Candidate, Strategy, strategy_named
from asgi_llm_guard.testing import FrozenClock


class Bench:
    """A group of deployments under one strategy, with chance and time that are the same on every run."""

    def __init__(self, strategy: str, *candidates: Candidate, seed: int = 1) -> None:
        self.clock = FrozenClock()
        self.stats = Stats(self.clock)
        self.strategy: Strategy = strategy_named(strategy)
        self.candidates = candidates
        self.random = Random(seed)
        self.tokens = {each.name: each.tokens for each in candidates}
        self.runs: list[Run] = []

    def order(self, candidates: Sequence[Candidate] | None = None) -> list[str]:
        given = self.candidates if candidates is None else candidates
        return [given[place].name for place in self.strategy.order(given, self.stats, self.random)]

    def begin(self) -> str:
        """A call begins at the first of the order, and is in flight."""
        name = self.order()[0]
        self.runs.append(self.stats.begin(name, self.tokens[name]))
        return name

    def end(self) -> None:
        """All calls end."""
        while self.runs:
            self.runs.pop().end()

    def spread(self, calls: int, *, parallel: int = 1) -> Counter[str]:
        """Where so many calls go, of which so many at a time are in flight; each uses what it may."""
        went: Counter[str] = Counter()
        while went.total() < calls:
            names = [self.begin() for _ in range(parallel)]
            for name, run in zip(names, self.runs, strict=True):
                run.end(self.tokens[name])
            self.runs.clear()
            went.update(names)
        return went


def near(went: Counter[str], ideal: dict[str, float]) -> bool:
    """Whether each got what it should, to a tenth of that."""
    calls, total = went.total(), sum(ideal.values())
    return all(abs(went[name] - calls * part / total) <= 0.1 * calls * part / total for name, part in ideal.items())


# --------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize("parallel", [1, 200])
def test_usage_spreads_by_tokens(parallel: int) -> None:
    """D2: by usage, calls go to deployments in proportion to their tpm, one by one and 200 at once."""
    tpm = {"a": 100_000, "b": 200_000, "c": 300_000}
    bench = Bench("usage", *(Candidate(name=name, tpm=limit, tokens=100) for name, limit in tpm.items()))
    assert near(bench.spread(600, parallel=parallel), dict(tpm))


def test_usage_spreads_by_requests() -> None:
    """D2: where requests are what is scarce, they decide."""
    rpm = {"a": 10, "b": 30}
    bench = Bench("usage", *(Candidate(name=name, rpm=limit, tpm=10**9, tokens=5) for name, limit in rpm.items()))
    assert near(bench.spread(40), dict(rpm))


def test_usage_without_limits_is_even() -> None:
    """Conformance 82: deployments without limits get the same, and one beside limited ones as much as the largest."""
    bench = Bench("usage", *(Candidate(name=name, tokens=10) for name in "abc"))
    assert near(bench.spread(300, parallel=30), dict.fromkeys("abc", 1))
    mixed = Bench("usage", Candidate(name="a", tpm=1000, tokens=1), Candidate(name="b", tokens=1))
    assert near(mixed.spread(100), {"a": 1, "b": 1})


def test_equal_usage_is_shuffled() -> None:
    """Conformance 82: of equally used ones each comes first about as often."""
    bench = Bench("usage", *(Candidate(name=name, rpm=10, tpm=100) for name in "abc"))
    assert near(Counter(bench.order()[0] for _ in range(3000)), dict.fromkeys("abc", 1))


def test_usage_forgets_after_a_minute() -> None:
    """Conformance 82: what was used counts for 60 seconds, and in parts of 5 no longer than 65."""
    bench = Bench("usage", Candidate(name="a", tpm=100), Candidate(name="b", tpm=100))
    bench.stats.begin("a").end(50)
    for seconds in (0, 59):
        bench.clock.advance(seconds=seconds)
        assert (bench.stats.tokens("a"), bench.stats.requests("a")) == (50, 1)
        assert bench.order() == ["b", "a"]
    bench.clock.advance(seconds=6)
    assert (bench.stats.tokens("a"), bench.stats.requests("a")) == (0, 0)


def test_a_limit_of_zero_comes_last() -> None:
    """Conformance 82: a deployment that takes nothing is behind every other, however much they are used."""
    bench = Bench("usage", Candidate(name="a", tpm=0, tokens=1), Candidate(name="b", tpm=10, tokens=1))
    bench.stats.begin("b", 1_000)
    assert bench.order() == ["b", "a"]


# ------------------------------------------------------------------------------------ weighted


@pytest.mark.parametrize("calls", [10, 200, 1000])
def test_weights_are_kept_exactly(calls: int) -> None:
    """D2: by weight, deployments come first in proportion, to within one call at any time."""
    weights = {"a": 1, "b": 3, "c": 6}
    bench = Bench("weighted", *(Candidate(name=name, weight=weight) for name, weight in weights.items()))
    went = bench.spread(calls, parallel=calls)
    assert all(abs(went[name] - calls * weight / 10) <= 1 for name, weight in weights.items())


def test_weights_are_spread_evenly() -> None:
    """No deployment gets a run of calls that another one's turn belongs into."""
    bench = Bench("weighted", Candidate(name="a", weight=1), Candidate(name="b", weight=1))
    firsts = [bench.order()[0] for _ in range(20)]
    assert all(one != other for one, other in zip(firsts[::2], firsts[1::2], strict=True))


def test_who_comes_back_makes_up_for_nothing() -> None:
    """A deployment that cooled down for a hundred calls gets its share again, and not all that it has missed."""
    both = Candidate(name="a"), Candidate(name="b")
    bench = Bench("weighted", *both)
    for _ in range(100):
        assert bench.order(both[:1]) == ["a"]
    assert near(Counter(bench.order()[0] for _ in range(20)), {"a": 1, "b": 1})


def test_a_weight_of_zero_is_a_spare() -> None:
    """Weight 0 comes first only where nobody else is left."""
    spare, other = Candidate(name="spare", weight=0), Candidate(name="other", weight=0.1)
    bench = Bench("weighted", spare, other)
    assert {tuple(bench.order()) for _ in range(20)} == {("other", "spare")}
    assert bench.order([spare]) == ["spare"]


# ------------------------------------------------------------------------ busy, latency and cost


def test_least_busy_levels_calls_in_flight() -> None:
    """D2: with 200 calls in flight each of three deployments has its third; one that ends makes room for the next."""
    bench = Bench("least_busy", *(Candidate(name=name) for name in "abc"))
    went = Counter(bench.begin() for _ in range(200))
    assert max(went.values()) - min(went.values()) <= 1
    slow = {"a": 0, "b": 0, "c": 10}
    bench = Bench("least_busy", *(Candidate(name=name) for name in slow))
    for name, busy in slow.items():
        for _ in range(busy):
            bench.stats.begin(name)
    assert Counter(bench.begin() for _ in range(20)) == {"a": 10, "b": 10}


def test_lowest_latency_prefers_the_fastest() -> None:
    """D2: the deployment whose answers begin soonest comes first, by a moving average that follows a change."""
    bench = Bench("lowest_latency", *(Candidate(name=name) for name in "abc"))
    for name, took_ms in (("a", 300), ("b", 100), ("c", 200)):
        run = bench.stats.begin(name)
        run.first_byte(took_ms)
        run.end()
    assert bench.order() == ["b", "c", "a"]
    for _ in range(5):
        run = bench.stats.begin("b")
        run.first_byte(900)
        run.end()
    assert bench.order() == ["c", "a", "b"]


def test_latencies_within_a_tenth_are_equal() -> None:
    """Of deployments that are about as fast the one with the fewest calls in flight comes first: no herd."""
    bench = Bench("lowest_latency", *(Candidate(name=name) for name in "abc"))
    for name, took_ms in (("a", 100), ("b", 109), ("c", 150)):
        run = bench.stats.begin(name)
        run.first_byte(took_ms)
        run.end()
    went = Counter(bench.begin() for _ in range(100))
    assert went == {"a": 50, "b": 50}


def test_the_unmeasured_are_tried_by_one_call() -> None:
    """One that was not measured within a minute is tried, by one call at a time; at the start all are, evenly."""
    bench = Bench("lowest_latency", *(Candidate(name=name) for name in "abc"))
    went = Counter(bench.begin() for _ in range(30))
    assert went == {"a": 10, "b": 10, "c": 10}
    bench.end()
    for name in "ab":
        run = bench.stats.begin(name)
        run.first_byte(100)
        run.end()
    assert [bench.begin() for _ in range(5)].count("c") == 1
    bench.clock.advance(seconds=61)
    assert bench.stats.first_ms("a") is None
    bench.end()
    assert {bench.begin() for _ in range(3)} == {"a", "b", "c"}


def test_lowest_cost_goes_by_the_call() -> None:
    """D2: the cheapest for this call comes first, one without a price last, equal ones by calls in flight."""
    priced = [Candidate(name="a", cost_nanousd=5), Candidate(name="b", cost_nanousd=3), Candidate(name="c")]
    bench = Bench("lowest_cost", *priced)
    assert bench.order() == ["b", "a", "c"]
    equal = Bench("lowest_cost", *(Candidate(name=name, cost_nanousd=1) for name in "ab"))
    assert Counter(equal.begin() for _ in range(20)) == {"a": 10, "b": 10}


# ----------------------------------------------------------------------------------- all of them


@given(
    name=st.sampled_from(sorted(STRATEGIES)),
    figures=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.none() | st.integers(0, 100),
            st.none() | st.integers(0, 1000),
            st.integers(0, 10**6),
            st.none() | st.integers(0, 10**9),
            st.integers(0, 3),
        ),
        max_size=6,
    ),
    seed=st.integers(0, 9),
)
def test_every_candidate_stays(
    name: str, figures: list[tuple[int, int | None, int | None, int, int | None, int]], seed: int
) -> None:
    """An order has each candidate once, whatever the figures, and is the same for the same chance."""
    candidates = [
        Candidate(name=f"{n}", weight=weight, rpm=rpm, tpm=tpm, tokens=tokens, cost_nanousd=cost)
        for n, (weight, rpm, tpm, tokens, cost, _) in enumerate(figures)
    ]
    orders = []
    for _ in range(2):
        bench = Bench(name, *candidates, seed=seed)
        for each, (*_, busy) in zip(candidates, figures, strict=True):
            for _ in range(busy):
                bench.stats.begin(each.name, each.tokens)
        orders.append([bench.order() for _ in range(3)])
        assert all(sorted(order) == sorted(each.name for each in candidates) for order in orders[-1])
    assert orders[0] == orders[1]


def test_strategies_have_names() -> None:
    """D2: a strategy is chosen by its name, each time a new one; an unknown name lists those that there are."""
    assert list(STRATEGIES) == ["usage", "weighted", "least_busy", "lowest_latency", "lowest_cost"]
    assert type(strategy_named("Least-Busy")) is type(strategy_named("least_busy"))
    assert strategy_named("weighted") is not strategy_named("weighted")
    for wrong in ("fastest", None):
        with pytest.raises(ConfigurationError, match="lowest_latency"):
            strategy_named(wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- stats


def test_a_run_counts_where_it_goes() -> None:
    """A call that goes elsewhere after all is counted there, and one that was not sent nowhere."""
    stats = Stats(FrozenClock())
    run = stats.begin("a", 100)
    run.move("b", 50)
    assert (stats.in_flight("a"), stats.requests("a"), stats.tokens("a")) == (0, 0, 0)
    assert (stats.in_flight("b"), stats.requests("b"), stats.tokens("b")) == (1, 1, 50)
    run.end(7)
    run.end(7)
    run.first_byte(5)
    assert (stats.in_flight("b"), stats.requests("b"), stats.tokens("b")) == (0, 1, 7)
    assert stats.first_ms("b") is None
    dropped = stats.begin("b", 10)
    dropped.drop()
    dropped.drop()
    assert (stats.in_flight("b"), stats.requests("b"), stats.tokens("b")) == (0, 1, 7)


def test_a_long_call_takes_back_no_more_than_there_is() -> None:
    """A call that was not sent after more than a minute leaves counts that are not below zero."""
    clock = FrozenClock()
    stats = Stats(clock)
    run = stats.begin("a")
    clock.advance(seconds=120)
    stats.begin("a")
    run.drop()
    assert stats.requests("a") == 1


def test_a_clock_that_steps_back_forgets_nothing_early() -> None:
    """What is counted after the clock stepped back counts until a minute after the latest instant that was seen."""
    clock = FrozenClock()
    stats = Stats(clock)
    stats.begin("a").end(1)
    clock.advance(seconds=-30)
    stats.begin("a").end(1)
    assert stats.tokens("a") == 2
    clock.advance(seconds=89)
    assert stats.tokens("a") == 2
    clock.advance(seconds=10)
    assert stats.tokens("a") == 0


def test_a_deployment_that_is_gone_is_forgotten() -> None:
    """Conformance 27: what is known of a deployment goes with it; calls that are in flight end without harm."""
    stats = Stats()
    run = stats.begin("a", 5)
    stats.forget("a")
    run.end(5)
    assert (stats.in_flight("a"), stats.requests("a"), stats.tokens("a"), stats.first_ms("a")) == (0, 0, 0, None)


def test_stats_are_told_by_many_threads() -> None:
    """Calls of several threads are all counted, and end with nothing in flight."""
    stats = Stats(FrozenClock())

    def work() -> None:
        for _ in range(500):
            run = stats.begin("a", 3)
            run.move("b", 2)
            assert stats.requests("b") > 0
            assert stats.tokens("b") > 0
            run.end(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (stats.in_flight("a"), stats.requests("a"), stats.tokens("a")) == (0, 0, 0)
    assert (stats.in_flight("b"), stats.requests("b"), stats.tokens("b")) == (0, 2000, 4000)
