"""The clients that people use, each over a guarded HTTP client, as if all were asked in the same way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import agents
import anthropic
import boto3
import cohere
import openai
from botocore.config import Config
from cohere.core.request_options import RequestOptions
from google import genai
from google.genai import types
from groq import AsyncGroq, Groq
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from mistralai.client import Mistral
from mistralai.client.utils import BackoffStrategy, RetryConfig
from ollama import AsyncClient as AsyncOllama
from ollama import Client as Ollama
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.matrix.kit import FUNCTION, LIMIT, MODEL, TOOL, Client, every_way

from asgi_llm_guard.integrations.botocore import guard_botocore


class OpenAIClient(Client):
    name = "openai"
    reads_should_retry = True

    def make_async(self) -> Any:
        return openai.AsyncOpenAI(api_key="k", base_url=self.base_url, http_client=self.http, max_retries=self.retrying)

    def make_sync(self) -> Any:
        return openai.OpenAI(api_key="k", base_url=self.base_url, http_client=self.http, max_retries=self.retrying)

    def asked(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": LIMIT}

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "function": FUNCTION}]} if tools else {}
        return self.sdk.chat.completions.create(**self.asked(text), **more)

    def read(self, answer: Any) -> str:
        message = answer.choices[0].message
        return str(message.tool_calls[0].function.name if message.tool_calls else message.content)

    def chunks(self, text: str) -> Any:
        return self.sdk.chat.completions.create(**self.asked(text), stream=True)

    def read_chunk(self, chunk: Any) -> str:
        return chunk.choices[0].delta.content or ""


class OpenAIResponsesClient(OpenAIClient):
    name = "openai-responses"

    def asked(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "input": text, "max_output_tokens": LIMIT}

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "strict": None, **FUNCTION}]} if tools else {}
        return self.sdk.responses.create(**self.asked(text), **more)

    def read(self, answer: Any) -> str:
        calls = [item.name for item in answer.output if item.type == "function_call"]
        return str(calls[0] if calls else answer.output_text)

    def chunks(self, text: str) -> Any:
        return self.sdk.responses.create(**self.asked(text), stream=True)

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk.delta) if chunk.type == "response.output_text.delta" else ""


class GroqClient(OpenAIClient):
    name = "groq"
    library = "httpx"
    platform = "groq"

    def make_async(self) -> Any:
        return AsyncGroq(api_key="k", base_url=self.base_url.root, http_client=self.http, max_retries=self.retrying)

    def make_sync(self) -> Any:
        return Groq(api_key="k", base_url=self.base_url.root, http_client=self.http, max_retries=self.retrying)


class AnthropicClient(Client):
    name = "anthropic"
    says_without_usage = False
    reads_should_retry = True

    def make_async(self) -> Any:
        return anthropic.AsyncAnthropic(
            api_key="k", base_url=self.base_url.root, http_client=self.http, max_retries=self.retrying
        )

    def make_sync(self) -> Any:
        return anthropic.Anthropic(
            api_key="k", base_url=self.base_url.root, http_client=self.http, max_retries=self.retrying
        )

    def asked(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": LIMIT}

    def call(self, text: str, *, tools: bool) -> Any:
        tool = {"name": TOOL, "description": "Find something.", "input_schema": FUNCTION["parameters"]}
        return self.sdk.messages.create(**self.asked(text), **({"tools": [tool]} if tools else {}))

    def read(self, answer: Any) -> str:
        block = answer.content[0]
        return str(block.name if block.type == "tool_use" else block.text)

    def chunks(self, text: str) -> Any:
        return self.sdk.messages.create(**self.asked(text), stream=True)

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk.delta.text) if chunk.type == "content_block_delta" else ""


class GeminiClient(Client):
    name = "google-genai"

    def make_async(self) -> Any:
        return self._client(httpx_async_client=self.http).aio

    def make_sync(self) -> Any:
        return self._client(httpx_client=self.http)

    def _client(self, **http: Any) -> genai.Client:
        retry = types.HttpRetryOptions(attempts=self.retrying + 1, initial_delay=0.001, jitter=0.0)
        options = types.HttpOptions(base_url=self.base_url.root, retry_options=retry if self.retrying else None, **http)
        return genai.Client(api_key="k", http_options=options)

    def asked(self, text: str, **more: Any) -> dict[str, Any]:
        return {
            "model": MODEL,
            "contents": text,
            "config": types.GenerateContentConfig(max_output_tokens=LIMIT, **more),
        }

    def call(self, text: str, *, tools: bool) -> Any:
        function = types.FunctionDeclaration(name=TOOL, description="Find something.")
        more = {"tools": [types.Tool(function_declarations=[function])]} if tools else {}
        return self.sdk.models.generate_content(**self.asked(text, **more))

    def read(self, answer: Any) -> str:
        return str(answer.function_calls[0].name if answer.function_calls else answer.text)

    def chunks(self, text: str) -> Any:
        return self.sdk.models.generate_content_stream(**self.asked(text))

    def read_chunk(self, chunk: Any) -> str:
        return chunk.text or ""


class MistralClient(Client):
    name = "mistralai"
    says_without_usage = False
    platform = "mistral"

    def make_async(self) -> Any:
        return self._client(async_client=self.http)

    def make_sync(self) -> Any:
        return self._client(client=self.http)

    def _client(self, **http: Any) -> Mistral:
        retry = RetryConfig("backoff", BackoffStrategy(1, 1, 1.0, 10_000), retry_connection_errors=False)
        return Mistral(
            api_key="k", server_url=self.base_url.root, retry_config=retry if self.retrying else None, **http
        )

    def asked(self, text: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": LIMIT}

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "function": FUNCTION}]} if tools else {}
        ask = self.sdk.chat.complete_async if self.mode == "async" else self.sdk.chat.complete
        return ask(**self.asked(text), **more)

    def read(self, answer: Any) -> str:
        message = answer.choices[0].message
        return str(message.tool_calls[0].function.name if message.tool_calls else message.content)

    def chunks(self, text: str) -> Any:
        ask = self.sdk.chat.stream_async if self.mode == "async" else self.sdk.chat.stream
        return ask(**self.asked(text))

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk.data.choices[0].delta.content or "")


class CohereClient(Client):
    name = "cohere"
    library = "httpx"

    def make_async(self) -> Any:
        return cohere.AsyncClientV2(api_key="k", base_url=self.base_url.root, httpx_client=self.http)

    def make_sync(self) -> Any:
        return cohere.ClientV2(api_key="k", base_url=self.base_url.root, httpx_client=self.http)

    def asked(self, text: str) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": LIMIT,
            "request_options": RequestOptions(max_retries=self.retrying),
        }

    def call(self, text: str, *, tools: bool) -> Any:
        more = {"tools": [{"type": "function", "function": FUNCTION}]} if tools else {}
        return self.sdk.chat(**self.asked(text), **more)

    def read(self, answer: Any) -> str:
        calls = answer.message.tool_calls
        return str(calls[0].function.name if calls else answer.message.content[0].text)

    def chunks(self, text: str) -> Any:
        return self.sdk.chat_stream(**self.asked(text))

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk.delta.message.content.text) if chunk.type == "content-delta" else ""


class OllamaClient(Client):
    name = "ollama"
    library = "httpx"
    retries = False

    def make_async(self) -> Any:
        made: Any = AsyncOllama(host=self.base_url.root)
        return self._over(made)

    def make_sync(self) -> Any:
        made: Any = Ollama(host=self.base_url.root)
        return self._over(made)

    def _over(self, made: Any) -> Any:
        self.http.base_url = made._client.base_url  # it takes no client of ours
        self.unused = made._client
        made._client = self.http
        return made

    async def aclose(self) -> None:
        await super().aclose()
        if self.mode == "async":
            await self.unused.aclose()
        else:
            self.unused.close()

    def asked(self, text: str) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "options": {"num_predict": LIMIT},
        }

    def call(self, text: str, *, tools: bool) -> Any:
        return self.sdk.chat(
            **self.asked(text), **({"tools": [{"type": "function", "function": FUNCTION}]} if tools else {})
        )

    def read(self, answer: Any) -> str:
        calls = answer.message.tool_calls
        return str(calls[0].function.name if calls else answer.message.content)

    def chunks(self, text: str) -> Any:
        return self.sdk.chat(**self.asked(text), stream=True)

    def read_chunk(self, chunk: Any) -> str:
        return chunk.message.content or ""


class LangChainClient(Client):
    """What LangChain's models have in common."""

    def call(self, text: str, *, tools: bool) -> Any:
        tool = {"title": TOOL, "description": "Find something.", "type": "object", "properties": {}}
        model = self.sdk.bind_tools([tool]) if tools else self.sdk
        return model.ainvoke(text) if self.mode == "async" else model.invoke(text)

    def read(self, answer: Any) -> str:
        return str(answer.tool_calls[0]["name"] if answer.tool_calls else answer.text)

    def chunks(self, text: str) -> Any:
        return self.sdk.astream(text) if self.mode == "async" else self.sdk.stream(text)

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk.text)


class LangChainOpenAIClient(LangChainClient):
    name = "langchain-openai"
    reads_should_retry = True

    def make_async(self) -> Any:
        return self._model(http_async_client=self.http)

    def make_sync(self) -> Any:
        return self._model(http_client=self.http)

    def _model(self, **http: Any) -> Any:
        # The client of the other kind is made all the same, and kept for good: one of ours, which is closed.
        options: dict[str, Any] = {"max_tokens": LIMIT, "max_retries": self.retrying, "base_url": self.base_url}
        return ChatOpenAI(model=MODEL, api_key="k", **options, **http)  # type: ignore[arg-type]


class LangChainAnthropicClient(LangChainClient):
    name = "langchain-anthropic"
    says_without_usage = False
    reads_should_retry = True

    def make_async(self) -> Any:
        return self._model()

    def make_sync(self) -> Any:
        return self._model()

    def _model(self) -> Any:
        options: dict[str, Any] = {"max_tokens": LIMIT, "max_retries": self.retrying, "base_url": self.base_url.root}
        model = ChatAnthropic(model=MODEL, api_key="k", **options)  # type: ignore[call-arg, arg-type]
        maker: Any = anthropic.AsyncAnthropic if self.mode == "async" else anthropic.Anthropic
        made = maker(api_key="k", base_url=self.base_url.root, http_client=self.http, max_retries=self.retrying)
        # It makes its clients when they are first used, and takes none of ours: put them where it looks.
        model.__dict__["_async_client" if self.mode == "async" else "_client"] = made
        return model


class PydanticAIClient(Client):
    name = "pydantic-ai"
    modes = ("async",)
    reads_should_retry = True

    def make_async(self) -> Any:
        client = openai.AsyncOpenAI(
            api_key="k", base_url=self.base_url, http_client=self.http, max_retries=self.retrying
        )
        return Agent(
            OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client)),
            model_settings={"max_tokens": LIMIT},
        )

    def make_sync(self) -> Any:
        raise NotImplementedError

    def call(self, text: str, *, tools: bool) -> Any:
        return self._run(text, tools=tools)

    async def _run(self, text: str, *, tools: bool) -> str:
        called: list[str] = []

        def search(query: str) -> str:
            called.append(TOOL)
            return query

        agent: Any = self.sdk
        if tools:
            agent = Agent(self.sdk.model, tools=[search], model_settings={"max_tokens": LIMIT})
        result = await agent.run(text)
        return called[0] if called else str(result.output)

    def read(self, answer: Any) -> str:
        return str(answer)

    def chunks(self, text: str) -> Any:
        return self._streamed(text)

    async def _streamed(self, text: str) -> AsyncIterator[str]:
        async with self.sdk.run_stream(text) as result:
            async for part in result.stream_text(delta=True, debounce_by=None):
                yield part

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk)


class AgentsClient(Client):
    name = "openai-agents"
    modes = ("async",)
    reads_should_retry = True

    def make_async(self) -> Any:
        agents.set_tracing_disabled(disabled=True)
        client = openai.AsyncOpenAI(
            api_key="k", base_url=self.base_url, http_client=self.http, max_retries=self.retrying
        )
        return agents.OpenAIChatCompletionsModel(MODEL, client)

    def make_sync(self) -> Any:
        raise NotImplementedError

    def _agent(self, tools: list[Any]) -> Any:
        settings = agents.ModelSettings(max_tokens=LIMIT)
        return agents.Agent(name="echo", model=self.sdk, tools=tools, model_settings=settings)

    def call(self, text: str, *, tools: bool) -> Any:
        return self._run(text, tools=tools)

    async def _run(self, text: str, *, tools: bool) -> str:
        called: list[str] = []

        @agents.function_tool
        def search(query: str) -> str:
            called.append(TOOL)
            return query

        result = await agents.Runner.run(self._agent([search] if tools else []), text)
        return called[0] if called else str(result.final_output)

    def read(self, answer: Any) -> str:
        return str(answer)

    def chunks(self, text: str) -> Any:
        return self._streamed(text)

    async def _streamed(self, text: str) -> AsyncIterator[str]:
        result = agents.Runner.run_streamed(self._agent([]), text)
        try:
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    yield event.data.delta
        finally:
            result.cancel()  # it runs in a task of its own

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk)


class BedrockClient(Client):
    """Of boto3, with botocore's newer kind of retries."""

    name = "botocore-standard"
    modes = ("sync",)
    reads_should_retry = True
    platform = "bedrock"
    retry_mode = "standard"

    def make_http(self) -> Any:
        return boto3.client(
            "bedrock-runtime",
            region_name="eu-central-1",
            endpoint_url=self.base_url.root,
            aws_access_key_id="any",
            aws_secret_access_key="any",
            config=Config(retries={"mode": self.retry_mode, "total_max_attempts": self.retrying + 1}, proxies={}),
        )

    def make_async(self) -> Any:
        raise NotImplementedError

    def make_sync(self) -> Any:
        return guard_botocore(self.guard, self.http)

    def asked(self, text: str) -> dict[str, Any]:
        return {
            "modelId": MODEL,
            "messages": [{"role": "user", "content": [{"text": text}]}],
            "inferenceConfig": {"maxTokens": LIMIT},
        }

    def call(self, text: str, *, tools: bool) -> Any:
        tool = {"name": TOOL, "description": "Find something.", "inputSchema": {"json": FUNCTION["parameters"]}}
        return self.sdk.converse(
            **self.asked(text), **({"toolConfig": {"tools": [{"toolSpec": tool}]}} if tools else {})
        )

    def read(self, answer: Any) -> str:
        block = answer["output"]["message"]["content"][0]
        return str(block["toolUse"]["name"] if "toolUse" in block else block["text"])

    def chunks(self, text: str) -> Any:
        return self.sdk.converse_stream(**self.asked(text))["stream"]

    def read_chunk(self, chunk: Any) -> str:
        return str(chunk["contentBlockDelta"]["delta"]["text"]) if "contentBlockDelta" in chunk else ""


class LegacyBedrockClient(BedrockClient):
    """With the retries that botocore has unless told otherwise."""

    name = "botocore-legacy"
    retry_mode = "legacy"


CLIENTS: tuple[type[Client], ...] = (
    OpenAIClient,
    OpenAIResponsesClient,
    GroqClient,
    AnthropicClient,
    GeminiClient,
    MistralClient,
    CohereClient,
    OllamaClient,
    LangChainOpenAIClient,
    LangChainAnthropicClient,
    PydanticAIClient,
    AgentsClient,
    BedrockClient,
    LegacyBedrockClient,
)

WAYS = every_way(CLIENTS)
