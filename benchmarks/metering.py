"""What reading answers costs, for every dialect: streamed events of 200 bytes, bodies of 2 MB, and memory.

    python -m benchmarks.metering [rounds] [megabytes]

An event is one chunk, as servers flush them, with nothing but text in the middle of an answer. *Ragged* chunks end
anywhere. Beside it stands `json.loads` of the same event, found by hand, which is what any reader does at least.
"""

from __future__ import annotations

import base64
import json
import statistics
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks._harness import Result, compare, duration, percentile

from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Head, Meter
from asgi_llm_guard.wire.registry import DIALECTS

EVENT_BYTES: Final = 200
EVENT_LIMIT_S: Final = 3e-6
BODY_BYTES: Final = 2_000_000
BODY_LIMIT_S: Final = 3e-3
MEMORY_LIMIT_BYTES: Final = 1 << 20
FEED_BYTES: Final = 64 * 1024

SSE: Final = b"text/event-stream"
NDJSON: Final = b"application/x-ndjson"
ARRAY: Final = b"application/json; charset=UTF-8"
FRAMES: Final = b"application/vnd.amazon.eventstream"

GEMINI: Final = "/v1beta/models/gemini-nova:streamGenerateContent"
INVOKE: Final = "/model/eu.anthropic.claude-brook-v1%3A0/invoke-with-response-stream"
CONVERSE: Final = "/model/eu.anthropic.claude-brook-v1%3A0/converse-stream"


def dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def data(value: object) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


def named(name: str, value: dict[str, object]) -> bytes:
    return f"event: {name}\n".encode() + data({"type": name, **value})


def frame(kind: str, payload: object) -> bytes:
    headers = b""
    for name, value in ((":event-type", kind), (":content-type", "application/json"), (":message-type", "event")):
        headers += bytes([len(name)]) + name.encode() + struct.pack(">BH", 7, len(value)) + value.encode()
    body = dumped(payload)
    prelude = struct.pack(">II", 16 + len(headers) + len(body), len(headers))
    whole = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + body
    return whole + struct.pack(">I", zlib.crc32(whole))


def anthropic_delta(text: str) -> dict[str, object]:
    return {"index": 0, "delta": {"type": "text_delta", "text": text}}


def chat_chunk(text: str) -> object:
    return {
        "id": "chatcmpl-Q",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "gpt-nova",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }


def completion_chunk(text: str) -> object:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": None}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "m", "choices": [choice]}


def candidate(text: str) -> object:
    usage = {"promptTokenCount": 9, "totalTokenCount": 9}
    return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}}], "usageMetadata": usage}


def invoked(text: str) -> object:
    inner = dumped({"type": "content_block_delta", **anthropic_delta(text)})
    return {"bytes": base64.b64encode(inner).decode()}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The events of one dialect's answer."""

    content_type: bytes
    event: Callable[[str], bytes]
    """An event with this text."""
    path: str = ""
    opening: bytes = b""

    def chunk(self) -> bytes:
        """An event of `EVENT_BYTES`, or the next longer that there is."""
        size = next((size for size in range(1, EVENT_BYTES) if len(self.event("x" * size)) >= EVENT_BYTES), 1)
        return self.event("x" * size)

    def meter(self, dialect: str, *, strip: bool = False) -> Meter:
        """A meter that has seen the beginning of the stream."""
        meter = dialect_named(dialect).meter(
            Head(200, [(b"content-type", self.content_type)], self.path), strip_usage=strip
        )
        meter.feed(self.opening + self.event("a"))
        return meter


STREAMS: Final[Mapping[str, Stream]] = {
    "openai": Stream(content_type=SSE, event=lambda text: data(chat_chunk(text))),
    "openai_responses": Stream(
        content_type=SSE,
        event=lambda text: named("response.output_text.delta", {"item_id": "m1", "output_index": 0, "delta": text}),
    ),
    "openai_completions": Stream(content_type=SSE, event=lambda text: data(completion_chunk(text))),
    "openai_audio": Stream(content_type=SSE, event=lambda text: named("transcript.text.delta", {"delta": text})),
    "mistral": Stream(content_type=SSE, event=lambda text: data(chat_chunk(text))),
    "anthropic": Stream(
        content_type=SSE, event=lambda text: named("content_block_delta", anthropic_delta(text)), path="/v1/messages"
    ),
    "bedrock": Stream(
        content_type=FRAMES,
        event=lambda text: frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": text}, "p": "ab"}),
        path=CONVERSE,
    ),
    "bedrock_invoke": Stream(content_type=FRAMES, event=lambda text: frame("chunk", invoked(text)), path=INVOKE),
    "gemini": Stream(
        content_type=SSE, event=lambda text: b"data: " + dumped(candidate(text)) + b"\r\n\r\n", path=GEMINI
    ),
    "gemini, array": Stream(
        content_type=ARRAY, event=lambda text: b",\n" + dumped(candidate(text)), path=GEMINI, opening=b"[{}"
    ),
    "gemini_interactions": Stream(
        content_type=SSE,
        event=lambda text: (
            b"event: step.delta\n"
            + data({"event_type": "step.delta", "index": 0, "delta": {"type": "text", "text": text}, "event_id": "e4"})
        ),
        path="/v1beta/interactions",
    ),
    "cohere": Stream(
        content_type=SSE,
        event=lambda text: (
            b"event: content-delta\n"
            + data({"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}})
        ),
        path="/v2/chat",
    ),
    "ollama": Stream(
        content_type=NDJSON,
        event=lambda text: (
            dumped({"model": "m", "created_at": "t", "message": {"role": "assistant", "content": text}, "done": False})
            + b"\n"
        ),
        path="/api/chat",
    ),
}


PROSE: Final = 'Der Zug fährt um 7:40 Uhr von Gleis 3. "Einsteigen!"\n'


def chat_usage() -> dict[str, object]:
    return {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


def token_usage() -> dict[str, object]:
    return {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}


def bodies() -> Mapping[str, tuple[str, bytes]]:
    """Bodies of some `BODY_BYTES` with their usage at the end, and where they come from."""
    prose = PROSE * (BODY_BYTES // len(PROSE.encode()))
    picture = base64.b64encode(bytes(BODY_BYTES * 3 // 4)).decode()
    vectors = [{"object": "embedding", "index": at, "embedding": [0.0123456789] * 1536} for at in range(104)]
    message = {"role": "assistant", "content": prose}
    part = [{"type": "text", "text": prose}]
    output = [{"type": "message", "content": [{"type": "output_text", "text": prose, "annotations": []}]}]
    gemini = {"promptTokenCount": 9, "candidatesTokenCount": 7, "totalTokenCount": 16}
    answers: dict[str, tuple[str, object]] = {
        "openai": ("", {"choices": [{"index": 0, "message": message}], "usage": chat_usage()}),
        "openai_responses": ("", {"object": "response", "output": output, "usage": token_usage()}),
        "openai_completions": ("", {"choices": [{"index": 0, "text": prose}], "usage": chat_usage()}),
        "openai_embeddings": (
            "",
            {"object": "list", "data": vectors, "usage": {"prompt_tokens": 9, "total_tokens": 9}},
        ),
        "openai_images": ("", {"created": 1, "data": [{"b64_json": picture}], "usage": token_usage()}),
        "openai_audio": ("", {"text": prose, "usage": {"type": "tokens", **token_usage()}}),
        "mistral": (
            "",
            {"choices": [{"index": 0, "message": message}], "usage": chat_usage() | {"num_cached_tokens": 1}},
        ),
        "anthropic": (
            "/v1/messages",
            {"type": "message", "role": "assistant", "model": "m", "content": part, "usage": token_usage()},
        ),
        "bedrock": (
            CONVERSE,
            {
                "output": {"message": {"role": "assistant", "content": [{"text": prose}]}},
                "usage": {"inputTokens": 9, "outputTokens": 7, "totalTokens": 16},
            },
        ),
        "bedrock_invoke": (
            INVOKE,
            {"type": "message", "role": "assistant", "model": "m", "content": part, "usage": token_usage()},
        ),
        "gemini": (
            "/v1beta/models/gemini-nova:generateContent",
            {"candidates": [{"content": {"parts": [{"text": prose}]}}], "usageMetadata": gemini},
        ),
        "cohere": (
            "/v2/chat",
            {
                "id": "1",
                "finish_reason": "COMPLETE",
                "message": {"role": "assistant", "content": part},
                "usage": {"tokens": {"input_tokens": 9, "output_tokens": 7}},
            },
        ),
        "ollama": (
            "/api/chat",
            {"model": "m", "message": message, "done": True, "prompt_eval_count": 9, "eval_count": 7},
        ),
    }
    return {name: (path, dumped(body)) for name, (path, body) in answers.items()}


def fed(dialect: str, path: str, body: bytes) -> object:
    """A whole body, as it comes from a socket, and what it says."""
    meter = dialect_named(dialect).meter(Head(200, [(b"content-type", b"application/json")], path))
    for at in range(0, len(body), FEED_BYTES):
        meter.feed(body[at : at + FEED_BYTES])
    meter.finish()
    return meter.answer()


def by_hand(chunk: bytes) -> Callable[[], object]:
    """Decode what is JSON in an event."""
    start, end = chunk.index(b"{"), chunk.rindex(b"}") + 1
    return lambda: json.loads(chunk[start:end])


def peak_bytes(dialect: str, stream: Stream, megabytes: int) -> int:
    """The most that a meter takes while so much passes."""
    meter, chunk = stream.meter(dialect), stream.chunk() * 320
    tracemalloc.start()
    try:
        for _ in range(megabytes * 1_000_000 // len(chunk)):
            meter.feed(chunk)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def row(cells: list[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def quiet_and_ratio(result: Result) -> list[object]:
    return [duration(result.quiet_s), duration(result.median_s), f"{statistics.median(result.ratios):.2f}"]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    megabytes = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    missed: list[str] = []

    print(f"### An event of {EVENT_BYTES} bytes (target: {duration(EVENT_LIMIT_S)})\n")
    row(["", "bytes", "`json.loads`", "metered, quiet", "median", "ratio", "stripped, quiet", "ragged, quiet"])
    row(["---"] * 8)
    for name, stream in STREAMS.items():
        dialect, chunk = name.partition(",")[0], stream.chunk()
        meter, stripping, ragged = stream.meter(dialect), stream.meter(dialect, strip=True), stream.meter(dialect)
        ragged.feed(chunk[:70])
        turned = chunk[70:] + chunk[:70]
        loads, metered, stripped, torn = compare(
            {
                "loads": by_hand(chunk) if dialect != "bedrock_invoke" else by_hand(stream.event("x" * 40)),
                "metered": lambda meter=meter, chunk=chunk: meter.feed(chunk),  # type: ignore[misc]
                "stripped": lambda meter=stripping, chunk=chunk: meter.feed(chunk),  # type: ignore[misc]
                "ragged": lambda meter=ragged, chunk=turned: meter.feed(chunk),  # type: ignore[misc]
            },
            operations=2_000,
            rounds=rounds,
        )
        row(
            [name, len(chunk), duration(loads.quiet_s), *quiet_and_ratio(metered)]
            + [duration(each.quiet_s) for each in (stripped, torn)]
        )
        if metered.quiet_s > EVENT_LIMIT_S:
            missed.append(f"{name}: {duration(metered.quiet_s)} an event")

    print(f"\n### A body of {BODY_BYTES / 1e6:.0f} MB (target: {duration(BODY_LIMIT_S)})\n")
    row(["", "bytes", "`json.loads`", "metered, quiet", "median", "ratio"])
    row(["---"] * 6)
    for name, (path, body) in bodies().items():
        loads, metered = compare(
            {
                "loads": lambda body=body: json.loads(body),  # type: ignore[misc]
                "metered": lambda name=name, path=path, body=body: fed(name, path, body),  # type: ignore[misc]
            },
            operations=1,
            rounds=rounds,
        )
        row([name, f"{len(body):,}", duration(percentile(loads.samples_s, 10)), *quiet_and_ratio(metered)])
        if metered.quiet_s > BODY_LIMIT_S:
            missed.append(f"{name}: {duration(metered.quiet_s)} a body")

    print(f"\n### Memory over {megabytes} MB of a stream (target: {MEMORY_LIMIT_BYTES:,} bytes)\n")
    row(["", "most bytes taken"])
    row(["---"] * 2)
    for name, stream in STREAMS.items():
        peak = peak_bytes(name.partition(",")[0], stream, megabytes)
        row([name, f"{peak:,}"])
        if peak > MEMORY_LIMIT_BYTES:
            missed.append(f"{name}: {peak:,} bytes")

    silent = {dialect.name for dialect in DIALECTS} - {name.partition(",")[0] for name in STREAMS} - set(bodies())
    print(f"\nNot measured, since their answers are short: {', '.join(sorted(silent))}.")
    print(f"Targets missed: {'; '.join(missed) or 'none'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
