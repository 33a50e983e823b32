"""LangChain's callbacks: what a model was asked for is claimed, what it used is settled, whatever way it is called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import httpx2
import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from tests.exits.kit import BILLED, CONTEXT, Stage
from tests.hooks.kit import in_thread

from asgi_llm_guard import Budget, Context, Iterations, LimitExceeded
from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.integrations.langchain import AsyncGuardCallback, GuardCallback
from asgi_llm_guard.testing import Behaviour
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

How = Literal["ainvoke", "astream", "invoke", "stream"]
HOWS: tuple[How, ...] = ("ainvoke", "astream", "invoke", "stream")
every_way = pytest.mark.parametrize("how", HOWS)
QUESTION = "one two three"

PLAIN: dict[str, Any] = {}
"""What every model here is made with."""


@pytest.fixture(autouse=True)
async def plain(stage: Stage) -> AsyncIterator[None]:
    """HTTP clients that end with the test: LangChain keeps its own for as long as the process runs."""
    client = httpx2.AsyncClient()
    PLAIN.update(http_async_client=client, http_client=httpx2.Client(), api_key="k", base_url=stage.base_url)
    yield
    await client.aclose()
    PLAIN["http_client"].close()
    PLAIN.clear()


def model(stage: Stage, how: str, *, context: Context | None = None, **options: Any) -> Any:
    callback: Any = AsyncGuardCallback if how.startswith("a") else GuardCallback
    handler = callback(stage.guard, context=context)
    options = {"max_retries": 0, "max_tokens": 20, "stream_usage": True, **PLAIN, **options}
    return ChatOpenAI(model=BILLED, callbacks=[handler], **options)


async def say(chat: Any, how: str, text: str = QUESTION) -> str:
    """One call; gives the answer's text."""
    if how == "ainvoke":
        return str((await chat.ainvoke(text)).text)
    if how == "astream":
        return "".join([chunk.text async for chunk in chat.astream(text)])
    if how == "invoke":
        return str(await in_thread(lambda: chat.invoke(text).text))
    return "".join(await in_thread(lambda: [chunk.text for chunk in chat.stream(text)]))


async def records(stage: Stage) -> list[UsageRecord]:
    await stage.provider.idle()
    return list(await stage.storage.records())


async def spent(stage: Stage) -> int:
    return sum(record.cost_nanousd or 0 for record in await records(stage))


@every_way
async def test_bill_is_what_was_settled(stage: Stage, how: How) -> None:
    """B9, C9: the provider's bill is what the ledger has, in one record, and one iteration was taken."""
    async with stage.guard.open(CONTEXT):
        assert await say(model(stage, how), how) == f"Echo: {QUESTION}"
    (record,) = await records(stage)
    assert record.outcome == "measured"
    assert record.model == BILLED
    assert record.provider == "openai"
    assert record.cost_nanousd == stage.provider.total_nanousd > 0
    assert await stage.storage.open_holds() == 0


@every_way
async def test_refusal_sends_nothing(stage: Stage, how: How) -> None:
    """A1: a refused call raises `LimitExceeded` before anything is sent, and takes nothing."""
    stage.guard.policies = stage.guard.engine.bind([Iterations(1)])
    async with stage.guard.open(CONTEXT):
        chat = model(stage, how)
        await say(chat, how)
        with pytest.raises(LimitExceeded, match="iteration"):
            await say(chat, how)
    assert stage.provider.calls == 1
    assert await spent(stage) == stage.provider.total_nanousd


@every_way
async def test_provider_errors_are_settled(stage: Stage, how: How) -> None:
    """A provider's error costs no money, and the call that fails is over."""
    stage.provider.script(Behaviour.error(500))
    async with stage.guard.open(CONTEXT):
        with pytest.raises(openai.InternalServerError):
            await say(model(stage, how), how)
    (record,) = await records(stage)
    assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)
    assert await stage.storage.open_holds() == 0


@every_way
async def test_answers_without_usage_are_charged_as_held(stage: Stage, how: How) -> None:
    """An answer that does not say what it used is never free: the hold stays, or what its text bounds."""
    stage.provider.script(Behaviour.no_usage())
    async with stage.guard.open(CONTEXT):
        await say(model(stage, how), how)
    (record,) = await records(stage)
    assert record.outcome in ("unmetered", "estimated")
    assert (record.cost_nanousd or 0) >= stage.provider.total_nanousd > 0


@pytest.mark.parametrize("how", ["astream", "stream"])
async def test_streams_that_are_left_are_charged(stage: Stage, how: How) -> None:
    """A stream that its reader leaves is charged by its text, never 0, when its admission has ended."""
    async with stage.guard.open(CONTEXT):
        chat = model(stage, how)
        if how == "astream":
            async for _ in chat.astream(QUESTION):
                break
        else:
            await in_thread(lambda: next(iter(chat.stream(QUESTION))))
    (record,) = await records(stage)
    assert record.outcome in ("estimated", "unknown", "measured")
    assert (record.cost_nanousd or 0) > 0
    assert await stage.storage.open_holds() == 0


@every_way
async def test_a_guarded_client_below_charges_once(stage: Stage, how: How) -> None:
    """With a guarded HTTP client below, the call is admitted once, and charged once."""
    stage.guard.policies = stage.guard.engine.bind([Iterations(1), Budget("$1/1d", per="global")])
    clients: dict[str, Any] = {
        "http_async_client": stage.guard.httpx_client(),
        "http_client": stage.guard.httpx_client_sync(),
    }
    async with stage.guard.open(CONTEXT):
        assert await say(model(stage, how, **clients), how) == f"Echo: {QUESTION}"
    (record,) = await records(stage)
    assert record.cost_nanousd == stage.provider.total_nanousd > 0
    await clients["http_async_client"].aclose()
    clients["http_client"].close()


async def test_batches_are_calls_of_their_own(stage: Stage) -> None:
    """Each prompt of a batch is a call: three are claimed and settled."""
    async with stage.guard.open(CONTEXT):
        await model(stage, "ainvoke").abatch(["one", "two", "three"])
    assert len(await records(stage)) == 3
    assert await spent(stage) == stage.provider.total_nanousd


@pytest.mark.parametrize("how", ["agenerate", "generate"])
async def test_refused_batches_send_nothing(stage: Stage, how: str) -> None:
    """Where the second of two prompts that go together is refused, the first is given back: neither was sent."""
    stage.guard.policies = stage.guard.engine.bind([Iterations(1)])
    chat = model(stage, how)
    async with stage.guard.open(CONTEXT) as admission:
        with pytest.raises(LimitExceeded):
            if how == "agenerate":
                await chat.agenerate([[AIMessage("a")], [AIMessage("b")]])
            else:
                await in_thread(lambda: chat.generate([[AIMessage("a")], [AIMessage("b")]]))
        assert not admission.calls
        await say(chat, "ainvoke" if how == "agenerate" else "invoke")
    assert stage.provider.calls == 1
    assert await spent(stage) == stage.provider.total_nanousd


async def test_calls_one_after_the_other(stage: Stage) -> None:
    """Ten calls of a loop are ten iterations; none of them nests in one that is over."""
    async with stage.guard.open(CONTEXT):
        chat = model(stage, "ainvoke")
        for _ in range(10):
            await say(chat, "ainvoke")
    assert len(await records(stage)) == 10
    assert await spent(stage) == stage.provider.total_nanousd


async def test_calls_at_the_same_time(stage: Stage) -> None:
    """Calls of one admission that run together are each admitted, exactly as many as fit."""
    stage.guard.policies = stage.guard.engine.bind([Iterations(3)])
    async with stage.guard.open(CONTEXT):
        chat = model(stage, "ainvoke")
        outcomes = await asyncio.gather(*(say(chat, "ainvoke") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(outcome, LimitExceeded) for outcome in outcomes) == 5
    assert stage.provider.calls == 3
    assert await spent(stage) == stage.provider.total_nanousd


async def test_tools_are_called(stage: Stage) -> None:
    """A bound tool counts as input, and its call is an answer like any other."""

    @tool
    def find(what: str) -> str:
        """Find something."""
        return what

    stage.provider.script(Behaviour.call_tool("find", what="it"))
    async with stage.guard.open(CONTEXT):
        answer = await model(stage, "ainvoke").bind_tools([find]).ainvoke(QUESTION)
    assert answer.tool_calls[0]["args"] == {"what": "it"}
    assert await spent(stage) == stage.provider.total_nanousd > 0


async def test_outside_of_an_admission(stage: Stage) -> None:
    """Without an admission a call needs a context of its own; without that, it is not made."""
    with pytest.raises(ContextError, match="give the callback"):
        await say(model(stage, "ainvoke"), "ainvoke")
    assert stage.provider.calls == 0
    await say(model(stage, "ainvoke", context=Context(caller="job:nightly")), "ainvoke")
    (record,) = await records(stage)
    assert (record.caller, record.cost_nanousd) == ("job:nightly", stage.provider.total_nanousd)


async def test_models_of_text(stage: Stage) -> None:
    """A model that completes text is guarded as well."""
    handler = AsyncGuardCallback(stage.guard)
    options: dict[str, Any] = {"max_tokens": 20, "max_retries": 0, **PLAIN}
    llm = OpenAI(model=BILLED, callbacks=[handler], **options)
    async with stage.guard.open(CONTEXT):
        await llm.ainvoke(QUESTION)
    (record,) = await records(stage)
    assert (record.cost_nanousd or 0) >= stage.provider.total_nanousd > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda guard: GuardCallback("guard"),  # type: ignore[arg-type]
        lambda guard: AsyncGuardCallback(guard, context="ann"),  # type: ignore[arg-type]
        lambda guard: GuardCallback(guard, model=""),
    ],
    ids=["guard", "context", "model"],
)
async def test_wrong_arguments(stage: Stage, make: Callable[[Any], Any]) -> None:
    """What a callback is told wrongly is an error when it is made."""
    with pytest.raises(ConfigurationError):
        make(stage.guard)
