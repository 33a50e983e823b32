"""Amazon Bedrock: Converse, and InvokeModel in the words of the model's vendor. Streams are frames of AWS."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from asgi_llm_guard.testing.sale import FakeRequest, Sale
from asgi_llm_guard.testing.speech.anthropic import AnthropicMessages, anthropic_prompt
from asgi_llm_guard.testing.speech.base import (
    Call,
    Fault,
    Streaming,
    Troubles,
    UnreadableError,
    chat_texts,
    counted,
    dump,
    text_of,
)
from asgi_llm_guard.testing.speech.event_stream import EVENT_STREAM_TYPE, frame
from asgi_llm_guard.testing.speech.openai_chat import number_in
from asgi_llm_guard.usage import Usage

__all__ = ["BedrockAnthropic", "BedrockConverse", "BedrockCount", "BedrockLlama"]

_EXCEPTIONS: Final = {
    400: "ValidationException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    424: "ModelErrorException",
    429: "ThrottlingException",
    500: "InternalServerException",
    503: "ServiceUnavailableException",
}


def _event(kind: str, payload: object) -> bytes:
    headers = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
    return frame(dump(payload), headers)


def _exception(kind: str, message: str) -> bytes:
    headers = {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}
    return frame(dump({"message": message}), headers)


class Bedrock(Streaming):
    """What Bedrock's operations have in common: where the model stands, and errors with their class in a header."""

    stream_type = EVENT_STREAM_TYPE
    id_header = "x-amzn-requestid"
    id_prefix = "bedrock-"
    troubles: ClassVar[Troubles] = {
        "rate_limit": (429, "ThrottlingException", "Too many tokens, please wait."),
        "quota": (400, "ServiceQuotaExceededException", "The quota of this account is used up."),
        "overloaded": (503, "ServiceUnavailableException", "The service is unavailable for the moment."),
        "context": (400, "ValidationException", "Input is too long for requested model."),
        "unknown_model": (404, "ResourceNotFoundException", "There is no such model."),
    }

    def failing(self, sale: Sale) -> bytes:
        return _exception(
            sale.behaviour.code or "modelStreamErrorException", "the fake provider fails inside the stream"
        )

    def error(self, fault: Fault) -> tuple[object, tuple[tuple[str, str], ...]]:
        kind = fault.code or _EXCEPTIONS.get(
            fault.status, "ValidationException" if fault.status < 500 else "InternalServerException"
        )
        return {"message": fault.message}, (("x-amzn-errortype", kind),)


class BedrockConverse(Bedrock):
    """The same words for every model. The answer does not name the model; a stream says last what it used."""

    dialect = "bedrock_converse"
    buckets = frozenset({"cache_read", "cache_write", "cache_write_1h"})
    path = re.compile(r"/model/(?P<model>.+)/(?P<method>converse|converse-stream)")
    broken = frame(b'{"delta":', {":event-type": "contentBlockDelta", ":message-type": "event"})

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        asked = body.get("input", {}).get("converse", body)  # a count wraps the request that it counts
        system = text_of(asked.get("system"))
        texts = (*([system] if system else []), *chat_texts(asked.get("messages")))
        config = asked.get("inferenceConfig")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named["model"],
            stream=call.named.get("method") == "converse-stream",
            texts=texts,
            counted_tokens=counted(texts),
            allowed_tokens=number_in(config, "maxTokens") if isinstance(config, dict) else None,
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        read, written = used.cache_read_tokens or 0, used.cache_write_tokens or 0
        kept = used.cache_write_1h_tokens or 0
        said: dict[str, Any] = {
            "inputTokens": (used.input_tokens or 0) - read - written,
            "outputTokens": used.output_tokens,
            "totalTokens": used.total_tokens,
            "cacheReadInputTokens": read,
            "cacheWriteInputTokens": written,
        }
        if written:
            details = [{"ttl": "5m", "inputTokens": written - kept}, {"ttl": "1h", "inputTokens": kept}]
            said["cacheDetails"] = [entry for entry in details if entry["inputTokens"]]
        return said

    def body(self, sale: Sale) -> Mapping[str, Any]:
        block = {"text": sale.text} if sale.behaviour.tool is None else {"toolUse": self._tool(sale, whole=True)}
        body: dict[str, Any] = {
            "output": {"message": {"role": "assistant", "content": [block]}},
            "stopReason": self._stop_reason(sale),
            "metrics": {"latencyMs": 1},
        }
        return {**body, "usage": self.report(sale)} if self.tells(sale) else body

    def opening(self, sale: Sale) -> Iterator[bytes]:
        yield _event("messageStart", {"role": "assistant"})
        if sale.behaviour.tool is not None:
            start = {"toolUse": self._tool(sale, whole=False)}
            yield _event("contentBlockStart", {"contentBlockIndex": 0, "start": start})

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        delta: dict[str, Any] = {"text": word} if sale.behaviour.tool is None else {"toolUse": {"input": word}}
        padding = "abcdefghijklmnop"[: sale.produced % 16]  # real frames are padded to lengths that tell nothing
        return _event("contentBlockDelta", {"contentBlockIndex": 0, "delta": delta, "p": padding})

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield _event("contentBlockStop", {"contentBlockIndex": 0})
        yield _event("messageStop", {"stopReason": self._stop_reason(sale)})
        if self.tells(sale):
            yield _event("metadata", {"usage": self.report(sale), "metrics": {"latencyMs": 1}})

    @staticmethod
    def _stop_reason(sale: Sale) -> str:
        return AnthropicMessages.stop_reason(sale)

    @staticmethod
    def _tool(sale: Sale, *, whole: bool) -> dict[str, Any]:
        assert sale.behaviour.tool is not None  # noqa: S101 - asked for with a tool only
        name, arguments = sale.behaviour.tool
        named = {"toolUseId": f"tooluse_{sale.number}", "name": name}
        return {**named, "input": arguments} if whole else named


class BedrockCount(BedrockConverse):
    """How many tokens a prompt has; free."""

    dialect = "bedrock_count"
    path = re.compile(r"/model/(?P<model>.+)/count-tokens")
    free = True

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return {"inputTokens": sale.input_tokens}


class _Invoke(Bedrock):
    """A body in the vendor's words, with counts in headers; a stream's chunks carry the vendor's events."""

    broken = frame(b'{"bytes":', {":event-type": "chunk", ":message-type": "event"})

    def counts(self, sale: Sale) -> tuple[tuple[str, str], ...]:
        if not self.tells(sale) or sale.behaviour.reports is not None:
            return ()
        used = self.consumed(sale)
        fresh = (used.input_tokens or 0) - (used.cache_read_tokens or 0) - (used.cache_write_tokens or 0)
        return (
            ("x-amzn-bedrock-input-token-count", str(fresh)),
            ("x-amzn-bedrock-output-token-count", str(used.output_tokens)),
            ("x-amzn-bedrock-cache-read-input-token-count", str(used.cache_read_tokens)),
            ("x-amzn-bedrock-cache-write-input-token-count", str(used.cache_write_tokens)),
            ("x-amzn-bedrock-invocation-latency", "1"),
        )

    def chunk(self, data: Mapping[str, Any]) -> bytes:
        return _event("chunk", {"bytes": base64.b64encode(dump(data)).decode(), "p": "abcd"})

    def metrics(self, sale: Sale) -> dict[str, Any]:
        """What the last chunk says in Bedrock's words."""
        used = self.consumed(sale)
        read, written = used.cache_read_tokens or 0, used.cache_write_tokens or 0
        return {
            "amazon-bedrock-invocationMetrics": {
                "inputTokenCount": (used.input_tokens or 0) - read - written,
                "outputTokenCount": used.output_tokens,
                "invocationLatency": 1,
                "firstByteLatency": 1,
                "cacheReadInputTokenCount": read,
                "cacheWriteInputTokenCount": written,
            }
        }

    def last(self, sale: Sale, data: Mapping[str, Any]) -> bytes:
        tells = self.tells(sale) and sale.behaviour.reports is None
        return self.chunk({**data, **self.metrics(sale)} if tells else data)


class BedrockAnthropic(_Invoke, AnthropicMessages):
    """InvokeModel of a Claude."""

    dialect = "bedrock_anthropic"
    path = re.compile(r"/model/(?P<model>.*anthropic.*)/(?P<method>invoke|invoke-with-response-stream)")

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        texts = anthropic_prompt(body)
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named["model"],
            stream=call.named["method"] == "invoke-with-response-stream",
            texts=texts,
            counted_tokens=counted(texts),
            allowed_tokens=number_in(body, "max_tokens"),
        )

    def event(self, data: Mapping[str, Any]) -> bytes:
        return self.chunk(data)

    def closing(self, sale: Sale) -> Iterator[bytes]:
        *events, _ = AnthropicMessages.closing(self, sale)
        yield from events
        yield self.last(sale, {"type": "message_stop"})


class BedrockLlama(_Invoke):
    """InvokeModel of a Llama, and of whatever else is no Claude: a prompt, and what follows it."""

    dialect = "bedrock_llama"
    buckets = frozenset()
    path = re.compile(r"/model/(?P<model>.+)/(?P<method>invoke|invoke-with-response-stream)")

    def read(self, call: Call) -> FakeRequest:
        body = call.json()
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise UnreadableError("prompt: expected a string")
        return FakeRequest(
            headers=call.headers,
            body=body,
            raw=call.raw,
            dialect=self.dialect,
            path=call.path,
            model=call.named["model"],
            stream=call.named["method"] == "invoke-with-response-stream",
            texts=(prompt,),
            counted_tokens=counted([prompt]),
            allowed_tokens=number_in(body, "max_gen_len"),
        )

    def usage(self, used: Usage) -> Mapping[str, Any]:
        return {"prompt_token_count": used.input_tokens, "generation_token_count": used.output_tokens}

    def body(self, sale: Sale) -> Mapping[str, Any]:
        return self._generation(sale, sale.text, self._stop_reason(sale))

    def piece(self, sale: Sale, choice: int, position: int, word: str) -> bytes:  # noqa: ARG002
        return self.chunk(self._generation(sale, word, None))

    def closing(self, sale: Sale) -> Iterator[bytes]:
        yield self.last(sale, self._generation(sale, "", self._stop_reason(sale)))

    @staticmethod
    def _stop_reason(sale: Sale) -> str:
        return "length" if sale.finish == "length" else "stop"

    def _generation(self, sale: Sale, text: str, stop_reason: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"generation": text, "stop_reason": stop_reason}
        return {**body, **self.report(sale)} if self.tells(sale) else body
