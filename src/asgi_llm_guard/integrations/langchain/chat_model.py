"""A chat model of LangChain whose calls go through the gateway.

    model = GatewayChatModel(gateway=gateway, model="auto")

It chooses no deployment, repeats nothing and keeps no key: that is the gateway's. Who asks is whoever has opened an
admission of the guard, or the gateway's own `context`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any, Final, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field

from asgi_llm_guard import background
from asgi_llm_guard.errors import GuardError
from asgi_llm_guard.gateway import Chunk, Completion, Gateway, GatewayError
from asgi_llm_guard.integrations.langchain.messages import ending_of, message_of, messages_for, piece_of
from asgi_llm_guard.usage import Usage

__all__ = ["GatewayChatModel", "StreamFailed"]

Method = Literal["function_calling", "json_schema", "json_mode"]

_METHODS: Final = ("function_calling", "json_schema", "json_mode")
_CHOICES: Final = frozenset({"auto", "none", "required"})


class StreamFailed(GuardError):  # noqa: N818 - what happened, as the errors of the gateway
    """An answer ended in an error after it had begun. What came before it counts, and is charged."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message") or "the stream ended in an error"))
        self.error = dict(error)
        """As OpenAI tells of it."""


class GatewayChatModel(BaseChatModel):
    """Chats with a model of a gateway: `ainvoke`, `astream`, and `invoke` and `stream` for synchronous code.

    Raises, when it is called:
        LimitExceeded, GatewayError, BodyError: as `Gateway.ask`.
        ContextError: no admission is open, and the gateway has no context; or a synchronous method was called on the
            thread of an event loop, which it would block.
        StreamFailed: an error in mid-stream.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    gateway: Gateway = Field(exclude=True, repr=False)
    """No part of what is shown, traced or serialised, and so neither are its keys."""
    model: str
    """`provider/model`, an alias or a group. One call may ask another: `ainvoke(..., model="other")`."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Of the answer. The gateway says it in the provider's word for it."""
    stop: list[str] | None = None
    """Where answers end; those of a call take their place."""
    fallbacks: bool = True
    """Whether other models may take over."""
    streaming: bool = False
    """`invoke` and `ainvoke` stream as well, for callbacks that want each token."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More fields of OpenAI's chat API, such as `reasoning_effort`."""

    # ------------------------------------------------------------------------------- about it

    @property
    def _llm_type(self) -> str:
        return "asgi-llm-guard-gateway"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "fallbacks": self.fallbacks, **self._defaults}

    @property
    def _defaults(self) -> dict[str, Any]:
        own = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "stop": self.stop}
        return {**{name: value for name, value in own.items() if value not in (None, [])}, **self.model_kwargs}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        provider, slash, _ = params.get("ls_model_name", self.model).partition("/")
        params["ls_provider"] = provider if slash else "asgi_llm_guard"
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        """The smallest context window of those who serve the model, as it was when this was made.

        `None`: one of them is not known, or the gateway has no deployments yet.
        """
        try:
            window = self.gateway.window(self.model)
        except GatewayError:  # whoever asks is told
            return None
        return None if window is None else ModelProfile(max_input_tokens=window)

    # ------------------------------------------------------------------------------ one answer

    def _body(self, stop: list[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model": self.model, "fallbacks": self.fallbacks, **self._defaults, **options}
        if stop:
            body["stop"] = stop
        return {name: value for name, value in body.items() if value is not None}

    async def _answer(
        self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]
    ) -> ChatResult:
        body = self._body(stop, options)
        completion = await self.gateway.chat(messages=messages_for(messages), **body)
        return ChatResult(generations=[_generation(each) for each in _choices(completion)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain tells it itself
        **kwargs: Any,
    ) -> ChatResult:
        return await self._answer(messages, stop, kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - as above
        **kwargs: Any,
    ) -> ChatResult:
        return background.run(self._answer(messages, stop, kwargs))

    # -------------------------------------------------------------------------------- a stream

    async def _pieces(
        self, messages: list[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        chunk: Chunk | None = None
        finish_reason: str | None = None
        usage: Usage | None = None  # LangChain adds up what several pieces say
        body = self._body(stop, options)
        async with aclosing(self.gateway.stream(messages=messages_for(messages), **body)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.error is not None:
                    raise StreamFailed(chunk.error)
                finish_reason = chunk.finish_reason or finish_reason
                usage = chunk.usage or usage
                piece = piece_of(chunk)
                if piece is not None:
                    yield ChatGenerationChunk(message=piece)
        yield ChatGenerationChunk(message=ending_of(chunk, finish_reason, usage))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - as above
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(self._pieces(messages, stop, kwargs)) as pieces:
            async for piece in pieces:
                yield piece

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - as above
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        pieces = self._pieces(messages, stop, kwargs)
        # Whoever leaves drops it, and so does the garbage collector, which must not wait: its own loop closes it.
        while (piece := background.run(_next(pieces))) is not None:
            yield piece

    # ------------------------------------------------------------------------ tools and schemas

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Give the model tools.

        `tool_choice`: `"auto"`, `"none"`; `"any"`, `"required"` or `True`: at least one; the name of one of them, or
        as OpenAI's chat API has it.

        Raises:
            ValueError: none of the tools has that name.
        """
        written = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choice = _choice(tool_choice, written)
        if choice is not None:
            kwargs["tool_choice"] = choice
        if parallel_tool_calls is not None:
            kwargs["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(tools=written, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        include_raw: bool = False,
        method: Method = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers of a schema: an object of its class, or a dict where it is none.

        `method`: `function_calling`, which most models know; `json_schema`, which holds them to it; `json_mode`: any
        JSON, and the prompt says which, so `schema` may be `None`. `strict`: the provider holds the answer to the
        schema, if it is of the kind that it can hold to. `include_raw`: a dict of `raw`, `parsed` and
        `parsing_error`, and what cannot be parsed is no error.

        Raises:
            ValueError: there is no such method, or it needs a schema.
        """
        if method not in _METHODS:
            raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
        if schema is None and method != "json_mode":
            raise ValueError(f"schema: method {method!r} needs one, got None")
        told = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        bound: Runnable[LanguageModelInput, AIMessage]
        if method == "function_calling":
            assert schema is not None  # noqa: S101 - as checked
            name = convert_to_openai_tool(schema)["function"]["name"]
            bound = self.bind_tools(
                [schema],
                tool_choice=name,
                strict=strict,
                parallel_tool_calls=False,
                ls_structured_output_format=told,
                **kwargs,
            )
        else:
            bound = self.bind(
                response_format=_format(schema, method, strict), ls_structured_output_format=told, **kwargs
            )
        parser = _parser(schema, method)
        if not include_raw:
            return bound | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _choices(completion: Completion) -> Iterator[Completion]:
    """Each choice as an answer of its own; what was used is told with the first."""
    yield completion
    for choice in completion.raw["choices"][1:]:
        yield Completion.of({**completion.raw, "choices": [choice], "usage": None}, deployment=completion.deployment)


def _generation(completion: Completion) -> ChatGeneration:
    return ChatGeneration(message=message_of(completion), generation_info={"finish_reason": completion.finish_reason})


async def _next(pieces: AsyncIterator[ChatGenerationChunk]) -> ChatGenerationChunk | None:
    return await anext(pieces, None)


def _choice(choice: str | bool | dict[str, Any] | None, tools: Sequence[dict[str, Any]]) -> str | dict[str, Any] | None:
    if choice is None or choice is False:
        return None
    if choice is True or choice == "any":
        return "required"
    if isinstance(choice, dict) or choice in _CHOICES:
        return choice
    names = [tool["function"]["name"] for tool in tools if "function" in tool]
    if choice not in names:
        raise ValueError(f"tool_choice: there is no tool {choice!r}; there are {', '.join(names) or 'none'}")
    return {"type": "function", "function": {"name": choice}}


def _format(schema: dict[str, Any] | type | None, method: Method, strict: bool | None) -> dict[str, Any]:
    if method == "json_mode":
        return {"type": "json_object"}
    assert schema is not None  # noqa: S101 - as checked
    written = convert_to_json_schema(schema, strict=strict)
    name = str(written.pop("title", "answer"))
    told: dict[str, Any] = {"name": name, "schema": written}
    description = written.pop("description", None)
    if description:
        told["description"] = description
    if strict is not None:
        told["strict"] = strict
    return {"type": "json_schema", "json_schema": told}


def _parser(schema: dict[str, Any] | type | None, method: Method) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        if method == "function_calling":
            return PydanticToolsParser(tools=[schema], first_tool_only=True)
        return PydanticOutputParser(pydantic_object=schema)
    if schema is None or method != "function_calling":
        return JsonOutputParser()
    return JsonOutputKeyToolsParser(key_name=convert_to_openai_tool(schema)["function"]["name"], first_tool_only=True)
