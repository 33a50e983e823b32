"""Meters of bodies that are read as one piece, and of those that say nothing."""

from __future__ import annotations

import pytest

from asgi_llm_guard.wire import dialect_for, dialect_named
from asgi_llm_guard.wire.base import Answer, Head
from asgi_llm_guard.wire.meters import MAX_BODY_BYTES, Opaque, Whole
from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.sse import Block

LARGE, SMALL = b"L" * 20_000, b"s" * 700


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [b""],
        [SMALL],
        [LARGE],
        [LARGE, LARGE],
        [SMALL, LARGE, SMALL, SMALL],
        [SMALL] * 60,
        [LARGE, *[SMALL] * 30, LARGE],
    ],
    ids=["none", "empty", "small", "large", "two", "mixed", "many small", "small between"],
)
def test_a_body_is_read_as_it_came(chunks: list[bytes]) -> None:
    """However large its chunks are, each is forwarded as it is, and together they are read as one body."""
    seen: list[bytes] = []

    def read(body: bytes) -> Answer:
        seen.append(body)
        return Answer(kind="success", finished=True)

    meter = Whole(read)
    assert all(meter.feed(chunk) is chunk for chunk in chunks)
    assert meter.cut(b"ending") == meter.finish() == b""
    assert meter.answer().finished
    assert seen == [b"".join(chunks)]
    assert not meter.ended


def test_a_body_that_is_too_long_is_not_read() -> None:
    """Past the most that is read nothing is kept; all of it is forwarded, and the answer says so."""
    meter = Whole(lambda body: pytest.fail(f"{len(body)} bytes were read"))
    chunk = b"x" * (MAX_BODY_BYTES // 2 + 1)
    assert [meter.feed(chunk) is chunk for _ in range(3)] == [True, True, True]
    assert meter.answer() == Answer(kind="success", finished=True, unread=1)


def test_what_says_nothing_passes() -> None:
    """A body of sound passes as it is, is not cut, and says what was known before."""
    known = Answer(kind="success", finished=True)
    meter = Opaque(known)
    assert (meter.feed(LARGE), meter.cut(b"ending"), meter.finish(), meter.answer()) == (LARGE, b"", b"", known)


@pytest.mark.parametrize(
    ("dialect", "plain", "other"),
    [
        (
            "openai",
            b'{"choices":[{"index":0,"delta":{"content":"a","reasoning_content":"bc"}}],"service_tier":"flex"}',
            b'{"object":"error","message":"no","choices":[{"delta":{"content":"a"}}]}',
        ),
        (
            "openai_completions",
            b'{"choices":[{"text":"abc"}],"service_tier":"flex"}',
            b'{"object":"text_completion","choices":[{"text":"abc"}],"usage":{"prompt_tokens":1}}',
        ),
        (
            "openai_responses",
            b'{"type":"response.output_text.delta","delta":"abc"}',
            b'{"type":"response.audio.delta","delta":"abcd"}',
        ),
    ],
)
def test_plain_events_are_read_the_same(dialect: str, plain: bytes, other: bytes) -> None:
    """An event that is decoded in a shorter way says what it says when it is read by its shape."""
    for event in (plain, other):
        answers = []
        for extra in (b"", b'"usage":[],"x_groq":[],"item_id":[],'):  # types that no plain event has
            meter = dialect_named(dialect).meter(Head(200, [(b"content-type", b"text/event-stream")]))
            meter.feed(b": ready\n\n")
            meter.feed(b"data: {" + extra + event[1:] + b"\n\n")
            answers.append(meter.answer())
        assert answers[0].text_bytes == answers[1].text_bytes
        assert answers[0].model == answers[1].model
        assert answers[0].kind == answers[1].kind


def test_a_piece_without_data_is_nothing() -> None:
    """Comments are no events of a dialect."""
    tally = OpenAIChat().tally()
    assert not tally.event(Block(b": hello\n\n", None))
    assert tally.answer() == Answer(kind="success")


def test_a_response_of_another_kind_is_read_by_its_shape() -> None:
    """An object with an output that is no response says nothing, and is no error."""
    body = b'{"object":"something","output":[]}'
    assert dialect_named("openai_responses").read_response(200, body) == Answer(kind="success", finished=True)


def test_deployments_of_others() -> None:
    """Deployments of other APIs are no Azure deployments."""
    assert dialect_for("/v1/deployments/d/responses") is None
    assert dialect_for("/openai/deployments/d/v2/responses") is not None
