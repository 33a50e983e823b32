"""`GuardMiddleware`: opens an admission for every request and WebSocket, and settles it when the response has ended.

Pure ASGI. The response is never buffered: every message is sent on as it comes. A request body is
read only where a dialect or a body extractor is declared, and replayed byte for byte (unless the
route asks for `clamp` or `inject_usage`, which change it).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, Literal

from asgi_llm_guard.admission import Admission, enter, leave
from asgi_llm_guard.configuration import Configuration, check_routes
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.identity.base import IdentityError, Resolver
from asgi_llm_guard.marks import is_own, own_mounts, unwrapped
from asgi_llm_guard.middleware.answers import (
    ASGIApp,
    ErrorPage,
    Message,
    Receive,
    Scope,
    Send,
    refusal_behind,
    refuse,
    refuse_websocket,
    request_id,
    unidentified,
)
from asgi_llm_guard.middleware.ending import Ending, Socket
from asgi_llm_guard.middleware.incoming import ClientLeft, cache_control
from asgi_llm_guard.middleware.plan import Plan, is_opaque
from asgi_llm_guard.middleware.request import STATE_KEY, GuardedRequest, finished
from asgi_llm_guard.middleware.serving import Serving
from asgi_llm_guard.replays import Replays
from asgi_llm_guard.routes import Route, normalise, route_path
from asgi_llm_guard.wire import dialect_for, dialect_named
from asgi_llm_guard.wire.base import Dialect
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.refusals import websocket_close

__all__ = ["GuardMiddleware"]

_log = logging.getLogger("asgi_llm_guard")

_PATHS_KEPT: Final = 200
_PROBES: Final = frozenset({"GET", "HEAD"})
_CLOSES: Final = frozenset({"websocket.close", "websocket.http.response.start"})


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
        self._routes = routes
        self._exempt = exempt
        self._unlisted: Literal["deny", "pass"] = unlisted
        self.replays: Replays | None = None
        """Where answers are kept for their idempotency keys; `None`: no route keeps any."""
        self._serving = self._serve_by(guard.configuration)
        self.sends_fields = rate_limit_headers
        self._dialects: dict[str, Dialect | None] = {}
        self._checked = False
        self._own_mounts: tuple[str, ...] = ()
        # Around a FastAPI(root_path=...), which strips it from the paths that it routes, wherever it got them.
        self._root_path = str(getattr(app, "root_path", None) or "")
        check_routes(routes)

    follows_routes = True
    """Whether `Guard.replace` gives it other routes."""

    @property
    def serving(self) -> Serving:
        """What requests that begin now are served by."""
        serving, configuration = self._serving, self.guard.configuration
        if serving.configuration is not configuration:
            serving = self._serving = self._serve_by(configuration)
        return serving

    def _serve_by(self, configuration: Configuration) -> Serving:
        own = configuration.routes is None or not self.follows_routes
        serving = Serving(
            self.guard,
            configuration,
            self._routes if own else configuration.routes,
            exempt=self._exempt,
            unlisted=self._unlisted,
        )
        if self.replays is None and serving.replays:
            self.replays = Replays(self.guard.engine.storage, self.guard.engine.new_id)
        return serving

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
        path = route_path(scope, self._root_path)
        if (self._own_mounts or path in self.guard.own_paths) and self._is_own(scope, path):
            await self.app(scope, receive, send)
            return
        serving = self.serving
        found = serving.table.find(path, scope["method"])
        if found == "deny":
            await refuse(self._not_listed(scope), scope, send, dialect=None, fields=())
            return
        if found == "pass":
            await self._unguarded(scope, receive, send)
            return
        plan = serving.plan(found)
        dialect = self._dialect(found, path)
        exchange = GuardedRequest(self, scope, receive, send, plan, dialect)
        try:
            denied = await self._closed(plan.route) if self.guard.engine.gate is not None else None
            denied = denied or await exchange.admit()
            if denied is not None:
                await exchange.refuse(denied)
            elif exchange.kept is not None:
                await exchange.replay(exchange.kept)
            else:
                await exchange.handle()
        except ClientLeft:
            return
        finally:
            await exchange.close()

    async def _unguarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that claims nothing; calls inside it claim their own."""
        admission = self._unclaimed(scope)
        if self.guard.cache is not None:
            admission.cache_control = cache_control(scope)
        scope[STATE_KEY] = admission
        token = enter(admission)
        self.guard.track(admission)
        page = ErrorPage(admission, send)
        try:
            await self.app(scope, receive, page.send)
            await page.flush()
        except Exception as error:
            refusal = refusal_behind(error, admission) or admission.stopped
            if refusal is None or page.started:
                await page.flush()
                raise
            await refuse(refusal, scope, send, dialect=None, fields=self.fields(refusal))
        finally:
            leave(token)
            await finished(self.guard, admission)

    def _unclaimed(self, scope: Scope) -> Admission:
        try:
            context = self.context(scope, None, self.guard.session, None, self.guard.identity)
        except IdentityError:
            context = Context()
        return self.guard.new_admission(context)

    def context(
        self, scope: Scope, view: BodyView | None, session: Any, route: Route | None, resolver: Resolver | None
    ) -> Context:
        """Who asks.

        Raises:
            IdentityError: an id is malformed, or was sent twice.
        """
        identity = None if resolver is None else resolver(scope)
        session_id = session.extract(scope["headers"], view)
        template = route.path if route is not None else None
        named = request_id(scope)
        if identity is None:
            return Context(session=session_id, route=template, request_id=named)
        return Context(
            caller=identity.caller,
            user=identity.user,
            departments=identity.departments,
            agent=identity.agent,
            session=session_id,
            tags=identity.tags,
            params=identity.params,
            route=template,
            request_id=named,
        )

    def fields(self, denied: Denied) -> list[tuple[bytes, bytes]]:
        """The rate-limit fields of a refusal."""
        if not self.sends_fields:
            return []
        return rate_limit_headers(denied.receipts, denied.now_ms, disclose=self.guard.engine.disclose)

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
        serving = self.serving  # kept: another thread may put another configuration in force meanwhile
        found = serving.table.find(route_path(scope, self._root_path), None)
        if found == "deny":
            await refuse_websocket(self._not_listed(scope), scope, receive, send, fields=())
            return
        if found == "pass":
            await self._serve_websocket(scope, receive, send, self._unclaimed(scope))
            return
        denied, admission = await self._admit_websocket(scope, serving.plan(found))
        if denied is not None:
            await refuse_websocket(denied, scope, receive, send, fields=self.fields(denied))
            return
        await self._serve_websocket(scope, receive, send, admission)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
        scope[STATE_KEY] = admission
        token = enter(admission.scope)
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

        async def close(refusal: Denied) -> None:
            admission.end(complete=False)
            code, reason = websocket_close(refusal)
            await send({"type": "websocket.close", "code": code, "reason": reason})

        ending = admission.front = Ending(Socket(lambda: not closed))
        self.guard.track(admission)
        try:
            await self.app(scope, watch_receive, watch_send)
        except asyncio.CancelledError:
            if admission.stopped is None or not ending.is_it():
                raise
            await close(admission.stopped)
        except Exception as error:
            refusal = refusal_behind(error, admission) or admission.stopped
            if refusal is None or closed:
                raise
            admission.refusal_answered()
            await close(refusal)
        else:
            if ending.fired and not closed and admission.stopped is not None:
                ending.is_it()  # it has caught that it was cancelled, and did not pass it on
                await close(admission.stopped)
        finally:
            leave(token)
            ending.over()
            admission.front = None
            await finished(self.guard, admission)

    async def _admit_websocket(self, scope: Scope, plan: Plan) -> tuple[Denied | None, Admission]:
        guard, route = self.guard, plan.route
        if guard.engine.gate is not None and (denied := await self._closed(route)) is not None:
            return denied, guard.new_admission(Context(route=route.path))
        try:
            configuration = plan.configuration
            context = self.context(scope, None, route.session or configuration.session, route, configuration.identity)
        except IdentityError as error:
            nobody = guard.new_admission(Context(route=route.path))
            return guard.engine.refused(Context(route=route.path), None, unidentified(error)), nobody
        admission = guard.new_admission(
            context, extra=plan.extra, opaque=is_opaque(guard, route), policies=plan.configuration.policies
        )
        if guard.draining:
            return guard.engine.refused(context, None, DRAINING), admission
        return await admission.open(None), admission

    async def _closed(self, route: Route) -> Denied | None:
        """Before it is asked who calls: that may have to be loaded, too."""
        gate = self.guard.engine.gate
        closed = None if gate is None else await gate()
        return None if closed is None else self.guard.engine.refused(Context(route=route.path), None, closed)

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
        failed = False

        async def checked(message: Message) -> None:
            nonlocal failed
            if message["type"] == "lifespan.startup.complete":
                try:
                    self._check(scope)
                except ConfigurationError as error:
                    failed = True
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    raise  # the application ends: who waits for that would wait for ever
            if not failed:  # it has been said
                await send(message)

        return checked

    def _is_own(self, scope: Scope, path: str) -> bool:
        """Whether the request is for the guard's own pages: they are neither counted nor refused."""
        told = path in self.guard.own_paths
        if not told and not any(path == mount or path.startswith(f"{mount}/") for mount in self._own_mounts):
            return False
        own = is_own(self.app, {**scope, "root_path": self._root_path} if self._root_path else scope)
        # Where nobody can say who answers there, what was told is believed as far as probes need it.
        return told and scope["method"] in _PROBES if own is None else own

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
        self.guard.started()
        self._own_mounts = own_mounts(self.app)
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
