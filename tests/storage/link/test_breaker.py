from __future__ import annotations

import pytest

from asgi_llm_guard.storage.breaker import Breaker


class Seconds:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def breaker(clock: Seconds, *, failures: int = 3, jitter: float = 0.0) -> Breaker:
    return Breaker(clock=clock, failures=failures, first_wait_s=1.0, longest_wait_s=8.0, jitter=lambda: jitter)


def test_opens_at_the_last_of_so_many_failures_in_a_row(clock: Seconds) -> None:
    """The third failure in a row opens it, and only that one says so."""
    own = breaker(clock)

    assert [own.failed(), own.failed(), own.failed(), own.failed()] == [False, False, True, False]
    assert own.state == "open"


def test_a_success_between_failures_starts_the_count_anew(clock: Seconds) -> None:
    """Two failures, a success and two failures leave it closed."""
    own = breaker(clock)

    for happens in (own.failed, own.failed, own.succeeded, own.failed, own.failed):
        assert not happens()

    assert own.state == "closed"
    assert own.troubled


def test_a_clear_no_opens_it_at_once(clock: Seconds) -> None:
    """A failure that is not worth repeating opens it by itself."""
    own = breaker(clock)

    assert own.failed(at_once=True)
    assert own.state == "open"


def test_waits_double_up_to_the_longest(clock: Seconds) -> None:
    """After the n-th failure the wait is 1, 2, 4, 8, 8 … seconds."""
    own = breaker(clock, failures=100)

    waits = []
    for _ in range(6):
        own.failed()
        waits.append(own.wait_s)

    assert waits == [1, 2, 4, 8, 8, 8]


def test_waits_are_bounded_after_an_outage_of_weeks(clock: Seconds) -> None:
    """A million failures overflow nothing."""
    own = breaker(clock, failures=10**9)

    for _ in range(100_000):
        own.failed()

    assert own.wait_s == 8


@pytest.mark.parametrize("jitter, wait_s", [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_at_most_half_of_a_wait_is_left_out_at_random(clock: Seconds, jitter: float, wait_s: float) -> None:
    """Processes that failed together come back spread over half of the wait."""
    own = breaker(clock, jitter=jitter)
    own.failed()

    assert own.wait_s == wait_s


def test_a_wait_passes_with_the_clock(clock: Seconds) -> None:
    """What is left of a wait shrinks to nothing, and never below."""
    own = breaker(clock)
    own.failed()
    clock.now += 0.75
    assert own.wait_s == 0.25
    clock.now += 100
    assert own.wait_s == 0


def test_without_failures_there_is_no_wait(clock: Seconds) -> None:
    """A breaker that has seen nothing, or a success last, lets everything through."""
    own = breaker(clock)
    assert own.wait_s == 0
    own.failed()
    own.succeeded()
    assert own.wait_s == 0


def test_an_open_one_lets_one_probe_through_after_its_wait(clock: Seconds) -> None:
    """Before the wait is over no probe, then exactly one."""
    own = breaker(clock, failures=1)
    own.failed()

    assert not own.probe()
    clock.now += 1
    assert own.probe()
    assert own.state == "half-open"
    assert not own.probe()


def test_a_successful_probe_closes_it(clock: Seconds) -> None:
    """The probe's success closes it, says so, and forgets the failures."""
    own = breaker(clock, failures=1)
    own.failed()
    clock.now += 1
    own.probe()

    assert own.succeeded()
    assert own.state == "closed"
    assert not own.troubled


def test_a_failed_probe_doubles_the_wait(clock: Seconds) -> None:
    """The probe's failure opens it again, for twice as long, and tells nobody anew."""
    own = breaker(clock, failures=1)
    own.failed()
    clock.now += 1
    own.probe()

    assert not own.failed()
    assert own.state == "open"
    assert own.wait_s == 2


def test_late_news_does_not_move_an_open_one(clock: Seconds) -> None:
    """While it is open, outcomes of calls begun before neither close it nor prolong its wait."""
    own = breaker(clock, failures=1)
    own.failed()
    own.failed()
    assert not own.succeeded()

    assert own.state == "open"
    assert own.wait_s == 1


def test_attempts_of_a_closed_one_wait_as_well(clock: Seconds) -> None:
    """Between two failures below the bound, `probe` still asks for the wait, and stays closed."""
    own = breaker(clock)
    own.failed()

    assert not own.probe()
    clock.now += 1
    assert own.probe()
    assert own.state == "closed"
