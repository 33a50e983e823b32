"""The gateway as an ASGI application, to be mounted anywhere: `Mount("/llm", gateway.app())`.

    POST  /v1/chat/completions        OpenAI's chat format
    POST  /v1/responses               OpenAI's Responses
    POST  /v1/embeddings
    POST  /v1/messages                Anthropic's Messages
    POST  /v1/messages/count_tokens   where the guard counts tokens (`Guard(counter=...)`)
    GET   /v1/models, /v1/models/…    what can be asked for
    GET   /healthz, /readyz           free, and open to everybody

Rule 1: every call is admitted once. A request that no middleware of the same guard has admitted is admitted here.
Rule 2: an error before the first byte is a whole answer in the dialect of the path; after it, it is the last event.
Rule 3: bytes are sent on as they come.
Rule 4: a client that leaves a stream ends it, at the provider too. An answer that is not streamed is read to its end:
providers bill it all the same, and then it is charged exactly.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asgi_llm_guard.admission import Admission
from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded
from asgi_llm_guard.gateway.errors import GatewayError, UnknownModel
from asgi_llm_guard.gateway.faults import Fault, MethodNotAllowed, NoSuchPath, Unexpected, rendered
from asgi_llm_guard.gateway.listing import anthropic_list, anthropic_model, openai_list, openai_model
from asgi_llm_guard.identity.base import IdentityError, Resolver
from asgi_llm_guard.middleware import GuardMiddleware, incoming
from asgi_llm_guard.middleware.answers import ASGIApp, Receive, Scope, Send, request_id, unidentified
from asgi_llm_guard.middleware.incoming import ClientLeft
from asgi_llm_guard.middleware.request import STATE_KEY
from asgi_llm_guard.routes import Route, route_path
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.peek import BodyError, BodyView, check_encoding, read_body
from asgi_llm_guard.wire.refusals import Rendered

if TYPE_CHECKING:
    from asgi_llm_guard.gateway.gateway import Gateway, Reply

__all__ = ["GatewayApp"]

_log = logging.getLogger("asgi_llm_guard")

_DIALECTS: Final = {
    "/v1/chat/completions": "openai",
    "/v1/responses": "openai_responses",
    "/v1/embeddings": "openai_embeddings",
    "/v1/messages": "anthropic",
}
_COUNT: Final = "/v1/messages/count_tokens"
_MODELS: Final = "/v1/models"
_PROBES: Final = ("/healthz", "/readyz")
_PATHS: Final = (*_DIALECTS, _COUNT, _MODELS, *_PROBES)
_JSON: Final = (b"content-type", b"application/json")
_FRESH: Final = (b"cache-control", b"no-store")
_STREAM: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would wait for more
]


class GatewayApp:
    """What `Gateway.app` gives.

    Args:
        gateway: answers the requests, under its guard.
        expose: tell clients in `x-guard-…` headers who has answered, how many attempts that took, and how long; and
            name deployments in errors. Off: where a request goes is the service's own matter.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(self, gateway: Gateway, *, expose: bool = False) -> None:
        if not isinstance(expose, bool):
            raise ConfigurationError(f"gateway.app: expose must be True or False, got {expose!r}")
        self.gateway = gateway
        self.guard = gateway.guard
        self.expose = expose
        self.routes = tuple(Route(path, ["POST"], dialect=each, calls="hooked") for path, each in _DIALECTS.items())
        """What asks for a model, and is admitted here unless it was before."""
        self._guarded = _Admitting(self._serve, gateway, self.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._guarded(scope, receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "this gateway speaks HTTP"})
        elif kind == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = _DIALECTS.get(route_path(scope))
        if dialect is not None and scope["method"] == "POST":
            try:  # before a middleware of ours reads it as what it is not
                _check_type(scope)
            except BodyError as error:
                await _Answering(self, scope, send, dialect).fail(error)
                return
        if self._is_admitted(scope):
            await self._serve(scope, receive, send)
        else:
            await self._guarded(scope, receive, send)

    def _is_admitted(self, scope: Scope) -> bool:
        """Whether a middleware of the same guard has claimed for this request. One that let it pass has not."""
        admission = scope.get(STATE_KEY)
        if not isinstance(admission, Admission) or admission.engine is not self.guard.engine:
            return False
        return admission.root is not None or bool(admission.receipts)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path, method = route_path(scope), scope["method"]
        dialect = _DIALECTS.get(path)
        answering = _Answering(self, scope, send, dialect or _dialect_of(scope, path))
        try:
            if dialect is not None or path == _COUNT:
                _allow(method, "POST")
                check_encoding(scope["headers"])
                body = await incoming.read_body(receive, scope, self.guard.max_body_bytes)
                if dialect is None:
                    self._turn_strangers_away(scope)
                    await answering.whole(self._counted(body))
                else:
                    await self._ask(answering, dialect, body, receive)
            elif path in _PROBES or path == _MODELS or path.startswith(f"{_MODELS}/"):
                _allow(method, "GET", "HEAD")
                await answering.whole(self._get(answering, path))
            else:
                raise NoSuchPath(_PATHS)  # noqa: TRY301 - told like any other
        except ClientLeft:
            return
        except (LimitExceeded, GatewayError, BodyError) as error:
            if answering.started:  # what comes after the first byte is the reply's to tell
                raise
            await answering.fail(error)
        except OSError:  # as servers tell that the client has left
            raise
        except Exception as error:
            if answering.started:
                raise
            _log.exception("the gateway has failed", exc_info=error)
            await answering.fail(Unexpected())

    async def _live(self, receive: Receive, send: Send) -> None:
        """Served by itself, and not mounted: its connections are closed when the server stops."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.gateway.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return
            await send({"type": "lifespan.startup.complete"})

    # ------------------------------------------------------------------------------- answers

    async def _ask(self, answering: _Answering, dialect: str, body: bytes, receive: Receive) -> None:
        async def work() -> None:
            await answering.reply(await self.gateway.ask(dialect, body, headers=answering.scope["headers"]))

        if read_body(body).flag("stream"):
            await _while_connected(work, receive, lambda: answering.ended)
        else:
            await work()

    def _counted(self, body: bytes) -> Rendered:
        """The tokens of a request to Anthropic's Messages, counted here.

        Raises:
            NoSuchPath: they are only bounded here, which is too many.
        """
        describer = self.guard.engine.describer
        if not describer.counts:
            raise NoSuchPath(tuple(path for path in _PATHS if path != _COUNT))
        view = read_body(body)
        ask = dialect_named("anthropic").read_request(view)
        call = describer.describe_body(ask, view, provider=None, dialect="anthropic", assumed_output_tokens=None)
        return _json(200, {"input_tokens": call.input_tokens})

    def _get(self, answering: _Answering, path: str) -> Rendered:
        if path == "/healthz":
            return _json(200, {"status": "ok"})
        if path == "/readyz":
            deployments = len(self.gateway)
            ready = self.guard.ready and deployments > 0
            return _json(200 if ready else 503, {**self.guard.health(), "ready": ready, "deployments": deployments})
        self._turn_strangers_away(answering.scope)
        names, anthropic = self.gateway.names, answering.dialect == "anthropic"
        if path == _MODELS:
            return _json(200, anthropic_list(names) if anthropic else openai_list(names))
        name = path.removeprefix(f"{_MODELS}/")
        if name not in names:
            raise UnknownModel("there is no model of this name; the list of models has them all")
        return _json(200, anthropic_model(name) if anthropic else openai_model(name))

    def _turn_strangers_away(self, scope: Scope) -> None:
        """Raises `LimitExceeded` for a caller whom the guard's identity turns away. Nothing is claimed."""
        if self.guard.identity is None:
            return
        try:
            self.guard.identity(scope)
        except IdentityError as error:
            raise LimitExceeded(self.guard.engine.refused(Context(), None, unidentified(error))) from error


class _Admitting(GuardMiddleware):
    """Admits what asks for a model that is served here; what nobody serves is no matter of limits, and costs nothing."""

    def __init__(self, app: ASGIApp, gateway: Gateway, routes: Sequence[Route]) -> None:
        super().__init__(app, gateway.guard, routes=routes)
        self._gateway = gateway

    follows_routes = False

    def context(
        self, scope: Scope, view: BodyView | None, session: Any, route: Route | None, resolver: Resolver | None
    ) -> Context:
        """As any. The name of a model is looked at once it is known who asks.

        Raises:
            BodyError: 404: nobody serves the model.
            IdentityError: see `GuardMiddleware.context`.
        """
        context = super().context(scope, view, session, route, resolver)
        name = None if view is None else view.get("model")
        if isinstance(name, str) and len(self._gateway) and not self.guard.known_models(name):
            raise BodyError(
                "model_not_found",
                404,
                "model: nobody serves it here, or several do and the name does not say who; see the list of models",
                "model",
            )
        return context


class _Answering:
    """One response."""

    __slots__ = ("_app", "_send", "dialect", "ended", "scope", "started")

    def __init__(self, app: GatewayApp, scope: Scope, send: Send, dialect: str) -> None:
        self._app = app
        self._send = send
        self.scope = scope
        self.dialect = dialect
        self.started = False
        self.ended = False
        """The last of it is on its way."""

    async def whole(self, answer: Rendered) -> None:
        await self._start(answer.status, answer.headers)
        self.ended = True
        body = b"" if self.scope["method"] == "HEAD" else answer.body
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, fault: Fault) -> None:
        accept = b", ".join(value for name, value in self.scope["headers"] if name == b"accept") or None
        instance = request_id(self.scope)
        await self.whole(rendered(fault, self.dialect, accept=accept, instance=instance, expose=self._app.expose))

    async def reply(self, reply: Reply) -> None:
        """Send on what a provider answers, as it comes."""
        told = _told(reply) if self._app.expose else []
        try:
            if not reply.stream:
                body = b"".join([piece async for piece in reply])
                await self.whole(Rendered(reply.status, [_JSON, _length(body), _FRESH, *told], body))
                return
            async for piece in reply:
                if not self.started:
                    await self._start(reply.status, [*_STREAM, *told])
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await reply.aclose()
        self.ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})


# ------------------------------------------------------------------------------------- requests


def _check_type(scope: Scope) -> None:
    """Let bodies pass that are JSON: what browsers send across origins without asking is none.

    Raises:
        BodyError: 415.
    """
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
            if kind not in (b"", b"application/json") and not kind.endswith(b"+json"):
                raise BodyError("invalid_request", 415, "content-type: expected application/json")


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise MethodNotAllowed(", ".join(allowed))


def _dialect_of(scope: Scope, path: str) -> str:
    """In which an error is told on a path that several dialects have, or none."""
    if path.startswith("/v1/messages") or any(name == b"anthropic-version" for name, _ in scope["headers"]):
        return "anthropic"
    return "openai"


async def _while_connected(
    work: Callable[[], Coroutine[None, None, None]], receive: Receive, is_over: Callable[[], bool]
) -> None:
    """Work until the client leaves. Servers tell that it has left when it has everything, too: `is_over`."""
    working, leaving = asyncio.create_task(work()), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if is_over():
            await asyncio.wait((working,))
    finally:
        left = not working.done()
        working.cancel()
        leaving.cancel()
        # Gathered, so that what either of them raises when nobody is there any more is not told as forgotten.
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not left:
        working.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ------------------------------------------------------------------------------------- headers


def _json(status: int, value: object) -> Rendered:
    body = msgspec.json.encode(value)
    return Rendered(status, [_JSON, _length(body), _FRESH], body)


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % len(body)


def _told(reply: Reply) -> list[tuple[bytes, bytes]]:
    """How the answer was come by, as far as it is known when it begins."""
    timings = reply.timings
    told = {
        "deployment": reply.deployment,
        "model": reply.model,
        "attempts": 0 if reply.cached else len(reply.failures) + 1,
        "waited-ms": round(reply.waited_s * 1000) or None,
        "connected-ms": timings.connected_ms,
        "first-byte-ms": timings.first_ms,
        "total-ms": timings.total_ms,
        "lowered-from": reply.lowered_from,
        "cached": "true" if reply.cached else None,
    }
    return [
        (b"x-guard-" + name.encode("ascii"), str(value).encode("latin-1", "replace"))
        for name, value in told.items()
        if value is not None
    ]
