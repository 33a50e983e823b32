"""What a fake provider does with one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from asgi_llm_guard.testing.gates import Gate
from asgi_llm_guard.usage import Usage

__all__ = ["GOOD", "Behaviour", "ConnectionCut", "Trouble"]

Trouble = Literal[
    "rate_limit",  # waiting helps
    "quota",  # the account has spent what it may
    "overloaded",  # the provider has too much to do
    "context",  # the input does not fit into the model
    "unknown_model",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a `FakeProvider` does with one request. Start from one of the named ones; `replace` combines them."""

    text: str | None = None
    """The answer; a token is a word. `None`: an echo of the last message."""
    tool: tuple[str, Mapping[str, object]] | None = None
    """Call this function with these arguments instead of answering; a token is a word of their JSON."""
    output_tokens: int | None = None
    """An answer of exactly so many tokens, reasoning not included, even if the request allows fewer."""
    word_bytes: int = 0
    """With `output_tokens`: each word has at least so many bytes. Long answers are made while they are sent."""
    input_tokens: int | None = None
    """All input, cache reads and writes included. `None`: counted from the messages, and at least what the cache
    has of it; see `FakeProvider`."""
    cache_read_tokens: int = 0
    """Included in the input, as are those that are written. What an API does not tell apart, as most do not tell of
    writes, is input like the rest of it; see `Speech.buckets`."""
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """Included in `cache_write_tokens`: those with the longer lifetime."""
    reasoning_tokens: int = 0
    """Come on top of the words of the answer, once per request."""
    audio_ms: int = 6_000
    """How long the audio is that a transcription is made of."""
    model: str | None = None
    """The model that answers, and is billed. `None`: the one that was asked for."""
    usage: bool = True
    """Whether the answer says what it used. Chat streams of OpenAI do so only if they are asked to, whatever is
    said here."""
    reports: Usage | Mapping[str, Any] | None = None
    """What the answer says instead of the truth: in the dialect's own words for a `Usage`, or, for a mapping, this
    object as it is. The bill has the truth."""
    encoding: Literal["gzip"] | None = None
    """How the body is encoded, if the client takes that; a stream is flushed with each of its chunks."""
    status: int = 200
    trouble: Trouble | None = None
    """An error as the dialect tells this kind, with its own status, code and words; goes before `status`."""
    headers: tuple[tuple[str, str], ...] = ()
    code: str | None = None
    """Of the error, if `status` is one; where the dialect has a place for it."""
    message: str | None = None
    """Of the error; `None`: some words."""
    content: bool = True
    """`False`: an answer without a body, or a stream without an event."""
    valid: bool = True
    """`False`: a JSON body that breaks off though the response is complete; a stream whose first event does,
    and that never says what it used."""
    cut_after: int | None = None
    """Drop the connection after so many chunks of the stream, or in the middle of a JSON body."""
    fail_after: int | None = None
    """Send an error event after so many chunks of the stream; a JSON request gets it as status 500."""
    waits: bool = False
    """Wait for the gate before answering anything."""
    paced: bool = False
    """Wait for the gate before every chunk of the stream, or before the JSON body."""
    gate: Gate | None = None
    """`None`: the gate that `FakeProvider.release` opens."""

    @classmethod
    def answer(
        cls,
        text: str | None = None,
        *,
        output_tokens: int | None = None,
        input_tokens: int | None = None,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
        reasoning_tokens: int = 0,
        model: str | None = None,
        encoding: Literal["gzip"] | None = None,
    ) -> Self:
        """A good answer, with these counts."""
        return cls(
            text=text,
            output_tokens=output_tokens,
            input_tokens=input_tokens,
            cache_read_tokens=cache_read_tokens,
            cache_write_tokens=cache_write_tokens,
            cache_write_1h_tokens=cache_write_1h_tokens,
            reasoning_tokens=reasoning_tokens,
            model=model,
            encoding=encoding,
        )

    @classmethod
    def call_tool(cls, name: str, **arguments: object) -> Self:
        """Not an answer yet: the model wants this function called with these arguments."""
        return cls(tool=(name, arguments))

    @classmethod
    def big(cls, size: int, *, word_bytes: int = 1_000) -> Self:
        """An answer of about so many bytes, in words of so many."""
        return cls(output_tokens=max(1, size // (word_bytes + 1)), word_bytes=word_bytes)

    @classmethod
    def lie(cls, reports: Usage | Mapping[str, Any]) -> Self:
        """A good answer that says it used something else."""
        return cls(reports=reports)

    @classmethod
    def error(
        cls, status: int, *, code: str | None = None, message: str | None = None, retry_after: float | str | None = None
    ) -> Self:
        """An error, not billed. `retry_after`: the value of the header, in seconds or as a date."""
        return cls(status=status, code=code, message=message, headers=_retry_after(retry_after))

    @classmethod
    def refuse(cls, trouble: Trouble, *, retry_after: float | str | None = None) -> Self:
        """An error of this kind, with the status and the words that the dialect has for it; not billed."""
        return cls(trouble=trouble, headers=_retry_after(retry_after))

    @classmethod
    def slow(cls, *, gate: Gate | None = None) -> Self:
        """One step of the gate for every chunk. Billed for what was produced when the client left."""
        return cls(paced=True, gate=gate)

    @classmethod
    def hang(cls, *, gate: Gate | None = None) -> Self:
        """No byte of an answer before one step of the gate.

        If the client leaves first, a stream is billed for its input, a JSON answer in full:
        providers do not stop generating it because nobody waits any more.
        """
        return cls(waits=True, gate=gate)

    @classmethod
    def cut(cls, *, after_chunks: int = 0) -> Self:
        """The connection drops after so many chunks; billed for them, unreported."""
        return cls(cut_after=after_chunks)

    @classmethod
    def stream_error(cls, *, after_chunks: int = 0) -> Self:
        """An error inside the stream after so many chunks, under status 200; billed for them, unreported."""
        return cls(fail_after=after_chunks)

    @classmethod
    def no_usage(cls) -> Self:
        """A good answer that does not say what it used; billed."""
        return cls(usage=False)

    @classmethod
    def empty(cls) -> Self:
        """Status 200 and nothing else; billed for the input."""
        return cls(content=False)

    @classmethod
    def malformed(cls) -> Self:
        """Status 200 and broken JSON; billed in full, unreported."""
        return cls(valid=False)

    def zipped(self) -> Self:
        """The same, encoded with gzip."""
        return replace(self, encoding="gzip")


def _retry_after(value: float | str | None) -> tuple[tuple[str, str], ...]:
    return () if value is None else (("retry-after", str(value)),)


GOOD: Final = Behaviour()


class ConnectionCut(ConnectionError):  # noqa: N818 - the field's word for it
    """A `FakeProvider` drops the connection. Under a server clients see a network error; in-process, this."""
