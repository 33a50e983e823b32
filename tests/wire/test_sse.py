"""Server-sent events, split at any byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.wire.sse import Block, Blocks


def read(*chunks: bytes, longest: int = 1 << 20) -> tuple[list[Block], int]:
    blocks = Blocks(longest)
    read = [block for chunk in chunks for block in blocks.feed(chunk)] + blocks.finish()
    return read, blocks.passed_over


def events(*chunks: bytes) -> list[bytes | None]:
    return [block.data for block in read(*chunks)[0]]


def test_line_ends() -> None:
    """LF, CR LF and CR end lines, also mixed; two of them end an event."""
    assert events(b"data: a\n\ndata: b\r\n\r\ndata: c\r\rdata: d\n\rdata: e\r\n\n") == [b"a", b"b", b"c", b"d", b"e"]
    assert events(b"data: a\r\ndata: b\r\n\r\n") == [b"a\nb"]


def test_fields() -> None:
    """One space after the colon is not data; several lines join with LF; other fields and comments have no data."""
    assert events(b"data:a\ndata:  b\ndata:\nid: 1\n\n: note\n\nevent: x\n\n") == [b"a\n b\n", None, None]
    assert events(b"database: 1\ndata\n\n") == [None]


def test_error_events_are_told() -> None:
    """The event name `error` is seen, with and without the space; other names are not."""
    blocks, _ = read(b"event: error\ndata: x\n\nevent:error\ndata: x\n\nevent: errors\ndata: x\n\n")
    assert [block.error for block in blocks] == [True, True, False]


def test_an_event_that_is_a_chunk() -> None:
    """Events that come one to a chunk, as servers flush them, are read as any other, names and errors included."""
    named, error = b"event: delta\ndata: a\n\n", b"event: error\ndata: b\n\n"
    chunks = [
        b": hello\n\n",
        named,
        error,
        b"data: c\n\n",
        b"event: x\n\n",
        b"data:d\n\n",
        b"data: e\r\n\r\n",
        b"data: f\n\n\n",
    ]
    blocks, _ = read(*chunks)
    assert [(block.data, block.error) for block in blocks] == [
        (None, False),
        (b"a", False),
        (b"b", True),
        (b"c", False),
        (None, False),
        (b"d", False),
        (b"e", False),
        (b"f", False),
        (None, False),
    ]
    assert b"".join(block.raw for block in blocks) == b"".join(chunks)


def test_byte_order_mark() -> None:
    """A mark at the start of the stream is not part of the first field's name; later it is."""
    assert events(b"\xef\xbb", b"\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == [b"a", None]


def test_unicode_line_separators_are_text() -> None:
    """U+2028, U+0085 and form feeds end no line."""
    data = "a\u2028b\u0085c\x0cd\x1ee".encode()
    assert events(b"data: " + data + b"\n\n") == [data]


def test_last_event_without_a_blank_line() -> None:
    """What is left at the end of the stream counts as an event."""
    assert events(b"data: a\n\ndata: b") == [b"a", b"b"]
    assert events(b"data: a\n\n") == [b"a"]


def test_long_events_are_passed_over() -> None:
    """A block above the bound is forwarded unread and counted once, in one chunk or in many; the next one is read."""
    stream = b"data: " + b"x" * 50 + b"\n\ndata: a\n\n"
    whole = [block.data for block in read(stream, longest=32)[0]]
    assert whole == [None, b"a"]
    blocks, passed_over = read(*(bytes([byte]) for byte in stream), longest=32)
    assert b"".join(block.raw for block in blocks) == stream
    assert [block.data for block in blocks if block.data] == [b"a"]
    assert passed_over == 1


def test_memory_is_bounded() -> None:
    """A stream that never ends a line is not collected."""
    blocks = Blocks(1000)
    for fed in range(100, 100_000, 100):
        blocks.feed(b"x" * 100)
        assert len(blocks._tail) <= min(fed, 1000)
    assert blocks.passed_over == 1


@given(
    st.lists(st.sampled_from([b"data: ", b"data", b":", b" ", b"x", b"\r", b"\n", b"\xef\xbb\xbf", b"event: error"])),
    st.data(),
)
def test_any_split_gives_the_same_events(pieces: list[bytes], data: st.DataObject) -> None:
    """Wherever chunks end: same events, same count of those passed over, and all bytes in order."""
    stream = b"".join(pieces)
    longest = data.draw(st.sampled_from([4, 9, 1000]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole, passed_over = read(stream, longest=longest)
    parts, also = read(*chunks, longest=longest)
    assert b"".join(block.raw for block in parts) == b"".join(block.raw for block in whole) == stream
    assert [block for block in parts if block.data is not None] == [block for block in whole if block.data is not None]
    assert also == passed_over


@given(st.lists(st.sampled_from([b"data: ", b":", b"x", b"\r", b"\n", b"id: 1"])))
def test_events_agree_with_the_line_by_line_rules(pieces: list[bytes]) -> None:
    """The events are those of the standard's algorithm, which goes line by line."""
    stream = b"".join(pieces)
    expected, data = [], list[bytes]()
    for line in (*stream.splitlines(), b""):
        if line:
            data += [line.removeprefix(b"data:").removeprefix(b" ")] if line.startswith(b"data:") else []
        elif data:
            expected.append(b"\n".join(data))
            data = []
    assert [event for event in events(stream) if event is not None] == expected
