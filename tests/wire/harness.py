"""What every dialect keeps, as checks over its fixtures.

`fixtures/<dialect>/` holds, beside `http.json` (`host`, `path`; `paths`: of single files, `headers`):

    request*.json                 a request's body
    response*.json, *.txt         the body of an answer with status 200
    error_<status>*.json          the body of an error
    *.sse *.ndjson *.array *.bin  a streamed answer, by its container; `.array` is one JSON array, `.bin` an
                                  AWS event stream

A folder is all it takes: `test_every_dialect.py` finds it. What a fixture's answer must be is said in the
dialect's own tests.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from botocore.eventstream import EventStreamBuffer
from hypothesis import strategies as st

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Answer, Dialect, Head, Meter

FIXTURES: Final = Path(__file__).parent / "fixtures"
MOST_COUNT: Final = 2**31


# ------------------------------------------------------------------------------ containers


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How a stream is written, by a reader that shares no code with the one that is tested."""

    content_type: bytes
    items: Callable[[bytes], list[object]]
    """The events of a stream; raises when a client could not read it."""
    ending: bytes
    """An error event, as a stream that is cut ends with it."""
    breaks_off: bool = True
    """Whether another event can follow one that broke off."""
    closes: bool = False
    """Whether nothing can follow the end of a stream."""


_ERROR: Final = {"error": {"message": "cut here"}}


def sse_items(data: bytes) -> list[object]:
    """The data of each event, decoded where it is JSON; what a broken-off line leaves is text."""
    text = re.sub(r"\r\n|\r", "\n", data.decode("utf-8", "replace").removeprefix("\ufeff"))
    events = []
    for block in text.split("\n\n"):
        lines = [line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:")]
        if lines:
            events.append(_json_or_text("\n".join(lines)))
    return events


def ndjson_items(data: bytes) -> list[object]:
    """Each line, decoded where it is JSON."""
    return [_json_or_text(line.decode("utf-8", "replace")) for line in data.splitlines() if line.strip()]


def array_items(data: bytes) -> list[object]:
    """The items of one JSON array."""
    value = json.loads(data)
    assert isinstance(value, list)
    return value


def frame_items(data: bytes) -> list[object]:
    """Each frame as botocore gives it, its checksums verified: type and payload."""
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    items: list[object] = []
    size = 0
    for message in buffer:
        size += message.prelude.total_length
        headers = message.headers
        kind = headers.get(":event-type") or headers.get(":exception-type")
        items.append({kind: json.loads(message.payload)})
    assert size == len(data), "a part of a frame is left"
    return items


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """One frame of an AWS event stream, with headers that are all text."""
    block = b"".join(
        struct.pack(">B", len(name)) + name.encode() + struct.pack(">BH", 7, len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    body = prelude + struct.pack(">I", zlib.crc32(prelude)) + block + payload
    return body + struct.pack(">I", zlib.crc32(body))


def _json_or_text(text: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value


CONTAINERS: Final[Mapping[str, Container]] = {
    ".sse": Container(
        content_type=b"text/event-stream; charset=utf-8",
        items=sse_items,
        ending=b"data: " + json.dumps(_ERROR).encode() + b"\n\n",
    ),
    ".ndjson": Container(
        content_type=b"application/x-ndjson",
        items=ndjson_items,
        ending=json.dumps(_ERROR).encode() + b"\n",
    ),
    ".array": Container(
        content_type=b"application/json; charset=UTF-8",
        items=array_items,
        ending=b"," + json.dumps(_ERROR).encode() + b"]",
        breaks_off=False,
        closes=True,
    ),
    ".bin": Container(
        content_type=b"application/vnd.amazon.eventstream",
        items=frame_items,
        ending=frame({":exception-type": "cut", ":message-type": "exception"}, json.dumps(_ERROR).encode()),
        breaks_off=False,
    ),
}


# -------------------------------------------------------------------------------- fixtures


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixture:
    """One file of a dialect's folder."""

    dialect: str
    name: str
    kind: Literal["request", "response", "error", "stream"]
    data: bytes
    head: Head
    host: str

    def __str__(self) -> str:
        return f"{self.dialect}/{self.name}"

    @property
    def spoken(self) -> Dialect:
        return dialect_named(self.dialect)

    @property
    def container(self) -> Container:
        """How the stream is written."""
        return CONTAINERS[Path(self.name).suffix]

    @property
    def items(self) -> list[object]:
        """The stream's events, the last of them perhaps broken off."""
        return self.container.items(self.data)

    @property
    def is_whole(self) -> bool:
        """Whether a client can read the stream to its end."""
        try:
            self.container.items(self.data)
        except (AssertionError, ValueError):
            return False
        return True

    def meter(self, *, strip_usage: bool = False) -> Meter:
        return self.spoken.meter(self.head, strip_usage=strip_usage)


@cache
def every_fixture() -> tuple[Fixture, ...]:
    """Every fixture of every dialect, by dialect and name."""
    return tuple(
        _fixture(folder, path)
        for folder in sorted(FIXTURES.iterdir())
        for path in sorted(folder.iterdir())
        if path.name != "http.json"
    )


def fixtures(*kinds: Literal["request", "response", "error", "stream"]) -> list[Fixture]:
    """The fixtures of these kinds."""
    return [fixture for fixture in every_fixture() if fixture.kind in kinds]


def fixture(dialect: str, name: str) -> Fixture:
    """One fixture."""
    return next(each for each in every_fixture() if (each.dialect, each.name) == (dialect, name))


def _fixture(folder: Path, path: Path) -> Fixture:
    http = json.loads((folder / "http.json").read_bytes())
    status, content_type = 200, b"text/plain" if path.suffix == ".txt" else b"application/json"
    kind: Literal["request", "response", "error", "stream"] = "stream"
    if path.suffix in CONTAINERS:
        content_type = CONTAINERS[path.suffix].content_type
    elif path.name.startswith("request"):
        kind = "request"
    elif path.name.startswith("response"):
        kind = "response"
    else:
        kind, status = "error", int(path.stem.split("_")[1])
    headers = [(b"Content-Type", content_type)]
    headers += [(name.encode(), value.encode()) for name, value in http.get("headers", {}).items()]
    target = http.get("paths", {}).get(path.name, http["path"])
    head = Head(status, headers, target)
    return Fixture(dialect=folder.name, name=path.name, kind=kind, data=path.read_bytes(), head=head, host=http["host"])


# ---------------------------------------------------------------------------------- checks


def read(meter: Meter, chunks: Iterable[bytes]) -> tuple[bytes, Answer]:
    """What a meter forwards of these chunks, and what it says of them."""
    forwarded = b"".join([meter.feed(chunk) for chunk in chunks]) + meter.finish()
    return forwarded, meter.answer()


def pieces(data: bytes, ends: Sequence[int]) -> list[bytes]:
    """`data` in chunks that end there."""
    edges = [0, *sorted(end for end in ends if 0 < end < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def check_every_split(case: Fixture, expected: Answer | None = None) -> None:
    """In one piece, in two wherever they part, and byte by byte: the same answer, each chunk forwarded as it is."""
    whole = case.meter()
    assert read(whole, [case.data])[0] == case.data
    answer = whole.answer()
    check_answer(answer)
    if expected is not None:
        assert answer == expected
    for at in range(1, len(case.data)):
        meter = case.meter()
        for chunk in (case.data[:at], case.data[at:]):
            assert meter.feed(chunk) is chunk
        assert meter.finish() == b""
        assert meter.answer() == answer, f"split at {at}"
    assert read(case.meter(), [bytes([byte]) for byte in case.data]) == (case.data, answer)


def check_strip(case: Fixture) -> None:
    """Stripped, wherever chunks end: some whole events may be missing, always the same, and the answer is the same."""
    answer = read(case.meter(), [case.data])[1]
    expected = read(case.meter(strip_usage=True), [case.data])
    assert expected[1] == answer
    if case.is_whole:
        kept, items = case.container.items(expected[0]), case.items
        position = 0
        for item in kept:
            position = items.index(item, position) + 1
    else:
        assert expected[0] == case.data
    for at in range(1, len(case.data)):
        assert read(case.meter(strip_usage=True), [case.data[:at], case.data[at:]]) == expected, f"split at {at}"
    assert read(case.meter(strip_usage=True), [bytes([byte]) for byte in case.data]) == expected


def check_cut(case: Fixture) -> None:
    """Cut anywhere: a client can read what it got, it is what the provider sent up to there and the ending, and
    the rest is still metered."""
    container = case.container
    for strip in (False, True):
        expected, answer = read(case.meter(strip_usage=strip), [case.data])
        items = container.items(expected)
        ending = container.items(container.ending)[-1] if container.breaks_off else _ERROR
        seen: set[bytes] = set()
        for at in range(len(case.data) + 1):
            for parts in ((case.data[at:],), (case.data[at : at + 1], case.data[at + 1 :])):
                meter = case.meter(strip_usage=strip)
                given = meter.feed(case.data[:at])
                given += meter.cut(container.ending)
                assert meter.cut(container.ending) == b"", "one ending is enough"
                given += b"".join([meter.feed(part) for part in parts])
                given += meter.finish()
                assert meter.ended
                assert meter.answer() == answer, f"cut at {at}"
                if given not in seen and not (container.closes and given.rstrip() == expected.rstrip()):
                    seen.add(given)
                    *before, last = container.items(given)
                    assert before == items[: len(before)], f"cut at {at}"
                    assert last == ending or list(last.values()) == [ending], f"cut at {at}"  # type: ignore[attr-defined]


def check_answer(answer: Answer) -> None:
    """What every answer keeps: whole numbers of a believable size, and parts within what they are part of."""
    assert answer.text_bytes >= 0
    assert answer.unread >= 0
    assert (answer.error is not None) == (answer.kind == "error")
    assert not (answer.finished and answer.kind == "error")
    if answer.usage is not None:
        check_usage(answer.usage)


def check_usage(usage: Usage) -> None:
    counts = {name: getattr(usage, name) for name in _COUNTS}
    assert any(count is not None for count in counts.values()) or usage.reported_nanousd is not None or usage.extra
    for name, count in counts.items():
        assert count is None or (type(count) is int and 0 <= count < MOST_COUNT), name
    for parts, whole in _WITHIN:
        assert sum(counts[part] or 0 for part in parts) <= (counts[whole] or 0), (parts, whole)
    assert usage.reported_nanousd is None or (type(usage.reported_nanousd) is int and usage.reported_nanousd >= 0)
    for label in (usage.model, usage.service_tier):
        assert label is None or (label.isprintable() and 0 < len(label) <= 256)
    for other in usage.extra:
        check_usage(other)


_COUNTS: Final = tuple(
    name for name in Usage.__struct_fields__ if name not in ("reported_nanousd", "service_tier", "model", "extra")
)
_WITHIN: Final = (
    (("cache_read_tokens", "cache_write_tokens"), "input_tokens"),
    (("cache_write_1h_tokens",), "cache_write_tokens"),
    (("input_audio_tokens",), "input_tokens"),
    (("input_image_tokens",), "input_tokens"),
    (("reasoning_tokens",), "output_tokens"),
    (("output_audio_tokens",), "output_tokens"),
    (("output_image_tokens",), "output_tokens"),
)


# --------------------------------------------------------------------------------- garbage

_SCALAR: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\{\}|\[\]')
_JUNK: Final = (
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"7",
        b"1.5",
        b"1e999",
        b"NaN",
        b"-Infinity",
        b"2147483648",
        b"9" * 40,
        b'"\\ud800"',
    ),
    *(
        b'"x"',
        b'""',
        b"[]",
        b"{}",
        b"[null]",
        b'[{"text":7}]',
        b'{"type":"error"}',
        b'{"":{}}',
        b"[[[[]]]]",
        b'"\xff\xfe"',
    ),
)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few things wrong: values of other types, pieces lost, doubled or damaged."""
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(6)
        if kind <= 2:
            tokens = list(_SCALAR.finditer(data))
            if tokens:
                token = rng.choice(tokens)
                data = data[: token.start()] + rng.choice(_JUNK) + data[token.end() :]
        elif kind == 3 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 4:
            start = rng.randrange(len(data) + 1)
            data = data[:start] + data[start + rng.randrange(60) :]
        else:
            start = rng.randrange(len(data) + 1)
            piece = data[start : start + rng.randrange(120)]
            at = rng.randrange(len(data) + 1)
            data = data[:at] + piece + data[at:]
    return data


def check_garbage(case: Fixture, data: bytes, rng: random.Random) -> None:
    """Whatever the bytes: nothing raises, what was not stripped is forwarded as it is, and counts are believable."""
    strip = case.kind == "stream" and rng.random() < 0.3
    meter = case.meter(strip_usage=strip)
    chunks = pieces(data, [rng.randrange(len(data) + 1) for _ in range(rng.randrange(4))])
    forwarded, answer = read(meter, chunks)
    if not strip:
        assert forwarded == data
    check_answer(answer)
    if case.kind == "stream" and rng.random() < 0.2:
        meter = case.meter()
        meter.feed(data[: len(data) // 2])
        meter.cut(case.container.ending)
        read(meter, [data[len(data) // 2 :]])
        assert meter.ended
    check_answer(case.spoken.read_response(rng.choice(_STATUSES), data))
    check_objects(case.spoken, _loose_items(case, data))


def check_objects(dialect: Dialect, items: Iterable[object]) -> None:
    """Whatever the objects: nothing raises, and counts are believable."""
    meter = dialect.item_meter()
    for item in items:
        answer = dialect.read_object(item)
        if answer is not None:
            check_answer(answer)
        meter.add(item)
    total = meter.answer()
    if total is not None:
        check_answer(total)


_STATUSES: Final = (200, 201, 302, 400, 402, 429, 500, 503)


def _loose_items(case: Fixture, data: bytes) -> list[object]:
    if case.kind != "stream":
        return [_json_or_text(data.decode("utf-8", "replace")), data]
    if case.container.breaks_off:
        return [*case.container.items(data)[:20], data]
    return [data]


@st.composite
def garbage(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """Bytes that look more or less like the samples: damaged, mixed, or anything at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=300))
    rng = random.Random(draw(st.integers(0, 2**32)))
    data = draw(st.sampled_from(list(samples)))
    if draw(st.booleans()):
        other = draw(st.sampled_from(list(samples)))
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    return mutate(rng, data)


def anything(*names: str) -> st.SearchStrategy[Any]:
    """JSON values of any shape, objects having members of these names."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4),
        max_leaves=12,
    )
