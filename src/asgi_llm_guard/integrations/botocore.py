"""A boto3 client of Bedrock that asks first: `guard_botocore(guard, boto3.client("bedrock-runtime"))`.

Only that client is changed: what it sends, each retry of botocore's too, passes the guard. A refusal is an answer
in Bedrock's words, for which botocore raises its own `ClientError`.

Source: botocore 1.44 (2026-11): `endpoint.Endpoint`, `httpsession.URLLib3Session`, `retryhandler`, `retries.standard`.
"""

from __future__ import annotations

import io
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar, Unpack
from urllib.parse import urlsplit

from botocore.awsrequest import AWSResponse
from botocore.exceptions import ResponseStreamingError

from asgi_llm_guard import background
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.exchange import Exchange, Outgoing
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.hook import Hook, HookOptions
from asgi_llm_guard.outcomes import REFUSED
from asgi_llm_guard.wire.base import Headers
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.refusals import render

__all__ = ["guard_botocore"]

_log = logging.getLogger("asgi_llm_guard")

_SERVICE: Final = "bedrock-runtime"
_KIND: Final = b"x-amzn-errortype"
_THROTTLED: Final = b"ThrottlingException"
_EXHAUSTED: Final = b"ServiceQuotaExceededException"
_NOT_REPEATED: Final = 400
_ENDED: Final = "the admission that this answer was asked for in has ended, and what came of it is charged"

C = TypeVar("C")


def guard_botocore(guard: Guard, client: C, **options: Unpack[HookOptions]) -> C:
    """Guard what a client of `bedrock-runtime` sends, and give the client back.

    Bodies that are signed are sent as they are: `clamp` works with API keys only. Of refusals botocore repeats
    those that are worth it, at its own pace. Streams are settled at their end, or where they are closed or left.

    Args:
        guard: decides, and settles.
        client: made by boto3 or botocore; other clients stay as they are.
        options: see `HookOptions`.

    Raises:
        ConfigurationError: an argument is wrong, or the client is of another service, or guarded already.
    """
    service = getattr(getattr(getattr(client, "meta", None), "service_model", None), "service_name", None)
    if service != _SERVICE:
        raise ConfigurationError(f"client: expected boto3.client({_SERVICE!r}), got {client!r}")
    # No public name leads to what sends, and events of botocore tell neither of the bytes of a stream nor of its end.
    endpoint: Any = getattr(client, "_endpoint", None)
    session = getattr(endpoint, "http_session", None)
    if isinstance(session, _Session):
        raise ConfigurationError("client: it is guarded already")
    if not callable(getattr(session, "send", None)):
        raise ConfigurationError(f"client: its transport is not known: expected an HTTP session, got {session!r}")
    endpoint.http_session = _Session(session, Hook(guard, caches=True, **options))
    client.meta.events.register_first(f"needs-retry.{_SERVICE}", _tell_of_refusal)  # type: ignore[attr-defined]
    return client


class _Session:
    """Sends requests as the session inside does, those that are billed after they were admitted."""

    def __init__(self, session: Any, hook: Hook) -> None:
        self._session = session
        self._hook = hook

    def send(self, request: Any) -> Any:
        """The answer, or the refusal.

        Raises what the session inside raises.
        """
        url = urlsplit(request.url)
        headers = [(_bytes(name), _bytes(value)) for name, value in request.headers.items()]
        outgoing = Outgoing(request.method, request.url, url.hostname or "", url.path, headers)
        exchange = self._hook.begin(outgoing)
        if exchange is None:
            return self._session.send(request)
        if isinstance(exchange, Denied):
            return self._refusal(exchange, outgoing)
        body = _body(request, exchange.max_body_bytes)
        denied = exchange.too_large() if body is None else exchange.admit_sync(body)
        if denied is not None:
            return self._refusal(denied, outgoing)
        if exchange.kept is not None:
            kept = exchange.kept
            headers = [(_bytes(name), _bytes(value)) for name, value in kept.headers]
            return _said(request.url, kept.status, headers, kept.body)
        if exchange.rewritten:
            request.body = exchange.body
            request.headers["Content-Length"] = str(len(exchange.body))
        try:
            return _answered(self._session.send(request), exchange, stream=request.stream_output)
        except BaseException as error:
            exchange.fail(error)
            raise

    def close(self) -> None:
        self._session.close()

    def _refusal(self, denied: Denied, outgoing: Outgoing) -> Any:
        fields = rate_limit_headers(denied.receipts, denied.now_ms, disclose=self._hook.guard.engine.disclose)
        rendered = render(denied, dialect="bedrock", fields=fields)
        headers = [
            # Botocore repeats what is called throttled, whatever else is said.
            (name, _EXHAUSTED if (name, value, denied.retry) == (_KIND, _THROTTLED, False) else value)
            for name, value in rendered.headers
        ]
        response = _said(outgoing.url, rendered.status, headers, rendered.body)
        setattr(response, REFUSED, denied)
        return response


def _said(url: str, status: int, headers: Headers, body: bytes) -> Any:
    """An answer that is there already."""
    texts = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return AWSResponse(url, status, texts, _Said(body))


def _tell_of_refusal(response: Any = None, **_: Any) -> None:
    """Put the refusal into what the client's error will carry, and keep botocore from repeating what is in vain.

    Runs before botocore decides whether to repeat. What it parsed stays as it is.
    """
    if response is None:
        return
    answered, parsed = response
    denied = getattr(answered, REFUSED, None)
    if isinstance(denied, Denied):
        parsed[REFUSED] = denied
        if not denied.retry:
            answered.status_code = _NOT_REPEATED  # it repeats any 429 and 503 by the status alone


def _body(request: Any, most: int) -> bytes | None:
    """The body of a request; `None`: it is longer than `most` bytes."""
    body = request.body
    if body is None:
        return b""
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, (bytes, bytearray)):
        return bytes(body)
    data: bytes = body.read(most + 1)
    request.reset_stream()
    return data if len(data) <= most else None


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def _answered(response: Any, exchange: Exchange, *, stream: bool) -> Any:
    """`response`, metered; if it is a stream, as it is read."""
    headers = [(_bytes(name), _bytes(value)) for name, value in response.headers.items()]
    exchange.answered(response.status_code, headers)
    if stream:
        return AWSResponse(response.url, response.status_code, response.headers, _Body(response.raw, exchange))
    exchange.feed(response.content)
    exchange.finish()
    return response


class _Said:
    """A body that is there already, as urllib3 gives bodies."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self._data.read()


class _Body:
    """The body of an answer, metered as it is read, in whichever way. All else is as with the body inside.

    Nobody can stop waiting for it: a deadline that has passed, or a stop, shows when the next part has come.
    """

    def __init__(self, raw: Any, exchange: Exchange) -> None:
        self._raw = raw
        self._exchange = exchange
        self._parts: Iterator[bytes] | None = None
        self._over = False
        self._left = False
        self._abandoned = weakref.finalize(self, background.later, partial(_give_up, raw, exchange))
        self._abandoned.atexit = False
        if exchange.call is not None:
            exchange.call.leave = partial(_leave, weakref.ref(self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, *args: Any, **options: Any) -> Iterator[bytes]:
        """The parts as they come."""
        parts = self._parts = self._raw.stream(*args, **options)
        while not self._over:
            forward = self._pull(lambda: next(parts, b""))
            if forward:
                yield forward

    def read(self, amt: int | None = None, *args: Any, **options: Any) -> bytes:
        """So many bytes, or all that are left."""
        if self._over or amt == 0:
            return b""
        forward = self._pull(lambda: self._raw.read(amt, *args, **options))
        return forward if self._over or amt is not None else forward + self._ended()

    def readinto(self, buffer: Any) -> int:
        """As many bytes as have room."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readlines(self) -> list[bytes]:
        """All lines that are left."""
        return self.read().splitlines(keepends=True)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readlines())

    def close(self) -> None:
        """Nobody reads it any more."""
        if not self._over:
            self._leave()
        elif not self._exchange.drains:
            self._raw.close()

    def leave(self) -> None:
        """Its admission has ended, and nobody goes on with it: who does gets an error, and the answer is closed."""
        self._left = True

    def _pull(self, read: Callable[[], bytes]) -> bytes:
        """What to give of the next part; an empty one is the end."""
        exchange = self._exchange
        if self._left and not self._over:
            self.close()
            raise ResponseStreamingError(error=_ENDED)
        if exchange.halted is not None and exchange.halt():
            return self._halted(exchange.halted.message)
        try:
            part = read()
            if not part:
                return self._ended()
            late = exchange.wait_s() == 0
            forward = exchange.feed(part)
            if late:
                forward = exchange.expire()
            elif exchange.wants_growth:
                forward += exchange.grow_sync()
        except BaseException as error:
            self._over = True
            exchange.fail(error)
            raise
        if late or exchange.cut:
            self._leave()
        return forward

    def _halted(self, message: str) -> bytes:
        last = self._exchange.halted_end()
        self._leave()
        if not last:
            raise ResponseStreamingError(error=message)
        return last

    def _ended(self) -> bytes:
        self._over = True
        self._abandoned.detach()
        return self._exchange.finish()

    def _leave(self) -> None:
        """The client gets nothing more: close the answer, or read it to its end in the background."""
        self._over = True
        self._abandoned.detach()
        if self._exchange.drains:
            threading.Thread(target=self._drain, name="llm-guard-drain", daemon=True).start()
            return
        self._exchange.close()
        self._raw.close()

    def _drain(self) -> None:
        exchange = self._exchange
        try:
            for part in self._raw.stream() if self._parts is None else self._parts:
                late = exchange.wait_s() == 0
                exchange.feed(part)
                if late:
                    break
            else:
                exchange.finish()
        except Exception:  # noqa: BLE001 - nobody waits for it: what was counted until then is charged
            _log.debug("an answer that was read to its end for its usage broke off", exc_info=True)
        finally:
            exchange.close()
            self._raw.close()


def _leave(body: weakref.ref[_Body]) -> None:
    alive = body()
    if alive is not None:
        alive.leave()


def _give_up(raw: Any, exchange: Exchange) -> None:
    """A body was dropped without being closed."""
    exchange.close()
    try:
        raw.close()
    except Exception:  # noqa: BLE001 - nobody waits for it
        _log.debug("an answer that nobody reads could not be closed", exc_info=True)
