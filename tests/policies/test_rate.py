from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.values import ALICE, DAY_MS, HOUR_MS, NOBODY, Bench, call, claims, keys

from asgi_llm_guard.claims import Rule, Unit
from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies import Concurrency, RateLimit
from asgi_llm_guard.windows import Bucket, Sliding, Slots

pytestmark = pytest.mark.anyio

GOOD = [
    ("60/minute", [(60, 60_000)]),
    ("60 / minute", [(60, 60_000)]),
    ("60 per minute", [(60, 60_000)]),
    ("60 requests/minute", [(60, 60_000)]),
    ("60 calls per minute", [(60, 60_000)]),
    ("10 per 2 hours", [(10, 2 * HOUR_MS)]),
    ("2/15minutes", [(2, 15 * 60_000)]),
    ("10/second;500/hour", [(10, 1000), (500, HOUR_MS)]),
    ("10/second, 500/hour | 1000/day", [(10, 1000), (500, HOUR_MS), (1000, DAY_MS)]),
    ("10/min", [(10, 60_000)]),
    ("10/s", [(10, 1000)]),
    ("10/HR", [(10, HOUR_MS)]),
    ("10/week", [(10, 7 * DAY_MS)]),
    ("10/2weeks", [(10, 14 * DAY_MS)]),
    ("3/month", [(3, 30 * DAY_MS)]),
    ("3/year", [(3, 360 * DAY_MS)]),
    ("1.5/second", [(3, 2000)]),
    ("0.5 per minute", [(1, 2 * 60_000)]),
    ("2.0/second", [(2, 1000)]),
    ("0/minute", [(0, 60_000)]),
]

BAD = [
    "", "60", "/minute", "60/", "sixty/minute", "-1/minute", "60/fortnight", "60/0minutes", "60/minute;", "60//minute",
    "60 bytes/minute", "60minute", "1e3/minute", "nan/minute", "0.3333/second", "10/minute;20/minute", "60/minutely",
    "9007199254740992/minute", "99999999999999999/minute", "60 permanent", None, 60, True, 1.5, ["60/minute"],
]  # fmt: skip


@pytest.mark.parametrize("rates, expected", GOOD)
def test_rates(rates: str, expected: list[tuple[int, int]]) -> None:
    """The grammar of the `limits` package, and abbreviations, weeks and halves beyond it."""
    found = claims(RateLimit(rates))
    assert [(claim.meter.limit, _sliding(claim.meter.window).period_ms) for claim in found] == expected
    assert {(claim.amount, claim.meter.unit, claim.meter.rule) for claim in found} == {(1, Unit.CALLS, Rule.RATE)}


@pytest.mark.parametrize("rates", BAD, ids=repr)
def test_malformed_rates(rates: object) -> None:
    """Anything else is a configuration error that shows what was written."""
    with pytest.raises(ConfigurationError, match=r"^user_rate") as error:
        RateLimit(rates)  # type: ignore[arg-type]
    assert repr(rates) in str(error.value) or "whole number" in str(error.value)


@given(st.text(alphabet="0123456789 ./;persecondmitushayk-", max_size=30))
def test_nothing_else_is_raised(rates: str) -> None:
    """Whatever is written, the answer is a policy or a configuration error."""
    try:
        RateLimit(rates)
    except ConfigurationError:
        return


def test_tokens_count_calls() -> None:
    """Rates of tokens are claimed by calls, with the call's upper bound."""
    policy = RateLimit("100000 tokens/minute")
    assert policy.counts == "calls"
    assert claims(policy) == ()
    (claim,) = claims(policy, ALICE, call(tokens=70))
    assert (claim.amount, claim.meter.unit, claim.meter.limit) == (70, Unit.TOKENS, 100_000)


def test_requests_and_tokens() -> None:
    """Both in one policy both count calls; a call that is not known yet costs one call."""
    policy = RateLimit("60 calls/minute; 1000 tokens/minute", counts="calls")
    assert [claim.amount for claim in claims(policy)] == [1]
    assert [claim.amount for claim in claims(policy, ALICE, call(tokens=70))] == [1, 70]


@pytest.mark.parametrize(
    "rates, options, message",
    [
        ("60/minute; 9 tokens/minute", {}, "use counts='calls'"),
        ("9 tokens/minute", {"counts": "requests"}, "use counts='calls'"),
        ("60/minute", {"algorithm": "fixed"}, "algorithm must be"),
        ("60/minute", {"burst": 5}, "burst needs algorithm='bucket'"),
        ("60/minute", {"burst": 0, "algorithm": "bucket"}, "at least 1"),
        ("60/minute", {"burst": True, "algorithm": "bucket"}, "whole number"),
        ("60/minute", {"burst": 2**40, "algorithm": "bucket"}, "burst x period"),
        ("9007199254740991/year", {"algorithm": "bucket"}, "burst: expected a whole number"),
        ("9007199254740991/year", {"algorithm": "bucket", "burst": 1}, "limit x period"),
        ("60/minute", {"per": "model"}, "use counts='calls'"),
        ("60/minute", {"per": "moon"}, "per must be one of"),
    ],
)
def test_malformed_options(rates: str, options: dict[str, object], message: str) -> None:
    """Options are checked when the policy is built, what meters demand included."""
    with pytest.raises(ConfigurationError, match=message):
        RateLimit(rates, **options)  # type: ignore[arg-type]


async def test_sliding_never_over_admits() -> None:
    """Of requests at any instants at most the amount is admitted in any period."""
    bench = Bench(RateLimit("10/second"))
    admitted = []
    for _ in range(400):
        if await bench.admits():
            admitted.append(bench.clock.now_ms())
        bench.clock.advance(ms=13)
    assert max(sum(1 for other in admitted if at <= other < at + 1000) for at in admitted) == 10


async def test_bucket_admits_its_burst_then_its_rate() -> None:
    """A bucket admits its burst at once, then one for each drained unit."""
    bench = Bench(RateLimit("60/minute", algorithm="bucket", burst=3))
    assert [await bench.admits() for _ in range(4)] == [True, True, True, False]
    bench.clock.advance(seconds=1)
    assert [await bench.admits() for _ in range(2)] == [True, False]
    window = claims(RateLimit("60/minute", algorithm="bucket"))[0].meter.window
    assert window == Bucket(60_000, 60)


def test_the_rate_of_a_bucket_is_in_its_key() -> None:
    """A bucket of another rate is another meter; a sliding window of another amount is the same one."""
    buckets = [keys(RateLimit(rates, algorithm="bucket", burst=5)) for rates in ("60/minute", "61/minute")]
    assert buckets[0] != buckets[1]
    assert keys(RateLimit("60/minute")) == keys(RateLimit("61/minute"))


@pytest.mark.parametrize("algorithm", ["sliding", "bucket"])
async def test_zero_blocks_everything(algorithm: str) -> None:
    """Conformance 30: a rate of 0 admits nothing, whatever the algorithm."""
    assert not await Bench(RateLimit("0/minute", algorithm=algorithm)).admits()  # type: ignore[arg-type]


@given(st.integers(1, 10_000))
def test_sub_buckets_divide_every_period(seconds: int) -> None:
    """Every period of whole seconds has at least forty even sub-buckets."""
    window = _sliding(claims(RateLimit(f"5 per {seconds} second"))[0].meter.window)
    assert window.period_ms == seconds * 1000
    assert 40 <= window.buckets <= 60


def test_verdicts_are_reused() -> None:
    """A rate of requests gives the same verdict each time."""
    policy = RateLimit("60/minute")
    assert policy.plan(ALICE, None, 0) is policy.plan(ALICE, call(), 5)
    assert claims(RateLimit("60/minute", per="session"), NOBODY) == ()
    assert policy.plan(NOBODY, None, 0) is not policy.plan(ALICE, None, 0)


def test_shadow_rates() -> None:
    """A rate in shadow enforces nothing and counts apart."""
    policy = RateLimit("60/minute")
    assert claims(policy.shadow())[0].meter.enforce is False
    assert keys(policy.shadow()) != keys(policy)


def test_the_parser_is_imported_only_for_rates() -> None:
    """Importing the policies imports no optional library."""
    code = (
        "import sys, asgi_llm_guard.policies\n"
        "heavy = {'limits', 'redis', 'pydantic', 'httpx', 'httpx2', 'opentelemetry', 'starlette'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


async def test_concurrency_takes_slots() -> None:
    """A slot is held while its request is open; the next one is refused until then."""
    bench = Bench(Concurrency(2))
    await bench.reserve()
    await bench.spend(0)
    assert await bench.admits()
    assert not await bench.admits()
    assert await bench.admits(Context(caller="other"))


def test_slots() -> None:
    """Slots name their scope and count requests unless told otherwise; absent scopes take none."""
    (claim,) = claims(Concurrency("4", per="department"))
    assert (claim.amount, claim.meter.limit, claim.meter.window, claim.meter.rule) == (1, 4, Slots(), Rule.SLOTS)
    assert (claim.meter.unit, claim.meter.policy) == (Unit.SLOTS, "department_concurrency")
    assert claims(Concurrency(4, per="department"), NOBODY) == ()
    assert (Concurrency(4).counts, Concurrency(4, per="model", counts="calls").counts) == ("requests", "calls")


@pytest.mark.parametrize("limit", [None, -1, True, 1.5, "many"], ids=repr)
def test_malformed_slots(limit: object) -> None:
    """Conformance 30: a number of slots is a whole number; 0 blocks everything."""
    with pytest.raises(ConfigurationError, match=r"user_concurrency\.limit: expected a whole number"):
        Concurrency(limit)  # type: ignore[arg-type]


async def test_no_slots_no_requests() -> None:
    """Conformance 30: without slots nothing is admitted."""
    assert not await Bench(Concurrency(0)).admits()


async def test_a_denied_request_burns_no_rate() -> None:
    """Conformance 9 and 33: a request that its slots refuse takes nothing from its rate."""
    rate, slots = RateLimit("2/minute"), Concurrency(1)
    bench = Bench(rate, slots)
    await bench.reserve()
    for _ in range(5):
        assert not await bench.admits()
    (reading,) = await bench.storage.read([claims(rate)[0].meter])
    assert reading.used + reading.held == 1


async def test_token_rates_are_reserved() -> None:
    """Conformance 32 and 40: of five calls of 60 tokens under 100 per minute one holds at a time."""
    bench = Bench(RateLimit("100 tokens/minute"))
    assert [await bench.admits(ALICE, call(tokens=60)) for _ in range(5)] == [True, False, False, False, False]


def _sliding(window: object) -> Sliding:
    assert isinstance(window, Sliding)
    return window
