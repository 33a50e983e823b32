"""Streams of lines and of array elements: taken apart at every split point, in bounded memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import pieces

from asgi_llm_guard.wire.array import ArrayMeter, Elements
from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.lines import Lines
from asgi_llm_guard.wire.sse import Block

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\{}[],\n\u2028'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='b"\\}]'), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(alphabet='b"\\}]'), values, max_size=3)


class Kept:
    """A tally that keeps what it is given."""

    text_bytes = 0

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def event(self, block: Block) -> bool:
        assert block.data is not None
        self.data.append(block.data)
        return False

    def answer(self, *, unread: int = 0) -> Answer:
        return Answer(kind="success", unread=unread)


def taken_apart(splitter: Lines | Elements, chunks: list[bytes]) -> tuple[bytes, list[bytes]]:
    blocks = [block for chunk in chunks for block in splitter.feed(chunk)] + splitter.finish()
    return b"".join(block.raw for block in blocks), [block.data for block in blocks if block.data is not None]


@given(
    elements=st.lists(objects | st.lists(values, max_size=3), max_size=4),
    indent=st.none() | st.integers(0, 2),
    ends=st.lists(st.integers(0, 400), max_size=8),
)
def test_elements_of_any_array(elements: list[Any], indent: int | None, ends: list[int]) -> None:
    """Whatever an array holds, however it is written and wherever chunks end: its elements come out, no byte is lost."""
    data = json.dumps(elements, indent=indent).encode()
    raw, found = taken_apart(Elements(), pieces(data, ends))
    assert raw == data
    assert [json.loads(each) for each in found] == elements


@given(elements=st.lists(objects, max_size=3), indent=st.none() | st.just(1), at=st.integers(0, 200))
def test_cut_array_is_json(elements: list[Any], indent: int | None, at: int) -> None:
    """An array that is cut anywhere, before its first bracket too, is valid JSON and ends with the error."""
    data = json.dumps(elements, indent=indent).encode()
    meter = ArrayMeter(Kept())
    given_out = meter.feed(data[:at]) + meter.cut(b',{"error":1}]')
    given_out += meter.feed(data[at:]) + meter.finish()
    assert meter.ended
    if given_out == data:
        assert at >= len(data)
    else:
        *before, last = json.loads(given_out)
        assert last == {"error": 1}
        assert before == elements[: len(before)]


def test_body_that_is_one_object() -> None:
    """An error comes as an object where an array was asked for: it is read, and nothing is put behind it."""
    kept = Kept()
    meter = ArrayMeter(kept)
    assert meter.feed(b'{"error":{}}') == b'{"error":{}}'
    assert kept.data == [b'{"error":{}}']
    assert meter.cut(b",{}]") == b""


@given(lines=st.lists(objects, max_size=5), ends=st.lists(st.integers(0, 400), max_size=8), last=st.booleans())
def test_lines_of_any_objects(lines: list[Any], ends: list[int], last: bool) -> None:
    """Wherever chunks end, each line comes out once, the last one without an end as well."""
    data = b"\n".join(json.dumps(line).encode() for line in lines) + (b"\n" if last and lines else b"")
    raw, found = taken_apart(Lines(), pieces(data, ends))
    assert raw == data
    assert [json.loads(each) for each in found] == lines


@pytest.mark.parametrize("kind", [Lines, Elements])
@given(data=st.binary(max_size=200), ends=st.lists(st.integers(0, 200), max_size=8))
def test_no_byte_is_lost(kind: type[Lines | Elements], data: bytes, ends: list[int]) -> None:
    """Bytes that are no JSON pass as they are, and chunks make no difference."""
    raw, found = taken_apart(kind(), pieces(data, ends))
    assert raw == data
    assert found == taken_apart(kind(), [data])[1]


@pytest.mark.parametrize(
    ("splitter", "data"),
    [
        (Lines(longest=10), b'{"a":1}\n{"long":"' + b"x" * 90 + b'"}\n{"b":2}\n'),
        (Elements(longest=10), b'[{"a":1},{"long":"' + b"x" * 90 + b'"},{"b":2}]'),
    ],
    ids=["lines", "elements"],
)
def test_what_is_too_long_is_passed_over(splitter: Lines | Elements, data: bytes) -> None:
    """A piece that is too long is forwarded unread and counted; what follows is read; nothing piles up."""
    blocks = []
    for at in range(0, len(data), 3):
        blocks += splitter.feed(data[at : at + 3])
        assert splitter.pending <= 13
    blocks += splitter.finish()
    assert b"".join(block.raw for block in blocks) == data
    assert [json.loads(block.data) for block in blocks if block.data is not None] == [{"a": 1}, {"b": 2}]
    assert splitter.passed_over == 1
    assert all(block.data is None for block in blocks if block.partial)
    assert any(block.partial for block in blocks)


def test_a_long_line_behind_a_short_one() -> None:
    """What is too long is let go of at once, also where it begins behind the end of another line."""
    lines = Lines(longest=10)
    assert [block.data for block in lines.feed(b'{"a":1}\n' + b"x" * 50)] == [b'{"a":1}\n', None]
    assert (lines.pending, lines.passed_over) == (1, 1)
