from __future__ import annotations

import sys
import threading
from decimal import Decimal

import pytest
from msgspec.structs import replace
from tests.policies.values import ALICE, NOBODY, Bench, call, claims

from asgi_llm_guard.claims import Refused, Rule, Unit
from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import NANO
from asgi_llm_guard.policies import DepartmentQuota, Quota, QuotaBook
from asgi_llm_guard.windows import Calendar

pytestmark = pytest.mark.anyio

FULL = DepartmentQuota(
    models=["openai/*"], daily_tokens=1000, monthly_tokens=5000, daily_cost=2, monthly_cost="$9", tz="Europe/Berlin"
)


def test_four_limits_in_two_units() -> None:
    """C5, C6: tokens and cost, each daily and monthly, in the department's zone; each names itself."""
    found = claims(Quota(QuotaBook({"research": FULL})), ALICE, call(usd=1, tokens=70))
    assert [(claim.amount, claim.meter.unit, claim.meter.limit, claim.meter.window) for claim in found] == [
        (70, Unit.TOKENS, 1000, Calendar("day", "Europe/Berlin")),
        (70, Unit.TOKENS, 5000, Calendar("month", "Europe/Berlin")),
        (NANO, Unit.NANOUSD, 2 * NANO, Calendar("day", "Europe/Berlin")),
        (NANO, Unit.NANOUSD, 9 * NANO, Calendar("month", "Europe/Berlin")),
    ]
    assert {(claim.meter.scope, claim.meter.subject, claim.meter.rule) for claim in found} == {
        ("department", "research", Rule.QUOTA)
    }


async def test_every_department_is_charged_in_full_and_the_strictest_wins() -> None:
    """C5: all departments are claimed together; when one is spent, none is charged."""
    quota = Quota(QuotaBook({"research": {"daily_tokens": 300}, "ops": {"daily_tokens": 100}}))
    bench = Bench(quota)
    both = Context(departments=("research", "ops"))
    assert await bench.admits(both, call(tokens=60))
    refused = await bench.reserve(both, call(tokens=60))
    assert isinstance(refused, Refused)
    assert [(r.claim.meter.subject, r.held, r.fits) for r in refused.states[0]] == [
        ("research", 60, True),
        ("ops", 60, False),
    ]
    assert await bench.admits(Context(departments=("research",)), call(tokens=240))


async def test_no_concurrent_overshoot() -> None:
    """C5: of ten calls that hold at the same time, those are admitted that fit together."""
    bench = Bench(Quota(QuotaBook({"research": {"daily_cost_cents": 100}})))
    assert sum([await bench.admits(ALICE, call(usd=0.3)) for _ in range(10)]) == 3


async def test_days_begin_in_the_departments_zone() -> None:
    """C5: a daily quota starts anew at the department's midnight, UTC unless set."""
    bench = Bench(Quota(QuotaBook({"research": {"daily_tokens": 100}})))
    assert await bench.admits(ALICE, call(tokens=100))
    bench.clock.advance(seconds=86_399)
    assert not await bench.admits(ALICE, call(tokens=1))
    bench.clock.advance(seconds=1)
    assert await bench.admits(ALICE, call(tokens=100))


def test_models_are_checked() -> None:
    """C5: a model outside any department's list is refused, and the department is named."""
    refusal = Quota(QuotaBook({"research": FULL})).plan(ALICE, call(provider="azure"), 0).refusal
    assert refusal is not None
    assert (refusal.code, refusal.scope, refusal.subject, refusal.policy) == (
        "model_not_allowed",
        "department",
        "research",
        "quota",
    )
    assert "'research'" in refusal.message
    assert Quota(QuotaBook({"research": {"models": []}})).plan(ALICE, call(), 0).refusal is not None


def test_models_that_may_answer_instead_are_checked() -> None:
    """C5: a fallback outside a department's list is refused by its name."""
    asked = replace(call(), alternatives=("openai/gpt-5-mini", "anthropic/claude-opus-4"))
    refusal = Quota(QuotaBook({"research": FULL})).plan(ALICE, asked, 0).refusal
    assert refusal is not None
    assert "'anthropic/claude-opus-4'" in refusal.message
    assert Quota(QuotaBook({"research": {}})).plan(ALICE, call(), 0).refusal is None


def test_one_strict_department_is_enough() -> None:
    """C5: the list of the second department counts as much as the first one's."""
    quota = Quota(QuotaBook({"a": {"models": ["*"]}, "b": {"models": ["claude-*"]}}))
    refusal = quota.plan(Context(departments=("a", "b")), call(), 0).refusal
    assert refusal is not None
    assert refusal.subject == "b"


def test_no_departments_no_check() -> None:
    """C8: a context without departments is neither checked nor charged."""
    assert claims(Quota(QuotaBook()), NOBODY, call(usd=None)) == ()


def test_request_without_a_call_claims_nothing() -> None:
    """What depends on the call is not claimed before there is one."""
    assert claims(Quota(QuotaBook({"research": FULL}))) == ()


def test_unknown_department() -> None:
    """C5: a department that is not in the book is refused, unless the policy says otherwise."""
    refusal = Quota(QuotaBook()).plan(ALICE, call(), 0).refusal
    assert refusal is not None
    assert (refusal.code, refusal.status, refusal.subject) == ("quota_exceeded", 403, "research")
    assert Quota(QuotaBook(), status=429).plan(ALICE, call(), 0).refusal.status == 429  # type: ignore[union-attr]
    assert claims(Quota(QuotaBook(), unknown="allow"), ALICE, call()) == ()
    assert Quota(QuotaBook()).plan(Context(departments=("",)), call(), 0).refusal is not None


def test_unpriced_model() -> None:
    """A cost quota refuses a call whose price is not known; a token quota does not."""
    refusal = Quota(QuotaBook({"research": {"daily_cost": 1}})).plan(ALICE, call(usd=None), 0).refusal
    assert refusal is not None
    assert (refusal.code, refusal.subject) == ("model_unpriced", "research")
    assert len(claims(Quota(QuotaBook({"research": {"daily_tokens": 1}})), ALICE, call(usd=None))) == 1


async def test_zero_blocks_everything() -> None:
    """Conformance 30: a quota of 0 admits not even what costs nothing."""
    bench = Bench(Quota(QuotaBook({"research": {"monthly_cost": 0}})))
    assert not await bench.admits(ALICE, call(usd=0))


def test_dollars_and_cents() -> None:
    """C5: cost limits may be given in cents, and are the same quota."""
    dollars = DepartmentQuota(daily_cost=12.5, monthly_cost="$100")
    assert DepartmentQuota(daily_cost_cents=1250, monthly_cost_cents="10000") == dollars
    assert (dollars.daily_cost, dollars.monthly_cost) == (Decimal("12.5"), Decimal(100))


def test_numbers_as_text() -> None:
    """A3: whole numbers may be text, as in environments and files."""
    assert DepartmentQuota(daily_tokens="1000") == DepartmentQuota(daily_tokens=1000)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"daily_tokens": -1}, r"quotas\['research'\].daily_tokens: expected a whole number"),
        ({"daily_tokens": True}, "daily_tokens"),
        ({"monthly_tokens": 1.5}, "monthly_tokens"),
        ({"daily_cost": float("nan")}, "daily_cost"),
        ({"daily_cost": float("inf")}, "daily_cost"),
        ({"monthly_cost": "-1"}, "monthly_cost"),
        ({"monthly_cost_cents": "many"}, "monthly_cost_cents"),
        ({"daily_cost": 1, "daily_cost_cents": 100}, "keep one"),
        ({"models": "gpt-5"}, "models: expected a list"),
        ({"models": [None]}, "models: expected the name"),
        ({"tz": "Mars/Olympus"}, "time zone"),
        ({"daily_budget": 1}, "unknown 'daily_budget'; known are models, daily_tokens"),
        ("$5/1d", "expected a DepartmentQuota or a mapping"),
        (None, "expected a DepartmentQuota or a mapping"),
    ],
)
def test_malformed_entries(entry: object, message: str) -> None:
    """C5: a malformed quota is an error that names department and field, and changes nothing."""
    book = QuotaBook({"research": FULL})
    for change in (
        lambda: QuotaBook({"research": entry}),  # type: ignore[dict-item]
        lambda: book.set("research", entry),  # type: ignore[arg-type]
        lambda: book.replace_all({"research": entry}),  # type: ignore[dict-item]
    ):
        with pytest.raises(ConfigurationError, match=message):
            change()
    assert (book.version, book.get("research")) == (1, FULL)


@pytest.mark.parametrize("name", ["", " ", None, 3], ids=repr)
def test_malformed_names(name: object) -> None:
    """A department needs a name."""
    with pytest.raises(ConfigurationError, match="name of a department"):
        QuotaBook({name: FULL})  # type: ignore[dict-item]


def test_changes_hold_at_once() -> None:
    """C5: a changed book holds from the next call on, and what was used stays on the same meters."""
    book = QuotaBook({"research": {"daily_tokens": 100}})
    quota = Quota(book)
    (before,) = claims(quota, ALICE, call())
    book.set("research", {"daily_tokens": 50})
    (after,) = claims(quota, ALICE, call())
    assert (before.meter.limit, after.meter.limit, before.meter.key == after.meter.key) == (100, 50, True)
    book.remove("research")
    book.remove("never was there")
    assert quota.plan(ALICE, call(), 0).refusal is not None
    book.replace_all({"research": {"monthly_tokens": 9}, "ops": FULL})
    assert claims(quota, ALICE, call())[0].meter.limit == 9
    version, snapshot = book.snapshot
    assert (version, sorted(snapshot)) == (book.version, ["ops", "research"])
    assert version == 5


def test_a_book_is_changed_by_many_threads() -> None:
    """No change is lost when several threads change the book at once."""
    book = QuotaBook()

    def fill(worker: int) -> None:
        for number in range(50):
            book.set(f"{worker}-{number}", {"daily_tokens": number})

    threads = [threading.Thread(target=fill, args=(worker,)) for worker in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (book.version, len(book.snapshot[1])) == (201, 200)


def test_snapshots_do_not_change() -> None:
    """A snapshot stays what it was, and cannot be changed."""
    book = QuotaBook({"research": FULL})
    _, snapshot = book.snapshot
    book.remove("research")
    assert dict(snapshot) == {"research": FULL}
    with pytest.raises(TypeError):
        snapshot["ops"] = FULL  # type: ignore[index]


def test_malformed_policies() -> None:
    """The book and the rule for unknown departments are checked when the policy is built."""
    with pytest.raises(ConfigurationError, match="expected a QuotaBook"):
        Quota({"research": FULL})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown must be"):
        Quota(QuotaBook(), unknown="ignore")  # type: ignore[arg-type]


def test_shadow_is_an_event() -> None:
    """A quota in shadow claims on meters of its own and refuses nothing."""
    shadow = Quota(QuotaBook({"research": FULL})).shadow()
    assert {claim.meter.enforce for claim in claims(shadow, ALICE, call())} == {False}
    verdict = shadow.plan(ALICE, call(provider="azure"), 0)
    assert (verdict.refusal, verdict.shadow_refusal is None) == (None, False)
