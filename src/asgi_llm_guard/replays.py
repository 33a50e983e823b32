"""Answers that are given again for the same `Idempotency-Key`: one request is made, and its repetitions get its answer.

    begin           a `KeptResponse`: give it; a `Refusal`; a `Lead`: answer the request, under its eyes
    lead.watching   sees the messages of the answer
    lead.close      keep the answer, if it is complete and a success; else the next one with this key is answered anew

Rule 1: a key belongs to one verified caller, on one route. Without a verified caller it means nothing.
Rule 2: it stands for one request: with another body it is refused (422), whether the first is answered or not.
Rule 3: of all requests with one key, over all workers, one is made at a time. The others wait for it, for a while.
Rule 4: only whole, successful answers are kept. Refusals of the guard never are, nor errors, nor streams that broke off.
Rule 5: where the storage does not answer, a request with a key is refused: that it was made once cannot be promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.idempotency import MAX_ANSWER_BYTES, KeptResponse, entry_key, fingerprint, kept_headers, read_key
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.entries import Bounds, Flights, InFlight, KeepsEntries, Kept
from asgi_llm_guard.wire import is_readable
from asgi_llm_guard.wire.base import Dialect, Head, Headers

__all__ = ["CLAIM_MS", "Lead", "Replays"]

_log = logging.getLogger("asgi_llm_guard")

CLAIM_MS: Final = 15_000
"""A worker that died stands in the way for so long. One that lives prolongs its claim three times in it."""

_WAIT_S: Final = 30.0
_MOST_WAITING: Final = 1_000
_SPACE: Final = "idempotency"
_HEAD_BYTES: Final = 16_384
_GAPS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KeptResponse).decode


class Replays:
    """The answers of one guard's routes."""

    def __init__(
        self, storage: Storage, new_id: Callable[[], str], *, wait_s: float = _WAIT_S, claim_ms: int = CLAIM_MS
    ) -> None:
        """`wait_s`: so long a repetition waits for the answer to the first. `claim_ms`: so long a worker that died
        stands in the way.

        Raises:
            ConfigurationError: the storage cannot keep answers.
        """
        if not isinstance(storage, KeepsEntries):
            raise ConfigurationError(
                f"idempotency: a {type(storage).__name__} cannot keep answers; count in memory, SQLite, Redis or Valkey"
            )
        bounds = Bounds(max_value_bytes=MAX_ANSWER_BYTES + _HEAD_BYTES)
        self.flights = Flights(storage.entries(_SPACE, bounds))
        self._new_id = new_id
        self._wait_s = wait_s
        self._claim_ms = claim_ms

    async def begin(
        self,
        scope: Mapping[str, Any],
        context: Context,
        read_body: Callable[[], Awaitable[bytes]],
        ttl_ms: int,
        dialect: Dialect | None,
    ) -> Lead | KeptResponse | Refusal | None:
        """What becomes of a request; `None`: it has no key that means anything. `dialect`: that of its answer.

        Raises:
            whatever `read_body` raises.
        """
        method: str = scope["method"].upper()
        if method in _GAPS or context.caller is None:
            return None
        key = read_key(scope["headers"])
        if key is None or isinstance(key, Refusal):
            return key
        entry = entry_key(context, method, key)
        note = fingerprint(scope["path"], scope.get("query_string", b""), await read_body())
        try:
            found = await self._join(entry, note)
        except StorageError:
            _log.warning("idempotency: the storage does not answer; a request with a key was refused", exc_info=True)
            return _refusal("guard_unavailable", "the storage does not answer; send the request again")
        if isinstance(found, str):
            return Lead(self.flights, Claim(entry, found, note, self._claim_ms), ttl_ms, dialect, scope["path"])
        return found

    async def _join(self, entry: str, note: str) -> str | KeptResponse | Refusal:
        """The answer; or the token of the claim to it."""
        token = self._new_id()
        wait_s = self._wait_s if self.flights.waiting < _MOST_WAITING else 0.0
        try:
            found = await self.flights.join(entry, token, claim_ms=self._claim_ms, wait_s=wait_s, note=note)
        except asyncio.CancelledError:  # the storage may have given the lead all the same
            with contextlib.suppress(StorageError):
                await self.flights.abandon(entry, token)
            raise
        if isinstance(found, (Kept, InFlight)) and found.note != note:
            return _refusal("invalid_request", "this key was sent with another request before; use a new one", 422)
        if isinstance(found, InFlight):
            return _refusal("concurrency_limit_exceeded", "the first request with this key is still being answered")
        if isinstance(found, Kept):
            try:
                return _decode(found.value)
            except msgspec.DecodeError:  # of another version: as if it had never been
                await self.flights.entries.forget(entry)
                return await self._join(entry, note)
        return token


class Claim(msgspec.Struct, frozen=True):
    """The right to make the answer of an entry."""

    entry: str
    token: str
    note: str
    """What the entry stands for."""
    lasts_ms: int


class Lead:
    """The request that is made for a key. Must be closed."""

    __slots__ = (
        "_claim", "_dialect", "_flights", "_headers", "_path", "_pieces", "_renewing", "_room", "_status", "_ttl_ms", "_whole",
    )  # fmt: skip

    def __init__(self, flights: Flights, claim: Claim, ttl_ms: int, dialect: Dialect | None, path: str) -> None:
        self._flights = flights
        self._claim = claim
        self._ttl_ms = ttl_ms
        self._dialect = dialect
        self._path = path
        self._status = 0
        self._headers: Headers = ()
        self._pieces: list[bytes] = []
        self._room = MAX_ANSWER_BYTES
        self._whole = False
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    def watching(self, send: Send) -> Send:
        """`send`, under the eyes of this."""

        def watched(message: MutableMapping[str, Any]) -> Awaitable[None]:
            self._note_down(message)
            return send(message)

        return watched

    async def close(self, *, cut: bool = False) -> None:
        """The request is over. Its answer is kept if it is whole, successful and no error by its content; never one that
        was `cut`, however it looks."""
        self._renewing.cancel()
        body = b"".join(self._pieces)
        keep = self._whole and not cut and self._room >= 0 and 200 <= self._status < 300 and self._is_sound(body)
        try:
            if keep:
                value = _encode(KeptResponse(self._status, kept_headers(self._headers), body))
                await self._flights.store(self._claim.entry, self._claim.token, value, ttl_ms=self._ttl_ms)
            else:
                await self._flights.abandon(self._claim.entry, self._claim.token)
        except StorageError:
            _log.warning("idempotency: an answer could not be kept; a repetition will be made anew", exc_info=True)

    def _note_down(self, message: Mapping[str, Any]) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._status = message["status"]
            self._headers = tuple(message.get("headers", ()))
        elif kind == "http.response.body":
            piece: bytes = message.get("body", b"")
            self._room -= len(piece)
            if self._room < 0:
                self._pieces.clear()
            else:
                self._pieces.append(piece)
            self._whole = not message.get("more_body", False)

    def _is_sound(self, body: bytes) -> bool:
        """Whether an answer, as far as its dialect can tell, came to its own end. An HTTP response can be whole
        although the provider's stream in it broke off, or ended with an error."""
        head = Head(self._status, self._headers, self._path)
        if self._dialect is None or not is_readable(head.header(b"content-type")):
            return True
        if head.header(b"content-encoding").lower() not in (b"", b"identity"):
            return not head.header(b"content-type").lower().startswith(b"text/event-stream")
        meter = self._dialect.meter(head)
        meter.feed(body)
        meter.finish()
        answer = meter.answer()
        return answer.kind == "success" and answer.finished

    async def _renew(self) -> None:
        claim = self._claim
        while True:
            await asyncio.sleep(claim.lasts_ms / 3000)
            with contextlib.suppress(StorageError):  # the next time may do
                # Not `prolong`: after an outage the claim is taken again, so that no repetition is made beside this.
                await self._flights.entries.begin(claim.entry, claim.token, claim_ms=claim.lasts_ms, note=claim.note)


def _refusal(code: Any, message: str, status: int | None = None) -> Refusal:
    return Refusal(policy="idempotency", code=code, message=f"idempotency-key: {message}", status=status)
