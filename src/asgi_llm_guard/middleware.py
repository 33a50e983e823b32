"""`GuardMiddleware`: opens an admission for every request and WebSocket, and settles it when the response has ended.

Pure ASGI. The response is never buffered: every message is sent on as it comes. A request body is
read only where a dialect or a body extractor is declared, and replayed byte for byte (unless the
route asks for `clamp` or `inject_usage`, which change it).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.admission import Admission, enter, leave
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.identity.base import IdentityError
from asgi_llm_guard.marks import unwrapped
from asgi_llm_guard.outcomes import refusal_of
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.routes import Route, RouteTable, normalise, route_path
from asgi_llm_guard.wire import dialect_for, dialect_named, is_readable
from asgi_llm_guard.wire.base import Answer, Ask, Dialect, Head, Meter
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.peek import BodyError, BodyView, body_too_large, check_encoding, read_body
from asgi_llm_guard.wire.refusals import Rendered, render, websocket_close

__all__ = ["GuardMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("asgi_llm_guard")

STATE_KEY: Final = "asgi_llm_guard"
"""Where the admission stands in the ASGI scope, for code that has lost the context variable."""

_PATHS_KEPT: Final = 200
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_CLOSES: Final = frozenset({"websocket.close", "websocket.http.response.start"})
_CAUSES: Final = 8


class _Plan(msgspec.Struct, frozen=True):
    """What a route means for its requests, worked out once."""

    route: Route
    extra: tuple[Policy, ...]
    session_declared: bool


class GuardMiddleware:
    """Guards the requests of an ASGI application.

    At start-up it refuses an application in which `@guarded` has no effect, and warns of a guard without an
    identity; at shutdown it drains the guard, which stays open.

    Args:
        app: the application.
        guard: the guard.
        routes: the guarded routes; `None`: every request except GET, HEAD and OPTIONS, and every
            WebSocket handshake.
        exempt: paths that are never guarded, exactly as they are requested.
        unlisted: with `routes`: what happens to other requests that are not GET, HEAD or OPTIONS.
        rate_limit_headers: send `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-11).

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        app: ASGIApp,
        guard: Guard,
        *,
        routes: Sequence[Route] | None = None,
        exempt: Sequence[str] = (),
        unlisted: Literal["deny", "pass"] = "pass",
        rate_limit_headers: bool = True,
    ) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"GuardMiddleware: guard must be a Guard, got {guard!r}")
        self.app = app
        self.guard = guard
        self._table = RouteTable(routes, exempt=exempt, unlisted=unlisted)
        self._fields = rate_limit_headers
        self._plans: dict[int, _Plan] = {}
        self._dialects: dict[str, Dialect | None] = {}
        self._checked = False
        # Around a FastAPI(root_path=...), which strips it from the paths that it routes, wherever it got them.
        self._root_path = str(getattr(app, "root_path", None) or "")
        for route in self._table.routes or ():
            self._plan(route)
            if route.dialect not in {None, "auto"}:
                dialect_named(str(route.dialect))
            elif (route.clamp or route.inject_usage) and dialect_for(normalise(route.path)) is None:
                raise ConfigurationError(
                    f"Route {route.path}: clamp and inject_usage change the body, and no dialect is known by this path; "
                    "name it: dialect='openai'"
                )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await self.app(scope, self._lifespan_receive(receive), self._lifespan_send(scope, send))
        else:
            await self.app(scope, receive, send)

    # --------------------------------------------------------------------------------- http

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._checked:
            self._check_late(scope)
        found = self._table.find(path := route_path(scope, self._root_path), scope["method"])
        if found == "deny":
            await _refuse(self._not_listed(scope), scope, send, dialect=None, fields=())
            return
        if found == "pass":
            await self._unguarded(scope, receive, send)
            return
        plan = self._plan(found)
        dialect = self._dialect(found, path)
        exchange = _Exchange(self, scope, receive, send, plan, dialect)
        try:
            denied = await exchange.admit()
        except _ClientLeft:
            return
        if denied is not None:
            await exchange.refuse(denied)
            return
        await exchange.handle()

    async def _unguarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that claims nothing; calls inside it claim their own."""
        admission = self._unclaimed(scope)
        scope[STATE_KEY] = admission
        token = enter(admission)
        self.guard.track(admission)
        page = _ErrorPage(admission, send)
        try:
            await self.app(scope, receive, page.send)
            await page.flush()
        except Exception as error:
            refusal = _refusal_behind(error)
            if refusal is None or page.started:
                await page.flush()
                raise
            await _refuse(refusal, scope, send, dialect=None, fields=self.fields(refusal))
        finally:
            leave(token)
            await _finished(self.guard, admission)

    def _unclaimed(self, scope: Scope) -> Admission:
        try:
            context = self.context(scope, None, self.guard.session, None)
        except IdentityError:
            context = Context()
        return self.guard.new_admission(context)

    def context(self, scope: Scope, view: BodyView | None, session: Any, route: Route | None) -> Context:
        """Who asks.

        Raises:
            IdentityError: an id is malformed, or was sent twice.
        """
        guard = self.guard
        identity = guard.identity(scope) if guard.identity is not None else None
        session_id = session.extract(scope["headers"], view)
        template = route.path if route is not None else None
        request_id = _request_id(scope)
        if identity is None:
            return Context(session=session_id, route=template, request_id=request_id)
        return Context(
            caller=identity.caller,
            user=identity.user,
            departments=identity.departments,
            agent=identity.agent,
            session=session_id,
            tags=identity.tags,
            params=identity.params,
            route=template,
            request_id=request_id,
        )

    def fields(self, denied: Denied) -> list[tuple[bytes, bytes]]:
        """The rate-limit fields of a refusal."""
        if not self._fields:
            return []
        return rate_limit_headers(denied.receipts, denied.now_ms, disclose=self.guard.engine.disclose)

    def _plan(self, route: Route) -> _Plan:
        plan = self._plans.get(id(route))  # the table keeps every route alive
        if plan is None:
            plan = _Plan(
                route, self.guard.engine.bind(route.extra), route.session is not None or self.guard.session_declared
            )
            self._plans[id(route)] = plan
        return plan

    def _dialect(self, route: Route, path: str) -> Dialect | None:
        if route.dialect is None:
            return None
        if route.dialect != "auto":
            return dialect_named(route.dialect)
        if path in self._dialects:
            return self._dialects[path]
        dialect = dialect_for(normalise(path))
        if len(self._dialects) < _PATHS_KEPT:  # paths may be random; what is not kept is worked out again
            self._dialects[path] = dialect
        return dialect

    def _not_listed(self, scope: Scope) -> Denied:
        refusal = Refusal(
            policy="routes",
            code="route_not_listed",
            message=f"{scope.get('method', 'WebSocket')} on this path is not among the guarded routes of this service.",
        )
        return self.guard.engine.refused(Context(), None, refusal)

    # ---------------------------------------------------------------------------- websocket

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._checked:
            self._check_late(scope)
        found = self._table.find(route_path(scope, self._root_path), None)
        if found == "deny":
            await _refuse_websocket(self._not_listed(scope), scope, receive, send, fields=())
            return
        if found == "pass":
            await self._serve_websocket(scope, receive, send, self._unclaimed(scope))
            return
        denied, admission = await self._admit_websocket(scope, self._plan(found))
        if denied is not None:
            await _refuse_websocket(denied, scope, receive, send, fields=self.fields(denied))
            return
        await self._serve_websocket(scope, receive, send, admission)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
        scope[STATE_KEY] = admission
        token = enter(admission.scope)
        self.guard.track(admission)
        closed = False

        async def watch_receive() -> Message:
            nonlocal closed
            message = await receive()
            if message["type"] == "websocket.disconnect":
                closed = True
                admission.end()
            return message

        async def watch_send(message: Message) -> None:
            nonlocal closed
            if message["type"] in _CLOSES:
                closed = True
                admission.end()
            await send(message)

        try:
            await self.app(scope, watch_receive, watch_send)
        except Exception as error:
            refusal = _refusal_behind(error)
            if refusal is None or closed:
                raise
            admission.refusal_answered()
            admission.end(complete=False)
            code, reason = websocket_close(refusal)
            await send({"type": "websocket.close", "code": code, "reason": reason})
        finally:
            leave(token)
            await _finished(self.guard, admission)

    async def _admit_websocket(self, scope: Scope, plan: _Plan) -> tuple[Denied | None, Admission]:
        guard, route = self.guard, plan.route
        try:
            context = self.context(scope, None, route.session or guard.session, route)
        except IdentityError as error:
            nobody = guard.new_admission(Context(route=route.path))
            return guard.engine.refused(Context(route=route.path), None, _unidentified(error)), nobody
        admission = guard.new_admission(context, extra=plan.extra, opaque=_opaque(guard, route))
        if guard.draining:
            return guard.engine.refused(context, None, DRAINING), admission
        return await admission.open(None), admission

    # ----------------------------------------------------------------------------- lifespan

    def _lifespan_receive(self, receive: Receive) -> Receive:
        async def drained() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.guard.resume()
            elif message["type"] == "lifespan.shutdown":
                await self.guard.drain()
            return message

        return drained

    def _lifespan_send(self, scope: Scope, send: Send) -> Send:
        async def checked(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self._check(scope)
                except ConfigurationError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
            await send(message)

        return checked

    def _check_late(self, scope: Scope) -> None:
        # No lifespan event reached us (a mounted application): too late to refuse the start, so say it.
        try:
            self._check(scope)
        except ConfigurationError as error:
            _log.critical("%s", error)

    def _check(self, scope: Scope) -> None:
        """Once: what is wrong with the application around us, while somebody reads the start-up log.

        Raises:
            ConfigurationError: an endpoint was marked by `@guarded` and registered without it.
        """
        self._checked = True
        if self.guard.identity is None:
            _log.warning(
                "no identity is configured: every request is the same anonymous caller, and limits per user or "
                "caller are shared by all; give Guard(identity=...) an ApiKeys, ScopeUser, JwtIdentity or TrustedHeaders"
            )
        names = unwrapped(scope.get("app"))
        if names:
            raise ConfigurationError(
                f"@guarded has no effect on {', '.join(names)}: it stands above the route decorator, which registered "
                "the function without it. Put @guarded directly above the function, below @app.get/@app.post."
            )


class _ClientLeft(Exception):  # noqa: N818 - not an error: nobody is there to answer
    pass


class _Exchange:
    """One guarded HTTP request and its response."""

    __slots__ = (
        "accept",
        "admission",
        "ask",
        "body",
        "call",
        "context",
        "denied",
        "dialect",
        "done",
        "fed",
        "guard",
        "headers",
        "left",
        "meter",
        "middleware",
        "plan",
        "receive",
        "replayed",
        "scope",
        "send",
        "status",
        "strip",
        "view",
    )

    def __init__(
        self,
        middleware: GuardMiddleware,
        scope: Scope,
        receive: Receive,
        send: Send,
        plan: _Plan,
        dialect: Dialect | None,
    ) -> None:
        self.middleware = middleware
        self.guard = middleware.guard
        self.scope = scope
        self.receive = receive
        self.send = send
        self.plan = plan
        self.dialect = dialect
        self.body: bytes | None = None
        self.view: BodyView | None = None
        self.call: Call | None = None
        self.context: Context | None = None
        self.admission: Admission | None = None
        self.ask: Ask | None = None
        self.replayed = False
        self.done = False
        self.status = 0
        self.strip = False
        self.meter: Meter | None = None
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.left: int | None = None
        self.fed = False

    # -------------------------------------------------------------------------------- admit

    async def admit(self) -> Denied | None:
        """Read what is needed, find out who asks, and claim. A `Denied` has taken nothing.

        Raises:
            _ClientLeft: before its body was complete.
        """
        guard, route, dialect = self.guard, self.plan.route, self.dialect
        session = route.session or guard.session
        try:
            if dialect is not None or (self.plan.session_declared and session.needs_body):
                check_encoding(self.scope["headers"])
                self.body = await self._read_body()
                self.view = read_body(self.body)
            context = self.middleware.context(self.scope, self.view, session, route)
            ask = None
            if dialect is not None and self.view is not None:
                ask = dialect.read_request(self.view, self.scope["path"])
                self.call = guard.engine.describer.describe_body(
                    ask,
                    self.view,
                    provider=dialect.provider,
                    dialect=dialect.name,
                    assumed_output_tokens=route.assumed_output_tokens,
                )
        except BodyError as error:
            return self._refused(Refusal(policy="request", code=error.code, message=str(error), status=error.status))
        except IdentityError as error:
            return self._refused(_unidentified(error))
        self.context = context
        if guard.draining:
            return self._refused(DRAINING)
        admission = guard.new_admission(context, extra=self.plan.extra, opaque=_opaque(guard, route))
        admission.release_on_4xx = route.release_on_4xx
        if guard.cache is not None:
            fields = [value for name, value in self.scope["headers"] if name == b"cache-control"]
            admission.cache_control = b",".join(fields).decode("latin-1")
        denied = await admission.open(self.call, clamp=route.clamp)
        if denied is not None:
            return denied
        self.admission = admission
        self.ask = ask
        return None

    def _refused(self, refusal: Refusal) -> Denied:
        context = self.context or Context(route=self.plan.route.path)
        return self.guard.engine.refused(context, self.call, refusal)

    async def _read_body(self) -> bytes:
        limit = self.guard.max_body_bytes
        length_sent: bytes = dict(self.scope["headers"]).get(b"content-length", b"")
        if length_sent.isdigit() and int(length_sent[:20]) > limit:  # else it is counted as it comes
            raise body_too_large(limit)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        chunk: bytes = message.get("body", b"")
        if len(chunk) > limit:
            raise body_too_large(limit)
        if not message.get("more_body", False):
            return chunk
        chunks, length = [chunk], len(chunk)
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            chunk = message.get("body", b"")
            length += len(chunk)
            if length > limit:
                raise body_too_large(limit)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _rewrite(self, *, wants_usage: bool, stream: bool) -> None:
        """Put what the route asks for into the body: usage on streams, and the output limit that was held for."""
        assert self.admission is not None  # noqa: S101 - `admit` granted it
        assert self.view is not None  # noqa: S101 - what was asked for was read from it
        assert self.dialect is not None  # noqa: S101 - and by it
        root, route = self.admission.root, self.plan.route
        held = root.call if root is not None else None
        limit = None
        if route.clamp and held is not None and self.call is not None:
            if held.max_output_tokens != self.call.max_output_tokens:
                limit = held.max_output_tokens
            elif held.max_output_tokens is None and held.output_tokens:
                limit = held.output_tokens // held.choices
        include = route.inject_usage and stream
        self.strip = include and not wants_usage
        body = self.dialect.rewrite(self.view, include_usage=include, max_output_tokens=limit)
        if body is not self.body:
            self.body = body
            headers = [(name, value) for name, value in self.scope["headers"] if name not in _FRAMING]
            self.scope["headers"] = [*headers, (b"content-length", b"%d" % len(body))]

    # ------------------------------------------------------------------------------- handle

    async def handle(self) -> None:
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        self.scope[STATE_KEY] = admission
        token = enter(admission.scope)
        self.guard.track(admission)
        receive = self.receive if self.body is None else self._replay
        page = _ErrorPage(admission, self._send)
        try:
            if self.ask is not None and (self.plan.route.clamp or self.plan.route.inject_usage):
                self._rewrite(wants_usage=self.ask.wants_usage, stream=self.ask.stream)
            await self.middleware.app(self.scope, receive, page.send)
            await page.flush()
        except Exception as error:
            refusal = _refusal_behind(error)
            if refusal is None or page.started:
                await page.flush()
                raise
            admission.refusal_answered()
            if not self.done:  # before the client sees the refusal, and asks again
                self.done = True
                admission.end(status=refusal.status, complete=False)
            await self.refuse(refusal)
        finally:
            leave(token)
            try:
                if not self.done:
                    admission.end(self._answer(), status=self.status or None, complete=False)
            finally:
                await _finished(self.guard, admission)

    async def _replay(self) -> Message:
        if self.replayed:
            return await self.receive()
        self.replayed = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            if self.meter is not None:
                message = self._metered(message)
            if not self.done and (not message.get("more_body", False) or self._is_whole(message)):
                # Handed over before the client can see the end: its next request finds this one settled.
                self._end()
        elif kind == "http.response.start":
            self._start(message)
        elif kind == "http.response.pathsend" and not self.done:
            self._end()
        await self.send(message)

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        self.left = None
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        headers = list(message.get("headers", ()))
        if self.dialect is not None and (self.strip or not admission.seen):
            self._start_meter(headers)
            if self.strip and self.meter is not None:
                headers = [header for header in headers if header[0].lower() != b"content-length"]
                message["headers"] = headers
        if self.middleware._fields and admission.receipts:
            headers += rate_limit_headers(
                admission.receipts, self.guard.clock.now_ms(), disclose=self.guard.engine.disclose
            )
            message["headers"] = headers
        self.headers = headers

    def _is_whole(self, message: Message) -> bool:
        """Whether the client has all of a body whose length it was told, though the end is still to be sent."""
        if self.left is None:
            lengths = [value for name, value in self.headers if name.lower() == b"content-length"]
            self.left = int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else sys.maxsize
        self.left -= len(message.get("body", b""))
        return self.left <= 0

    def _start_meter(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Read the body as it passes, if it is in a form that can be read."""
        assert self.dialect is not None  # noqa: S101 - asked for by `_start` only
        for name, value in headers:
            if name.lower() == b"content-encoding" and value.lower() != b"identity":
                return
        head = Head(self.status, headers, self.scope["path"], self.ask)
        if is_readable(head.header(b"content-type")):
            self.meter = self.dialect.meter(head, strip_usage=self.strip)

    def _metered(self, message: Message) -> Message:
        assert self.meter is not None  # noqa: S101 - asked for by `_send` only
        body: bytes = message.get("body", b"")
        self.fed |= bool(body)
        forward = self.meter.feed(body)
        if not message.get("more_body", False):
            forward += self.meter.finish()
        return message if forward is body else {**message, "body": forward}

    def _answer(self) -> Answer | None:
        return self.meter.answer() if self.meter is not None and self.fed else None

    def _end(self) -> None:
        self.done = True
        admission = self.admission
        assert admission is not None  # noqa: S101 - `admit` granted it
        admission.end(self._answer(), status=self.status)

    # ------------------------------------------------------------------------------- refuse

    async def refuse(self, denied: Denied) -> None:
        dialect = self.dialect.name if self.dialect is not None else None
        await _refuse(denied, self.scope, self.send, dialect=dialect, fields=self.middleware.fields(denied))


class _ErrorPage:
    """Passes a response on, except a 500 after a refusal: that one waits until the application says what went wrong.

    The outermost layer of an application answers every exception before it lets it go on. Where the middleware
    is around that layer, the answer to a refusal must not be that page.
    """

    __slots__ = ("_admission", "_held", "_send", "started")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self._held: list[Message] = []
        self.started = False
        """Something was passed on."""

    def send(self, message: Message) -> Awaitable[None]:
        if self._held or (self._admission.refused and message.get("status") == 500 and not self.started):
            return self._hold(message)
        self.started = True
        return self._send(message)

    async def _hold(self, message: Message) -> None:
        self._held.append(message)
        if message.get("more_body", False):
            await self.flush()  # a stream, and no page

    async def flush(self) -> None:
        """Pass on what was held back."""
        held, self._held = self._held, []
        for message in held:
            self.started = True
            await self._send(message)


# --------------------------------------------------------------------------------- helpers


def _unidentified(error: IdentityError) -> Refusal:
    code: Code = "credentials_invalid" if error.status == 403 else "invalid_request"
    status = None if error.status in (400, 403) else error.status  # those of the two codes, unless the guard has others
    return Refusal(policy="identity", code=code, message=str(error), status=status)


def _opaque(guard: Guard, route: Route) -> bool:
    return not guard.hooked if route.calls == "auto" else route.calls == "opaque"


def _refusal_behind(error: BaseException, depth: int = 0) -> Denied | None:
    """The refusal of ours that an exception was raised from; of a group, if it consists of nothing else."""
    seen: BaseException | None = error
    while seen is not None and depth < _CAUSES:  # causes may form a ring
        refusal = refusal_of(seen)
        if refusal is not None:
            return refusal
        depth += 1
        if isinstance(seen, BaseExceptionGroup):
            refusals = [_refusal_behind(each, depth) for each in seen.exceptions]
            return refusals[0] if None not in refusals else None
        seen = seen.__cause__
    return None


async def _refuse(
    denied: Denied, scope: Scope, send: Send, *, dialect: str | None, fields: Sequence[tuple[bytes, bytes]]
) -> None:
    response = _rendered(denied, scope, dialect, fields)
    await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
    body = b"" if scope.get("method") == "HEAD" else response.body
    await send({"type": "http.response.body", "body": body})


async def _refuse_websocket(
    denied: Denied, scope: Scope, receive: Receive, send: Send, *, fields: Sequence[tuple[bytes, bytes]]
) -> None:
    """Answer the handshake: with a whole response where the server can, else by closing."""
    await receive()  # websocket.connect
    if "websocket.http.response" in (scope.get("extensions") or {}):
        response = _rendered(denied, scope, None, fields)
        await send({"type": "websocket.http.response.start", "status": response.status, "headers": response.headers})
        await send({"type": "websocket.http.response.body", "body": response.body})
        return
    code, reason = websocket_close(denied)
    await send({"type": "websocket.close", "code": code, "reason": reason})


def _rendered(denied: Denied, scope: Scope, dialect: str | None, fields: Sequence[tuple[bytes, bytes]]) -> Rendered:
    accept = b", ".join(_headers(scope, b"accept")) or None
    return render(denied, dialect=dialect, accept=accept, instance=_request_id(scope), fields=fields)


def _request_id(scope: Scope) -> str | None:
    """The request's own id, if it sends one that may stand in records and answers as it is."""
    if b"x-request-id" not in dict(scope["headers"]):
        return None
    ids: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]):
        return ids[0].decode("ascii")
    return None


def _headers(scope: Scope, name: bytes) -> Iterator[bytes]:
    return (value for key, value in scope["headers"] if key == name)


async def _finished(guard: Guard, admission: Admission) -> None:
    """Wait until what was handed over is written: the response has ended, so nobody waits for us.

    It keeps the task alive until then, which servers wait for when they shut down; so nothing is lost
    where no lifespan event reaches us (mounted applications).
    """
    try:
        await admission.close()
    finally:
        guard.untrack(admission)
