"""Calls that end by other people's means: in another task, by their exceptions, by their error pages."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import httpx2
import pytest
from tests.engine.conftest import NewGuard

from asgi_llm_guard import Budget, Context, Iterations
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

MODEL = "openai/test-model"


def guarded(new_guard: NewGuard) -> Any:
    return new_guard(Iterations(9), Budget("$1/1d"))


async def the_record(guard: Any) -> UsageRecord:
    assert await guard.storage.open_holds() == 0
    (record,) = await guard.storage.records()
    assert isinstance(record, UsageRecord)
    return record


async def test_block_that_is_left_in_another_task_is_settled(new_guard: NewGuard) -> None:
    """A call entered in one task and left in another, as an abandoned stream is, keeps nothing held."""
    guard = guarded(new_guard)
    block = guard.call(model=MODEL, input_tokens=100, max_output_tokens=50)
    async with guard.open(Context(caller="acme", session="s")):
        await asyncio.create_task(block.__aenter__())
        await asyncio.create_task(block.__aexit__(None, None, None))
    assert (await the_record(guard)).outcome == "unmetered"


@pytest.mark.parametrize("library", [httpx, httpx2])
@pytest.mark.parametrize("status", [429, 500])
async def test_raise_for_status_is_the_answer_of_the_provider(new_guard: NewGuard, library: Any, status: int) -> None:
    """What `raise_for_status` raises is the provider's error: no money, one call."""
    guard = guarded(new_guard)
    response = library.Response(status, request=library.Request("POST", "http://provider"))
    with pytest.raises(library.HTTPStatusError):
        async with (
            guard.open(Context(caller="acme", session="s")),
            guard.call(model=MODEL, input_tokens=100, max_output_tokens=50),
        ):
            response.raise_for_status()
    record = await the_record(guard)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)


async def test_recorded_error_page_costs_no_money(new_guard: NewGuard) -> None:
    """A response with an error status is an error, even if its body is a page of HTML."""
    guard = guarded(new_guard)
    async with (
        guard.open(Context(caller="acme", session="s")),
        guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call,
    ):
        call.record(httpx2.Response(502, text="<h1>Bad Gateway</h1>"))
    record = await the_record(guard)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)


async def test_recorded_page_without_an_error_status_is_unmetered(new_guard: NewGuard) -> None:
    """A good response in which no usage can be read is charged the hold."""
    guard = guarded(new_guard)
    async with (
        guard.open(Context(caller="acme", session="s")),
        guard.call(model=MODEL, input_tokens=100, max_output_tokens=50) as call,
    ):
        call.record(httpx2.Response(200, text="hello"))
    record = await the_record(guard)
    assert (record.outcome, record.cost_nanousd) == ("unmetered", 200_000)
