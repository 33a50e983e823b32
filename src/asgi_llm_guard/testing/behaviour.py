"""What a fake provider does with one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from asgi_llm_guard.testing.gates import Gate

__all__ = ["GOOD", "Behaviour", "ConnectionCut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a `FakeProvider` does with one request. Start from one of the named ones; `replace` combines them."""

    text: str | None = None
    """The answer; a token is a word. `None`: an echo of the last message."""
    tool: tuple[str, Mapping[str, object]] | None = None
    """Call this function with these arguments instead of answering; a token is a word of their JSON."""
    output_tokens: int | None = None
    """An answer of exactly so many tokens, reasoning not included, even if the request allows fewer."""
    input_tokens: int | None = None
    """`None`: counted from the messages; see `FakeProvider`."""
    cache_read_tokens: int = 0
    reasoning_tokens: int = 0
    """Come on top of the words of the answer, once per request."""
    usage: bool = True
    """Whether the answer says what it used. A stream does so only if it is asked to, whatever is said here."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    code: str | None = None
    """Of the error, if `status` is one."""
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
        reasoning_tokens: int = 0,
    ) -> Self:
        """A good answer, with these counts."""
        return cls(
            text=text,
            output_tokens=output_tokens,
            input_tokens=input_tokens,
            cache_read_tokens=cache_read_tokens,
            reasoning_tokens=reasoning_tokens,
        )

    @classmethod
    def call_tool(cls, name: str, **arguments: object) -> Self:
        """Not an answer yet: the model wants this function called with these arguments."""
        return cls(tool=(name, arguments))

    @classmethod
    def error(cls, status: int, *, code: str | None = None, retry_after: float | str | None = None) -> Self:
        """An error, not billed. `retry_after`: the value of the header, in seconds or as a date."""
        headers = () if retry_after is None else (("retry-after", str(retry_after)),)
        return cls(status=status, code=code, headers=headers)

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


GOOD: Final = Behaviour()


class ConnectionCut(ConnectionError):  # noqa: N818 - the field's word for it
    """A `FakeProvider` drops the connection. Under a server clients see a network error; in-process, this."""
