"""Answers in which less is told than was billed: no way to be charged less than what is known, or what was held."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import zstandard
from tests.exits.kit import CONTEXT, MAX_TOKENS, Stage
from tests.hooks.kit import Way, asked, library_of, over, pieces
from tests.hooks.test_answers import ANSWER, COST, STREAM, STREAMED, outcomes, raw, the_hold

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.streams import SURE_BYTES
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_named

pytestmark = pytest.mark.anyio

LONG = "word " * 40


def chunk(text: str = "", *, done: bool = False, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if done else None}
    value = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-test", "choices": [choice], **more}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def usage(written: int, entered: int = 10) -> dict[str, int]:
    return {"prompt_tokens": entered, "completion_tokens": written, "total_tokens": entered + written}


async def charged(
    stage: Stage,
    way: Way,
    parts: Sequence[bytes],
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    broken: bool = False,
    **more: Any,
) -> list[tuple[str, int | None]]:
    """What a call is charged that gets this answer; `broken`: which breaks off after the parts."""
    library = library_of(way)

    def body() -> Any:
        yield from parts
        if broken:
            raise library.ReadError("gone")

    def provider(request: Any) -> Any:
        content = pieces(way, body())
        return library.Response(status, headers=STREAMED if headers is None else headers, content=content)

    async with over(stage, way, provider) as client:
        try:
            await client.chunks(asked(stream=True, **more))
        except (library.ReadError, library.DecodingError):
            assert broken or headers
    return await outcomes(stage)


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/x-ndjson", "text/plain", ""])
@pytest.mark.parametrize("body", [b'data: {"detail":"slow down"}\n\n', b"slow down", b'{"detail":"slow down"}\n'])
async def test_error_in_a_stream_type(offline: Stage, way: Way, content_type: str, body: bytes) -> None:
    """B9: an error status is an error of the provider, whatever the type and the words of its body."""
    seen = await charged(offline, way, [body], status=429, headers={"content-type": content_type})

    assert seen == [("provider_error", 0)]


async def test_usage_told_before_the_text(offline: Stage, way: Way) -> None:
    """T4: a report that came before more text leaves that text out: the hold is charged, or what is counted."""
    hold = [chunk(usage=usage(1)), chunk(LONG), chunk(done=True), b"data: [DONE]\n\n"]
    assert await charged(offline, way, hold) == [("unmetered", await the_hold(offline))]


async def test_usage_told_before_the_text_that_breaks_off(offline: Stage, way: Way) -> None:
    """T4: as above, of a stream that breaks off."""
    ((outcome, cost),) = await charged(offline, way, [chunk(usage=usage(1)), chunk("x" * 7)], broken=True)

    assert (outcome, cost) == ("estimated", 10 * 1_000 + 7 * 2_000)


async def test_usage_told_all_along(offline: Stage, way: Way) -> None:
    """C5: a stream that tells its usage with every chunk is charged what it told last, also if it breaks off."""
    parts = [chunk("x" * 7, usage=usage(number)) for number in range(1, 4)]

    assert await charged(offline, way, parts, broken=True) == [("measured", 10 * 1_000 + 3 * 2_000)]


async def test_event_that_is_too_long_to_be_read(offline: Stage, way: Way) -> None:
    """T4: text that was not read is not counted as none: the hold is charged."""
    ((outcome, cost),) = await charged(offline, way, [chunk("yes"), chunk("x" * (1 << 20)), chunk("yes")], broken=True)

    assert (outcome, cost) == ("unknown", await the_hold(offline))


@pytest.mark.parametrize("event", [b'data: {"choices":[{"delta":{"content":"x"}}\n\n', b"data: \xff\xfe\xfd\n\n"])
async def test_event_that_cannot_be_read(offline: Stage, way: Way, event: bytes) -> None:
    """T4: as above, of an event that is not JSON."""
    ((outcome, cost),) = await charged(offline, way, [chunk("yes"), event, chunk("no")], broken=True)

    assert (outcome, cost) == ("unknown", await the_hold(offline))


@pytest.mark.parametrize("name", ["zstd", "gzip"])
@pytest.mark.parametrize("size", [3, 100_000])
async def test_encoded_in_several_frames(offline: Stage, way: Way, name: str, size: int) -> None:
    """Every frame of an encoded stream is metered, however they are cut into chunks."""
    compress: Any = zstandard.ZstdCompressor().compress if name == "zstd" else gzip.compress
    events = STREAM.replace(b"\n\n", b"\n\n|").split(b"|")
    body = b"".join(compress(event) for event in events)
    parts = [body[start : start + size] for start in range(0, len(body), size)]

    def provider(request: Any) -> Any:
        headers = {**STREAMED, "content-encoding": name}
        return library_of(way).Response(200, headers=headers, content=pieces(way, parts))

    async with over(offline, way, provider) as client:
        assert await raw(client.client, way) == body

    assert await outcomes(offline) == [("measured", COST)]


@pytest.mark.parametrize("name", ["zstd", "gzip"])
async def test_encoding_that_breaks(offline: Stage, way: Way, name: str) -> None:
    """T4: what follows after bytes that cannot be decoded may be the most of it: the hold is charged."""
    compress: Any = zstandard.ZstdCompressor().compress if name == "zstd" else gzip.compress
    parts = [compress(chunk("yes")), b"\1 not of that encoding", chunk(LONG)]

    ((outcome, cost),) = await charged(offline, way, parts, headers={**STREAMED, "content-encoding": name})

    assert outcome in ("unmetered", "unknown")
    assert cost == await the_hold(offline)


async def test_waste_behind_an_encoded_answer(offline: Stage, way: Way) -> None:
    """What comes behind an answer that has told its usage changes nothing."""
    body = gzip.compress(json.dumps(ANSWER).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}

    assert await charged(offline, way, [body, b"waste"], headers=headers) == [("measured", COST)]


@pytest.mark.parametrize("parts", [[b""], [b"", b""], []])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_nothing_but_empty_chunks(offline: Stage, way: Way, parts: list[bytes], kind: str) -> None:
    """T4: an answer without a byte may have been billed: the hold is charged."""
    ((outcome, cost),) = await charged(offline, way, parts, headers={"content-type": kind})

    assert outcome in ("unmetered", "unknown")
    assert cost == await the_hold(offline)


@pytest.mark.parametrize("status", [201, 202, 203, 204, 206, 226])
async def test_other_successes(offline: Stage, way: Way, status: int) -> None:
    """T4: every status of success is one."""
    body = [] if status == 204 else [json.dumps(ANSWER).encode()]
    ((outcome, cost),) = await charged(offline, way, body, status=status, headers={"content-type": "application/json"})

    assert (outcome, cost) == (("unmetered", await the_hold(offline)) if status == 204 else ("measured", COST))


@pytest.mark.parametrize("status", [300, 304, 399])
async def test_billed_and_sent_on(offline: Stage, way: Way, status: int) -> None:
    """T4: an answer that tells what it used is charged that, whatever its status says."""
    body = json.dumps(ANSWER).encode()
    seen = await charged(offline, way, [body], status=status, headers={"content-type": "application/json"})

    assert seen == [("measured", COST)]


@pytest.mark.parametrize(
    "told",
    [
        usage(0, 0),
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": -1, "completion_tokens": -1},
        {"prompt_tokens": 1e9, "completion_tokens": 1e9},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": True, "completion_tokens": True},
    ],
)
@pytest.mark.parametrize("text", ["yes", ""])
async def test_usage_that_cannot_be(offline: Stage, way: Way, told: dict[str, Any], text: str) -> None:
    """T4: a report of nothing is no report: the hold is charged."""
    body = ANSWER | {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}], "usage": told}
    seen = await charged(
        offline, way, [json.dumps(body).encode()], headers={"content-type": "application/json; charset=utf-8"}
    )

    assert seen == [("unmetered", await the_hold(offline))]


@pytest.mark.parametrize("trailing", [b"", chunk(), b": bye\n\n"])
async def test_usage_behind_the_end(offline: Stage, way: Way, trailing: bytes) -> None:
    """Usage that comes behind `[DONE]` counts, if it comes."""
    parts = [chunk("yes", done=True), b"data: [DONE]\n\n", chunk(choices=[], usage=usage(5)), trailing]

    assert await charged(offline, way, parts) == [("measured", COST)]


async def test_error_with_status_200(offline: Stage, way: Way) -> None:
    """B9: an error in an answer with status 200 costs no money; with text beside it, what is counted."""
    error = {"error": {"message": "no", "type": "server_error"}}
    headers = {"content-type": "application/json"}
    assert await charged(offline, way, [json.dumps(error).encode()], headers=headers) == [("provider_error", 0)]


async def test_members_that_come_twice(offline: Stage, way: Way) -> None:
    """Of members that come twice the last one counts, as for the client's own parser."""
    text = json.dumps(ANSWER)
    body = text[:-1] + ', "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'
    seen = await charged(offline, way, [body.encode()], headers={"content-type": "application/json"})

    assert seen == [("measured", 3_000)]


def test_search_that_is_not_utf8() -> None:
    """T4: reading a response never fails, though what one of its searches looked for is not UTF-8."""
    response = json.dumps(
        {
            "object": "response",
            "output": [{"type": "web_search_call", "action": {"type": "search", "query": "?"}}],
            "usage": {"input_tokens": 3, "output_tokens": 2},
        }
    )
    answer = dialect_named("openai_responses").read_response(200, response.encode().replace(b"?", b"\xff"))

    assert answer.usage == Usage(input_tokens=3, output_tokens=2, web_searches=1)


def test_bound_of_the_cases() -> None:
    """The text of these cases is more than what is held, so that a count would show."""
    assert len(LONG) > MAX_TOKENS * SURE_BYTES


@pytest.mark.parametrize(("parts", "calls"), [([STREAM], 2), ([chunk("x", usage=usage(1))], 1)])
async def test_made_again_after_its_connection_broke(offline: Stage, way: Way, parts: list[bytes], calls: int) -> None:
    """B9: after an answer that was complete the same request is a new call; after one that broke off, an attempt."""
    library = library_of(way)

    def body() -> Any:
        yield from parts
        raise library.ReadError("gone")

    def provider(request: Any) -> Any:
        return library.Response(200, headers=STREAMED, content=pieces(way, body()))

    async with over(offline, way, provider) as client:
        for _ in range(2):
            with pytest.raises(library.ReadError):
                await client.chunks(asked(stream=True))

    assert [outcome for outcome, _ in await outcomes(offline)] == ["measured", "measured"]
    assert (await offline.counters())[0] == calls


async def test_made_again_after_an_error_that_was_billed(offline: Stage, way: Way) -> None:
    """B9: an error that tells what it used is charged that, and is followed by an attempt of the same call."""

    def provider(request: Any) -> Any:
        return library_of(way).Response(500, json={"error": {"message": "late"}, "usage": ANSWER["usage"]})

    async with over(offline, way, provider) as client:
        for _ in range(2):
            await client.post(asked())

    assert await outcomes(offline) == [("measured", COST)] * 2
    assert (await offline.counters())[0] == 1


class Moody:
    """A policy that fails when it is asked for the `fails`-th time."""

    name = "moody"
    counts: Literal["calls"] = "calls"

    def __init__(self, fails: int) -> None:
        self._left = fails

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:
        self._left -= call is not None
        if self._left == 0:
            raise ZeroDivisionError
        return Verdict()


async def test_attempt_that_was_never_granted(offline: Stage, way: Way) -> None:
    """B9: an attempt that broke off before it was granted is made again as the same attempt, and counts no call."""
    answers = [500, 200]
    asked_ = asked()

    def provider(request: Any) -> Any:
        return library_of(way).Response(answers.pop(0), json=ANSWER | {"usage": None})

    async with over(offline, way, provider) as client, offline.guard.open(CONTEXT, extra=[Moody(2)]):
        await client.post(asked_)
        with pytest.raises(ZeroDivisionError):
            await client.post(asked_)
        await client.post(asked_)

    assert [outcome for outcome, _ in await outcomes(offline)] == ["provider_error", "unmetered"]
    assert (await offline.counters())[0] == 1
