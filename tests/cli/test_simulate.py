"""Simulations: what a period would have been like under other policies, and how far they agree with shadows."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest
from tests.cli.kit import call, document, fill, settings
from tests.cli.traffic import Traffic

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    ModelAllow,
    RateLimit,
    Route,
    Usage,
)
from asgi_llm_guard.cli.considered import Holder, Holders
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Event, ShadowMisfit
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.simulate import Agreement, Misfit, Simulation, Simulator, agreement, agreement_of_counts, compare
from asgi_llm_guard.simulate.report import MOST_SUBJECTS, Tally
from asgi_llm_guard.usage import UsageRecord


class Watchable(Policy, Protocol):
    """A policy that has a shadow."""

    def shadow(self) -> Policy: ...


T0 = 1_795_269_600_000  # 2026-11-21 14:00 UTC
DOLLAR = 10**9

CANDIDATES: list[Watchable] = [
    Iterations(4),
    Budget(["$0.05/hourly", "$0.50/daily"], per="user", name="user_budget"),
    Budget("$0.20/10m", per="department", name="department_budget"),
    RateLimit("5/minute", per="caller", name="caller_rate"),
    Concurrency(2, per="caller", name="caller_slots"),
    Budget("200000 tokens/1h", per="caller", name="caller_tokens"),
]


def record(number: int, at_s: float, *, lasts_s: float = 1, cost: int = DOLLAR, **fields: Any) -> UsageRecord:
    """One measured call of a dollar, held for two."""
    at_ms = T0 + round(at_s * 1000)
    values: dict[str, Any] = {
        "call_id": f"0a-{number:x}",
        "at_ms": at_ms,
        "ended_ms": at_ms + round(lasts_s * 1000),
        "caller": "team",
        "user": "mia",
        "provider": "openai",
        "model": "gpt-4o",
        "usage": Usage(input_tokens=100, output_tokens=50),
        "tokens": 150,
        "cost_nanousd": cost,
        "estimate_nanousd": 2 * DOLLAR,
    }
    return UsageRecord(**values | fields)


def replay(
    policies: Sequence[Policy], records: Sequence[UsageRecord], *, since_ms: int = 0, **options: Any
) -> tuple[Simulation, list[Misfit]]:
    found: list[Misfit] = []

    async def batches() -> AsyncIterator[Sequence[UsageRecord]]:
        for start in range(0, len(records), 500):
            yield records[start : start + 500]

    simulator = Simulator(policies, found=found.append, **options)
    return asyncio.run(simulator.run(batches(), since_ms=since_ms)), found


def compared(requests: int, *, span_s: int, seed: int = 7) -> tuple[Agreement, Traffic, Simulation]:
    """Traffic through a guard with shadows, replayed, and compared: calls by id, requests by theirs."""
    traffic = Traffic([policy.shadow() for policy in CANDIDATES], requests=requests, span_s=span_s, seed=seed)
    records = asyncio.run(traffic.run())
    request_of = {each.call_id: each.request_id or "" for each in records}
    by_request = {policy.name for policy in CANDIDATES if policy.counts == "requests"}

    def key(call_id: str, policy: str) -> tuple[str, str]:
        return (request_of[call_id] if policy in by_request else call_id, policy)

    simulation, found = replay(CANDIDATES, records, apart=True)
    simulated = {key(misfit.call_id, misfit.policy) for misfit in found}
    reported = {key(call_id, policy) for call_id, policy in traffic.misfits if call_id in request_of}
    return agreement(simulated, reported, decisions=len(records) * len(CANDIDATES)), traffic, simulation


# ------------------------------------------------------------------------------ against shadows


def test_simulation_agrees_with_shadows() -> None:
    """W1, M14: replayed concurrent traffic gives what its shadows reported, call by call: at least 99 of 100 decisions,
    and of the misfits of either."""
    agreed, traffic, simulation = compared(500, span_s=1_500)
    assert traffic.refused == []
    assert simulation.records > 1_000
    assert agreed.both > 400
    assert agreed.share >= 0.99
    assert agreed.overlap >= 0.99
    assert {row.policy for row in simulation.policies} == {policy.name for policy in CANDIDATES}
    assert simulation.refused == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_simulation_agrees_with_shadows_at_length(seed: int) -> None:
    """W1, M14: as above, over 40,000 calls of different traffic."""
    agreed, _, simulation = compared(20_000, span_s=60_000, seed=seed)
    assert simulation.records > 35_000
    assert agreed.share >= 0.99
    assert agreed.overlap >= 0.99


@pytest.mark.slow
def test_simulation_agrees_with_shadows_of_real_threads(tmp_path: Path) -> None:
    """W1, M14: as above, over calls of eight threads at once on a SQLite storage, in real time: what overlapped within a
    millisecond is told apart by the order of ids alone. Slots are left out: calls of two milliseconds are shorter than
    the requests around them, of which the ledger knows nothing."""
    policies: list[Watchable] = [
        Budget("$0.05/1d", per="user", name="user_budget"),
        Iterations(12),
        RateLimit("150/1s", per="caller", name="caller_rate"),
    ]
    said: dict[str, set[str]] = {}

    def observe(event: Event) -> None:
        if isinstance(event, ShadowMisfit):
            said.setdefault(event.context.request_id or "", set()).add(event.policy.removesuffix(".shadow"))

    guard = Guard(
        [policy.shadow() for policy in policies], storage=f"sqlite:///{tmp_path / 'guard.db'}", observers=[observe]
    )

    def work(thread: int) -> None:
        draw = random.Random(thread)
        for number in range(400):
            context = Context(
                caller=f"caller-{thread % 2}",
                user=f"user-{draw.randrange(6)}",
                session=f"session-{draw.randrange(150)}",
                request_id=f"request-{thread}-{number}",
            )
            call = guard.call_sync(model="openai/gpt-4o", input_tokens=100, max_output_tokens=draw.randrange(10, 400))
            with guard.open_sync(context), call as made:
                made.record(Usage(input_tokens=100, output_tokens=draw.randrange(5, 100)))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, thread) for thread in range(8)]:
            done.result()

    async def recorded() -> Sequence[UsageRecord]:
        records = await guard.storage.records()
        await guard.aclose()
        return records

    records = asyncio.run(recorded())
    _, found = replay(policies, records, apart=True)
    simulated = {(misfit.request_id, misfit.policy) for misfit in found}
    reported = {(request, policy) for request, policies in said.items() for policy in policies}
    agreed = agreement(simulated, reported, decisions=len(records) * len(policies))
    assert len(records) == 3_200
    assert agreed.both > 1_000
    assert agreed.share >= 0.99, agreed


def test_program_agrees_with_what_shadows_reported(tmp_path: Path) -> None:
    """W1: `simulate --against shadow` compares with the counts that a running guard has kept, from one settings file."""
    policies: list[Watchable] = [Budget("$0.01/hourly", per="user", name="budget"), Iterations(8)]
    fill(tmp_path, [policy.shadow() for policy in policies], calls=200)
    budget = '[[policies]]\nkind = "budget"\nlimits = ["$0.01/hourly"]\nper = "user"\nname = "budget"\n'
    file = settings(tmp_path, f'{budget}[[policies]]\nkind = "iterations"\nlimit = 8\n')
    arguments = ("simulate", "--config", file, "--since", "2d", "--against", "shadow")
    told = document(*arguments)
    assert told["simulation"]["records"] == 200
    assert told["agreement"]["both"] > 20
    assert told["agreement"]["share"] >= 0.99
    assert "agree with what shadows reported" in call(*arguments).stdout


def test_a_simulation_that_disagrees_says_so(tmp_path: Path) -> None:
    """W1: other limits than those that the shadows had do not agree: exit 1."""
    fill(tmp_path, [Budget("$0.01/hourly", per="user", name="budget").shadow()], calls=200)
    file = settings(tmp_path, '[[policies]]\nkind = "budget"\nlimits = ["$9/hourly"]\nper = "user"\nname = "budget"\n')
    told = document("simulate", "--config", file, "--since", "2d", "--against", "shadow", code=1)
    assert told["agreement"]["share"] < 0.99


def test_without_reports_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """W1: a ledger in which no shadow has left a mark agrees with nothing: no percentage, and exit 1."""
    fill(tmp_path, calls=200)
    file = settings(
        tmp_path, '[[policies]]\nkind = "budget"\nlimits = ["$0.01/hourly"]\nper = "user"\nname = "budget"\n'
    )
    arguments = ("simulate", "--config", file, "--since", "2d", "--against", "shadow")
    told = document(*arguments, code=1)["agreement"]
    assert (told["share"], told["decisions"], told["policies"]) == (None, 0, [])
    assert told["not_compared"]["budget"] > 20
    said = call(*arguments).stdout
    assert "Nothing to compare" in said
    assert "the ledger has no report of a shadow of budget" in said
    assert "%" not in said


def test_only_what_was_reported_is_compared(tmp_path: Path) -> None:
    """W1: the percentage is of the policies that reported, and of the whole hours; what was not compared is named, and
    where it would have refused here, the exit code is 1."""
    shadow = Budget("$0.01/hourly", per="user", name="budget").shadow()
    fill(tmp_path, [shadow], calls=200)
    budget = '[[policies]]\nkind = "budget"\nlimits = ["$0.01/hourly"]\nper = "user"\nname = "budget"\n'
    wide = settings(tmp_path, f'{budget}[[policies]]\nkind = "iterations"\nlimit = 1000\n')
    arguments = ("simulate", "--config", wide, "--since", "2d", "--against", "shadow")
    told = document(*arguments)["agreement"]
    assert (told["policies"], told["not_compared"]) == (["budget"], {"iterations": 0})
    assert 0 < told["decisions"] == told["calls"] <= 200
    assert told["share"] >= 0.99
    assert "Not compared: the ledger has no report of a shadow of iterations:" in call(*arguments).stdout

    narrow = settings(tmp_path, f'{budget}[[policies]]\nkind = "iterations"\nlimit = 8\n')
    told = document("simulate", "--config", narrow, "--since", "2d", "--against", "shadow", code=1)["agreement"]
    assert told["not_compared"]["iterations"] > 0
    assert told["share"] >= 0.99


def test_hours_that_the_period_cuts_are_not_compared() -> None:
    """W1: reports are kept by the hour, so that only whole hours of the period are compared, and their calls alone count."""
    hour_ms = 3_600_000
    found, _ = replay(
        [Budget("$1/daily", per="user", name="budget")], [record(n, 1800 * n) for n in range(6)], apart=True
    )
    assert found.hourly == ((T0, 2), (T0 + hour_ms, 2), (T0 + 2 * hour_ms, 2))
    reports = [(T0, "budget", 99), (T0 + hour_ms, "budget", 1), (T0 + hour_ms, "another", 5)]
    told = compare(found, reports, ["budget", "other"], since_ms=T0 + 1, until_ms=T0 + 3 * hour_ms - 1)
    assert (told.since_ms, told.until_ms, told.calls) == (T0 + hour_ms, T0 + 2 * hour_ms, 2)
    assert told.agreement == Agreement(decisions=2, both=1, only_simulated=1, only_reported=0)
    assert (told.policies, dict(told.missing), told.holds) == (("budget",), {"other": 0}, False)

    none = compare(found, reports, ["budget"], since_ms=T0 + 1, until_ms=T0 + hour_ms)
    assert (none.since_ms, none.agreement, none.holds) == (none.until_ms, None, False)


# ------------------------------------------------------------------------------------- refusals


def test_refused_calls_take_nothing() -> None:
    """W1: in force, the first calls that fit are admitted, and what was refused leaves room for what comes later."""
    records = [record(number, 10 * number) for number in range(6)]
    found, misfits = replay([Budget("$3/daily", per="user", name="budget")], records)
    # Each takes two dollars until it is settled with one, so the third is the first that does not fit.
    assert [misfit.call_id for misfit in misfits] == ["0a-2", "0a-3", "0a-4", "0a-5"]
    assert (found.records, found.refused, found.refused_nanousd) == (6, 4, 4 * DOLLAR)
    (row,) = found.policies
    assert (row.policy, row.code, row.calls, row.first_ms) == ("budget", "budget_exhausted", 4, T0 + 20_000)
    (who,) = found.subjects
    assert (who.scope, who.subject, who.calls) == ("user", "mia", 4)


def test_what_is_held_counts_until_it_is_settled() -> None:
    """W1: calls at the same time hold their estimates, as they did; one after the other they do not."""
    together = [record(number, 0.001 * number, lasts_s=60) for number in range(3)]
    later = [record(number, 61 * number, lasts_s=60) for number in range(3)]
    budget = Budget("$4/daily", per="user", name="budget")
    assert replay([budget], together)[0].refused == 1
    assert replay([budget], later)[0].refused == 0


def test_waits_for_the_holds_of_others() -> None:
    """W1: a call that only the holds of others keep out is admitted if one of them ends within the wait, else refused."""
    budget = Budget("$2.5/daily", per="user", name="budget")
    soon = [record(1, 0, lasts_s=0.2, cost=0), record(2, 0.1)]
    late = [record(1, 0, lasts_s=5, cost=0), record(2, 0.1)]
    assert replay([budget], soon)[0].refused == 0
    found, misfits = replay([budget], late)
    assert [misfit.code for misfit in misfits] == ["held_by_others"]
    assert found.refused == 1
    assert replay([budget], soon, hold_wait_s=0)[0].refused == 1


def test_windows_end_in_a_replay() -> None:
    """W1: the clock of a replay is the records': a new hour, a new budget."""
    records = [record(number, 600 * number) for number in range(12)]
    found, misfits = replay([Budget("$3/hourly", per="user", name="budget")], records)
    assert [misfit.call_id for misfit in misfits] == ["0a-2", "0a-3", "0a-4", "0a-5", "0a-8", "0a-9", "0a-a", "0a-b"]
    assert [row.calls for row in found.hours] == [4, 4]


def test_records_before_the_period_fill_the_counters() -> None:
    """W1: what comes before `since_ms` counts and is not reported."""
    records = [record(number, 10 * number) for number in range(6)]
    found, _ = replay([Budget("$3/daily", per="user", name="budget")], records, since_ms=T0 + 40_000)
    assert (found.records, found.refused, found.first_ms) == (2, 2, T0 + 40_000)


def test_attempts_fall_with_their_call() -> None:
    """W1: attempts of one call take one iteration; those of a refused call are refused with it."""
    records = [
        record(1, 0, session="s", outcome="provider_error", cost=0),
        record(2, 2, session="s", attempt_of="0a-1", attempt=2),
        record(3, 4, session="s", outcome="provider_error", cost=0),
        record(4, 6, session="s", attempt_of="0a-3", attempt=2),
    ]
    found, misfits = replay([Iterations(1)], records)
    assert (found.records, found.calls, found.refused, found.followed) == (4, 2, 2, 1)
    assert [misfit.call_id for misfit in misfits] == ["0a-3"]


def test_requests_count_once() -> None:
    """W1: what counts requests is asked once for the calls of one request id, and its slot lasts to the last one."""
    agent = [record(number, number, request_id="r1") for number in range(4)]
    other = [record(9, 2.5, request_id="r2")]
    records = sorted([*agent, *other], key=lambda each: each.at_ms)
    assert replay([RateLimit("2/minute", per="caller", name="rate")], records)[0].refused == 0
    found, misfits = replay([Concurrency(1, per="caller", name="slots")], records)
    assert [misfit.request_id for misfit in misfits] == ["r2"]
    assert found.refused == 1


def test_a_refused_request_makes_no_calls() -> None:
    """W1: where the request is refused, all of its calls are."""
    records = [record(0, 0, request_id="r1"), *[record(number, number, request_id="r2") for number in range(1, 4)]]
    found, _ = replay([RateLimit("1/minute", per="caller", name="rate")], records)
    assert (found.refused, found.refused_nanousd) == (3, 3 * DOLLAR)


def test_calls_of_a_refused_request_fall_though_there_is_room_again() -> None:
    """W1: a request that found no slot is over; its later calls would not have been made."""
    records = [record(1, 0, request_id="r1", lasts_s=3), record(2, 1, request_id="r2"), record(3, 5, request_id="r2")]
    found, misfits = replay([Concurrency(1, per="caller", name="slots")], records)
    assert [misfit.call_id for misfit in misfits] == ["0a-2", "0a-3"]
    assert found.refused == 2


def test_an_id_that_is_used_for_ever_is_no_request() -> None:
    """W1: calls more than ten minutes apart are of different requests, whatever id the client sends."""
    records = [record(number, 700 * number, request_id="always") for number in range(5)]
    found, _ = replay([RateLimit("2/1d", per="caller", name="rate")], records)
    assert found.refused == 3


def test_policies_apart_take_nothing_from_each_other() -> None:
    """M14: asked apart, a policy that would refuse does not keep the others from counting; in force it does."""
    records = [record(number, 10 * number) for number in range(4)]
    policies: list[Policy] = [ModelAllow(["anthropic/*"]), Budget("$2/daily", per="user", name="budget")]
    apart, _ = replay(policies, records, apart=True)
    assert {row.policy: row.calls for row in apart.policies} == {"models": 4, "budget": 3}
    assert apart.refused == 0
    in_force, _ = replay(policies, records)
    assert {row.policy: row.calls for row in in_force.policies} == {"models": 4}


def test_shadows_of_the_candidate_stay_shadows() -> None:
    """M14: a shadow among the candidates is reported beside what refuses, and refuses nothing."""
    records = [record(number, 10 * number) for number in range(4)]
    found, misfits = replay([Budget("$2/daily", per="user", name="budget").shadow()], records)
    assert found.refused == 0
    assert [(row.policy, row.enforced, row.calls) for row in found.policies] == [("budget", False, 3)]
    assert misfits[0].limit == 2 * DOLLAR


def test_routes_have_policies_of_their_own() -> None:
    """W1: `extra` policies are asked of the records of their route."""
    routes = [Route("/agents/{name}", extra=[Iterations(1, name="agents")])]
    records = [
        record(number, number, session="s", route="/agents/{name}" if number else "/chat") for number in range(3)
    ]
    assert replay([], records, routes=routes)[0].refused == 1


@pytest.mark.parametrize(
    ("outcome", "refused"),
    [("measured", 0), ("provider_error", 0), ("cached", 0), ("unknown", 1), ("unmetered", 1), ("expired", 1)],
)
def test_outcomes_are_charged_as_they_were(outcome: str, refused: int) -> None:
    """W1: what was charged as it was held is charged so again; an error of the provider and a kept answer cost nothing."""
    cost = {"measured": DOLLAR, "provider_error": 0, "cached": 0}.get(outcome, 2 * DOLLAR)
    estimate = 0 if outcome == "cached" else 2 * DOLLAR
    first = record(1, 0, outcome=outcome, cost=cost, estimate_nanousd=estimate, usage=None)
    if outcome == "expired":
        first = msgspec.structs.replace(first, ended_ms=None)
    found, _ = replay([Budget("$3/daily", per="user", name="budget")], [first, record(2, 30)])
    assert found.refused == refused


def test_kept_answers_need_no_room() -> None:
    """W1: an answer from the cache takes rates and nothing else, so a spent limit does not refuse it."""
    records = [record(1, 0, session="s"), record(2, 5, session="s", outcome="cached", cost=0, estimate_nanousd=0)]
    assert replay([Iterations(1), Budget("$2/daily", per="user")], records)[0].refused == 0
    assert replay([RateLimit("1/minute", per="caller")], records)[0].refused == 1


def test_late_settlements_stay_at_what_expired() -> None:
    """W1: a late record's hold stayed charged where it was more than what was used."""
    records = [record(1, 0, late=True), record(2, 30)]
    assert replay([Budget("$3/daily", per="user", name="budget")], records)[0].refused == 1
    assert replay([Budget("$4/daily", per="user", name="budget")], records)[0].refused == 0


def test_tokens_are_held_as_the_money_says() -> None:
    """W1: held tokens are worked out from the money that was held: more than what was used in the end."""
    records = [
        record(1, 0, lasts_s=9, estimate_nanousd=10_250_000),
        record(2, 1, lasts_s=9, estimate_nanousd=10_250_000),
    ]
    # 10 $ for a million output tokens, 2.5 for a million of input: 100 of input and 1,000 of output were held.
    for limit, refused in ((2_100, 1), (2_200, 0)):
        found, _ = replay([Budget(f"{limit} tokens/1h", per="user", name="tokens")], records)
        assert found.refused == refused, limit


def test_unpriced_calls_are_priced_by_the_candidate() -> None:
    """M9: a call without a price is refused under a budget, unless the candidate's prices know its model."""
    unpriced = record(1, 0, estimate_nanousd=None, cost_nanousd=None, provider="acme", model="unknown")
    found, misfits = replay([Budget("$3/daily", per="user", name="budget")], [unpriced])
    assert [misfit.code for misfit in misfits] == ["model_unpriced"]
    assert found.unknown == 1
    known = msgspec.structs.replace(unpriced, provider="openai", model="gpt-4o")
    assert replay([Budget("$3/daily", per="user", name="budget")], [known])[0].refused == 0


def test_calls_that_were_not_described_are_debited() -> None:
    """W1: what turned out only afterwards is charged to what policies would have claimed."""
    hidden = record(1, 0, estimate_nanousd=None, cost=3 * DOLLAR)
    found, _ = replay([Budget("$3/daily", per="user", name="budget")], [hidden, record(2, 30)])
    assert found.refused == 1


OUTPUT = {"prices": PriceBook.snapshot(overrides={"openai/gpt-4o": {"input": 0, "output": 10}})}
"""$10 for a million output tokens, and nothing for input: a record that holds two dollars may have 200,000."""


def long_answer(number: int, output: int, **fields: Any) -> UsageRecord:
    """A call whose answer had so many tokens, at the same time as the others."""
    usage = Usage(input_tokens=100, output_tokens=output)
    more: dict[str, Any] = {"route": "/chat", "usage": usage, "tokens": output + 100, "cost": 10_000 * output}
    return record(number, 0.001 * number, lasts_s=60, **(more | fields))


def test_clamp_lowers_the_output_limit_before_it_refuses() -> None:
    """W1: on a route with `clamp`, a call that fits with a shorter answer is admitted with it, and is charged what that
    would have cost; one that fits in no way is refused. Elsewhere, and as a shadow, nothing is lowered."""
    budget = Budget("$3/daily", per="user", name="budget")
    routes = [Route("/chat", dialect="openai", clamp=True)]
    records = [long_answer(1, 50_000), long_answer(2, 150_000), long_answer(3, 10)]

    found, misfits = replay([budget], records, routes=routes, arguments=OUTPUT)
    assert [misfit.call_id for misfit in misfits] == ["0a-3"]
    assert (found.refused, found.clamped, found.cut) == (1, 1, 1)
    # $0.50, and $1.00 of the answer that was cut: a later call of $2 just does not fit, and one of $1.50 does.
    later = record(4, 120, route="/other")
    for estimate, refused in ((3 * DOLLAR // 2 + 1, 1), (3 * DOLLAR // 2, 0)):
        last = msgspec.structs.replace(later, estimate_nanousd=estimate)
        assert replay([budget], [*records, last], routes=routes, arguments=OUTPUT)[0].refused == 1 + refused

    uncut, _ = replay([budget], [long_answer(1, 50_000), long_answer(2, 90_000)], routes=routes, arguments=OUTPUT)
    assert (uncut.clamped, uncut.cut) == (1, 0)
    elsewhere, _ = replay([budget], records, arguments=OUTPUT)
    assert (elsewhere.refused, elsewhere.shorter, elsewhere.clamped) == (2, 2, 0)
    apart, _ = replay([budget], records, routes=routes, arguments=OUTPUT, apart=True)
    assert (apart.clamped, apart.policies[0].calls) == (0, 2)


def test_what_was_charged_as_held_is_charged_as_it_would_be_held() -> None:
    """W1: a lowered call without a measured answer is charged what was held for it then."""
    budget = Budget("$3/daily", per="user", name="budget")
    routes = [Route("/chat", dialect="openai", clamp=True)]
    lost = long_answer(2, 0, usage=None, tokens=200_000, cost=2 * DOLLAR, outcome="unknown")
    records = [long_answer(1, 50_000), lost, record(4, 120, route="/other", estimate_nanousd=3 * DOLLAR // 2)]
    found, _ = replay([budget], records, routes=routes, arguments=OUTPUT)
    assert (found.clamped, found.refused) == (1, 0)


def test_limits_of_keys_are_those_of_who_called() -> None:
    """W1: the limits that belong to a caller's key win over the policy's own, as in the service."""
    records = [record(number, 10 * number, session="s") for number in range(6)]
    assert replay([Iterations(9)], records)[0].refused == 0
    told: list[str] = []

    def params(asked: UsageRecord) -> dict[str, object]:
        told.append(asked.call_id)
        return {"max_iterations": 2}

    assert replay([Iterations(9)], records, params=params)[0].refused == 4
    assert told == [each.call_id for each in records]


def holder(**fields: Any) -> Holder:
    values: dict[str, Any] = {"caller": "team", "user": None, "departments": (), "agent": None, "params": {}}
    return Holder(**values | fields)


def test_keys_are_told_apart_by_what_records_say() -> None:
    """W1: of several keys of a caller those that a record can be of; where they have different limits none is taken, and
    the records are counted."""
    mine, bots = holder(user="mia", params={"max_iterations": 3}), holder(agent="bot", params={"max_iterations": 5})
    known = Holders([mine, bots, holder(caller="other", departments=("hr",), params={"max_iterations": 1})])
    assert known
    assert not Holders([holder()])
    assert known.params(record(1, 0)) == {"max_iterations": 3}
    assert known.params(record(2, 0, user="zoe", agent="bot")) == {"max_iterations": 5}
    assert known.params(record(3, 0, user="zoe")) == {}
    assert known.params(record(4, 0, caller=None)) == {}
    assert known.params(record(5, 0, caller="other")) == {}
    assert not known.unsure
    assert known.params(record(6, 0, agent="bot")) == {}
    assert known.unsure == {"team": 1}


def test_program_takes_the_limits_of_keys(tmp_path: Path) -> None:
    """W1: the keys of the settings decide about their callers; where nobody can tell which of two was shown, the output says
    so, for people and for programs."""
    fill(tmp_path, calls=60)
    policy = '[[policies]]\nkind = "iterations"\nlimit = 1000\n'
    identity = '[identity]\nkind = "api_keys"\nfile = "keys.toml"\nsecret = "0123456789abcdef0123456789abcdef"\n'
    file = settings(tmp_path, policy + identity)
    first, second = (
        ApiKeys.generate("team", secret="0123456789abcdef0123456789abcdef", params={"max_iterations": limit})[1]
        for limit in (4, 6)
    )
    (tmp_path / "keys.toml").write_text(first.to_toml(), "utf-8")
    told = document("simulate", "--config", file, "--since", "2d")
    assert (told["simulation"]["refused"], told["not_considered"]) == (60 - 5 * 4, [])
    assert "Not considered" not in call("simulate", "--config", file, "--since", "2d").stdout

    (tmp_path / "keys.toml").write_text(first.to_toml() + second.to_toml(), "utf-8")
    told = document("simulate", "--config", file, "--since", "2d")
    (passed,) = told["not_considered"]
    assert (told["simulation"]["refused"], passed["what"], passed["records"]) == (0, "keys", 60)
    said = call("simulate", "--config", file, "--since", "2d").stdout
    assert "Not considered in this run:\n  limits of single keys of team:" in said


def test_program_names_administration_data(tmp_path: Path) -> None:
    """W1: what is administered wins over any candidate in the service; a simulation without it says so."""
    fill(tmp_path, calls=4)
    url = f"sqlite:///{tmp_path / 'control.db'}"
    file = settings(tmp_path, f'[[policies]]\nkind = "iterations"\nlimit = 100\n[control]\nurl = "{url}"\n')
    (passed,) = document("simulate", "--config", file, "--since", "2d")["not_considered"]
    assert "there is no file" in passed["told"]

    async def administer() -> None:
        control = Control(url)
        await control.put("department", "research", {"daily_tokens": 5}, actor=Actor(name="anna"))
        stop = {"scope": "user", "subject": "mia", "until_ms": 10**13}
        await control.put("stop", "s", stop, actor=Actor(name="anna"))
        await control.aclose()

    asyncio.run(administer())
    (passed,) = document("simulate", "--config", file, "--since", "2d")["not_considered"]
    assert (passed["what"], passed["records"]) == ("administration", None)
    assert passed["told"].endswith("in the service: 1 departments, 1 stops")


def test_program_names_limits_of_deployments_and_policies_of_code(tmp_path: Path) -> None:
    """W1: records of deployments with limits, refusals of policies that the candidate has not, and `clamp` of a policy that
    is asked by itself are named with what this run has of them."""
    text = (
        '[[policies]]\nkind = "iterations"\nlimit = 100\n[[routes]]\npath = "/v1/chat/completions"\nclamp = true\n'
        '[gateway]\n[[gateway.deployments]]\nname = "small"\nprovider = "openai"\nmodel_name = "gpt-4o"\n'
        'api_key = "key-of-nobody"\nrpm = 5\n'
        '[[gateway.deployments]]\nname = "free"\nprovider = "openai"\nmodel_name = "gpt-4o"\napi_key = "key-of-nobody"\n'
    )
    asyncio.run(_refused_by_code(tmp_path))
    file = settings(tmp_path, text)
    found = document("simulate", "--config", file, "--since", "2d", "--apart")["not_considered"]
    assert [(each["what"], each["records"]) for each in found] == [
        ("deployments", 2),
        ("functions", None),
        ("clamp", None),
    ]
    assert "the policy of_code, which refused 1 times in the period" in found[1]["told"]
    found = document("simulate", "--config", file, "--since", "2d")["not_considered"]
    assert [each["what"] for each in found] == ["deployments", "functions"]


async def _refused_by_code(folder: Path) -> None:
    """Two calls to a deployment, and one that a policy of code has refused."""
    guard = Guard([Iterations(2, name="of_code")], storage=f"sqlite:///{folder / 'guard.db'}")
    async with guard.open(Context(caller="team", session="s")):
        for number in range(3):
            try:
                async with guard.call(model="openai/gpt-4o", input_tokens=9, max_output_tokens=9) as made:
                    made.record(Usage(input_tokens=9, output_tokens=9))
            except LimitExceeded:
                assert number == 2
    assert guard.books is not None
    await guard.books.catch_up()
    await guard.aclose()
    connection = sqlite3.connect(folder / "guard.db")
    with connection:
        connection.execute("UPDATE ledger SET deployment = 'small'")
    connection.close()


def test_order_within_a_millisecond_is_that_of_the_process() -> None:
    """W1: call ids count up within their process, in hexadecimal; of two at one instant the first is admitted."""
    records = [record(16, 0), record(9, 0)]
    _, misfits = replay([Budget("$2/daily", per="user", name="budget")], records, hold_wait_s=0)
    assert [misfit.call_id for misfit in misfits] == ["0a-10"]


def test_a_policy_without_a_shadow_cannot_be_asked_apart() -> None:
    """M14: what has no shadow is refused when the simulation is made."""

    class Own:
        name = "own"
        counts = "calls"

        def plan(self, context: object, call: object, now_ms: int) -> object:
            raise AssertionError

    with pytest.raises(ConfigurationError, match="own has no shadow"):
        Simulator([Own()], apart=True)  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="expected policies"):
        Simulator(["own"])  # type: ignore[list-item]


def test_subjects_are_bounded() -> None:
    """W1: subjects beyond the bound are counted together."""
    tally = Tally(0)
    for number in range(MOST_SUBJECTS + 50):
        misfit = Misfit(
            at_ms=T0, call_id=str(number), policy="p", code="c", scope="user", subject=str(number), enforced=True
        )
        tally.add(misfit)
    found = tally.result()
    assert len(found.subjects) == MOST_SUBJECTS + 1
    assert sum(row.calls for row in found.subjects) == found.policies[0].calls == MOST_SUBJECTS + 50


def test_agreement_counts_both_sides() -> None:
    """W1: what only one side has is a disagreement; nothing on either side agrees."""
    agreed = agreement({1, 2, 3}, {2, 3, 4}, decisions=100)
    assert (agreed.both, agreed.only_simulated, agreed.only_reported) == (2, 1, 1)
    assert (agreed.share, agreed.overlap) == (0.98, 0.5)
    assert agreement(set(), set(), decisions=0).share == agreement(set(), set(), decisions=0).overlap == 1.0
    assert agreement_of_counts({"a": 3, "b": 1}, {"a": 2, "c": 4}, decisions=10) == Agreement(
        decisions=10, both=2, only_simulated=2, only_reported=4
    )


# -------------------------------------------------------------------------------------- program


def test_program_simulates_a_candidate_file(tmp_path: Path) -> None:
    """W1: `simulate CANDIDATE` says who would have been refused, when, by which policy, and for how much."""
    spent = fill(tmp_path, calls=60)
    file = settings(tmp_path, "")
    candidate = tmp_path / "candidate.toml"
    candidate.write_text(
        '[[policies]]\nkind = "budget"\nlimits = ["$0.005/daily"]\nper = "user"\nname = "tight"\n', "utf-8"
    )
    refusals = tmp_path / "refusals.jsonl"
    told = document("simulate", candidate, "--config", file, "--since", "2d", "--refusals", refusals)["simulation"]
    assert (told["records"], told["cost_nanousd"]) == (60, spent)
    assert {row["subject"] for row in told["subjects"]} == {f"user-{number}" for number in range(4)}
    lines = [json.loads(line) for line in refusals.read_text("utf-8").splitlines()]
    assert len(lines) == told["refused"] > 0
    assert sum(line["cost_nanousd"] for line in lines) == told["refused_nanousd"]
    shown = call("simulate", candidate, "--config", file, "--since", "2d", "--top", "2").stdout
    assert "tight" in shown
    assert "… and 2 more" in shown


def test_program_without_records_exits_with_one(tmp_path: Path) -> None:
    """A period without records is told, and is no success."""
    fill(tmp_path, calls=3)
    ran = call("simulate", "--config", settings(tmp_path, ""), "--since", "2020-01-01", "--until", "2020-02-01")
    assert ran.exit_code == 1
    assert ran.stdout == "There are no usage records in this period.\n"


def test_warm_up_begins_before_the_period(tmp_path: Path) -> None:
    """W1: with --warm-up, counters begin as they were."""
    fill(tmp_path, calls=60)
    file = settings(tmp_path, '[[policies]]\nkind = "iterations"\nlimit = 8\nttl = "1d"\n')
    cold = document("simulate", "--config", file, "--since", "15m")["simulation"]
    warm = document("simulate", "--config", file, "--since", "15m", "--warm-up", "1d")["simulation"]
    assert cold["records"] == warm["records"] > 5
    assert cold["refused"] == 0
    assert warm["refused"] == warm["records"]


@pytest.mark.parametrize(
    "arguments", [("--warm-up", "soon"), ("--refusals", "/nonexistent/refusals.jsonl")], ids=["no length", "no folder"]
)
def test_program_knows_wrong_arguments_before_it_replays(tmp_path: Path, arguments: tuple[str, str]) -> None:
    """What can neither be read nor written is a wrong command line, whether something would be refused or not: exit 2."""
    fill(tmp_path, calls=3)
    ran = call("simulate", *arguments, "--config", settings(tmp_path, ""))
    assert (ran.exit_code, arguments[0] in ran.stderr) == (2, True), ran.output
