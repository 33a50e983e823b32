"""AWS event streams, split at any byte; botocore's reader says what they hold."""

from __future__ import annotations

import struct
import zlib

from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import frame

from asgi_llm_guard.wire.base import Answer
from asgi_llm_guard.wire.eventstream import Frames, exception_type
from asgi_llm_guard.wire.meters import Streamed
from asgi_llm_guard.wire.sse import Block

EVENT = {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}


def read(*chunks: bytes, longest: int = 1 << 20) -> tuple[list[Block], int]:
    frames = Frames(longest)
    read = [block for chunk in chunks for block in frames.feed(chunk)] + frames.finish()
    return read, frames.passed_over


def payloads(*chunks: bytes, longest: int = 1 << 20) -> list[bytes | None]:
    return [block.data for block in read(*chunks, longest=longest)[0]]


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Counted:
    """A tally that counts events."""

    text_bytes = 0

    def event(self, block: Block) -> bool:
        assert block.data is not None
        self.text_bytes += len(block.data)
        return False

    def answer(self, *, unread: int = 0) -> Answer:
        return Answer(kind="success", text_bytes=self.text_bytes, unread=unread)


def test_frames() -> None:
    """The payload of each frame is given, an empty one too, and exceptions are told from events."""
    failure = frame({":exception-type": "throttlingException", ":message-type": "exception"}, b"{}")
    fault = frame({":error-code": "InternalError", ":message-type": "error"}, b"")
    blocks, passed_over = read(frame(EVENT, b"one") + frame(EVENT, b"") + failure + fault)
    assert [(block.data, block.error) for block in blocks] == [
        (b"one", False),
        (b"", False),
        (b"{}", True),
        (b"", True),
    ]
    assert [exception_type(block.raw) for block in blocks] == [None, None, "throttlingException", "InternalError"]
    assert passed_over == 0


def test_headers_of_every_type() -> None:
    """Headers that are numbers, flags, bytes, times or ids are stepped over; what cannot be stepped over ends them."""
    others = b"".join(
        struct.pack(">B", len(name)) + name + value
        for name, value in (
            (b"t", b"\x00"),
            (b"f", b"\x01"),
            (b"i1", b"\x02\x07"),
            (b"i2", b"\x03\x00\x07"),
            (b"i4", b"\x04" + bytes(4)),
            (b"i8", b"\x05" + bytes(8)),
            (b"b", b"\x06\x00\x03\x07\x07\x07"),
            (b"at", b"\x08" + bytes(8)),
            (b"id", b"\x09" + bytes(16)),
        )
    )
    kind = b"\x0d:message-type\x07\x00\x09exception\x0f:exception-type\x07\x00\x03Bad"

    def raw(headers: bytes) -> bytes:
        prelude = struct.pack(">II", 16 + len(headers), len(headers))
        body = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers
        return body + struct.pack(">I", zlib.crc32(body))

    for headers in (others + kind, kind + b"\x01x\x63" + others, kind + b"\x05x"):
        (block,) = read(raw(headers))[0]
        assert block.error
        assert exception_type(block.raw) == "Bad"
    (block,) = read(raw(b"\x01x\x63" + kind))[0]
    assert not block.error


def test_damaged_frame_is_passed_over() -> None:
    """A frame whose checksum is wrong is forwarded unread and counted; the next one is read."""
    one, other = frame(EVENT, b"one"), frame(EVENT, b"other")
    for at in (*range(12, len(one)),):
        blocks, passed_over = read(damaged(one, at) + other)
        assert [block.data for block in blocks] == [None, b"other"]
        assert blocks[0].raw == damaged(one, at)
        assert passed_over == 1


def test_damaged_lengths_end_the_reading() -> None:
    """Where the lengths are wrong nothing that follows is read, all of it is forwarded, and it counts as one."""
    one, other = frame(EVENT, b"one"), frame(EVENT, b"other")
    for at in range(12):
        stream = other + damaged(one, at) + other
        blocks, passed_over = read(*(bytes([byte]) for byte in stream))
        assert [block.data for block in blocks if block.data is not None] == [b"other"]
        assert b"".join(block.raw for block in blocks) == stream
        assert passed_over == 1


def test_impossible_lengths() -> None:
    """Lengths that no frame can have are damaged, though their checksum is right."""
    for total, headers in ((0, 0), (15, 0), (20, 5), (16, 1 << 31)):
        prelude = struct.pack(">II", total, headers)
        assert payloads(prelude + struct.pack(">I", zlib.crc32(prelude)) + bytes(40)) == [None, None]


def test_long_frames_are_passed_over() -> None:
    """A frame above the bound is forwarded unread and counted once, in one chunk or in many; the next one is read."""
    stream = frame(EVENT, b"x" * 500) + frame(EVENT, b"a")
    for chunks in ((stream,), tuple(bytes([byte]) for byte in stream), (stream[:50], stream[50:])):
        blocks, passed_over = read(*chunks, longest=200)
        assert b"".join(block.raw for block in blocks) == stream
        assert [block.data for block in blocks if block.data is not None] == [b"a"]
        assert passed_over == 1


def test_memory_is_bounded() -> None:
    """Neither a frame that is too long nor one without an end is collected."""
    endless = Frames(1000)
    endless.feed(struct.pack(">II", 1 << 30, 0) + struct.pack(">I", zlib.crc32(struct.pack(">II", 1 << 30, 0))))
    for _ in range(1000):
        endless.feed(b"x" * 100)
        assert endless.pending == 1
    assert endless.passed_over == 1


def test_stream_is_cut_between_frames() -> None:
    """The ending never stands inside a frame, one that is too long to be read included."""
    for payload in (b"x" * 30, b"x" * 500):
        first, second = frame(EVENT, payload), frame(EVENT, b"more")
        stream = first + second
        for at in range(len(stream) + 1):
            meter = Streamed(Frames(200), Counted())
            given = meter.feed(stream[:at]) + meter.cut(b"END")
            given += b"".join([meter.feed(stream[at : at + 7]), meter.feed(stream[at + 7 :])]) + meter.finish()
            border = 0 if at == 0 else len(first) if at <= len(first) else len(stream)
            assert given == stream[:border] + b"END"
            assert meter.answer().text_bytes == 4 + (30 if len(payload) == 30 else 0)


@given(st.lists(st.binary(max_size=20), max_size=5), st.data())
def test_any_split_gives_what_botocore_reads(parts: list[bytes], data: st.DataObject) -> None:
    """Wherever chunks end the frames are those that botocore's reader gives, and all bytes come in order."""
    stream = b"".join(frame({**EVENT, "n": "x" * len(part)}, part) for part in parts)
    stream += data.draw(st.binary(max_size=11))  # a frame that broke off
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    oracle = EventStreamBuffer()
    oracle.add_data(stream)
    blocks, passed_over = read(*chunks)
    assert [block.data for block in blocks if block.data is not None] == [message.payload for message in oracle]
    assert b"".join(block.raw for block in blocks) == stream
    assert passed_over == 0


@given(st.lists(st.binary(max_size=20), max_size=4), st.integers(0, 400), st.data())
def test_damage_is_seen_wherever_chunks_end(parts: list[bytes], at: int, data: st.DataObject) -> None:
    """With a byte wrong anywhere: the same frames, the same count, and every byte in order, however it is cut."""
    stream = b"".join(frame(EVENT, part) for part in parts)
    stream = damaged(stream, at % len(stream)) if stream else stream
    longest = data.draw(st.sampled_from([90, 1000]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole, passed_over = read(stream, longest=longest)
    blocks, also = read(*chunks, longest=longest)
    assert [block for block in blocks if block.data is not None] == [block for block in whole if block.data is not None]
    assert b"".join(block.raw for block in blocks) == stream
    assert also == passed_over
