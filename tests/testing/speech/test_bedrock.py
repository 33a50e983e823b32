"""Amazon Bedrock as boto3 reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError
from tests.testing.speech.requests import ECHO, HELLO
from urllib3.exceptions import ProtocolError

from asgi_llm_guard.testing import Behaviour, FakeProvider

MODEL = "eu.anthropic.claude-m-v1:0"
PROFILE = "arn:aws:bedrock:eu-central-1:123456789012:application-inference-profile/abc"
ASKED = [{"role": "user", "content": [{"text": HELLO}]}]
CLAUDE = json.dumps(
    {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 50, "messages": [{"role": "user", "content": HELLO}]}
)
COUNTS = Behaviour.answer(
    "one two", input_tokens=100, cache_read_tokens=40, cache_write_tokens=20, cache_write_1h_tokens=5
)


def stream(client: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    with closing(client.converse_stream(modelId=MODEL, messages=ASKED)["stream"]) as events:
        return list(events)


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def client(provider: FakeProvider) -> Iterator[Any]:
    with provider.serve() as base_url:
        made = boto3.client(
            "bedrock-runtime",
            region_name="eu-central-1",
            endpoint_url=base_url.root,
            aws_access_key_id="any",
            aws_secret_access_key="any",
            config=Config(retries={"total_max_attempts": 1}, proxies={}),
        )
        yield made
        made.close()


def test_converse(provider: FakeProvider, client: Any) -> None:
    """Fresh input, cache reads and both kinds of writes are told apart; the model of the path is billed."""
    provider.script(COUNTS)
    answer = client.converse(modelId=MODEL, messages=ASKED, system=[{"text": "be brief"}])

    assert answer["output"]["message"]["content"] == [{"text": "one two"}]
    assert answer["usage"] == {
        "inputTokens": 40,
        "outputTokens": 2,
        "totalTokens": 102,
        "cacheReadInputTokens": 40,
        "cacheWriteInputTokens": 20,
        "cacheDetails": [{"ttl": "5m", "inputTokens": 15}, {"ttl": "1h", "inputTokens": 5}],
    }
    assert (provider.bill[0].model, provider.requests[0].texts) == (MODEL, ("be brief", HELLO))


def test_converse_with_a_profile(provider: FakeProvider, client: Any) -> None:
    """A model's name with slashes in it arrives as it was."""
    client.converse(modelId=PROFILE, messages=ASKED)

    assert provider.bill[0].model == PROFILE


def test_converse_stream(provider: FakeProvider, client: Any) -> None:
    """The frames have their checksums, and the last one says what was used."""
    events = stream(client)

    text = "".join(event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event)
    assert text == ECHO
    assert [next(iter(event)) for event in events[-2:]] == ["messageStop", "metadata"]
    assert events[-1]["metadata"]["usage"]["totalTokens"] == provider.bill[0].usage.total_tokens == 19


def test_converse_tools(provider: FakeProvider, client: Any) -> None:
    """The use of a tool comes with its input, in one piece or in many."""
    provider.script(*[Behaviour.call_tool("search", query="llamas and alpacas")] * 2)
    answer = client.converse(modelId=MODEL, messages=ASKED)
    events = stream(client)

    (block,) = answer["output"]["message"]["content"]
    assert (block["toolUse"]["name"], block["toolUse"]["input"]) == ("search", {"query": "llamas and alpacas"})
    parts = [
        event["contentBlockDelta"]["delta"]["toolUse"]["input"] for event in events if "contentBlockDelta" in event
    ]
    assert json.loads("".join(parts)) == {"query": "llamas and alpacas"}
    assert {"messageStop": {"stopReason": "tool_use"}} in events


def test_invoke(provider: FakeProvider, client: Any) -> None:
    """InvokeModel answers in the vendor's words, with counts in headers too."""
    provider.script(COUNTS, Behaviour())
    claude = client.invoke_model(modelId=MODEL, body=CLAUDE)
    llama = client.invoke_model(modelId="meta.llama-m", body=json.dumps({"prompt": HELLO, "max_gen_len": 2}))
    message, generation = json.load(claude["body"]), json.load(llama["body"])

    assert (message["content"][0]["text"], message["usage"]["cache_read_input_tokens"]) == ("one two", 40)
    headers = claude["ResponseMetadata"]["HTTPHeaders"]
    assert headers["x-amzn-bedrock-input-token-count"] == "40"
    assert headers["x-amzn-bedrock-cache-write-input-token-count"] == "20"
    assert (generation["generation"], generation["generation_token_count"]) == ("Echo: say", 2)
    assert [line.dialect for line in provider.bill] == ["bedrock_anthropic", "bedrock_llama"]


def test_invoke_stream(provider: FakeProvider, client: Any) -> None:
    """The chunks carry the vendor's events, the last one Bedrock's own counts."""

    def events(model: str, body: str) -> list[dict[str, Any]]:
        answer = client.invoke_model_with_response_stream(modelId=model, body=body)
        with closing(answer["body"]) as chunks:
            return [json.loads(chunk["chunk"]["bytes"]) for chunk in chunks]

    claude = events(MODEL, CLAUDE)
    llama = events("meta.llama-m", json.dumps({"prompt": HELLO}))

    assert [event["type"] for event in claude if event["type"] != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(event["generation"] for event in llama) == ECHO
    for last in (claude[-1], llama[-1]):
        metrics = last["amazon-bedrock-invocationMetrics"]
        assert (metrics["inputTokenCount"], metrics["outputTokenCount"]) == (13, 6)


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (Behaviour.refuse("rate_limit"), "ThrottlingException"),
        (Behaviour.refuse("quota"), "ServiceQuotaExceededException"),
        (Behaviour.refuse("overloaded"), "ServiceUnavailableException"),
        (Behaviour.refuse("context"), "ValidationException"),
        (Behaviour.refuse("unknown_model"), "ResourceNotFoundException"),
        (Behaviour.error(403), "AccessDeniedException"),
    ],
)
def test_errors(provider: FakeProvider, client: Any, behaviour: Behaviour, code: str) -> None:
    """Each kind of error is the SDK's own, of the class that the header names."""
    provider.script(behaviour)
    with pytest.raises(ClientError) as caught:
        client.converse(modelId=MODEL, messages=ASKED)

    assert caught.value.response["Error"]["Code"] == code
    assert [(attempt.billed, attempt.retry) for attempt in provider.attempts] == [(False, 0)]


def test_broken_streams(provider: FakeProvider, client: Any) -> None:
    """An exception's frame, and a connection that drops, end a stream with an error."""
    provider.script(Behaviour.stream_error(after_chunks=1), Behaviour.cut(after_chunks=2))
    with pytest.raises(EventStreamError, match="fails inside"):
        stream(client)
    with pytest.raises(ProtocolError):
        stream(client)

    assert [(line.output_tokens, line.reported) for line in provider.bill] == [(1, False), (2, False)]


def test_counting_is_free(provider: FakeProvider, client: Any) -> None:
    """A count of tokens is what would be billed, and no call."""
    counted = client.count_tokens(modelId=MODEL, input={"converse": {"messages": ASKED}})

    assert counted["inputTokens"] == 13
    assert provider.calls == 0
