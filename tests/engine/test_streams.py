"""Streams while they pass: what they hold, when they are cut and where, and their deadlines."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import PRICES, NewGuard

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Admission, Event, Refused
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.streams import NEAR_BYTES, SURE_BYTES, StreamGuard, StreamRules
from asgi_llm_guard.testing import FrozenClock, OutageStorage
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Head
from asgi_llm_guard.wire.refusals import stream_error

pytestmark = pytest.mark.anyio

CONTEXT = Context(caller="acme", session="s")
HEADERS = [(b"content-type", b"text/event-stream")]
CUT = StreamRules(cut=True)
INPUT = 100 * 1_000
TOKEN = 2_000  # nano-USD for a token of output


class Seconds:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def event(text: str = "", **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice], **more}).encode() + b"\n\n"


def usage(output_tokens: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 100, "completion_tokens": output_tokens, "total_tokens": 100 + output_tokens}}


async def opened(guard: Guard, **described: Any) -> ActiveCall:
    described = {"model": "openai/test-model", "input_tokens": 100, "stream": True, **described}
    call = new_call(guard.engine, guard.describe(described.pop("model"), **described), ())
    await call.claim()
    call.dispatched()
    return call


def stream(call: ActiveCall, rules: StreamRules = CUT, *, dialect: str = "openai", **options: Any) -> StreamGuard:
    meter = dialect_named(dialect).meter(Head(200, HEADERS))
    return StreamGuard(call, meter, rules, lambda denied: stream_error(denied, dialect, "sse"), **options)


async def passed(guarded: StreamGuard, *chunks: bytes) -> bytes:
    """What the client gets, chunk by chunk, as a carrier does it."""
    sent = b""
    for chunk in chunks:
        sent += guarded.feed(chunk)
        if guarded.wants_growth:
            sent += await guarded.grow()
    return sent


async def money(guard: Guard) -> tuple[int, int]:
    """Used and held of the budget."""
    call = guard.describe("openai/test-model", input_tokens=1, max_output_tokens=1)
    (budget,) = [policy for policy in guard.policies if isinstance(policy, Budget)]
    meters = [claim.meter for claim in budget.plan(CONTEXT, call, guard.clock.now_ms()).claims]
    (reading,) = await guard.storage.read(meters)
    return reading.used, reading.held


def short(new_guard: NewGuard, tokens: int, **options: Any) -> Guard:
    """A guard with a budget for the input and so many tokens of output, which holds for 100 of them at first."""
    budget = f"${(INPUT + tokens * TOKEN) / 10**9:.9f}/1d"
    return new_guard(Iterations(9), Budget(budget), assumed_output_tokens=100, hold_wait_s=0, **options)


async def test_stream_is_cut_when_it_has_used_up_what_it_holds(new_guard: NewGuard) -> None:
    """T18: when nothing more can be held, the client gets the dialect's error event, once, and nothing after it."""
    guard = short(new_guard, 120)
    async with guard.open(CONTEXT):
        call = await opened(guard)
        guarded = stream(call)
        sent = await passed(guarded, *[event("x" * 40) for _ in range(50)])
        assert guarded.ended
        assert guarded.denied is not None
        assert guarded.denied.code in ("budget_exhausted", "request_exceeds_budget")
        events = sent.split(b"\n\n")
        assert events.pop() == b""
        last = json.loads(events[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == guarded.denied.code
        assert all("choices" in json.loads(each.removeprefix(b"data: ")) for each in events[:-1])
        assert (len(events) - 1) * 40 >= 120 * SURE_BYTES > (len(events) - 2) * 40
        guarded.end()
    assert await money(guard) == (INPUT + 120 * TOKEN, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_cut_is_at_the_border_of_an_event(sizes: list[int]) -> None:
    """However the stream is chunked, what the client gets is whole events, of which the last is the error."""
    import asyncio

    async def check() -> None:
        guard = short(_in_memory, 101)
        body = b"".join(event("word " * 20) for _ in range(30))
        async with guard.open(CONTEXT):
            call = await opened(guard)
            guarded = stream(call)
            chunks: list[bytes] = []
            at = 0
            while at < len(body):
                size = sizes[len(chunks) % len(sizes)]
                chunks.append(body[at : at + size])
                at += size
            sent = await passed(guarded, *chunks)
            assert guarded.ended
            *events, rest = sent.split(b"\n\n")
            assert rest == b""
            kinds = ["error" in json.loads(each.removeprefix(b"data: ")) for each in events]
            assert kinds == [False] * (len(kinds) - 1) + [True]
            guarded.end()

    asyncio.run(check())


def _in_memory(*policies: Any, **options: Any) -> Guard:
    return Guard(policies, storage=MemoryStorage(), prices=PRICES, **options)


async def test_declared_limit_is_never_cut(new_guard: NewGuard) -> None:
    """A stream whose request sets its own limit goes on to its end, however many bytes its tokens have."""
    guard = short(new_guard, 100)
    async with guard.open(CONTEXT):
        call = await opened(guard, max_output_tokens=100)
        guarded = stream(call)
        body = [event(" " * 5_000) for _ in range(20)] + [event(**usage(100)), b"data: [DONE]\n\n"]
        assert await passed(guarded, *body) == b"".join(body)
        assert not guarded.ended
        guarded.end(complete=True)
    assert await money(guard) == (INPUT + 100 * TOKEN, 0)


async def test_hold_grows_with_the_stream(new_guard: NewGuard) -> None:
    """A stream that is longer than expected holds more before it needs it, in few trips, and is charged what it used."""
    seen: list[Event] = []
    guard = new_guard(Budget("$1/1d"), assumed_output_tokens=100, observers=[seen.append])
    async with guard.open(CONTEXT):
        call = await opened(guard)
        guarded = stream(call)
        trips = 0
        for _ in range(2_000):
            guarded.feed(event("four" * 10))
            if guarded.wants_growth:
                trips += 1
                assert await guarded.grow() == b""
            _, held = await money(guard)
            assert held >= INPUT + guarded.meter.text_bytes // NEAR_BYTES * TOKEN
        assert trips <= 24
        guarded.feed(event(**usage(20_000)))
        guarded.end(complete=True)
    assert await money(guard) == (INPUT + 20_000 * TOKEN, 0)
    assert sum(isinstance(each, Admission) for each in seen) == 2


async def test_undeclared_stream_is_cut_beyond_what_its_model_gives(new_guard: NewGuard) -> None:
    """A hold for the model's longest answer is enough until a stream is surely longer; then it grows, or it is cut."""
    prices = PriceBook.snapshot(overrides={"openai/test-model": {"input": 1, "output": 2, "max_output_tokens": 100}})
    seen: list[Event] = []
    guard = new_guard(Budget("$1/1d"), prices=prices, observers=[seen.append])
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard))
        await passed(guarded, *[event("x" * 40) for _ in range(19)])
        assert await money(guard) == (0, INPUT + 100 * TOKEN)
        await passed(guarded, event("x" * 40))
        assert (await money(guard))[1] > INPUT + 300 * TOKEN
        assert not guarded.ended
        guarded.end()
    guard = new_guard(Budget("$0.0003/1d", name="other"), prices=prices)
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard))
        await passed(guarded, *[event("x" * 40) for _ in range(19)])
        assert not guarded.ended
        await passed(guarded, event("x" * 40))
        assert guarded.ended
        guarded.end()


async def test_growth_takes_what_is_left(new_guard: NewGuard) -> None:
    """Where a quarter more does not fit, what is left is held, and the stream goes on until that is used up."""
    guard = short(new_guard, 130)
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard))
        await passed(guarded, event("x" * 240))
        assert await money(guard) == (0, INPUT + 130 * TOKEN)
        assert not guarded.ended
        guarded.end()


async def test_stream_goes_on_uncut_by_default(new_guard: NewGuard) -> None:
    """Without `cut` a stream passes whole, is not asked about again and again, and its debt is charged."""
    seen: list[Event] = []
    guard = short(new_guard, 100, observers=[seen.append])
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard), StreamRules())
        body = [event("x" * 400) for _ in range(50)] + [event(**usage(500)), b"data: [DONE]\n\n"]
        assert await passed(guarded, *body) == b"".join(body)
        guarded.end(complete=True)
    assert await money(guard) == (INPUT + 500 * TOKEN, 0)
    assert sum(isinstance(each, Refused) for each in seen) == 1


async def test_reported_tokens_are_believed_before_text(new_guard: NewGuard) -> None:
    """Where a dialect reports its usage all along, a stream is held for and cut by that, with much text or none."""

    def gemini(output_tokens: int, text: str = "") -> bytes:
        told = {
            "candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}],
            "usageMetadata": {
                "promptTokenCount": 100,
                "candidatesTokenCount": output_tokens,
                "totalTokenCount": 100 + output_tokens,
            },
            "modelVersion": "test-model",
        }
        return b"data: " + json.dumps(told).encode() + b"\r\n\r\n"

    guard = short(new_guard, 120)
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard), dialect="gemini")
        await passed(guarded, *[gemini(count, "x" * 5_000) for count in range(1, 119)])
        assert not guarded.ended
        sent = await passed(guarded, gemini(119, "x"), gemini(120, "x"), gemini(121, "x"))
        assert guarded.ended
        assert b'"candidatesTokenCount": 121' not in sent
        guarded.end()
    used, held = await money(guard)
    assert (held, used // TOKEN - INPUT // TOKEN) == (0, 121)


async def test_outage_is_decided_as_the_policies_say(clock: FrozenClock) -> None:
    """While the storage is away, a budget that refuses then ends a stream that needs more, and one that allows does not."""
    for on_outage in ("deny", "allow"):
        storage = OutageStorage(MemoryStorage(clock=clock))
        policies = [Budget("$1/1d", on_outage=on_outage)]
        guard = Guard(policies, storage=storage, clock=clock, prices=PRICES, assumed_output_tokens=100)
        async with guard.open(CONTEXT):
            guarded = stream(await opened(guard))
            storage.down()
            sent = await passed(guarded, *[event("x" * 100) for _ in range(20)])
            assert guarded.ended is (on_outage == "deny")
            assert (b"guard_unavailable" in sent) is (on_outage == "deny")
            storage.up()
            guarded.end()
        await guard.aclose()


async def test_slow_stream_keeps_its_hold_and_slot(clock: FrozenClock) -> None:
    """T18: a stream that lasts for an hour holds its money and its slot for as long as its process lives, no longer."""
    storage = MemoryStorage(clock=clock)
    guard = Guard([Concurrency(1), Budget("$1/1d")], storage=storage, clock=clock, prices=PRICES)
    other = Guard([Concurrency(1), Budget("$1/1d")], storage=storage, clock=clock, prices=PRICES)
    async with guard.open(CONTEXT):
        guarded = stream(await opened(guard))
        _, held = await money(guard)
        for _ in range(360):
            clock.advance(seconds=10)
            await guard.heartbeat()
            await other.heartbeat()
            guarded.feed(event("x"))
            assert await money(guard) == (0, held)
        assert await storage.open_holds() == 2
        clock.advance(seconds=16)
        await other.heartbeat()
        assert await money(guard) == (held, 0)
        guarded.feed(event(**usage(7)))
        guarded.end(complete=True)


def test_deadlines_are_counted_from_the_last_and_from_the_first_byte() -> None:
    """T18: a stream from which nothing comes, and one that lasts too long, are told by their deadlines."""
    time = Seconds()
    call = new_call_without_hold()
    guarded = stream(call, StreamRules(idle_s=10, total_s=25), time=time)
    assert guarded.wait_s() == 10
    time.now = 8
    assert guarded.wait_s() == 2
    guarded.feed(event("x"))
    assert guarded.wait_s() == 10
    time.now = 17
    guarded.feed(event("x"))
    assert guarded.wait_s() == 8
    time.now = 30
    assert guarded.wait_s() == 0
    assert stream(call, StreamRules()).wait_s() is None


@pytest.mark.parametrize("begun", [b"", b'data: {"choi'], ids=["between events", "inside one"])
def test_deadline_ends_the_stream_with_an_event(begun: bytes) -> None:
    """T18: at its deadline a stream ends with the dialect's error event, which says why."""
    time = Seconds()
    guarded = stream(new_call_without_hold(), StreamRules(idle_s=10, total_s=25), time=time)
    sent = guarded.feed(event("x") + begun)
    time.now = 11
    sent += guarded.expire()
    last = json.loads(sent.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "stream_timeout"
    assert "nothing has come for 10 seconds" in last["error"]["message"]
    assert guarded.ended
    assert guarded.feed(event("y")) == b""
    assert guarded.expire() == b""


def new_call_without_hold() -> ActiveCall:
    guard = Guard(prices=PRICES)
    return ActiveCall(guard.new_admission(CONTEXT), None, (), None)


async def test_learned_hold_grows_up_to_the_declared_limit(new_guard: NewGuard) -> None:
    """A hold below the request's own limit, learned from answers before, grows up to it and no further."""
    import msgspec

    guard = new_guard(Budget("$1/1d"))
    async with guard.open(CONTEXT):
        described = guard.describe("openai/test-model", input_tokens=100, max_output_tokens=400)
        learned = msgspec.structs.replace(
            guard.describe("openai/test-model", input_tokens=100, max_output_tokens=100),
            max_output_tokens=400,
            learned=True,
        )
        call = new_call(guard.engine, learned, ())
        await call.claim()
        guarded = stream(call)
        await passed(guarded, *[event("x" * 100) for _ in range(40)])
        assert await money(guard) == (0, described.cost_nanousd)
        guarded.end()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"idle_s": 0}, "idle_s: expected seconds above 0"),
        ({"total_s": -1}, "total_s: expected seconds above 0"),
        ({"total_s": True}, "total_s: expected seconds above 0"),
        ({"idle_s": float("nan")}, "idle_s: expected seconds above 0"),
        ({"drain": "keep"}, "drain: expected 'close' or 'read'"),
        ({"drain": "read"}, "give it an end with total_s"),
        ({"cut": "yes"}, "cut: expected True or False"),
    ],
)
def test_rules_are_checked(arguments: dict[str, Any], message: str) -> None:
    """Malformed rules are refused at construction, with what is allowed."""
    with pytest.raises(ConfigurationError, match=message):
        StreamRules(**arguments)
