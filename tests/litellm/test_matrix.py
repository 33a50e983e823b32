"""The matrix of `tests/matrix` for LiteLLM: asynchronous through its callback, synchronous inside `guard.call_sync`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar

import litellm
import pytest
from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER
from tests.matrix.cases import Cases
from tests.matrix.kit import FUNCTION, LIMIT, MODEL, Client, Mode, every_way

from asgi_llm_guard.integrations.litellm import GuardCallback

pytestmark = pytest.mark.anyio


class LiteLLMClient(Client):
    """Its Router, which repeats requests."""

    name = "litellm"
    modes: ClassVar[tuple[Mode, ...]] = ("async",)
    reads_should_retry = True
    counts = True

    def make_http(self) -> Any:
        """It has its own."""

    def make_async(self) -> Any:
        self.callback = GuardCallback(self.guard)
        litellm.callbacks = [self.callback]
        deployment = {"model": f"openai/{MODEL}", "api_base": self.base_url, "api_key": "k", "max_retries": 0}
        return litellm.Router(
            model_list=[{"model_name": MODEL, "litellm_params": deployment}], num_retries=self.retrying, retry_after=0
        )

    def make_sync(self) -> Any:
        raise NotImplementedError

    def asked(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": LIMIT}

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "function": FUNCTION}]} if tools else {}
        return self.sdk.acompletion(**self.asked(text), **more)

    def read(self, answer: Any) -> str:
        message = answer.choices[0].message
        return str(message.tool_calls[0].function.name if message.tool_calls else message.content)

    def chunks(self, text: str) -> Any:
        return self.sdk.acompletion(**self.asked(text), stream=True)

    def read_chunk(self, chunk: Any) -> str:
        return (chunk.choices[0].delta.content or "") if chunk.choices else ""

    async def told(self) -> None:
        await asyncio.sleep(0)  # the tasks in which it tells begin
        await GLOBAL_LOGGING_WORKER.flush()
        async with asyncio.timeout(10):
            await asyncio.gather(*self.callback._calls._looking)

    async def aclose(self) -> None:
        litellm.logging_callback_manager._reset_all_callbacks()
        await litellm.close_litellm_async_clients()


class SyncLiteLLMClient(LiteLLMClient):
    """Its synchronous function, which no callback can stop."""

    name = "litellm-call"
    modes = ("sync",)
    retries = False

    def make_async(self) -> Any:
        raise NotImplementedError

    def make_sync(self) -> Any:
        return litellm.completion

    def asked(self, text: str) -> dict[str, Any]:
        to = {"model": f"openai/{MODEL}", "api_base": self.base_url, "api_key": "k", "max_retries": 0}
        return super().asked(text) | to

    def _guarded(self, text: str) -> Any:
        return self.guard.call_sync(model=f"openai/{MODEL}", input=text, max_output_tokens=LIMIT)

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "function": FUNCTION}]} if tools else {}
        with self._guarded(text) as call:
            answer = self.sdk(**self.asked(text), **more)
            call.record(answer)
        return answer

    def chunks(self, text: str) -> Iterator[Any]:
        with self._guarded(text) as call:
            stream = self.sdk(**self.asked(text), stream=True, stream_options={"include_usage": True})
            with closing(stream.completion_stream):
                yield from call.stream_sync(stream)

    async def told(self) -> None:
        """At once."""

    async def aclose(self) -> None:
        """It has nothing to close."""


@pytest.mark.parametrize(("kind", "mode"), every_way([LiteLLMClient, SyncLiteLLMClient]))
class TestMatrix(Cases):
    """LiteLLM, in the environment that it needs."""
