"""What a call is charged when it ends: every row of the table in `charge.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, Usage
from asgi_llm_guard.admission import ActiveCall, enter, leave
from asgi_llm_guard.events import Event, UsageAnomaly
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.outcomes import together
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.wire.base import Answer

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"
CONTEXT = Context(caller="acme", session="s")
HELD = 100 * 1_000 + 50 * 2_000
"""What 100 tokens in and 50 out cost, in nano-USD: what every call of this file holds."""


class ReadTimeoutError(Exception):
    """As a client library raises it: nothing is known of the request."""


class ConnectError(Exception):
    """By name and meaning httpx's: there was no connection."""


class APIStatusError(Exception):
    """By shape that of the OpenAI and Anthropic libraries."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"Error code: {status_code}")
        self.status_code = status_code
        self.response = object()


def chunk(text: str) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "model": "test-model",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }


async def charged(guard: Guard) -> tuple[int, int]:
    """Iterations and nano-USD that are charged; nothing is held any more."""
    policies = guard.policies
    call = guard.describe(MODEL, input_tokens=1, max_output_tokens=1)
    meters = [c.meter for p in policies for c in p.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    readings = await guard.storage.read(meters)
    assert [reading.held for reading in readings] == [0] * len(readings)
    assert await guard.storage.open_holds() == 0
    return readings[0].used, readings[1].used


async def record_of(guard: Guard) -> UsageRecord:
    (record,) = await guard.storage.records()
    return record


def guarded(new_guard: NewGuard, **options: Any) -> Guard:
    return new_guard(Iterations(9), Budget("$1/1d"), **options)


def call_of(guard: Guard) -> Any:
    return guard.call(model=MODEL, input_tokens=100, max_output_tokens=50)


async def test_measured_is_charged_as_measured(new_guard: NewGuard) -> None:
    """A call whose usage is recorded is charged what it used, and its record says so."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=10, output_tokens=5))
    assert await charged(guard) == (1, 20_000)
    record = await record_of(guard)
    assert (record.outcome, record.cost_nanousd, record.estimate_nanousd, record.tokens) == (
        "measured",
        20_000,
        HELD,
        15,
    )


async def test_measured_above_the_hold_is_debited_in_full(new_guard: NewGuard) -> None:
    """Usage above the bound is charged in full, past the hold."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=1_000, output_tokens=500))
    assert await charged(guard) == (1, 2_000_000)


@pytest.mark.parametrize(
    "usage",
    [
        Usage(input_tokens=-1, output_tokens=5),
        Usage(input_tokens=10, output_tokens=5, cache_read_tokens=-3),
        Usage(input_tokens=10, output_tokens=5, reported_nanousd=-(10**9)),
        Usage(input_tokens=10, output_tokens=5, extra=(Usage(input_tokens=-1, output_tokens=1),)),
        Usage(input_tokens=1.5, output_tokens=5),  # type: ignore[arg-type]  # what the test is about
    ],
    ids=["input", "part", "cost", "beside", "fraction"],
)
async def test_impossible_usage_is_not_believed(new_guard: NewGuard, usage: Usage) -> None:
    """T23: a report below zero is flagged, and the call is charged what it holds: the budget is never refunded by it."""
    seen: list[Event] = []
    guard = guarded(new_guard, observers=[seen.append])
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(usage)
    assert await charged(guard) == (1, HELD)
    assert [event.usage for event in seen if isinstance(event, UsageAnomaly)] == [usage]
    assert (await record_of(guard)).outcome == "unmetered"


async def test_absurd_usage_is_clamped(new_guard: NewGuard) -> None:
    """T23: a report of 10^12 tokens is charged as ten times the hold, flagged, and its record says so."""
    seen: list[Event] = []
    guard = guarded(new_guard, observers=[seen.append])
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=10**12, output_tokens=5))
    assert await charged(guard) == (1, 10 * HELD)
    (anomaly,) = [event for event in seen if isinstance(event, UsageAnomaly)]
    assert (anomaly.usage.input_tokens, anomaly.tokens, anomaly.cost_nanousd) == (10**12, 1_500, 10 * HELD)
    record = await record_of(guard)
    assert (record.outcome, record.cost_nanousd, record.tokens) == ("measured", 10 * HELD, 1_500)
    assert str(record.price_source).endswith("; clamped")


@pytest.mark.parametrize("times", [2, None])
async def test_believed_overage_is_configured(new_guard: NewGuard, times: int | None) -> None:
    """T23: how much more than the hold is believed is a setting; without one, every report is."""
    guard = guarded(new_guard, max_overage=times)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=1_000, output_tokens=0))
    assert await charged(guard) == (1, 1_000_000 if times is None else times * HELD)


async def test_assumptions_are_not_taken_for_bounds(new_guard: NewGuard) -> None:
    """T23: where the input was assumed, a report of as much as a model can take is believed, and no more."""
    guard = guarded(new_guard)
    assumed = guard.call(model=MODEL, max_output_tokens=50)
    async with guard.open(CONTEXT), assumed as call:
        call.record(Usage(input_tokens=500_000, output_tokens=0))
    assert await charged(guard) == (1, 500_000_000)
    async with guard.open(CONTEXT), guard.call(model=MODEL, max_output_tokens=50) as call:
        call.record(Usage(input_tokens=10**12, output_tokens=0))
    _, spent = await charged(guard)
    assert 2_000_000_000 <= spent - 500_000_000 <= 7_000_000_000


async def test_usage_without_tokens_is_measured(new_guard: NewGuard) -> None:
    """What is billed by images is charged by images; its tokens are as held where nobody counted them."""
    prices = PriceBook.snapshot(overrides={"openai/test-image": {"input": 0, "output": 0, "per_image": 0.04}})
    guard = guarded(new_guard, prices=prices)
    priced = msgspec.structs.replace(
        guard.describe("openai/test-image", input_tokens=10, max_output_tokens=0), images=2
    )
    async with guard.open(CONTEXT):
        call = new_call(guard.engine, priced, ())
        await call.claim()
        call.record(Usage(images=1))
        call.end()
    record = await record_of(guard)
    assert (record.outcome, record.cost_nanousd, record.tokens) == ("measured", 40_000_000, 10)


async def test_reported_cost_is_measured_without_tokens(new_guard: NewGuard) -> None:
    """A provider that tells what a call cost, and not its tokens, is believed where the price is not known."""
    prices = PriceBook.snapshot(unknown="allow")
    guard = guarded(new_guard, prices=prices)
    async with guard.open(CONTEXT), guard.call(model="nobody/unheard-of", input_tokens=10, max_output_tokens=1) as call:
        call.record(Usage(reported_nanousd=7_000))
    record = await record_of(guard)
    assert (record.outcome, record.cost_nanousd, record.tokens) == ("measured", 7_000, 11)


async def test_two_reports_add_up_whatever_they_count(new_guard: NewGuard) -> None:
    """Units besides tokens add up as well; a cost that only one of two attempts reports is not the cost of both."""
    one = Usage(images=1, input_tokens=1, output_tokens=1, reported_nanousd=5)
    other = Usage(images=2, input_tokens=2, output_tokens=2, audio_ms=7)
    summed = together(Answer(kind="success", usage=one), Answer(kind="success", usage=other)).usage
    assert summed is not None
    assert (summed.images, summed.input_tokens, summed.audio_ms, summed.reported_nanousd) == (3, 3, 7, None)


async def test_released_call_costs_nothing(new_guard: NewGuard) -> None:
    """A call that is known not to have been sent costs no money and no iteration, and leaves no record."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.release()
    assert await charged(guard) == (0, 0)
    assert await guard.storage.records() == []


async def test_connection_that_was_never_made_costs_nothing(new_guard: NewGuard) -> None:
    """A connect error means that nothing was sent: nothing is charged."""
    guard = guarded(new_guard)
    with pytest.raises(ConnectError):
        async with guard.open(CONTEXT), call_of(guard):
            raise ConnectError
    assert await charged(guard) == (0, 0)


async def test_refusal_inside_a_call_costs_nothing(new_guard: NewGuard) -> None:
    """A call whose inner call was refused was never sent."""
    guard = guarded(new_guard)
    with pytest.raises(LimitExceeded):
        async with guard.open(CONTEXT), call_of(guard), guard.call(model=MODEL, input_tokens=10**7):
            raise AssertionError
    assert await charged(guard) == (0, 0)


async def test_refusal_after_dispatch_keeps_the_hold(new_guard: NewGuard) -> None:
    """A call that is on its way is not taken for unsent because a later one was refused in its block."""
    guard = guarded(new_guard)
    with pytest.raises(LimitExceeded):
        async with guard.open(CONTEXT), call_of(guard) as call:
            call.dispatched()
            await guard.call(model=MODEL, input_tokens=10**7).__aenter__()
    assert await charged(guard) == (1, HELD)


@pytest.mark.parametrize("status", [400, 429, 500, 503, 529])
async def test_error_of_the_provider_costs_an_iteration(new_guard: NewGuard, status: int) -> None:
    """An error answer without usage costs no money, and one iteration."""
    guard = guarded(new_guard)
    with pytest.raises(APIStatusError):
        async with guard.open(CONTEXT), call_of(guard):
            raise APIStatusError(status)
    assert await charged(guard) == (1, 0)
    record = await record_of(guard)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)


async def test_recorded_error_body_costs_an_iteration(new_guard: NewGuard) -> None:
    """The same holds for an error body that is recorded."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record({"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}})
    assert await charged(guard) == (1, 0)


@pytest.mark.parametrize("error", [ReadTimeoutError, asyncio.CancelledError, KeyError])
async def test_unknown_outcome_keeps_the_hold(new_guard: NewGuard, error: type[BaseException]) -> None:
    """A call that was sent and whose outcome is unknown is charged what it holds."""
    guard = guarded(new_guard)
    with pytest.raises(error):
        async with guard.open(CONTEXT), call_of(guard):
            raise error
    assert await charged(guard) == (1, HELD)
    assert (await record_of(guard)).outcome == "unknown"


@pytest.mark.parametrize(
    "response",
    [
        None,
        {"object": "chat.completion", "model": "test-model", "choices": [], "usage": None},
        object(),
    ],
    ids=["nothing recorded", "no usage", "unknown object"],
)
async def test_success_without_usage_keeps_the_hold(new_guard: NewGuard, response: object) -> None:
    """A success that does not tell its usage is charged what it holds, and counted as unmetered."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        if response is not None:
            call.record(response)
    assert await charged(guard) == (1, HELD)
    record = await record_of(guard)
    assert (record.outcome, record.usage, record.cost_nanousd) == ("unmetered", None, HELD)


async def test_failed_attempt_takes_no_usage_away(new_guard: NewGuard) -> None:
    """An error that is recorded after a success, and a release after either, change nothing that was measured."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=10, output_tokens=5))
        call.record({"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}})
        call.release()
    assert await charged(guard) == (1, 20_000)


async def test_two_billed_attempts_add_up(new_guard: NewGuard) -> None:
    """Two successes that are recorded on one call were both billed, and are both charged."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record(Usage(input_tokens=10, output_tokens=5, cache_read_tokens=4))
        call.record(Usage(input_tokens=1, output_tokens=2))
    assert await charged(guard) == (1, 25_000)
    usage = (await record_of(guard)).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (11, 7, 4)


async def test_released_stream_is_charged_for_its_text(new_guard: NewGuard) -> None:
    """A call that has streamed text was sent, whatever is said of it afterwards."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record_chunk(chunk("four"))
        call.release()
    assert await charged(guard) != (0, 0)


async def test_zero_tokens_beside_text_are_not_believed(new_guard: NewGuard) -> None:
    """Usage of no output tokens beside a text is a server that does not count: the hold is charged."""
    guard = guarded(new_guard)
    message = {"role": "assistant", "content": "plenty of words"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    async with guard.open(CONTEXT), call_of(guard) as call:
        call.record({"object": "chat.completion", "model": "test-model", "choices": choices, "usage": usage})
    assert await charged(guard) == (1, HELD)


async def test_cut_stream_is_charged_for_the_text_so_far(new_guard: NewGuard) -> None:
    """A stream that is cut costs its input and the text so far: never nothing, never more than the hold."""
    guard = guarded(new_guard)

    async def broken() -> AsyncIterator[dict[str, Any]]:
        yield chunk("four")
        raise ReadTimeoutError

    with pytest.raises(ReadTimeoutError):
        async with guard.open(CONTEXT), call_of(guard) as call:
            async for _ in call.stream(broken()):
                pass
    assert await charged(guard) == (1, 100 * 1_000 + 4 * 2_000)
    assert (await record_of(guard)).outcome == "estimated"


async def test_cut_stream_never_costs_more_than_the_hold(new_guard: NewGuard) -> None:
    """However much text was seen, a cut stream is charged at most what was held."""
    guard = guarded(new_guard)

    async def broken() -> AsyncIterator[dict[str, Any]]:
        yield chunk("x" * 1_000)
        raise ReadTimeoutError

    with pytest.raises(ReadTimeoutError):
        async with guard.open(CONTEXT), call_of(guard) as call:
            async for _ in call.stream(broken()):
                pass
    assert await charged(guard) == (1, HELD)


@pytest.mark.parametrize(
    ("opaque", "release_on_4xx", "status", "expected"),
    [
        (True, False, 200, (1, HELD)),
        (True, False, 500, (1, HELD)),
        (True, False, 404, (1, HELD)),
        (True, True, 404, (0, 0)),
        (True, True, 500, (1, HELD)),
        (False, False, 200, (0, 0)),
        (False, False, 500, (0, 0)),
    ],
)
async def test_request_in_which_no_call_was_seen(
    new_guard: NewGuard, *, opaque: bool, release_on_4xx: bool, status: int, expected: tuple[int, int]
) -> None:
    """Conformance 65: hooked routes release what no call has taken over; opaque ones charge it, whatever the status."""
    guard = guarded(new_guard)
    admission = guard.new_admission(CONTEXT, opaque=opaque)
    admission.release_on_4xx = release_on_4xx
    await admission.open(guard.describe(MODEL, input_tokens=100, max_output_tokens=50))
    await admission.end(None, status=status)
    assert await charged(guard) == expected


async def test_error_body_of_an_opaque_route_is_the_applications_word(new_guard: NewGuard) -> None:
    """An error body does not prove that no call was billed before it: an opaque route is charged what it holds."""
    guard = guarded(new_guard)
    admission = guard.new_admission(CONTEXT, opaque=True)
    await admission.open(guard.describe(MODEL, input_tokens=100, max_output_tokens=50))
    await admission.end(Answer(kind="error", error="other", finished=True), status=500)
    assert await charged(guard) == (1, HELD)


async def test_usage_of_a_call_that_was_not_described_is_charged(new_guard: NewGuard) -> None:
    """Usage that turns up on a call nobody had described is debited to the budgets that it belongs to, past limits too."""
    guard = guarded(new_guard)
    async with guard.open(CONTEXT), guard.call() as call:
        call.record(Usage(input_tokens=1_000_000, output_tokens=1_000_000, model="openai/test-model"))
    assert await charged(guard) == (1, 3_000_000_000)
    with pytest.raises(LimitExceeded, match="budget"):
        async with guard.open(CONTEXT), call_of(guard):
            raise AssertionError


async def test_every_end_after_the_first_changes_nothing(new_guard: NewGuard) -> None:
    """Ending a call twice, or ending its admission again, settles once."""
    guard = guarded(new_guard)
    admission = guard.new_admission(CONTEXT)
    await admission.open(None, calls=False)
    token = enter(admission)
    block = call_of(guard)
    call: ActiveCall = await block.__aenter__()
    call.record(Usage(input_tokens=10, output_tokens=5))
    await call.end()
    call.record(Usage(input_tokens=99, output_tokens=99))
    await call.end(ReadTimeoutError())
    await block.__aexit__(None, None, None)
    await admission.end()
    await admission.end()
    leave(token)
    assert await charged(guard) == (1, 20_000)
    assert len(await guard.storage.records()) == 1


async def test_unpriced_model_is_refused_where_money_counts(new_guard: NewGuard) -> None:
    """Conformance 67: a model without a price is refused under a money policy, not counted as free."""
    guard = guarded(new_guard)
    with pytest.raises(LimitExceeded) as caught:
        async with guard.open(CONTEXT), guard.call(model="openai/nobody-knows-me", max_output_tokens=1):
            raise AssertionError
    assert (caught.value.denied.code, caught.value.denied.status) == ("model_unpriced", 403)


async def test_price_edit_takes_effect_at_once(new_guard: NewGuard) -> None:
    """Conformance 63, 67: a new price counts from the next call on, from free to paid too."""
    guard = guarded(new_guard, prices=PriceBook.snapshot(overrides={MODEL: {"input": 0, "output": 0}}))
    async with guard.open(CONTEXT), call_of(guard) as call:
        assert call.call is not None
        assert call.call.cost_nanousd == 0
        call.record(Usage(input_tokens=10, output_tokens=5))
    guard.prices = PriceBook.snapshot(overrides={MODEL: {"input": 1000, "output": 2000}})
    async with guard.open(CONTEXT), call_of(guard) as call:
        assert call.call is not None
        assert call.call.cost_nanousd == HELD * 1_000
        call.record(Usage(input_tokens=10, output_tokens=5))
    assert await charged(guard) == (2, 20_000_000)
