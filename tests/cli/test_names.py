"""Rules that are about nothing: `check` lists them, and `serve` does not start with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.cli.kit import call, document, fill, settings

from asgi_llm_guard import Budget, Iterations
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.doctor import Known, Named, examine_names, examine_raises, named_by
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.stops import Stop

NOW_MS = 1_795_269_600_000
LATER_MS = NOW_MS + 3_600_000
BUDGET = '[[policies]]\nkind = "budget"\nlimits = ["$5/1d"]\nper = "user"\nname = "user_budget"\n'
GATEWAY = '[gateway]\n[[gateway.deployments]]\nprovider = "openai"\nmodel_name = "gpt-4o"\napi_key = "key-of-nobody"\n'


def known(**fields: Any) -> Known:
    policies = (Budget("$5/1d", per="user", name="user_budget"), Iterations(9))
    return Known(policies=policies, prices=PriceBook.snapshot(), **fields)


def found(named: list[Named], **fields: Any) -> list[tuple[str, str, str]]:
    return [(each.severity, each.code, each.next_step) for each in examine_names(named, known(**fields))]


def of(kind: Any, name: str, **fields: Any) -> Named:
    return Named(kind=kind, name=name, where="a rule", **fields)


@pytest.mark.parametrize(
    "named",
    [
        of("policy", "user_budget"),
        of("policy", "user_*"),
        of("policy", "*"),
        of("policy", "mine"),
        of("scope", "user", of="user_budget"),
        of("scope", "us*"),
        of("scope", "anything", of="mine"),
        of("department", "research"),
        of("agent", "writer"),
        of("model", "openai/gpt-4o"),
        of("model", "gpt-4o"),
        of("model", "our/own"),
        of("model", "own"),
        of("model", "openai/*"),
        of("model", "our/*"),
    ],
    ids=str,
)
def test_what_is_known_is_not_told(named: Named) -> None:
    """S20: a name that something is called by, a pattern that fits, and what nobody can tell are no findings."""
    assert found([named], others=["mine"], departments=["research"], agents=["writer"], models=["our/own"]) == []


@pytest.mark.parametrize(
    ("named", "severity", "said"),
    [
        (of("policy", "user_budgets"), "warning", "did you mean 'user_budget'?"),
        (of("policy", "User_Budget"), "warning", "did you mean 'user_budget'?"),
        (of("policy", "quota*"), "warning", "known are user_budget, iterations"),
        (of("scope", "departments", of="user_budget"), "warning", "known are user"),
        (of("scope", "users"), "warning", "did you mean 'user'?"),
        (of("department", "reserch"), "warning", "did you mean 'research'?"),
        (of("department", "legal"), "note", "known are research"),
        (of("agent", "writer"), "note", "the configuration names no agent"),
        (of("model", "openai/gpt-4oo"), "warning", "did you mean 'openai/gpt-4o'?"),
        (of("model", "acme/unheard-of"), "note", "the configuration names no model"),
        (of("model", "acme/*"), "note", "the configuration names no model"),
    ],
    ids=str,
)
def test_what_is_not_known_is_told_with_what_is_near(named: Named, severity: str, said: str) -> None:
    """S20: a name that nothing has is told, with the one that it may be a slip of; without one it may be a caller's own."""
    ((seen, code, next_step),) = found([named], departments=["research"])
    assert (seen, code) == (severity, f"unknown_{named.kind}")
    assert said in next_step


def test_where_no_code_can_have_other_policies_it_is_an_error() -> None:
    """S20: a service that is run from the settings alone has no policies but theirs."""
    assert [severity for severity, *_ in found([of("policy", "nothing")], whole=True)] == ["error"]


def test_what_raises_and_stops_are_about() -> None:
    """S20: of raises and stops that hold now: policies, departments, agents, models; users and sessions nobody knows."""
    raises = [
        Raise(policy="a", unit="usd", amount=1, until_ms=LATER_MS, scope="department", subject="hr", id="r1"),
        Raise(policy="b", unit="usd", amount=1, until_ms=LATER_MS, scope="user", subject="mia"),
        Raise(policy="ended", unit="usd", amount=1, until_ms=NOW_MS),
    ]
    stops = [
        Stop(scope="agent", subject="bot", id="s1"),
        Stop(scope="model", subject="gpt-4o"),
        Stop(scope="user", subject="mia"),
        Stop(scope="all"),
        Stop(scope="department", subject="old", until_ms=NOW_MS),
    ]
    assert [(each.kind, each.name, each.where) for each in named_by(raises, stops, NOW_MS)] == [
        ("policy", "a", "the raise 'r1'"),
        ("department", "hr", "the raise 'r1'"),
        ("policy", "b", "a raise of b"),
        ("agent", "bot", "the stop 's1'"),
        ("model", "gpt-4o", "a stop"),
    ]


def test_raises_of_limits_that_a_policy_has_not() -> None:
    """S20: a raise in another unit or scope than its policy counts in lifts nothing, and is told; one that has ended is not."""
    policies = known().policies

    def told(**fields: Any) -> list[str]:
        values: dict[str, Any] = {"policy": "user_budget", "unit": "usd", "amount": 1, "until_ms": LATER_MS, "id": "r1"}
        return [each.seen for each in examine_raises([Raise(**values | fields)], policies, NOW_MS)]

    assert told() == told(policy="another", unit="slots") == told(unit="tokens", until_ms=NOW_MS) == []
    assert told(unit="tokens") == [
        "the raise 'r1': raise of user_budget: it has no limit in tokens; it counts usd: it has no effect"
    ]
    assert told(scope="department", id="") == [
        "raise of user_budget: it counts per user, not per 'department': it has no effect"
    ]


def test_program_lists_rules_without_effect(tmp_path: Path) -> None:
    """S20: alert rules with their line, raises and stops with their id: each that is about nothing, with a suggestion."""
    fill(tmp_path, calls=1)
    alerts = '[[alerts.thresholds]]\npolicy = "user_budgt"\n[[alerts.burn_rates]]\npolicy = "user_*"\nscope = "usr"\n'
    text = f'{BUDGET}{alerts}[agents.writer]\nmax_iterations = 5\n[control]\nurl = "sqlite:///{tmp_path}/control.db"\n'
    file = settings(tmp_path, text)

    async def administer() -> None:
        control, actor, until_ms = Control(f"sqlite:///{tmp_path}/control.db"), Actor(name="anna"), 10**13
        lifted = {"policy": "user_budgets", "unit": "usd", "amount": 1, "until_ms": until_ms}
        await control.put("raise", "more", lifted, actor=actor)
        await control.put("department", "research", {"daily_tokens": 5}, actor=actor)
        for scope, subject in (("department", "reserch"), ("agent", "writers"), ("agent", "writer")):
            await control.put("stop", f"{scope}:{subject}", {"scope": scope, "subject": subject}, actor=actor)
        await control.aclose()

    asyncio.run(administer())
    findings = document("check", "--config", file, code=1)["findings"]
    told = {
        each["code"] + " " + each["seen"].partition(": no ")[0]: each["next_step"]
        for each in findings
        if each["code"].startswith("unknown_")
    }
    assert told == {
        f"unknown_policy {file}, line 8: alerts.thresholds[0].policy": "did you mean 'user_budget'?",
        f"unknown_scope {file}, line 11: alerts.burn_rates[0].scope": "did you mean 'user'?",
        "unknown_policy the raise 'more'": "did you mean 'user_budget'?",
        "unknown_department the stop 'department:reserch'": "did you mean 'research'?",
        "unknown_agent the stop 'agent:writers'": "did you mean 'writer'?",
    }


def test_serve_does_not_start_with_an_alert_about_nothing(tmp_path: Path) -> None:
    """S3: where the settings have all policies, an alert rule about none is a mistake, with its line; `check` says so, too."""
    fill(tmp_path, calls=1)
    alerts = '[[alerts.thresholds]]\npolicy = "deployment_limits"\n[[alerts.thresholds]]\npolicy = "user_budgt"\n'
    file = settings(tmp_path, f"{BUDGET}{alerts}{GATEWAY}")
    said = f"Error: {file}, line 10: alerts.thresholds[1].policy: there is no policy 'user_budgt'; did you mean 'user_budget'?"
    for workers in "1", "2":
        ran = call("serve", "--workers", workers, "--config", file)
        assert (ran.exit_code, ran.stderr.strip()) == (3, said)
    findings = document("check", "--config", file, code=1)["findings"]
    assert [each["severity"] for each in findings if each["code"] == "unknown_policy"] == ["error"]
