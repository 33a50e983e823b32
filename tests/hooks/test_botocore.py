"""A guarded boto3 client of Bedrock: what botocore retries and raises, what streams cost, and what stays as it was."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError, EventStreamError, ResponseStreamingError
from tests.exits.kit import CONTEXT, MAX_TOKENS, SLOTS, Settlements, Stage
from tests.hooks.kit import in_thread
from tests.hooks.test_sdks import counted, ledger
from urllib3.exceptions import ProtocolError

from asgi_llm_guard import Budget, CacheScope, Concurrency, Context, Guard, Iterations, ModelAllow, RateLimit
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.integrations.botocore import guard_botocore
from asgi_llm_guard.outcomes import refusal_of
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock, Price

pytestmark = pytest.mark.anyio

MODEL = "eu.anthropic.claude-test-v1:0"
PRICES = PriceBook.snapshot(overrides={f"bedrock/{MODEL}": {"input": 1, "output": 2}})
BILL = {MODEL: Price(input=1_000, output=2_000)}
TEXT = "one two three"
MESSAGES: Any = [{"role": "user", "content": [{"text": TEXT}]}]
INVOKED: Any = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": MAX_TOKENS,
    "messages": [{"role": "user", "content": TEXT}],
}


def converse(client: Any) -> str:
    answer = client.converse(modelId=MODEL, messages=MESSAGES, inferenceConfig={"maxTokens": MAX_TOKENS})
    return str(answer["output"]["message"]["content"][0]["text"])


def stream_of(client: Any) -> Any:
    limit = {"maxTokens": MAX_TOKENS}
    return client.converse_stream(modelId=MODEL, messages=MESSAGES, inferenceConfig=limit)["stream"]


def converse_stream(client: Any) -> str:
    with closing(stream_of(client)) as events:
        return "".join(event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event)


def invoke(client: Any) -> str:
    answer = client.invoke_model(modelId=MODEL, body=json.dumps(INVOKED))
    return str(json.loads(answer["body"].read())["content"][0]["text"])


def invoke_stream(client: Any) -> str:
    answer = client.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps(INVOKED).encode())
    with closing(answer["body"]) as chunks:
        events = [json.loads(chunk["chunk"]["bytes"]) for chunk in chunks]
    return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")


Way = Callable[[Any], str]
PLAIN: tuple[Way, ...] = (converse, invoke)
STREAMS: tuple[Way, ...] = (converse_stream, invoke_stream)
every_way = pytest.mark.parametrize("way", [*PLAIN, *STREAMS])


def made(base_url: str, *, mode: str = "standard", attempts: int = 2, signature: Any = None) -> Any:
    """A client that is not guarded."""
    return boto3.client(
        "bedrock-runtime",
        region_name="eu-central-1",
        endpoint_url=base_url.removesuffix("/v1"),
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(retries={"mode": mode, "total_max_attempts": attempts}, proxies={}, signature_version=signature),
    )


@asynccontextmanager
async def on_stage(hook: Any = None, cache: Cache | None = None, **options: Any) -> AsyncIterator[tuple[Stage, Any]]:
    """A stage, and a guarded client of its provider."""
    clock = FrozenClock(1_800_000_000_000)
    provider = FakeProvider(prices=BILL)
    settlements = Settlements()
    slots = Concurrency(SLOTS, per="global", counts="calls")
    policies: list[Policy] = [Iterations(1_000), Budget("$10/1d", per="global"), slots]
    if cache is not None:
        policies.append(CacheScope())
    storage = MemoryStorage(clock=clock)
    async with (
        provider.serve() as base_url,
        Guard(policies, storage=storage, clock=clock, prices=PRICES, observers=[settlements], cache=cache) as guard,
    ):
        client = guard_botocore(guard, made(base_url, **options), **(hook or {}))
        try:
            yield Stage(guard.storage, provider, base_url, guard, settlements), client
        finally:
            client.close()


async def asked(stage: Stage, client: Any, way: Way, extra: tuple[Policy, ...] = ()) -> str:
    """One question inside an admission, from a thread."""
    async with stage.guard.open(CONTEXT, extra=extra):
        return str(await in_thread(lambda: way(client)))


@every_way
async def test_answers(way: Way) -> None:
    """boto3 gives its answer, and the ledger says what the bill says."""
    async with on_stage() as (stage, client):
        assert await asked(stage, client, way) == f"Echo: {TEXT}"

        (record,) = await ledger(stage)
        assert (record.outcome, record.model, record.provider) == ("measured", MODEL, "bedrock")
        assert await counted(stage) == (1, 0)


@pytest.mark.parametrize("way", [converse, converse_stream, invoke])
async def test_cached_input_and_tool_calls(way: Way) -> None:
    """B9: what was read from the cache and written to it is billed as the provider bills it."""
    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.answer("a b", input_tokens=100, cache_read_tokens=40, cache_write_tokens=20))
        await asked(stage, client, way)

        (record,) = await ledger(stage, exact=False)
        assert record.usage is not None
        usage = record.usage
        assert (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens) == (100, 40, 20)
        assert usage.output_tokens == 2


REFUSALS: dict[str, tuple[Policy, int, str]] = {
    "budget": (Budget("$0.000001/1d", name="small"), 402, "ServiceQuotaExceededException"),
    "model": (ModelAllow(["openai/other"]), 403, "AccessDeniedException"),
    "iterations": (Iterations(0, name="none"), 429, "ServiceQuotaExceededException"),
}


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
@pytest.mark.parametrize("way", [converse, invoke_stream])
@pytest.mark.parametrize(("policy", "status", "code"), REFUSALS.values(), ids=REFUSALS)
async def test_refused(policy: Policy, status: int, code: str, way: Way, mode: str) -> None:
    """A refusal is botocore's own error, with words for people, asked for once, and carries what was refused."""
    async with on_stage(mode=mode, attempts=3) as (stage, client):
        with pytest.raises(ClientError, match=policy.name) as caught:
            await asked(stage, client, way, (policy,))

        response = caught.value.response
        assert response["Error"]["Code"] == code
        assert response["ResponseMetadata"]["HTTPStatusCode"] == status
        assert response["ResponseMetadata"]["RetryAttempts"] == 0
        denied = refusal_of(caught.value)
        assert denied is not None
        assert denied.policy == policy.name
        assert stage.provider.calls == 0
        assert await ledger(stage) == []
        assert await counted(stage) == (0, 0)


@pytest.mark.parametrize("mode", ["legacy", "standard"])
async def test_long_wait_is_not_waited_for(mode: str) -> None:
    """A rate whose wait is long is refused once: under the name that botocore repeats it would be asked for again."""
    async with on_stage(mode=mode, attempts=3) as (stage, client):
        rate = RateLimit("1/day", name="daily", counts="calls")
        assert await asked(stage, client, converse, (rate,)) == f"Echo: {TEXT}"
        with pytest.raises(ClientError, match="daily") as caught:
            await asked(stage, client, converse, (rate,))

        response = caught.value.response
        assert response["Error"]["Code"] == "ServiceQuotaExceededException"
        assert response["ResponseMetadata"]["HTTPStatusCode"] == 429
        assert response["ResponseMetadata"]["RetryAttempts"] == 0
        assert len(await ledger(stage)) == 1


async def test_refusal_that_passes_is_repeated() -> None:
    """Where waiting helps botocore waits, in its own way, and what comes after is the first attempt."""
    async with on_stage() as (stage, client):
        waits = 0

        def slot_is_free(**_: Any) -> None:
            nonlocal waits
            waits += 1
            held.release()

        async with stage.guard.open(CONTEXT):
            one = Concurrency(1, name="one", per="global", counts="calls")
            held = Held(stage, one)
            await in_thread(held.take)
            client.meta.events.register("needs-retry.bedrock-runtime.Converse", slot_is_free)
            async with stage.guard.open(CONTEXT, extra=[one]):
                assert await in_thread(lambda: converse(client)) == f"Echo: {TEXT}"

        assert waits == 2
        (record,) = await ledger(stage)
        assert record.attempt == 1


class Held:
    """A slot that somebody has."""

    def __init__(self, stage: Stage, policy: Policy) -> None:
        self._open = stage.guard.open_sync(CONTEXT, extra=[policy])
        self._call: Any = None
        self._stage = stage

    def take(self) -> None:
        self._open.__enter__()
        self._call = self._stage.guard.call_sync(model=f"bedrock/{MODEL}", input_tokens=1, max_output_tokens=1)
        self._call.__enter__().release()

    def release(self) -> None:
        if self._call is not None:
            self._call.__exit__(None, None, None)
            self._open.__exit__(None, None, None)
            self._call = None


@every_way
@pytest.mark.parametrize("status", [429, 503])
async def test_retried(way: Way, status: int) -> None:
    """What botocore repeats is another attempt of one call: one iteration, and each charged as it is billed."""
    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.error(status))
        assert await asked(stage, client, way) == f"Echo: {TEXT}"

        records = await ledger(stage)
        assert [(record.outcome, record.attempt) for record in records] == [("provider_error", 1), ("measured", 2)]
        assert records[1].attempt_of == records[0].call_id
        assert await counted(stage) == (1, 0)


@every_way
async def test_errors_of_the_provider(way: Way) -> None:
    """An error that is not repeated costs one iteration and no money, and is not taken for a refusal."""
    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.error(400))
        with pytest.raises(ClientError) as caught:
            await asked(stage, client, way)

        assert refusal_of(caught.value) is None
        (record,) = await ledger(stage)
        assert (record.outcome, record.cost_nanousd) == ("provider_error", 0)
        assert await counted(stage) == (1, 0)


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("behaviour", [Behaviour.cut(after_chunks=2), Behaviour.stream_error(after_chunks=2)])
async def test_stream_that_breaks_off(way: Way, behaviour: Behaviour) -> None:
    """C10: boto3 raises, and the call is charged what came through: no less than billed, no more than held."""
    async with on_stage() as (stage, client):
        stage.provider.script(behaviour)
        with pytest.raises((EventStreamError, ProtocolError)):
            await asked(stage, client, way)

        await gone(stage)
        await ledger(stage, exact=False)


async def gone(stage: Stage) -> None:
    """Wait until what nobody reads any more is settled."""
    gc.collect()
    await stage.settlements.until(1)


@pytest.mark.parametrize("leave", ["close", "drop"])
async def test_stream_that_is_left(leave: str) -> None:
    """A stream that is closed, or dropped, in the middle is settled: by what came through, and nothing stays held."""

    def first_events(client: Any) -> str:
        events = stream_of(client)
        seen = [event for event, _ in zip(events, range(3), strict=False)]
        if leave == "close":
            events.close()
        return seen[1]["contentBlockDelta"]["delta"]["text"]  # type: ignore[no-any-return]

    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.answer(output_tokens=10))
        await asked(stage, client, first_events)

        await gone(stage)
        (record,) = await ledger(stage, exact=False)
        assert record.outcome in ("estimated", "measured", "unknown")


async def test_stream_that_is_read_while_the_guard_drains() -> None:
    """T18: a stream that is still read when the guard ends is charged what came of it, and goes no further."""

    def begin(client: Any) -> Any:
        events = iter(stream_of(client))
        assert next(events)
        return events

    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.slow())
        stage.provider.release(2)
        async with stage.guard.open(CONTEXT):
            events = await in_thread(lambda: begin(client))
            await stage.guard.drain(0)
            (record,) = await stage.storage.records()
            with pytest.raises(ResponseStreamingError, match="has ended"):
                await in_thread(lambda: list(events))
            await stage.provider.idle()
        stage.guard.resume()

        assert record.outcome in ("estimated", "unknown")
        assert record.cost_nanousd
        assert stage.provider.disconnects == 1


@every_way
async def test_success_without_usage(way: Way) -> None:
    """An answer that does not tell is charged what it held."""
    async with on_stage() as (stage, client):
        stage.provider.script(Behaviour.no_usage())
        assert await asked(stage, client, way) == f"Echo: {TEXT}"

        (record,) = await ledger(stage, exact=False)
        assert record.cost_nanousd == record.estimate_nanousd


async def test_body_in_pieces() -> None:
    """The body of an answer may be read in any way, and is settled however far it was read."""

    def whole(body: Any) -> bytes:
        return bytes(body.read())

    def parts(body: Any) -> bytes:
        return b"".join(body.iter_chunks(7))

    def lines(body: Any) -> bytes:
        return b"\n".join(body.iter_lines())

    def raw_lines(body: Any) -> bytes:
        return b"".join(body.readlines())

    def buffers(body: Any) -> bytes:
        return io.BufferedReader(Readable(body)).read()

    def opened(body: Any) -> bytes:
        with body as inner:
            return b"".join(inner)

    ways: tuple[Callable[[Any], bytes], ...] = (whole, parts, lines, raw_lines, buffers, opened)
    for number, read in enumerate(ways, 1):
        async with on_stage() as (stage, client):

            def ask(client: Any, read: Callable[[Any], bytes] = read) -> str:
                answer = client.invoke_model(modelId=MODEL, body=json.dumps(INVOKED))
                return str(json.loads(read(answer["body"]))["content"][0]["text"])

            assert await asked(stage, client, ask) == f"Echo: {TEXT}", number
            (record,) = await ledger(stage)
            assert record.outcome == "measured"


class Readable(io.RawIOBase):
    """A body as the standard library reads one."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._body.readinto(buffer))


async def test_body_that_nobody_reads() -> None:
    """An answer whose body is dropped unread is charged what it held."""

    def ask(client: Any) -> str:
        client.invoke_model(modelId=MODEL, body=io.BytesIO(json.dumps(INVOKED).encode()))
        return ""

    async with on_stage() as (stage, client):
        await asked(stage, client, ask)
        await gone(stage)

        (record,) = await ledger(stage, exact=False)
        assert record.cost_nanousd == record.estimate_nanousd


async def test_never_sent() -> None:
    """A connection that was never made costs nothing, and no iteration."""
    async with on_stage(attempts=1) as (stage, _):
        client = guard_botocore(stage.guard, made("http://127.0.0.1:9", attempts=1))
        with pytest.raises(EndpointConnectionError):
            await asked(stage, client, converse)

        assert await ledger(stage) == []
        assert await counted(stage) == (0, 0)


async def test_outside_an_admission() -> None:
    """Where no admission is open a context that was given is asked for, and without one the call is refused."""
    async with on_stage() as (stage, client):
        with pytest.raises(ClientError, match="no admission of this guard is open"):
            await in_thread(lambda: converse(client))
        assert stage.provider.calls == 0

        other = guard_botocore(stage.guard, made(stage.base_url), context=CONTEXT)
        assert await in_thread(lambda: converse(other)) == f"Echo: {TEXT}"
        with pytest.raises(ClientError, match="not among those"):
            elsewhere = guard_botocore(stage.guard, made(stage.base_url), context=CONTEXT, hosts=["bedrock.example"])
            await in_thread(lambda: converse(elsewhere))
        assert len(await ledger(stage)) == 1


ROOM = Budget("$0.001/1d", name="room")  # 500 tokens


@pytest.mark.parametrize("signature", [None, UNSIGNED])
async def test_clamped(signature: Any) -> None:
    """A limit is lowered to what fits where the body is not signed; a signed one is sent as it is, or refused."""
    limit = {"maxTokens": 5_000}

    def ask(client: Any) -> str:
        answer = client.converse(modelId=MODEL, messages=MESSAGES, inferenceConfig=limit)
        return str(answer["output"]["message"]["content"][0]["text"])

    async with on_stage({"clamp": True}, signature=signature) as (stage, client):
        if signature is None:
            with pytest.raises(ClientError, match="room"):
                await asked(stage, client, ask, (ROOM,))
            assert stage.provider.calls == 0
        else:
            assert await asked(stage, client, ask, (ROOM,)) == f"Echo: {TEXT}"
            (sent,) = stage.provider.requests
            assert 0 < sent.body["inferenceConfig"]["maxTokens"] < 500
        await ledger(stage)


def unlimited(client: Any) -> str:
    with closing(client.converse_stream(modelId=MODEL, messages=MESSAGES)["stream"]) as events:
        return "".join(event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event)


async def test_stream_that_is_cut() -> None:
    """A stream that has used up what can be held for it ends with an exception of Bedrock's, and is charged."""
    hook = {"assumed_output_tokens": 100, "streams": StreamRules(cut=True)}
    async with on_stage(hook) as (stage, client):
        stage.provider.script(Behaviour.answer(output_tokens=4_000))
        with pytest.raises(EventStreamError, match=r"\(ServiceQuotaExceededException\).*room"):
            await asked(stage, client, unlimited, (ROOM,))

        await gone(stage)
        (record,) = await stage.storage.records()
        assert record.outcome == "estimated"
        assert await stage.storage.open_holds() == 0


async def test_stream_that_grows() -> None:
    """A stream that lasts longer than expected holds more while it lasts, and is charged what it used."""
    async with on_stage({"assumed_output_tokens": 100, "streams": StreamRules(cut=True)}) as (stage, client):
        stage.provider.script(Behaviour.answer(output_tokens=2_000))
        assert len((await asked(stage, client, unlimited)).split()) == 2_000
        await ledger(stage)


async def test_deadline() -> None:
    """A deadline shows with the next part that comes: an exception of Bedrock's ends the stream."""
    async with on_stage({"streams": StreamRules(total_s=1e-6)}) as (stage, client):
        with pytest.raises(EventStreamError, match=r"\(serviceUnavailableException\).*ended"):
            await asked(stage, client, converse_stream)
        await gone(stage)
        await ledger(stage, exact=False)


async def test_left_and_read_to_its_end() -> None:
    """With `drain="read"` a stream that its client leaves is read to its end, and charged what it reports."""

    def first(client: Any) -> str:
        with closing(stream_of(client)) as events:
            return str(next(iter(events)))

    async with on_stage({"streams": StreamRules(drain="read", total_s=30)}) as (stage, client):
        stage.provider.script(Behaviour.slow())
        stage.provider.release(2)
        await asked(stage, client, first)
        stage.provider.release()
        await gone(stage)

        (record,) = await ledger(stage)
        assert record.outcome == "measured"
        assert stage.provider.disconnects == 0


@pytest.mark.parametrize("way", PLAIN)
async def test_kept(way: Way) -> None:
    """C14: what was answered once is given again to the same caller: nothing is sent, and nothing is charged."""
    async with on_stage(cache=Cache(ttl="1h", streams=True)) as (stage, client):
        for _ in range(2):
            async with stage.guard.open(Context(caller="ada", session="s")):
                assert await in_thread(lambda: way(client)) == f"Echo: {TEXT}"

        assert stage.provider.calls == 1
        assert [record.outcome for record in await ledger(stage)] == ["measured", "cached"]


async def test_free_operations_pass() -> None:
    """Counting tokens is not billed, and is not asked for."""
    async with on_stage() as (stage, client):
        counting = {"converse": {"messages": MESSAGES}}
        answer = await in_thread(lambda: client.count_tokens(modelId=MODEL, input=counting))

        assert answer["inputTokens"] > 0
        assert await stage.storage.records() == []


async def test_too_large() -> None:
    """A body that is longer than the guard reads is refused, from memory and from a file."""
    async with on_stage() as (stage, client):
        stage.guard.max_body_bytes = 100
        for body in (b" " * 200, io.BytesIO(b" " * 200)):

            def ask(client: Any, body: Any = body) -> str:
                client.invoke_model(modelId=MODEL, body=body)
                return ""

            with pytest.raises(ClientError, match="and this route reads 100; send a shorter one"):
                await asked(stage, client, ask)
        assert stage.provider.calls == 0


async def test_only_that_client() -> None:
    """Other clients stay as they are, and what cannot be guarded is refused when it is tried."""
    async with on_stage() as (stage, client):
        plain = made(stage.base_url)
        assert await in_thread(lambda: converse(plain)) == f"Echo: {TEXT}"
        assert await stage.storage.records() == []

        with pytest.raises(ConfigurationError, match="guarded already"):
            guard_botocore(stage.guard, client)
        s3 = boto3.client("s3", "eu-central-1", aws_access_key_id="any", aws_secret_access_key="any")
        for wrong in (s3, object(), None):
            with pytest.raises(ConfigurationError, match=r"expected boto3\.client"):
                guard_botocore(stage.guard, wrong)
        with pytest.raises(ConfigurationError, match="guard: expected"):
            guard_botocore(None, plain)  # type: ignore[arg-type]
        plain._endpoint.http_session = None
        with pytest.raises(ConfigurationError, match="transport is not known"):
            guard_botocore(stage.guard, plain)
