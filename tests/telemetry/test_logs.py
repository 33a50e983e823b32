"""Logs: what belongs together is found, no line can be forged, and a refusal is one line at most."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from tests.decorator.values import ANSWER, BOUND, PRICES
from tests.middleware.values import Provider, ask, guarded
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Context, Guard, Iterations, LimitExceeded
from asgi_llm_guard.telemetry import JsonLines, LogCorrelation, LogRefusals

pytestmark = pytest.mark.anyio

HOSTILE = "a\r\nX: y\x1b[2J\x00\u202e\u2028\u200b\ud800\x85"


class Lines:
    """What a logger has written."""

    def __init__(self, handler: logging.StreamHandler[StringIO]) -> None:
        self.handler = handler

    @property
    def text(self) -> str:
        return self.handler.stream.getvalue()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.split("\n")[:-1]]


@pytest.fixture
def guard() -> Guard:
    return Guard([Iterations(1, per="caller")], prices=PRICES)


@pytest.fixture
def lines(guard: Guard) -> Iterator[Lines]:
    """The lines of our logger, of all levels."""
    logger = logging.getLogger("asgi_llm_guard")
    handler = logging.StreamHandler(StringIO())
    handler.addFilter(LogCorrelation(guard))
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield Lines(handler)
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


async def test_correlation(guard: Guard, lines: Lines, told: Telemetry) -> None:
    """S17: a line has the trace, the span, the request and the call that it was written in."""
    log = logging.getLogger("asgi_llm_guard.somewhere")
    log.warning("nowhere")
    async with guard.open(Context(caller="ada", request_id="request-1")):
        with told.tracer.start_as_current_span("work") as span:
            log.warning("in a request")
            async with guard.call(**BOUND) as call:
                log.warning("in a call")
                call.record(ANSWER)
    (record,) = await guard.storage.records()

    nowhere, request, in_call = lines.records
    assert {"trace_id", "span_id", "request_id", "call_id"}.isdisjoint(nowhere)
    context = span.get_span_context()
    assert (int(request["trace_id"], 16), int(request["span_id"], 16)) == (context.trace_id, context.span_id)
    assert (request["request_id"], request.get("call_id")) == ("request-1", None)
    assert (in_call["request_id"], in_call["call_id"]) == ("request-1", record.call_id)


def test_lines_cannot_be_forged(lines: Lines) -> None:
    """T16: whatever stands in a message, a field or a traceback: one record is one line, of visible characters."""
    try:
        int(HOSTILE, base=-1)
    except ValueError:
        # Not through the logger: pytest would keep what can be neither printed nor sent to another process.
        logger, extra = logging.getLogger("asgi_llm_guard"), {"policy": HOSTILE, "request_id": HOSTILE}
        made = logger.makeRecord(logger.name, logging.ERROR, "", 0, "%s", (HOSTILE,), sys.exc_info(), extra=extra)
        lines.handler.handle(made)

    assert len(lines.text.splitlines()) == 1
    assert [character for character in lines.text[:-1] if not character.isprintable()] == []
    assert "\u200b" not in lines.text
    (record,) = lines.records
    assert record["message"].startswith("a\r\nX: y")
    assert "ValueError" in record["error"]
    assert "\n" in record["error"]


async def test_one_line_for_each_refusal(guard: Guard, lines: Lines) -> None:
    """T16, S17: a refusal is one line at DEBUG with policy, code, status, route and model, and no id; above DEBUG none."""
    app = guarded(Provider(), guard)
    guard.observe(LogRefusals())
    for _ in range(3):
        await ask(app, headers=[(b"x-request-id", b"request-1")])

    refusals = [record for record in lines.records if "refused" in record["message"]]
    assert len(refusals) == 2
    assert all(record["level"] == "DEBUG" for record in refusals)
    told = {name: refusals[0][name] for name in ("policy", "code", "status", "model", "message")}
    assert told == {
        "policy": "iterations",
        "code": "session_iterations_exhausted",
        "status": 429,
        "model": "test-model",
        "message": "refused by iterations: session_iterations_exhausted",
    }
    logging.getLogger("asgi_llm_guard").setLevel(logging.INFO)
    await ask(app)
    assert len([record for record in lines.records if "refused" in record["message"]]) == 2


async def test_no_line_for_each_refusal_unless_asked(guard: Guard, lines: Lines) -> None:
    """T16: refusals by themselves write nothing."""
    async with guard.open(Context(caller="ada")):
        async with guard.call(**BOUND) as call:
            call.record(ANSWER)
        for _ in range(5):
            with pytest.raises(LimitExceeded):
                await guard.call(**BOUND).__aenter__()
    assert lines.records == []
