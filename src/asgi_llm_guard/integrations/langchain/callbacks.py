"""Callbacks for LangChain: a call is admitted when a model starts, and settled when it ends.

    model = ChatOpenAI(model="gpt-5.6-mini", callbacks=[AsyncGuardCallback(guard)])

`AsyncGuardCallback` is for `ainvoke`, `astream` and `abatch`, `GuardCallback` for `invoke`, `stream` and `batch`.
A refusal is raised as `LimitExceeded` before anything is sent. A model over a guarded HTTP client
(`http_async_client=guard.httpx_client()`) needs none of this, and sees each attempt of the SDK. Both together charge
a call once, but for several prompts that go to one `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk, LLMResult

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.integrations.calls import BegunCalls

__all__ = ["AsyncGuardCallback", "GuardCallback"]


class _Handler:
    """What both kinds of callbacks do."""

    raise_error = True
    """A refusal stops the call; LangChain logs the errors of other callbacks and goes on."""
    run_inline = True
    """In the task of the call, before it is sent."""

    def __init__(
        self,
        guard: Guard,
        *,
        context: Context | Callable[[], Context] | None = None,
        model: str | None = None,
    ) -> None:
        """`guard`: decides, and settles.

        `context`: who asks where no admission of the guard is open; `None`: such calls raise `ContextError`.
        `model`: whose price it is, for models that do not tell their name.

        Raises:
            ConfigurationError: an argument is wrong.
        """
        if model is not None and (not isinstance(model, str) or not model):
            raise ConfigurationError(f"model: expected a name such as 'openai/gpt-5.6-mini', got {model!r}")
        self._calls = BegunCalls(guard, context)
        self._model = model

    def _described(self, given: object, told: Mapping[str, Any]) -> Call:
        """The call that is about to be made: `metadata` has its name, `invocation_params` all the rest."""
        metadata, params = told.get("metadata") or {}, told.get("invocation_params") or {}
        names = (metadata.get("ls_model_name"), params.get("model"), params.get("model_name"), params.get("model_id"))
        model = next((name for name in (self._model, *names) if isinstance(name, str) and name), None)
        if model is None:
            raise ConfigurationError(
                "this LangChain model does not tell its name; give the callback one: GuardCallback(guard, model=...)"
            )
        limits = [params.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        limits.append(metadata.get("ls_max_tokens"))
        choices = params.get("n")
        text = {"messages": given, "tools": params.get("tools") or params.get("functions") or ()}
        provider = metadata.get("ls_provider")
        return self._calls.guard.describe(
            model,
            provider=provider if isinstance(provider, str) and provider and "/" not in model else None,
            input=text,
            max_output_tokens=max((limit for limit in limits if type(limit) is int and limit > 0), default=None),
            choices=choices if type(choices) is int and choices > 0 else 1,
            stream=bool(params.get("stream")),
        )

    def _chunk(self, run_id: UUID, token: object, chunk: object) -> None:
        begun = self._calls.find(run_id)
        if begun is not None:
            begun.used = True
            begun.call.record_chunk(token if chunk is None else chunk)
            if begun.call.halted is not None:
                raise LimitExceeded(begun.call.halted)

    def _ended(self, run_id: UUID, response: LLMResult) -> None:
        begun = self._calls.find(run_id)
        if begun is not None:
            if not begun.call.recorded or begun.call.usage is None:
                begun.call.record_if_known(response)
            self._calls.end(run_id)

    def _failed(self, run_id: UUID, error: BaseException) -> None:
        self._calls.end(run_id, error, complete=False)


class AsyncGuardCallback(_Handler, AsyncCallbackHandler):
    """Guards `ainvoke`, `astream` and `abatch` of the models that it is given to."""

    async def on_chat_model_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002 - see AsyncCallbackHandler
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **told: Any,
    ) -> None:
        """Claim the call.

        Raises:
            LimitExceeded: refused; nothing is sent.
        """
        await self._calls.begin(run_id, self._described(messages, told), group=(parent_run_id,))

    async def on_llm_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002 - see AsyncCallbackHandler
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **told: Any,
    ) -> None:
        """Claim the call of a model that completes text; raises as `on_chat_model_start`."""
        await self._calls.begin(run_id, self._described(prompts, told), group=(parent_run_id,))

    async def on_llm_new_token(
        self,
        token: str | list[str | dict[str, Any]],
        *,
        chunk: GenerationChunk | ChatGenerationChunk | None = None,
        run_id: UUID,
        **_: Any,
    ) -> None:
        """Count what a stream has given.

        Raises:
            LimitExceeded: the call was stopped meanwhile; LangChain ends the stream.
        """
        self._chunk(run_id, token, chunk)

    async def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Settle the call by what the answer says."""
        self._ended(run_id, response)

    async def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Settle the call by what the error says."""
        self._failed(run_id, error)


class GuardCallback(_Handler, BaseCallbackHandler):
    """Guards `invoke`, `stream` and `batch` of the models that it is given to."""

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002 - see BaseCallbackHandler
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **told: Any,
    ) -> None:
        """Claim the call.

        Raises:
            LimitExceeded: refused; nothing is sent.
        """
        self._calls.begin_sync(run_id, self._described(messages, told), group=(parent_run_id,))

    def on_llm_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002 - see BaseCallbackHandler
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **told: Any,
    ) -> None:
        """Claim the call of a model that completes text; raises as `on_chat_model_start`."""
        self._calls.begin_sync(run_id, self._described(prompts, told), group=(parent_run_id,))

    def on_llm_new_token(
        self,
        token: str | list[str | dict[str, Any]],
        *,
        chunk: GenerationChunk | ChatGenerationChunk | None = None,
        run_id: UUID,
        **_: Any,
    ) -> None:
        """Count what a stream has given.

        Raises:
            LimitExceeded: the call was stopped meanwhile; LangChain ends the stream.
        """
        self._chunk(run_id, token, chunk)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Settle the call by what the answer says."""
        self._ended(run_id, response)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Settle the call by what the error says."""
        self._failed(run_id, error)
