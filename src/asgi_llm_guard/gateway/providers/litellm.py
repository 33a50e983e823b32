"""Everything else, through LiteLLM: chat and embeddings, whole and streamed, as OpenAI's API would answer.

What LiteLLM takes as a keyword may be a setting of its own: where to call, as whom, what to run. So only parameters
that are known to be a request's are given to it; a request with another one is refused, and nothing is left out.

A `GuardCallback` in `litellm.callbacks` would admit these calls a second time: leave it out where the gateway is used.

Source: litellm 1.106 (`main.acompletion`, `exceptions`, `types.utils.ModelResponseStream`) (2026-11).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

import litellm
import msgspec

from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import CannotExpress
from asgi_llm_guard.gateway.providers.base import FailureKind, ModelRequest, TransportFailed, Upstream, pick_dialect
from asgi_llm_guard.gateway.secret import Secret
from asgi_llm_guard.wire.base import Headers

__all__ = ["LiteLLMProvider"]

_PATHS: Final = {"openai": "/v1/chat/completions", "openai_embeddings": "/v1/embeddings"}
_CHAT: Final = frozenset(
    {
        "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
        "max_tokens", "messages", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty",
        "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
        "stream_options", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_logprobs", "top_p", "user",
        "verbosity", "web_search_options",
    }
)  # fmt: skip
_EMBEDDINGS: Final = frozenset({"dimensions", "encoding_format", "input", "user"})
_TAKEN: Final = {"openai": _CHAT, "openai_embeddings": _EMBEDDINGS}
_HEADERS: Final = frozenset({"retry-after", "retry-after-ms", "x-ratelimit-reset", "x-should-retry"})

# LiteLLM has other libraries' errors inside its own, which are told apart by their names.
_NEVER_SENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"})
_TLS: Final = frozenset(
    {"SSLError", "SSLCertVerificationError", "ClientConnectorSSLError", "ClientConnectorCertificateError"}
)
_TIMEOUTS: Final = frozenset({"APITimeoutError", "ReadTimeout", "ServerTimeoutError", "Timeout", "TimeoutError"})
_NO_ANSWERS: Final = frozenset({"APIConnectionError", "ClientError", "ReadError", "RemoteProtocolError", "WriteError"})
_CAUSES: Final = 8

_Failure = tuple[FailureKind, str, bool]


class LiteLLMProvider:
    """Sends requests through LiteLLM."""

    def dialect(self, deployment: Deployment, asked: str) -> str | None:  # noqa: ARG002 - one for all deployments
        return pick_dialect(tuple(_PATHS), asked)

    async def send(self, deployment: Deployment, request: ModelRequest) -> Upstream:
        arguments = _arguments(deployment, request)
        call = litellm.aembedding if request.dialect == "openai_embeddings" else litellm.acompletion
        times = request.timeouts or deployment.timeouts
        loop = asyncio.get_running_loop()
        deadline = None if times.total_s is None else loop.time() + times.total_s
        found: Any = None
        failed: _Failure | _Told | None = None
        try:
            async with asyncio.timeout_at(deadline):
                found = await call(**arguments)
        except TimeoutError:
            failed = ("timeout", "no answer came in time", True)
        except Exception as error:  # noqa: BLE001 - the errors of a hundred providers; all of them become ours
            failed = _read(error, deployment)
        # Out of the handler, so that an error with a key in its text is not in the context of ours.
        if isinstance(failed, tuple):
            raise _raised(deployment, failed)
        path = _PATHS[request.dialect]
        if failed is not None:
            return _Whole(failed.status, failed.headers, failed.body, request.dialect, path)
        if request.stream and request.dialect == "openai":
            return _Stream(deployment, found, path, deadline)
        body = msgspec.json.encode(_plain(found))
        return _Whole(200, [(b"content-type", b"application/json")], body, request.dialect, path)

    async def aclose(self) -> None:
        """LiteLLM keeps its connections for itself."""


class _Told(msgspec.Struct, frozen=True):
    """An error that a provider answered."""

    status: int
    headers: Headers
    body: bytes


class _Whole:
    """An answer that is here already."""

    __slots__ = ("_body", "dialect", "headers", "path", "status")

    def __init__(self, status: int, headers: Headers, body: bytes, dialect: str, path: str) -> None:
        self.status = status
        self.headers = headers
        self.dialect = dialect
        self.path = path
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body

    async def aclose(self) -> None:
        """Nothing is open."""


class _Stream:
    """Chunks, as server-sent events."""

    __slots__ = ("_chunks", "_deadline", "_deployment", "path")

    status = 200
    dialect = "openai"
    headers: Headers = ((b"content-type", b"text/event-stream; charset=utf-8"),)

    def __init__(self, deployment: Deployment, chunks: Any, path: str, deadline: float | None) -> None:
        self.path = path
        self._deployment = deployment
        self._chunks = chunks
        self._deadline = deadline

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._chunks)
        failed: _Failure | _Told | None = None
        try:
            while failed is None:
                chunk: Any = None
                try:
                    async with asyncio.timeout_at(self._deadline):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    yield b"data: [DONE]\n\n"
                    return
                except TimeoutError:
                    failed = ("timeout", "the answer did not end in time", True)
                except Exception as error:  # noqa: BLE001 - as in `send`
                    failed = _read(error, self._deployment)
                if failed is None:
                    yield b"data: " + msgspec.json.encode(_plain(chunk)) + b"\n\n"
            if isinstance(failed, tuple):
                kind, what, _ = failed
                raise _raised(self._deployment, (kind, what, True))
            yield b"data: " + failed.body + b"\n\n"
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        # LiteLLM's wrapper has the provider's stream in it, which is what holds the connection.
        for stream in (self._chunks, getattr(self._chunks, "completion_stream", None)):
            close = getattr(stream, "aclose", None) or getattr(stream, "close", None)
            if close is None:
                continue
            closing = close()
            if hasattr(closing, "__await__"):
                await closing


def _arguments(deployment: Deployment, request: ModelRequest) -> dict[str, Any]:
    taken = _TAKEN[request.dialect]
    for name in request.body:
        if name not in taken and name not in ("model", "stream"):
            raise CannotExpress(name, f"is not sent to {deployment.provider} here; leave it out")
    _refuse_fetching(request.body.get("messages"))
    name = deployment.platform.litellm or deployment.provider
    arguments: dict[str, Any] = {
        **deployment.params,
        **{key: value for key, value in request.body.items() if value is not None},
        **{key: _revealed(value) for key, value in deployment.options.items()},
        "model": f"{name}/{request.model or deployment.model}",
        "max_retries": 0,
        "num_retries": 0,
        "timeout": (request.timeouts or deployment.timeouts).read_s,
        "caching": False,
    }
    if any(key in request.body for key in ("max_tokens", "max_completion_tokens")):
        for key in ("max_tokens", "max_completion_tokens"):
            if key not in request.body:
                arguments.pop(key, None)
    arguments.pop("stream", None)
    if request.stream:
        arguments["stream"] = True
        options = arguments.get("stream_options")
        arguments["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        arguments.pop("stream_options", None)
    if deployment.key is not None:
        arguments["api_key"] = deployment.key.reveal()
    if deployment.api_base is not None:
        arguments["api_base"] = deployment.api_base
    if deployment.headers:
        arguments["extra_headers"] = {key: _revealed(value) for key, value in deployment.headers.items()}
    return arguments


def _refuse_fetching(messages: object) -> None:
    """LiteLLM fetches images and files for providers that do not: from here, with what this machine may reach."""
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        waiting = list(content) if isinstance(content, list | tuple) else []
        while waiting:
            value = waiting.pop()
            if isinstance(value, Mapping):
                waiting.extend(inner for key, inner in value.items() if key != "text")
            elif isinstance(value, list | tuple):
                waiting.extend(value)
            elif isinstance(value, str) and value.lstrip()[:8].lower().startswith(("http:", "https:", "file:")):
                raise CannotExpress(
                    "messages", "images and files by URL are not sent to this provider; send the data itself"
                )


def _revealed(value: object) -> object:
    return value.reveal() if isinstance(value, Secret) else value


def _plain(found: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = found.model_dump(mode="json", warnings=False)
    return {key: value for key, value in dumped.items() if value is not None}


def _read(error: Exception, deployment: Deployment) -> _Failure | _Told:
    """What one of LiteLLM's errors is: no answer, or an answer that tells of an error."""
    causes = tuple(_causes(error))
    names = {type(cause).__name__ for cause in causes}
    answered = any(map(_is_answer, causes))
    if not answered and names & _NEVER_SENT:
        return ("tls", "TLS failed", False) if names & _TLS else ("connect", "no connection", False)
    if not answered and names & _TIMEOUTS:
        return "timeout", "no answer came in time", True
    if not answered and names & _NO_ANSWERS:
        return "cut", "the connection ended before the answer", True
    status = getattr(error, "status_code", None)
    status = status if type(status) is int and 400 <= status < 600 else 500
    code = getattr(error, "code", None)
    if isinstance(error, litellm.exceptions.ContextWindowExceededError):
        code = "context_length_exceeded"
    elif isinstance(error, litellm.exceptions.ContentPolicyViolationError):
        code = "content_filter"
    told = {
        "message": deployment.redacted(str(getattr(error, "message", "") or error)),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": None,
        "code": code if isinstance(code, str) and not code.isdecimal() else None,
    }
    headers = [(b"content-type", b"application/json"), *_headers(error)]
    return _Told(status, headers, msgspec.json.encode({"error": told}))


def _is_answer(error: BaseException) -> bool:
    """Whether a library below LiteLLM tells of a response; LiteLLM itself makes one up where there is none."""
    made_up = type(error).__module__.startswith("litellm.") and type(error).__name__ != "MaskedHTTPStatusError"
    return not made_up and getattr(error, "response", None) is not None


def _headers(error: Exception) -> Iterator[tuple[bytes, bytes]]:
    for source in (getattr(error, "response", None), getattr(error, "litellm_response_headers", None)):
        headers = getattr(source, "headers", source)
        if isinstance(headers, Mapping) and headers:
            for name, value in headers.items():
                if str(name).lower() in _HEADERS:
                    yield str(name).lower().encode("ascii"), str(value).encode("ascii", "replace")
            return


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _raised(deployment: Deployment, failure: _Failure) -> TransportFailed:
    kind, what, sent = failure
    message = f"{deployment.name} through LiteLLM: {what}"
    return TransportFailed(kind, message, sent=sent, deployment=deployment.name)
