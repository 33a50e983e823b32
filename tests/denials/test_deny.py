from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.denials.values import CODES, NOW_MS, fitting, meter, refused, stuck

from asgi_llm_guard.claims import Meter, Reading, Receipt, Refused, Rule, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Code, Refusal
from asgi_llm_guard.denials import deny, refuse
from asgi_llm_guard.denials.denied import RETRYABLE_S
from asgi_llm_guard.denials.receipts import capacity, fits_max_tokens, held_by_others
from asgi_llm_guard.denials.statuses import check_status, check_statuses
from asgi_llm_guard.denials.wording import period, provider_lines, utc
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import NANO
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

HOUR_MS = 3_600_000

# Every row of the table in docs/denials.md: what refuses, then status, code, retry and seconds of Retry-After.
ROWS: dict[str, tuple[Receipt, int, Code, bool, int | None]] = {
    "rate, short wait": (stuck(meter(Rule.RATE), wait_ms=12_001), 429, "rate_limit_exceeded", True, 13),
    "rate, one minute": (stuck(meter(Rule.RATE), wait_ms=60_000), 429, "rate_limit_exceeded", True, 60),
    "rate, longer wait": (stuck(meter(Rule.RATE), wait_ms=60_001), 429, "rate_limit_exceeded", False, 61),
    "slot": (stuck(meter(Rule.SLOTS), used=0, held=10), 429, "concurrency_limit_exceeded", True, 1),
    "held tokens of others": (
        stuck(meter(Rule.QUOTA), used=4, held=6, wait_ms=HOUR_MS),
        429,
        "held_by_others",
        True,
        1,
    ),
    "held money of others": (
        stuck(meter(Rule.BUDGET, 10 * NANO), amount=NANO, used=9 * NANO, held=NANO, wait_ms=HOUR_MS),
        429,
        "held_by_others",
        True,
        1,
    ),
    "iterations, with a reset": (
        stuck(meter(Rule.ITERATIONS), wait_ms=HOUR_MS),
        429,
        "session_iterations_exhausted",
        False,
        3600,
    ),
    "iterations, without": (stuck(meter(Rule.ITERATIONS)), 429, "session_iterations_exhausted", False, None),
    "iterations in flight": (
        stuck(meter(Rule.ITERATIONS), used=8, held=2, wait_ms=HOUR_MS),
        429,
        "session_iterations_exhausted",
        False,
        3600,
    ),
    "token quota": (stuck(meter(Rule.QUOTA), wait_ms=HOUR_MS), 429, "quota_exceeded", False, 3600),
    "token quota, no reset": (stuck(meter(Rule.QUOTA)), 429, "quota_exceeded", False, None),
    "cost quota": (
        stuck(meter(Rule.QUOTA, 10 * NANO, unit=Unit.NANOUSD), amount=1, used=10 * NANO, wait_ms=HOUR_MS),
        429,
        "quota_exceeded",
        False,
        3600,
    ),
    "spent budget": (
        stuck(meter(Rule.BUDGET, 10 * NANO), amount=NANO, used=10 * NANO, wait_ms=HOUR_MS),
        402,
        "budget_exhausted",
        False,
        3600,
    ),
    "money that can never fit": (
        stuck(meter(Rule.BUDGET, NANO), amount=NANO + 1, used=0, wait_ms=HOUR_MS),
        402,
        "request_exceeds_budget",
        False,
        None,
    ),
    "a cost quota that can never fit": (
        stuck(meter(Rule.QUOTA, NANO, unit=Unit.NANOUSD), amount=NANO + 1, used=0),
        402,
        "request_exceeds_budget",
        False,
        None,
    ),
    "tokens that can never fit": (
        stuck(meter(Rule.QUOTA), amount=11, used=0),
        429,
        "request_exceeds_budget",
        False,
        None,
    ),
    "more than the burst": (
        stuck(meter(Rule.RATE, 100, window=Bucket(60_000, 5)), amount=6, used=0),
        429,
        "request_exceeds_budget",
        False,
        None,
    ),
    "a bucket that nothing drains from": (
        stuck(meter(Rule.RATE, 0, window=Bucket(60_000, 5)), used=0),
        429,
        "request_exceeds_budget",
        False,
        None,
    ),
    "a slot limit of 0": (stuck(meter(Rule.SLOTS, 0), used=0), 429, "request_exceeds_budget", False, None),
    "too many sessions": (stuck(meter(Rule.IDS), wait_ms=5_000), 429, "session_overflow", False, 5),
}


@pytest.mark.parametrize(
    "receipt, status, code, retry, retry_after_s", [pytest.param(*row, id=name) for name, row in ROWS.items()]
)
def test_row_of_the_table(receipt: Receipt, status: int, code: Code, retry: bool, retry_after_s: int | None) -> None:
    """Each row of the table of refusals gives its status, code, retry flag and wait."""
    denied = deny(refused(receipt), None)
    assert (denied.status, denied.code, denied.retry, denied.retry_after_s) == (status, code, retry, retry_after_s)


OWN_CODES: dict[Code, int] = {
    "model_not_allowed": 403,
    "model_unpriced": 403,
    "model_not_found": 404,
    "feature_not_allowed": 403,
    "route_not_listed": 403,
    "session_required": 400,
    "invalid_request": 400,
    "credentials_invalid": 403,
    "body_too_large": 413,
    "body_encoded": 415,
    "guard_unavailable": 503,
    "guard_draining": 503,
    "stopped": 403,
    "stream_timeout": 504,
}


@pytest.mark.parametrize("code, status", OWN_CODES.items())
def test_own_refusal(code: Code, status: int) -> None:
    """A policy's own refusal has the status of the table; only an outage and a shutdown are worth a retry."""
    denied = refuse(Refusal(policy="p", code=code, message="m", scope="caller", subject="c1"))
    assert denied.status == status
    assert (denied.retry, denied.retry_after_s) == ((True, 1) if status == 503 else (False, None))
    assert (denied.policy, denied.message, denied.scope, denied.subject) == ("p", "m", "caller", "c1")
    assert denied.violated == ("p",)


@pytest.mark.parametrize("code", CODES)
def test_no_code_has_a_status_that_clients_misread(code: Code) -> None:
    """No refusal is ever answered with 401, 408 or 409."""
    assert refuse(Refusal(policy="p", code=code, message="m")).status in {400, 402, 403, 404, 413, 415, 429, 503, 504}


# -------------------------------------------------------------------------------- several claims


def test_first_refusing_claim_names_the_refusal() -> None:
    """The first enforced claim that does not fit names policy, scope, subject and unit; shadows and fits do not."""
    shadow = stuck(meter(Rule.BUDGET, policy="shadow", enforce=False))
    fits = fitting(meter(Rule.RATE, policy="fits"), taken=False)
    first = stuck(meter(Rule.QUOTA, policy="tokens", scope="user", subject="u1"), wait_ms=HOUR_MS)
    second = stuck(meter(Rule.RATE, policy="rpm"), wait_ms=1)
    denied = deny(refused(shadow, fits, first, second), None)
    assert (denied.policy, denied.scope, denied.subject, denied.unit) == ("tokens", "user", "u1", "tokens")
    assert denied.violated == ("tokens", "rpm")
    assert len(denied.receipts) == 4


def test_the_wait_is_the_longest_of_all() -> None:
    """Retry-After is the maximum over all refusing claims, whichever comes first."""
    short, long = (
        stuck(meter(Rule.RATE, policy="a"), wait_ms=2_000),
        stuck(meter(Rule.RATE, policy="b"), wait_ms=40_000),
    )
    assert deny(refused(short, long), None).retry_after_s == 40
    assert deny(refused(long, short), None).retry_after_s == 40


@pytest.mark.parametrize("hopeless", [stuck(meter(Rule.QUOTA)), stuck(meter(Rule.QUOTA), amount=11, wait_ms=1)])
def test_no_wait_if_one_claim_has_none(hopeless: Receipt) -> None:
    """A claim without a reset, or one that can never fit, takes Retry-After and the retry away from all."""
    denied = deny(refused(stuck(meter(Rule.RATE), wait_ms=2_000), hopeless), None)
    assert (denied.code, denied.retry, denied.retry_after_s) == ("rate_limit_exceeded", False, None)


def test_what_can_never_fit_has_no_reset() -> None:
    """A window that ends does not help a request that is larger than its limit, so no reset is told."""
    denied = deny(refused(stuck(meter(Rule.QUOTA), amount=11, wait_ms=1_000)), None)
    assert denied.resets_at_ms is None


def test_no_retry_if_one_claim_is_final() -> None:
    """A rate that frees up soon is not worth a retry while a quota beside it is used up."""
    denied = deny(refused(stuck(meter(Rule.RATE), wait_ms=2_000), stuck(meter(Rule.QUOTA), wait_ms=30_000)), None)
    assert (denied.retry, denied.retry_after_s) == (False, 30)


def test_held_beside_a_final_claim_is_not_worth_waiting_for() -> None:
    """`held_by_others` is said only if nothing final refuses beside it."""
    held = stuck(meter(Rule.BUDGET, policy="a"), used=4, held=6, wait_ms=HOUR_MS)
    spent = stuck(meter(Rule.BUDGET, policy="b"), wait_ms=HOUR_MS)
    denied = deny(refused(held, spent), None)
    assert (denied.code, denied.status, denied.retry) == ("budget_exhausted", 402, False)


def test_held_beside_a_rate_waits_for_both() -> None:
    """Held money beside a rate is worth a retry, after the longer of both waits."""
    held = stuck(meter(Rule.BUDGET), used=4, held=6, wait_ms=HOUR_MS)
    denied = deny(refused(held, stuck(meter(Rule.RATE), wait_ms=9_000)), None)
    assert (denied.code, denied.status, denied.retry, denied.retry_after_s) == ("held_by_others", 429, True, 9)


def test_held_by_others_counts_only_what_comes_back() -> None:
    """Slots, held tokens and held money are given back; a rate, an iteration, a counted call are not."""
    slot = stuck(meter(Rule.SLOTS), used=0, held=10)
    tokens = stuck(meter(Rule.QUOTA), used=4, held=6)
    calls = stuck(meter(Rule.QUOTA, unit=Unit.CALLS), used=4, held=6)
    iteration = stuck(meter(Rule.ITERATIONS), used=4, held=6)
    assert held_by_others([slot, tokens])
    assert not held_by_others([slot, calls])
    assert not held_by_others([tokens, iteration])
    assert not held_by_others([stuck(meter(Rule.QUOTA), used=10, held=6)])
    assert not held_by_others([fitting(meter(Rule.QUOTA))])


def test_deny_explains_the_plan_it_is_asked_about() -> None:
    """`plan` picks which of the offered plans is explained; the others' refusals follow in `details`."""
    plans = tuple(
        (stuck(meter(Rule.BUDGET, policy="providers", scope="provider", subject=name), wait_ms=HOUR_MS),)
        for name in ("openai", "anthropic")
    )
    denied = deny(Refused(plans, NOW_MS), None, plan=1)
    assert denied.subject == "anthropic"
    assert denied.violated == ("providers",)
    [line] = denied.details
    assert line.startswith("providers: provider 'openai' (limit")
    assert line.endswith("resets at 2026-11-21T11:00:00Z")


def test_deny_without_a_refusing_claim_is_a_mistake() -> None:
    """Asking why a plan was refused that was not is an error that says so."""
    with pytest.raises(ValueError, match="plan 0: no enforced claim refuses"):
        deny(refused(fitting(meter(Rule.RATE)), stuck(meter(Rule.RATE, enforce=False))), None)


# ---------------------------------------------------------------------------------------- jitter


@given(wait_ms=st.integers(1, 10_000_000), draw=st.integers(-5, 10**9))
def test_jitter_only_adds(wait_ms: int, draw: int) -> None:
    """The wait is never understated, at most a tenth longer, and jitter moves no wait past what clients retry."""
    plain_s = -(-wait_ms // 1000)
    denied = deny(refused(stuck(meter(Rule.RATE), wait_ms=wait_ms)), None, jitter=lambda _: draw)
    assert denied.retry_after_s is not None
    assert plain_s <= denied.retry_after_s <= plain_s + plain_s // 10
    assert denied.retry == (plain_s <= RETRYABLE_S)
    assert not denied.retry or denied.retry_after_s <= RETRYABLE_S


@pytest.mark.parametrize("wait_s, told_s", [(54, 59), (57, 60), (60, 60), (61, 67)])
def test_jitter_keeps_a_wait_that_is_retried_within_a_minute(wait_s: int, told_s: int) -> None:
    """Old clients ignore more than a minute and come back at once, so jitter stops there for waits worth a retry."""
    denied = deny(refused(stuck(meter(Rule.RATE), wait_ms=wait_s * 1000)), None, jitter=lambda wait_s: wait_s)
    assert denied.retry_after_s == told_s


def test_jitter_is_told_the_wait() -> None:
    """Jitter is injected, and told the wait in seconds."""
    asked: list[int] = []

    def jitter(wait_s: int) -> int:
        asked.append(wait_s)
        return 3

    denied = deny(refused(stuck(meter(Rule.RATE), wait_ms=45_000)), None, jitter=jitter)
    assert asked == [45]
    assert denied.retry_after_s == 48


# ---------------------------------------------------------------------------------- disclosure


def test_a_shared_scope_shows_no_amounts() -> None:
    """Limit, used, held and the name of a scope that the caller does not own are kept to ourselves."""
    receipt = stuck(
        meter(Rule.QUOTA, 777, policy="dept", subject="secret-lab", owned=False), amount=5, used=770, held=7, wait_ms=9
    )
    denied = deny(refused(receipt, stuck(meter(Rule.QUOTA, 778, subject="other-lab", owned=False), used=778)), None)
    assert (denied.subject, denied.limit, denied.used, denied.held) == ("", None, None, None)
    told = " ".join((denied.message, *denied.details))
    for secret in ("secret-lab", "other-lab", "777", "770", "778"):
        assert secret not in told
    assert "this department" in denied.message
    assert (denied.requested, denied.resets_at_ms) == (5, NOW_MS + 9)


def test_disclose_all_shows_a_shared_scope() -> None:
    """C6: with `disclose="all"` a department's refusal carries department, kind, period, limit and current value."""
    receipt = stuck(meter(Rule.QUOTA, 777, policy="dept", subject="lab", owned=False), amount=5, used=775, wait_ms=9)
    denied = deny(refused(receipt), None, disclose="all")
    assert (denied.scope, denied.subject, denied.unit) == ("department", "lab", "tokens")
    assert (denied.limit, denied.used, denied.held) == (777, 775, 0)
    assert denied.message == (
        "dept: department 'lab' has used up its daily token quota (limit 777 tokens, used 775, requested 5). "
        "It resets at 2026-11-21T10:00:01Z."
    )


# ------------------------------------------------------------------------------------- messages


def test_iterations_name_session_count_and_limit() -> None:
    """A9: the refusal of a session names the session, its count and its limit."""
    denied = deny(refused(stuck(meter(Rule.ITERATIONS, 25, policy="loop"), used=25, wait_ms=HOUR_MS)), None)
    assert denied.message == (
        "loop: session 's1' has used up its calls (limit 25 calls, used 25, requested 1). "
        "It resets at 2026-11-21T11:00:00Z."
    )


MESSAGES: dict[str, tuple[Receipt, str]] = {
    "sliding rate": (
        stuck(meter(Rule.RATE, 60, policy="rpm"), used=60, wait_ms=5_000),
        (
            "rpm: user 's1' is over its rate limit (limit 60 calls per 1m, used 60, requested 1). "
            "Try again at 2026-11-21T10:00:05Z."
        ),
    ),
    "bucket": (
        stuck(meter(Rule.RATE, 60, policy="rpm", window=Bucket(60_000, 5)), used=5, wait_ms=1_000),
        (
            "rpm: user 's1' is over its rate limit (limit 60 calls per 1m in bursts of 5, used 5, requested 1). "
            "Try again at 2026-11-21T10:00:01Z."
        ),
    ),
    "slots": (
        stuck(meter(Rule.SLOTS, 4), used=0, held=4),
        (
            "slots: user 's1' has as many calls in flight as it may have "
            "(limit 4 at a time, used 0, held by calls in flight 4, requested 1). Try again when one of them has ended."
        ),
    ),
    "budget": (
        stuck(meter(Rule.BUDGET, 10 * NANO), amount=NANO // 8, used=10 * NANO, wait_ms=HOUR_MS),
        (
            "budget: user 's1' has used up its 1d budget (limit $10.00, used $10.00, requested $0.125). "
            "It resets at 2026-11-21T11:00:00Z."
        ),
    ),
    "held": (
        stuck(meter(Rule.BUDGET, 10 * NANO), amount=NANO, used=9 * NANO, held=NANO, wait_ms=HOUR_MS),
        (
            "budget: calls in flight hold the rest of the 1d budget of user 's1' "
            "(limit $10.00, used $9.00, held by calls in flight $1.00, requested $1.00). Try again when they have settled."
        ),
    ),
    "never": (
        stuck(meter(Rule.QUOTA, 10, window=Calendar("month")), amount=11, used=0),
        (
            "quota: this request alone is more than the whole monthly token quota of department 's1' "
            "(limit 10 tokens, used 0, requested 11). Waiting does not help: ask for less, or have the limit raised."
        ),
    ),
    "nothing allowed": (
        stuck(meter(Rule.ITERATIONS, 0), used=0),
        (
            "iterations: this request alone is more than the whole limit of session 's1' "
            "(limit 0 calls, used 0, requested 1). A limit of 0 blocks every call; have the limit raised."
        ),
    ),
    "no reset": (
        stuck(meter(Rule.QUOTA, 1, unit=Unit.CALLS, scope="global", subject=""), used=1),
        (
            "quota: the service has used up its daily quota (limit 1 call, used 1, requested 1). "
            "It does not reset by itself: ask for less, or have the limit raised."
        ),
    ),
    "ids": (
        stuck(meter(Rule.IDS, 3), used=3, wait_ms=1_000),
        (
            "ids: caller 's1' has too many live sessions to open another (limit 3 live ids, used 3, requested 1). "
            "It resets at 2026-11-21T10:00:01Z."
        ),
    ),
}


@pytest.mark.parametrize("receipt, message", [pytest.param(*row, id=name) for name, row in MESSAGES.items()])
def test_messages_say_what_is_over_and_what_to_do(receipt: Receipt, message: str) -> None:
    """A message names the policy, whose limit it is, what was seen, and the next step."""
    assert deny(refused(receipt), None).message == message


def test_a_zero_limit_of_others_is_not_told() -> None:
    """A limit of 0 on a shared scope reads like any other request that can never fit."""
    denied = deny(refused(stuck(meter(Rule.QUOTA, 0, owned=False), used=0)), None)
    assert denied.message == (
        "quota: this request alone is more than the whole daily token quota of this department (requested 1). "
        "Waiting does not help: ask for less, or have the limit raised."
    )


def test_an_id_cannot_break_a_line_of_a_log() -> None:
    """T16: control characters of an id are escaped in messages, and long ids are cut."""
    denied = deny(refused(stuck(meter(Rule.ITERATIONS, subject="a\r\nX: y\x1b[31m" + "z" * 500))), None)
    assert denied.message.isprintable()
    assert len(denied.message) < 400


def test_reset_is_told_in_utc_whatever_the_host() -> None:
    """Conformance 48: the reset time of a refusal is UTC whatever the host's time zone is."""
    code = "from asgi_llm_guard.denials.wording import utc; print(utc(1795255200000))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TZ": "America/New_York"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "2026-11-21T10:00:00Z"


def test_an_instant_is_rounded_up() -> None:
    """An instant inside a second is told as the next one, so that coming back then is not too early."""
    assert utc(NOW_MS) == "2026-11-21T10:00:00Z"
    assert utc(NOW_MS + 1) == "2026-11-21T10:00:01Z"


@pytest.mark.parametrize(
    "window, text",
    [
        (Calendar("hour"), "hourly"),
        (Calendar("year"), "yearly"),
        (Rolling(7 * 86_400_000), "7d"),
        (Sliding(90_000), "90s"),
        (Bucket(60_000, 5), "1m"),
        (Lifetime(12 * HOUR_MS), "12h"),
        (Distinct(1_500), "1500ms"),
        (Slots(), None),
    ],
)
def test_period_reads_as_it_is_configured(window: Window, text: str | None) -> None:
    """A window's length is told in the grammar that configures it; slots have none."""
    assert period(window) == text


# ------------------------------------------------------------------------------------- what fits

MAX = 2**20


def call_of(*, tokens: int, per_choice: int, choices: int, picousd: int = 0, input_nanousd: int = 0) -> Call:
    cost = input_nanousd + -(-picousd * per_choice // 1000)
    return Call(
        model="m",
        input_tokens=tokens,
        output_tokens=per_choice * choices,
        choices=choices,
        cost_nanousd=cost,
        input_nanousd=input_nanousd,
        output_picousd=picousd,
    )


@given(
    tokens=st.integers(0, MAX),
    per_choice=st.integers(1, MAX),
    choices=st.integers(1, 8),
    picousd=st.integers(1, 10**8),
    input_nanousd=st.integers(0, 10**9),
    used=st.integers(0, MAX),
    held=st.integers(0, MAX),
    limits=st.tuples(st.integers(0, 2 * MAX), st.integers(0, 10**12)),
)
def test_fits_max_tokens_is_the_largest_that_fits(
    tokens: int,
    per_choice: int,
    choices: int,
    picousd: int,
    input_nanousd: int,
    used: int,
    held: int,
    limits: tuple[int, int],
) -> None:
    """With the named output limit every refusing meter fits, and with one more it does not."""
    call = call_of(tokens=tokens, per_choice=per_choice, choices=choices, picousd=picousd, input_nanousd=input_nanousd)
    assert call.cost_nanousd is not None
    quota, budget = meter(Rule.QUOTA, limits[0]), meter(Rule.BUDGET, limits[1])
    receipts = [
        stuck(on, amount=amount, used=used, held=held)
        for on, amount in ((quota, call.total_tokens), (budget, call.cost_nanousd))
        if used + held + amount > capacity(on)
    ]

    def fits(most: int) -> bool:
        sizes = {Unit.TOKENS: tokens + choices * most, Unit.NANOUSD: input_nanousd + -(-picousd * most // 1000)}
        return all(
            used + held + sizes[receipt.claim.meter.unit] <= capacity(receipt.claim.meter) for receipt in receipts
        )

    most = fits_max_tokens(receipts, call)
    if not receipts:
        assert most is None
    elif most is None:
        assert not fits(1)
    else:
        assert 1 <= most < per_choice
        assert fits(most)
        assert not fits(most + 1)


def test_what_would_fit_is_told_for_an_owned_scope() -> None:
    """A refusal because the bound alone does not fit says which output limit would."""
    call = call_of(tokens=100, per_choice=1000, choices=1)
    denied = deny(refused(stuck(meter(Rule.QUOTA, 600, owned=True), amount=1100, used=0)), call)
    assert denied.fits_max_tokens == 500
    assert denied.message.endswith(" It would fit with max_tokens ≤ 500.")


def test_what_would_fit_is_not_told_in_words_for_a_shared_scope() -> None:
    """For a shared scope the message keeps quiet; a field may say what trying would show as well."""
    call = call_of(tokens=100, per_choice=1000, choices=1)
    shared = stuck(meter(Rule.QUOTA, 600, owned=False), amount=1100, used=0)
    denied = deny(refused(shared), call)
    assert denied.fits_max_tokens == 500
    assert "max_tokens" not in denied.message
    assert "max_tokens ≤ 500" in deny(refused(shared), call, disclose="all").message
    own = stuck(meter(Rule.QUOTA, 900), amount=1100, used=0)
    assert "max_tokens" not in deny(refused(own, shared), call).message


def test_what_would_fit_of_output_only() -> None:
    """A meter that counts output tokens only leaves all of its room to the output."""
    call = call_of(tokens=100, per_choice=50, choices=2)
    assert fits_max_tokens([stuck(meter(Rule.QUOTA, 80), amount=100, used=20, held=10)], call) == 25


@pytest.mark.parametrize(
    "receipt",
    [
        stuck(meter(Rule.RATE)),
        stuck(meter(Rule.SLOTS)),
        stuck(meter(Rule.QUOTA, 50), amount=100),  # counts the input alone
        stuck(meter(Rule.QUOTA, 100), amount=1100),  # the input alone leaves no room
        stuck(meter(Rule.BUDGET, 10), amount=11),  # counts something else than the call's cost
    ],
)
def test_nothing_would_fit_where_output_is_not_the_matter(receipt: Receipt) -> None:
    """No output limit is promised where a shorter answer would not have been admitted either."""
    call = call_of(tokens=100, per_choice=1000, choices=1, picousd=1)
    helps = stuck(meter(Rule.QUOTA, 600, policy="helps"), amount=1100, used=0)
    assert fits_max_tokens([helps], call) == 500
    assert fits_max_tokens([helps, receipt], call) is None


def test_nothing_would_fit_for_an_unknown_call() -> None:
    """Without a described call nothing is known of its output."""
    assert fits_max_tokens([stuck(meter(Rule.QUOTA))], None) is None


# -------------------------------------------------------------------------------------- statuses


def test_statuses_can_be_set() -> None:
    """A status set on the meter wins over the guard's by code, that over the guard's by rule, that over the table."""
    spent = stuck(meter(Rule.BUDGET), wait_ms=HOUR_MS)
    by_rule = check_statuses({"budget": 422})
    by_both = check_statuses({"budget": 422, "budget_exhausted": 403})
    assert deny(refused(spent), None, statuses=check_statuses({"quota": 422})).status == 402
    assert deny(refused(spent), None, statuses=by_rule).status == 422
    assert deny(refused(spent), None, statuses=by_both).status == 403
    assert deny(refused(stuck(meter(Rule.BUDGET, status=429))), None, statuses=by_both).status == 429


def test_statuses_of_own_refusals_can_be_set() -> None:
    """A refusal's own status wins over the guard's, that over the table."""
    plain = Refusal(policy="p", code="model_unpriced", message="m")
    assert refuse(plain, statuses=check_statuses({"model_unpriced": 422})).status == 422
    own = Refusal(policy="p", code="model_unpriced", message="m", status=404)
    assert refuse(own, statuses=check_statuses({"model_unpriced": 422})).status == 404


@pytest.mark.parametrize("status", [401, 408, 409, 200, 399, 600, True, "429", 429.0, None])
def test_statuses_that_clients_misread_are_refused(status: object) -> None:
    """401, 408 and 409, and what is no error status at all, are configuration errors that name the setting."""
    with pytest.raises(ConfigurationError, match=r"budget\.status: expected a status"):
        check_status(status, name="budget.status")


def test_statuses_of_unknown_codes_are_refused() -> None:
    """A misspelt code or rule is a configuration error that lists the known ones."""
    assert check_status(422) == 422
    with pytest.raises(ConfigurationError, match=r"expected one of rate, .*budget_exhausted.*, got 'budgets'"):
        check_statuses({"budgets": 402})
    with pytest.raises(ConfigurationError, match=r"statuses\['budget'\]: expected a status"):
        check_statuses({"budget": 409})


# -------------------------------------------------------------------------------------- providers


def provider(name: str, limit: int | None) -> Meter:
    return meter(Rule.BUDGET, limit, policy="providers", scope="provider", subject=name, owned=False)


def test_provider_lines_list_every_provider() -> None:
    """B3: every provider's spend and limit are listed, with the soonest reset."""
    readings = [
        (provider("openai", 100 * NANO), Reading(99 * NANO, NANO, NOW_MS + HOUR_MS)),
        (provider("anthropic", 50 * NANO), Reading(50 * NANO, 0, NOW_MS + 1_000)),
        (provider("mistral", NANO), Reading(NANO, 0, NOW_MS + 2_000)),
        (provider("local", None), Reading(NANO, 0, None)),
    ]
    assert provider_lines(readings, disclose="all") == (
        "openai: $99.00 of $100.00 spent, $1.00 held, resets at 2026-11-21T11:00:00Z",
        "anthropic: $50.00 of $50.00 spent, resets at 2026-11-21T10:00:01Z",
        "mistral: $1.00 of $1.00 spent, resets at 2026-11-21T10:00:02Z",
        "local: $1.00 of no limit spent",
        "soonest reset: anthropic at 2026-11-21T10:00:01Z",
    )


def test_provider_lines_keep_amounts_from_callers() -> None:
    """What the service spends with a provider is not shown to those who do not own it."""
    readings = [
        (provider("openai", 100 * NANO), Reading(99 * NANO, NANO, None)),
        (provider("anthropic", 50 * NANO), Reading(49 * NANO, 0, None)),
    ]
    assert provider_lines(readings, disclose="owned") == (
        "openai: budget spent",
        "anthropic: budget not enough for this request",
    )


def test_capacity_needs_a_limit() -> None:
    """A meter without a limit cannot refuse, and asking for its capacity is an error that says so."""
    with pytest.raises(ValueError, match="a meter without a limit"):
        capacity(meter(Rule.QUOTA, None))
