from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.values import DAY_MS, HOUR_MS

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT, NANO
from asgi_llm_guard.policies.grammar import Limit, cents, parse_limit, parse_limits, whole
from asgi_llm_guard.windows import Calendar, Lifetime, Rolling, Slots

FOREVER = Lifetime(HOUR_MS, renew=True)

GOOD: list[tuple[object, int | None, Unit, Lifetime | Rolling | Calendar]] = [
    ("$5/1d", 5 * NANO, Unit.NANOUSD, Rolling(DAY_MS)),
    (" $ 5 / 1d ", 5 * NANO, Unit.NANOUSD, Rolling(DAY_MS)),
    ("$0.000000001/30s", 1, Unit.NANOUSD, Rolling(30_000)),
    ("$1,000/1mo", 1000 * NANO, Unit.NANOUSD, Rolling(30 * DAY_MS)),
    ("$100/monthly", 100 * NANO, Unit.NANOUSD, Calendar("month", "Europe/Berlin")),
    ("$0/1d", 0, Unit.NANOUSD, Rolling(DAY_MS)),
    ("$3", 3 * NANO, Unit.NANOUSD, FOREVER),
    ("200000 tokens/1d", 200_000, Unit.TOKENS, Rolling(DAY_MS)),
    ("200_000 tokens/daily", 200_000, Unit.TOKENS, Calendar("day", "Europe/Berlin")),
    ("1 token", 1, Unit.TOKENS, FOREVER),
    ({"budget_limit": 100, "time_period": "1d"}, 100 * NANO, Unit.NANOUSD, Rolling(DAY_MS)),
    ({"budget_limit": "0.5", "time_period": "12h"}, NANO // 2, Unit.NANOUSD, Rolling(12 * HOUR_MS)),
    ({"budget_limit": 0.1}, NANO // 10, Unit.NANOUSD, FOREVER),
    ({"tokens": "500", "time_period": "weekly"}, 500, Unit.TOKENS, Calendar("week", "Europe/Berlin")),
    ({"time_period": "1d"}, None, Unit.NANOUSD, Rolling(DAY_MS)),
    ({"budget_limit": None, "time_period": "1d"}, None, Unit.NANOUSD, Rolling(DAY_MS)),
    (Limit(amount=7, unit=Unit.TOKENS, window=FOREVER), 7, Unit.TOKENS, FOREVER),
]

BAD: list[tuple[object, str]] = [
    ("5/1d", "expected '\\$5/1d'"),
    ("", "expected '\\$5/1d'"),
    ("$", "expected dollars"),
    ("$five/1d", "expected dollars"),
    ("$-5/1d", "must not be negative"),
    ("$nan/1d", "finite"),
    ("$inf/1d", "finite"),
    ("$1e-10/1d", "below one nano-dollar"),
    ("$99999999/1d", "at most"),
    ("$5/", "got ''"),
    ("$5/1x", "got '1x'"),
    ("$5/0d", "got '0d'"),
    ("$5/1d/2d", "got '1d/2d'"),
    ("$5/-1d", "got '-1d'"),
    ("-5 tokens/1d", "whole number"),
    ("1.5 tokens/1d", "whole number"),
    ("9007199254740992 tokens/1d", "whole number"),
    ("5 calls/1d", "expected '\\$5/1d'"),
    ("tokens/1d", "expected '\\$5/1d'"),
    (5, "expected '\\$5/1d'"),
    (True, "expected '\\$5/1d'"),
    (None, "expected '\\$5/1d'"),
    ({}, "expected '\\$5/1d'"),
    ({"limit": 5}, "expected '\\$5/1d'"),
    ({"budget_limit": None}, "expected '\\$5/1d'"),
    ({"budget_limit": True, "time_period": "1d"}, "expected dollars"),
    ({"budget_limit": float("nan"), "time_period": "1d"}, "finite"),
    ({"budget_limit": -1, "time_period": "1d"}, "must not be negative"),
    ({"budget_limit": 1, "tokens": 1}, "either budget_limit or tokens"),
    ({"budget_limit": 1, "time_period": 86400}, "time_period"),
    ({"tokens": 1.5}, "whole number"),
]


@pytest.mark.parametrize("value, amount, unit, window", GOOD, ids=[repr(row[0]) for row in GOOD])
def test_limits(value: object, amount: int | None, unit: Unit, window: Lifetime | Rolling | Calendar) -> None:
    """B1, conformance 14: text, mappings and typed values say the same in their own ways."""
    assert parse_limit(value, lifetime=FOREVER, tz="Europe/Berlin") == Limit(amount=amount, unit=unit, window=window)


@pytest.mark.parametrize("value, message", BAD, ids=[repr(row[0]) for row in BAD])
def test_malformed_limits(value: object, message: str) -> None:
    """B1: anything else is a configuration error that names the setting and says what is allowed."""
    with pytest.raises(ConfigurationError, match=message) as error:
        parse_limit(value, lifetime=FOREVER, name="my_limit")
    assert str(error.value).startswith("my_limit")


@given(
    st.one_of(
        st.text(),
        st.sampled_from([str(row[0]) for row in GOOD]),
        st.integers(),
        st.floats(),
        st.dictionaries(st.sampled_from(["budget_limit", "time_period"]), st.text()),
    )
)
def test_nothing_else_is_raised(value: object) -> None:
    """Whatever is written, the answer is a limit or a configuration error."""
    try:
        limit = parse_limit(value, lifetime=FOREVER)
    except ConfigurationError:
        return
    assert limit.amount is None or 0 <= limit.amount <= MAX_AMOUNT


def test_several_windows() -> None:
    """A list holds several windows; money and tokens may share one."""
    limits = parse_limits(["$5/1d", "$50/monthly", "100 tokens/1d"], lifetime=FOREVER)
    assert [str(limit) for limit in limits] == ["$5.00", "$50.00", "100 tokens"]


@pytest.mark.parametrize(
    "value, message", [([], "at least one limit"), (["$5/1d", "$6/24h"], "same window"), (["$5/1d", 3], "expected")]
)
def test_malformed_lists(value: object, message: str) -> None:
    """An empty list, or two limits of one unit over one window, is a configuration error."""
    with pytest.raises(ConfigurationError, match=message):
        parse_limits(value, lifetime=FOREVER)


@pytest.mark.parametrize(
    "amount, unit, window, message",
    [
        (-1, Unit.TOKENS, FOREVER, "amount"),
        (1, Unit.CALLS, FOREVER, "unit"),
        (1, Unit.TOKENS, Slots(), "window"),
    ],
)
def test_typed_limits_are_checked(amount: int, unit: Unit, window: Lifetime, message: str) -> None:
    """B1: a typed limit is checked like a written one."""
    with pytest.raises(ConfigurationError, match=message):
        Limit(amount=amount, unit=unit, window=window)


def test_a_counted_limit_reads_so() -> None:
    """A limit without an amount says that it is none."""
    assert str(Limit(amount=None, unit=Unit.NANOUSD, window=FOREVER)) == "unlimited nanousd"


@pytest.mark.parametrize("value, number", [(0, 0), ("25", 25), (" 1_000 ", 1000), (MAX_AMOUNT, MAX_AMOUNT)])
def test_whole_numbers(value: object, number: int) -> None:
    """A3: numbers given as text are taken for the number."""
    assert whole(value, name="limit") == number


@pytest.mark.parametrize("value, nano", [(1250, 12_500_000_000), ("0.5", 5_000_000), (Decimal(1), 10_000_000), (0, 0)])
def test_cents(value: object, nano: int) -> None:
    """C5: cents are a hundredth of a dollar, exactly."""
    assert cents(value, name="cost") == nano


@pytest.mark.parametrize(
    "value", [True, None, "$5", "many", -1, float("nan"), float("inf"), "1e999999", 10**12], ids=repr
)
def test_malformed_cents(value: object) -> None:
    """C5: anything that is not a price in cents is a configuration error."""
    with pytest.raises(ConfigurationError, match="cost"):
        cents(value, name="cost")
