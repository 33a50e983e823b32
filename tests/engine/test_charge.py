"""The rules of charging one by one, as values: what an ended call is charged, settles with and writes down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.storage.values import DAY_MS

from asgi_llm_guard.charge import Charge, actuals, believed, charge_of, draft, finished
from asgi_llm_guard.claims import Claim, Meter, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.pricing import Cost
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.windows import Rolling, Slots
from asgi_llm_guard.wire.base import Answer

CALL = Call(model="m", input_tokens=100, output_tokens=50, cost_nanousd=1_000)
UNPRICED = Call(model="m", input_tokens=100, output_tokens=50)


def costs(nanousd: int | None) -> Callable[[Usage], Cost]:
    """Prices at which everything costs the same."""
    return lambda usage: Cost(nanousd, "list", "billed")


def success(usage: Usage | None = None, **seen: Any) -> Answer:
    return Answer(kind="success", usage=usage, **seen)


def became(
    answer: Answer | None,
    *,
    call: Call | None = CALL,
    cost: int | None = 7,
    complete: bool = True,
    released: bool = False,
    failure: Outcome | None = None,
) -> Charge:
    return charge_of(call, answer, costs(cost), complete=complete, released=released, failure=failure)


# ---------------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("answer", "complete", "outcome"),
    [
        (None, True, "unmetered"),
        (None, False, "unknown"),
        (success(finished=True), True, "unmetered"),
        (success(finished=True), False, "unknown"),
        (success(), True, "unknown"),
        (success(), False, "unknown"),
        (success(text_bytes=9, finished=True), True, "unmetered"),
        (success(text_bytes=9, finished=True), False, "estimated"),
        (success(text_bytes=9), True, "estimated"),
        (success(text_bytes=9, finished=True, unread=1), True, "unmetered"),
        (success(text_bytes=9, finished=True, unread=1), False, "unknown"),
        (success(text_bytes=9, unread=1), True, "unknown"),
        (Answer(kind="error"), True, "provider_error"),
        (Answer(kind="error", text_bytes=9), True, "estimated"),
    ],
)
def test_an_answer_without_usage(answer: Answer | None, complete: bool, outcome: Outcome) -> None:
    """Only what came to its own end, and whole, is unmetered; text of what did not is counted, if all of it was read."""
    assert became(answer, complete=complete).outcome == outcome


def test_what_was_released_without_an_answer_was_not_sent() -> None:
    """A released call costs nothing, unless an answer to it was seen."""
    assert became(None, released=True) == Charge(outcome="not_dispatched")
    assert became(success(finished=True), released=True) == Charge(outcome="unmetered")


def test_a_failure_says_what_became_of_the_call() -> None:
    """Where the answer says nothing, the failure does; text that came before it is counted."""
    assert became(None, failure="provider_error") == Charge(outcome="provider_error")
    assert became(success(), failure="unknown", complete=False) == Charge(outcome="unknown")
    assert became(success(text_bytes=9, finished=True), failure="unknown").outcome == "estimated"


# ---------------------------------------------------------------------------------------- measured


def test_measured() -> None:
    """Usage with input and output is charged as measured, at its price."""
    usage = Usage(input_tokens=3, output_tokens=4)
    assert became(success(usage)) == Charge(
        outcome="measured", usage=usage, tokens=7, cost_nanousd=7, price_source="list", billed_model="billed"
    )


@pytest.mark.parametrize("unit", ["images", "audio_ms", "characters", "search_units"])
def test_what_is_billed_by_another_unit_is_measured_without_tokens(unit: str) -> None:
    """An image, a millisecond, a character or a unit of a ranking is a measure, with or without tokens."""
    one: dict[str, Any] = {unit: 1}
    none: dict[str, Any] = {unit: 0}
    assert became(success(Usage(**one))).outcome == "measured"
    zeros = Usage(input_tokens=3, output_tokens=0, **one)
    assert became(success(zeros, text_bytes=9, finished=True)).outcome == "measured"
    assert became(success(Usage(**none), finished=True)).outcome == "unmetered"


def test_a_reported_cost_is_measured_without_tokens() -> None:
    """What a provider says that it costs is a measure, even if it is nothing."""
    assert became(success(Usage(reported_nanousd=0))).outcome == "measured"


def test_text_for_no_tokens_is_not_believed() -> None:
    """Zero output tokens beside text are a server that does not count; one token is a measure."""
    assert became(success(Usage(input_tokens=3, output_tokens=0), text_bytes=9, finished=True)).outcome == "unmetered"
    assert became(success(Usage(input_tokens=3, output_tokens=1), text_bytes=9, finished=True)).outcome == "measured"
    assert became(success(Usage(input_tokens=3, output_tokens=0), finished=True)).outcome == "measured"


def test_no_price() -> None:
    """C10: Money is charged as held where no price is known; where none was held, the cost is unknown, and not 0."""
    usage = Usage(input_tokens=3, output_tokens=4)
    as_held = Charge(outcome="measured", usage=usage, tokens=7)
    assert became(success(usage), cost=None) == as_held
    assert became(success(usage), cost=None, call=None) == as_held
    assert became(success(usage), cost=None, call=UNPRICED) == as_held
    assert written(as_held, UNPRICED).cost_nanousd is None


# ---------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(Usage(input_tokens=-1), id="below zero"),
        pytest.param(Usage(input_tokens=1, images=2**53), id="beyond all amounts"),
        pytest.param(Usage(input_tokens=10**12 + 1, output_tokens=1), id="more than a call uses"),
        pytest.param(Usage(output_tokens=1.5), id="no whole number"),  # type: ignore[arg-type]
        pytest.param(Usage(input_tokens=1, extra=(Usage(input_tokens=1), Usage(input_tokens=-1))), id="beside it"),
    ],
)
def test_figures_that_cannot_be(usage: Usage) -> None:
    """Figures below zero, beyond all amounts, or no whole numbers, are charged as held and reported as doubted."""
    assert became(success(usage, finished=True)) == Charge(outcome="unmetered", doubted=usage)


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(Usage(), id="none"),
        pytest.param(Usage(input_tokens=0, model="m"), id="zero"),
        pytest.param(Usage(output_tokens=1, service_tier="flex", extra=(Usage(input_tokens=0),)), id="beside it"),
    ],
)
def test_figures_that_are_too_few(usage: Usage) -> None:
    """Figures that can be, and do not suffice to charge by, are charged as held without a doubt."""
    assert became(success(usage, finished=True)) == Charge(outcome="unmetered")


@pytest.mark.parametrize("cost", [None, 0, 7])
def test_measures_that_cannot_be(cost: int | None) -> None:
    """A measure that cannot be is charged as held, whatever its price; it never takes anything off a meter."""
    below = Usage(input_tokens=-30, output_tokens=4)
    assert became(success(below), cost=cost) == Charge(outcome="unmetered", doubted=below)
    reported = Usage(input_tokens=3, output_tokens=4, reported_nanousd=-1)
    assert became(success(reported), cost=cost) == Charge(outcome="unmetered", doubted=reported)
    nothing = Usage(input_tokens=0, output_tokens=0, reported_nanousd=0)
    assert became(success(nothing), cost=cost).outcome == "measured"


def test_believed() -> None:
    """A measure is cut to the most that the call can have used; what was reported is kept beside it."""
    most = Call(model="m", input_tokens=4, output_tokens=2, cost_nanousd=10)
    usage = Usage(input_tokens=9, output_tokens=9)
    charge = Charge(outcome="measured", usage=usage, tokens=7, cost_nanousd=11, price_source="list")
    cut = believed(charge, most)
    assert (cut.tokens, cut.cost_nanousd, cut.price_source, cut.doubted) == (6, 10, "list; clamped", usage)
    assert believed(Charge(outcome="measured", tokens=7), most) == Charge(
        outcome="measured", tokens=6, price_source="clamped"
    )
    dear = believed(Charge(outcome="measured", tokens=1, cost_nanousd=11), most)
    assert (dear.tokens, dear.cost_nanousd) == (1, 10)
    within = Charge(outcome="measured", usage=usage, tokens=6, cost_nanousd=10)
    assert believed(within, most) is within
    assert believed(charge, Call(model="m")) is charge


# ---------------------------------------------------------------------------------------- counted


def counted(
    usage: Usage | None = None, *, text_bytes: int = 9, call: Call | None = CALL, cost: int | None = 7
) -> tuple[Outcome, Usage | None, int | None, int | None]:
    charge = became(success(usage, text_bytes=text_bytes, model="answered"), call=call, cost=cost, complete=False)
    return charge.outcome, charge.usage, charge.tokens, charge.cost_nanousd


def test_a_cut_stream_is_counted_by_its_text() -> None:
    """The text so far is the output, and the input is what was held, or what the stream has told of it."""
    as_held = Usage(input_tokens=100, output_tokens=9, model="answered")
    assert counted() == ("estimated", as_held, 109, 7)
    assert counted(Usage(output_tokens=1)) == ("estimated", as_held, 109, 7)
    told = Usage(input_tokens=30, cache_read_tokens=20)
    assert counted(told) == ("estimated", Usage(input_tokens=30, cache_read_tokens=20, output_tokens=9), 39, 7)
    assert counted(Usage(input_tokens=0)) == ("estimated", Usage(input_tokens=0, output_tokens=9), 9, 7)


def test_a_cut_stream_is_never_counted_above_its_hold() -> None:
    """Output, tokens and cost end at what is held; what nothing is known of is charged as unknown."""
    assert counted(text_bytes=51) == ("estimated", Usage(input_tokens=100, output_tokens=50, model="answered"), 150, 7)
    assert counted(Usage(input_tokens=120), text_bytes=50)[2] == 150
    assert counted(cost=1_001)[3] == 1_000
    assert counted(cost=1_001, call=UNPRICED)[3] == 1_001
    assert counted(cost=None)[3] is None
    assert counted(call=None) == ("unknown", None, None, None)


@pytest.mark.parametrize("cost, source", [(999, "list"), (1_000, "list"), (1_001, None), (None, None)])
def test_a_cut_stream_names_the_price_that_makes_its_charge(cost: int | None, source: str | None) -> None:
    """Its own price up to what was held; beyond, it is the hold that makes the charge, and has a price of its own."""
    charge = became(success(text_bytes=9, model="answered"), call=CALL, cost=cost, complete=False)
    assert (charge.price_source, charge.billed_model) == (source, "billed" if source else None)


# ---------------------------------------------------------------------------------------- settled


def of(unit: Unit, rule: Rule, scope: str = "user") -> Claim:
    window = Slots() if unit is Unit.SLOTS else Rolling(DAY_MS)
    key = f"{unit}:{rule}:{scope}"
    return Claim(Meter(key=key, policy="p", scope=scope, subject="s", unit=unit, rule=rule, limit=99, window=window), 9)


CLAIMS = (
    of(Unit.NANOUSD, Rule.BUDGET),
    of(Unit.TOKENS, Rule.QUOTA),
    of(Unit.TOKENS, Rule.RATE),
    of(Unit.SLOTS, Rule.SLOTS),
    of(Unit.CALLS, Rule.ITERATIONS),
    of(Unit.CALLS, Rule.RATE),
    of(Unit.CALLS, Rule.RATE, "deployment"),
)


@pytest.mark.parametrize(
    ("outcome", "amounts"),
    [
        ("measured", (5, 3, 3, 0, None, None, None)),
        ("estimated", (5, 3, 3, 0, None, None, None)),
        ("provider_error", (0, 0, 0, 0, None, None, None)),
        ("cached", (0, 0, 0, 0, 0, None, None)),
        ("not_dispatched", (0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_amounts_by_outcome(outcome: Outcome, amounts: tuple[int | None, ...]) -> None:
    """Each claim is settled by its unit: money, tokens, nothing for slots, and what is held for calls."""
    assert actuals(CLAIMS, Charge(outcome=outcome, tokens=3, cost_nanousd=5)) == amounts


def test_amounts_where_nothing_is_known() -> None:
    """What nothing is known of is settled with what is held; slots are given back."""
    assert actuals(CLAIMS, Charge(outcome="unknown")) == (None, None, None, 0, None, None, None)


def test_calls_that_stay_taken() -> None:
    """An attempt that was not sent, beside one that was, keeps its calls, but for those where it would have gone."""
    charge = Charge(outcome="not_dispatched")
    assert actuals(CLAIMS, charge, keep_calls=True) == (0, 0, 0, 0, None, None, 0)


# ---------------------------------------------------------------------------------------- recorded


def written(
    charge: Charge, call: Call | None = CALL, *, first_ms: int | None = None, now_ms: int = 1_030
) -> UsageRecord:
    record = draft("c", Context(), call, 1_000)
    return finished(record, call, charge, began_ms=1_000, first_ms=first_ms, now_ms=now_ms)


def test_the_record_tells_what_is_charged() -> None:
    """Cost and tokens of a record are those charged: measured, or held where they are not known, or none."""
    measured = written(Charge(outcome="measured", tokens=3, cost_nanousd=5))
    assert (measured.outcome, measured.tokens, measured.cost_nanousd) == ("measured", 3, 5)
    nothing = written(Charge(outcome="measured", tokens=0, cost_nanousd=0))
    assert (nothing.tokens, nothing.cost_nanousd) == (0, 0)
    held = written(Charge(outcome="unknown"))
    assert (held.tokens, held.cost_nanousd) == (150, 1_000)
    unknown = written(Charge(outcome="unknown"), None)
    assert (unknown.tokens, unknown.cost_nanousd) == (None, None)
    for call in (CALL, None):
        failed = written(Charge(outcome="provider_error"), call)
        assert (failed.tokens, failed.cost_nanousd) == (0, 0)


def test_the_record_tells_what_was_estimated() -> None:
    """What was held at admission is kept as the estimate; an answer from the cache held nothing."""
    assert written(Charge(outcome="measured", tokens=3, cost_nanousd=5)).estimate_nanousd == 1_000
    assert written(Charge(outcome="cached", tokens=0, cost_nanousd=0)).estimate_nanousd == 0


def test_the_record_tells_the_model_and_its_price() -> None:
    """The model is the one asked for, or else the one that answered; the price is the bill's, or else the hold's."""
    usage = Usage(input_tokens=1, output_tokens=1, model="answered")
    by_bill = Charge(outcome="measured", usage=usage, price_source="bill", billed_model="billed")
    assert written(by_bill).model == "m"
    assert written(by_bill, None).model == "answered"
    assert written(Charge(outcome="unknown"), None).model is None
    priced = Call(model="m", price_source="hold", billed_model="held")
    assert (written(by_bill, priced).price_source, written(by_bill, priced).billed_model) == ("bill", "billed")
    plain = written(Charge(outcome="unknown"), priced)
    assert (plain.price_source, plain.billed_model, plain.usage) == ("hold", "held", None)


def test_the_record_tells_the_times() -> None:
    """Times count from dispatch, and are 0 where the clock has stepped back; no first token, no time of it."""
    record = written(Charge(outcome="measured"), first_ms=1_010)
    assert (record.ended_ms, record.dispatched_ms) == (1_030, 1_000)
    assert (record.first_token_ms, record.latency_ms) == (10, 30)
    back = written(Charge(outcome="measured"), first_ms=990, now_ms=980)
    assert (back.first_token_ms, back.latency_ms) == (0, 0)
    assert written(Charge(outcome="measured")).first_token_ms is None
