"""A stop ends what is running on ways in that have no HTTP request of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import EventStreamError
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from tests.gateway.kit import fleet
from tests.hooks.kit import in_thread
from tests.hooks.test_botocore import on_stage, stream_of

from asgi_llm_guard import Budget, Context, Guard, LimitExceeded
from asgi_llm_guard.gateway import RetryRules
from asgi_llm_guard.integrations.langchain import AsyncGuardCallback, GuardCallback
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.stops import Stop, StopScope
from asgi_llm_guard.testing import Behaviour, FrozenClock

pytestmark = pytest.mark.anyio

PRICES = PriceBook.snapshot(overrides={"openai/acme-1": {"input": 1, "output": 1}})
MIA = Context(caller="key-1", user="mia", session="s", departments=("sales",), agent="writer")
STOPS: dict[StopScope, str] = {
    "caller": "key-1", "user": "mia", "session": "s", "department": "sales", "agent": "writer",
    "model": "openai/acme-1", "all": "",
}  # fmt: skip
WORDS = ["one ", "two ", "three ", "four "]


class Model(BaseChatModel):
    """Says four words. `said`: is told after each of them."""

    said: Any = None

    @property
    def _llm_type(self) -> str:
        return "words"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_provider": "openai", "ls_model_name": "acme-1", "ls_model_type": "chat", "ls_max_tokens": 100}

    def _generate(self, messages: list[BaseMessage], *args: Any, **options: Any) -> ChatResult:
        raise NotImplementedError

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for word in WORDS:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=word))
            if run_manager is not None:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for word in WORDS:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=word))
            if run_manager is not None:
                await run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk


async def of_langchain(guard: Guard, got: list[str], stop: Stop) -> None:
    model = Model(callbacks=[AsyncGuardCallback(guard)])
    async with guard.open(MIA):
        async for piece in model.astream("hello"):
            got.append(str(piece.content))
            if len(got) == 2:
                guard.set_stops([stop])


async def of_langchain_sync(guard: Guard, got: list[str], stop: Stop) -> None:
    model = Model(callbacks=[GuardCallback(guard)])

    def work() -> None:
        with guard.open_sync(MIA):
            for piece in model.stream("hello"):
                got.append(str(piece.content))
                if len(got) == 2:
                    guard.set_stops([stop])

    await asyncio.to_thread(work)


async def of_call(guard: Guard, got: list[str], stop: Stop) -> None:
    async def words() -> AsyncIterator[dict[str, Any]]:
        for word in WORDS:
            yield {
                "object": "chat.completion.chunk",
                "model": "acme-1",
                "choices": [{"index": 0, "delta": {"content": word}}],
            }

    async with guard.open(MIA), guard.call(model="openai/acme-1", input="hello", max_output_tokens=100) as call:
        async for chunk in call.stream(words()):
            got.append(chunk["choices"][0]["delta"]["content"])
            if len(got) == 2:
                guard.set_stops([stop])


@pytest.mark.parametrize("way", [of_langchain, of_langchain_sync, of_call])
@pytest.mark.parametrize("scope", STOPS)
async def test_a_stream_of_a_job_is_ended(way: Any, scope: StopScope) -> None:
    """S8: a stop of whatever kind ends the stream of a job with its next part, and the call is charged for what came."""
    guard = Guard([Budget("$1/daily", per="global")], prices=PRICES)
    async with guard:
        got: list[str] = []
        with pytest.raises(LimitExceeded) as raised:
            await way(guard, got, Stop(scope=scope, subject=STOPS[scope]))
        assert raised.value.denied.code == "stopped"
        assert got == WORDS[:2]
        assert guard.open_admissions == 0
        (record,) = await guard.storage.records()
        assert record.outcome == "estimated"
        assert 0 < (record.cost_nanousd or 0) <= (record.estimate_nanousd or 0)
        assert await guard.storage.open_holds() == 0


async def test_a_stream_of_bedrock_is_ended() -> None:
    """S8: a stopped stream of boto3 ends with an exception of Bedrock's, and is charged for what came."""
    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.slow())
        stage.provider.release(3)
        got: list[str] = []

        def work() -> None:
            for event in stream_of(client):
                if "contentBlockDelta" in event:
                    got.append(event["contentBlockDelta"]["delta"]["text"])
                    stage.guard.set_stops([Stop(scope="all")])
                    stage.provider.release()

        async with stage.guard.open(MIA):
            with pytest.raises(EventStreamError, match="stopped"):
                await in_thread(work)

        assert "three" not in "".join(got)
        await stage.provider.until(lambda: stage.provider.open == 0)
        (record,) = await stage.storage.records()
        assert record.outcome == "estimated"
        assert await stage.storage.open_holds() == 0


def stopped_for_good(guard: Guard) -> None:
    guard.set_stops([Stop(scope="all")])


def stopped_once(guard: Guard) -> None:
    assert guard.stop(Stop(scope="all")) == 1


@pytest.mark.parametrize("stop", [stopped_for_good, stopped_once])
async def test_a_call_that_is_to_be_repeated_is_refused(clock: FrozenClock, stop: Callable[[Guard], None]) -> None:
    """S8: who is stopped while a gateway waits to ask once more is told so, and not of the provider's failure."""

    async def sleep(_: float) -> None:
        stop(made.guard)

    async with fleet(clock, "a", retry=RetryRules(retries=2, pause_s=5), sleep=sleep) as made:
        made["a"].script(Behaviour.error(503), Behaviour.error(503))
        with pytest.raises(LimitExceeded) as raised:
            await made.chat()
        assert raised.value.denied.code == "stopped"
        assert made["a"].calls == 1
        await made.settled()
