"""A boto3 client of Bedrock that asks first: `guard_botocore(guard, boto3.client("bedrock-runtime"))`.

Only that client is changed: what it sends, each retry of botocore's too, passes the guard. A refusal is an answer
in Bedrock's words, for which botocore raises its own `ClientError`.

Source: botocore 1.44 (2026-11): `endpoint.Endpoint`, `httpsession.URLLib3Session`, `retryhandler`, `retries.standard`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from botocore.awsrequest import AWSResponse

from asgi_llm_guard import background
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.exchange import Exchange, Hook, Outgoing
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.outcomes import REFUSED

__all__ = ["guard_botocore"]

_SERVICE: Final = "bedrock-runtime"
_KIND: Final = "x-amzn-errortype"
_THROTTLED: Final = "ThrottlingException"
_EXHAUSTED: Final = "ServiceQuotaExceededException"
_NOT_REPEATED: Final = 400

C = TypeVar("C")


def guard_botocore(
    guard: Guard,
    client: C,
    *,
    context: Context | Callable[[], Context] | None = None,
    hosts: Collection[str] | None = None,
    assumed_output_tokens: int | None = None,
) -> C:
    """Guard what a client of `bedrock-runtime` sends, and give the client back.

    Bodies are signed before they pass, and are sent as they are: nothing is clamped. Of refusals botocore
    repeats only those that are worth it, at its own pace. Streams are settled at their end, or where they are
    closed or left.

    Args:
        guard: decides, and settles.
        client: made by boto3 or botocore; other clients stay as they are.
        context: see `Hook`.
        hosts: see `Hook`.
        assumed_output_tokens: see `Hook`.

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
    hook = Hook(guard, context=context, hosts=hosts, include_usage=False, assumed_output_tokens=assumed_output_tokens)
    endpoint.http_session = _Session(session, hook)
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
        try:
            return _answered(self._session.send(request), exchange, stream=request.stream_output)
        except BaseException as error:
            exchange.fail(error)
            raise

    def close(self) -> None:
        self._session.close()

    def _refusal(self, denied: Denied, outgoing: Outgoing) -> Any:
        rendered = self._hook.rendered(denied, outgoing)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in rendered.headers}
        if not denied.retry and headers.get(_KIND) == _THROTTLED:
            headers[_KIND] = _EXHAUSTED  # botocore repeats the other, whatever the status
        response = AWSResponse(outgoing.url, rendered.status, headers, _Said(rendered.body))
        setattr(response, REFUSED, denied)
        return response


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
        self._data = data

    def stream(self) -> Iterator[bytes]:
        yield self._data

    def close(self) -> None:
        """Nothing is open."""


class _Body:
    """The body of an answer, metered as it is read, in whichever way. All else is as with the body inside."""

    def __init__(self, raw: Any, exchange: Exchange) -> None:
        self._raw = raw
        self._exchange = exchange
        self._abandoned = weakref.finalize(self, background.later, exchange.close)
        self._abandoned.atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, *args: Any, **options: Any) -> Iterator[bytes]:
        """The chunks as they come."""
        chunks = self._raw.stream(*args, **options)
        while True:
            try:
                chunk = next(chunks, None)
            except BaseException as error:
                self._exchange.fail(error)
                raise
            forward = self._ended() if chunk is None else self._exchange.feed(chunk)
            if forward:
                yield forward
            if chunk is None:
                return

    def read(self, amt: int | None = None, *args: Any, **options: Any) -> bytes:
        """So many bytes, or all that are left."""
        data = self._read(lambda: self._raw.read(amt, *args, **options))
        forward = self._exchange.feed(data) if data else b""
        return forward + self._ended() if amt is None or (amt and not data) else forward

    def readinto(self, buffer: Any) -> int:
        """As many bytes as have room."""
        count: int = self._read(lambda: self._raw.readinto(buffer))
        self._exchange.feed(bytes(memoryview(buffer)[:count]))
        if not count:
            self._ended()
        return count

    def readlines(self) -> list[bytes]:
        """All lines that are left."""
        return self.read().splitlines(keepends=True)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readlines())

    def close(self) -> None:
        """Nobody reads it any more."""
        self._abandoned.detach()
        self._exchange.close()
        self._raw.close()

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BaseException as error:
            self._exchange.fail(error)
            raise

    def _ended(self) -> bytes:
        self._abandoned.detach()
        return self._exchange.finish()
