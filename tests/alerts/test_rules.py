"""Which counters a rule is about, and what it makes of their windows."""

from __future__ import annotations

import pytest
from tests.storage.values import DAY_MS, HOUR_MS, START_MS, WINDOWS, meter

from asgi_llm_guard.alerts import Alerts, BurnRate, Threshold
from asgi_llm_guard.alerts.rules import crossed, instance_of, is_fixed, period_ms
from asgi_llm_guard.claims import Meter, Rule
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import Calendar, Distinct, Slots, Window


def on(
    window: Window, *, policy: str = "policy", rule: Rule = Rule.BUDGET, limit: int | None = 100, enforce: bool = True
) -> Meter:
    from msgspec.structs import replace

    return replace(meter(window, limit, policy=policy, enforce=enforce), rule=rule)


DAY = Calendar("day")


def test_a_pattern_means_budgets_and_quotas() -> None:
    """`*` is about money and quotas; what refills by the second has to be named."""
    for rule in Rule:
        billed = rule in (Rule.BUDGET, Rule.QUOTA)
        assert Threshold().matches(on(DAY, rule=rule)) is billed
        assert Threshold(policy="p*").matches(on(DAY, rule=rule)) is billed
        assert Threshold(policy="policy").matches(on(DAY, rule=rule))
        assert BurnRate().matches(on(DAY, rule=rule)) is billed
    assert not Threshold(policy="other").matches(on(DAY))
    assert not Threshold(policy="Policy").matches(on(DAY))


def test_scopes_limits_and_shadow() -> None:
    """S3: a rule may name a scope; without a limit there is nothing to tell, and of shadow policies only if asked."""
    assert Threshold(scope="user").matches(on(DAY))
    assert Threshold(scope="u*").matches(on(DAY))
    assert not Threshold(scope="department").matches(on(DAY))
    assert not Threshold().matches(on(DAY, limit=None))
    assert not Threshold().matches(on(DAY, limit=0))
    assert not Threshold().matches(on(DAY, enforce=False))
    assert Threshold(shadow=True).matches(on(DAY, enforce=False))
    assert not BurnRate().matches(on(DAY, enforce=False))


def test_windows_that_cannot_be_used_up() -> None:
    """Slots and ids are never worth an alert; a burn rate needs a window that does not drain, and is longer than its own."""
    for window in (Slots(), Distinct(HOUR_MS)):
        assert not Threshold(policy="policy").matches(on(window))
    assert [name for name, window in WINDOWS.items() if BurnRate(window="1m").matches(on(window))] == [
        "lifetime",
        "rolling",
        "calendar",
    ]
    assert not BurnRate(window="1d").matches(on(WINDOWS["rolling"]))


def test_percents_are_exact() -> None:
    """A threshold is crossed at its percent and not a nano below it."""
    assert crossed(80, 80, 100)
    assert not crossed(79, 80, 100)
    assert crossed(1, 33.3, 3)
    assert not crossed(9_007_199_254_740_990, 100, 9_007_199_254_740_991)
    assert crossed(9_007_199_254_740_991, 100, 9_007_199_254_740_991)


def test_what_just_lasts() -> None:
    """A burn rate is measured against the limit spread over its window, which for a calendar is as long as it is."""
    month = on(Calendar("month"), limit=744)
    assert BurnRate(window="1h", times=10).worth(month, START_MS) == 10
    assert BurnRate(window="1h", times=0.1).worth(month, START_MS) == 1


def test_instances() -> None:
    """Fixed windows are named by their end; those that slide, drain or are renewed have no instances."""
    assert [name for name, window in WINDOWS.items() if is_fixed(window)] == ["lifetime", "rolling", "calendar"]
    assert instance_of(DAY, START_MS) == str(START_MS)
    assert instance_of(DAY, None) == ""
    assert instance_of(WINDOWS["sliding"], START_MS) == ""
    assert [period_ms(window, START_MS) for window in WINDOWS.values()] == [
        HOUR_MS, HOUR_MS, DAY_MS, DAY_MS, HOUR_MS, DAY_MS, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: Threshold(at=()),
        lambda: Threshold(at=(0,)),
        lambda: Threshold(at=(1001,)),
        lambda: Threshold(at=(True,)),
        lambda: Threshold(at="80"),  # type: ignore[arg-type]
        lambda: Threshold(at=b"80"),  # type: ignore[arg-type]
        lambda: Threshold(at=80),  # type: ignore[arg-type]
        lambda: Threshold(policy=""),
        lambda: Threshold(scope=7),  # type: ignore[arg-type]
        lambda: Threshold(of="spent"),  # type: ignore[arg-type]
        lambda: BurnRate(times=0),
        lambda: BurnRate(window="30s"),
        lambda: BurnRate(window="31d"),
        lambda: BurnRate(window="hour"),
        lambda: Alerts([object()]),  # type: ignore[list-item]
        lambda: Alerts(webhooks=["https://h.example"]),  # type: ignore[list-item]
        lambda: Alerts(patience="1s"),
    ],
    ids=range(17),
)
def test_rules_that_say_nothing(make: object) -> None:
    """What cannot be is refused at construction."""
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]


def test_thresholds_are_ordered_and_once() -> None:
    """Percents are kept in their order, each once."""
    assert Threshold(at=(100, 50, 50)).at == (50, 100)
