"""What a caller may see of its own limits: one page and one answer in JSON, for whoever the guard's identity knows.

Reading them costs nothing and is never refused by a limit: who has nothing left has to be able to see that.

Rule 1: everything that is shown is about the caller of the request. No parameter names anybody.

Rule 2: of what it shares with others (a department, a provider, everything) a caller is shown what refusals would
show: that there is a limit, and no figure, unless the guard says `disclose="all"`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from asgi_llm_guard.admin.asked import ProblemError, json_answer
from asgi_llm_guard.admin.mounted import serve
from asgi_llm_guard.admin.pages import STATIC, write
from asgi_llm_guard.admin.shown import dollars
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.identity.base import IdentityError
from asgi_llm_guard.marks import mark_own
from asgi_llm_guard.routes import route_path
from asgi_llm_guard.standing import known_scopes, standing_of
from asgi_llm_guard.windows import Calendar

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.standing import StandingRow

__all__ = ["Limit", "Limits", "UsageApp"]

_log = logging.getLogger("asgi_llm_guard")

_READS: Final = frozenset({"GET", "HEAD"})
_ANY_CALL: Final = Call(model="any", cost_nanousd=0)
"""Of no model in particular, and for nothing: it meets every limit that calls meet."""


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit of the caller. `limit`, `used`, `held` and `remaining` are `null` where they may not be shown; amounts of
    money are US dollars as text, all others numbers as text in `unit`."""

    policy: str
    scope: str
    subject: str | None
    unit: str
    window: str | None
    limit: str | None
    used: str | None
    held: str | None
    remaining: str | None
    resets_at_ms: int | None
    raised_until_ms: int | None
    share: float | None
    """How much of it is used and held: 1 is all."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Whose limits they are, and all of them."""

    caller: str | None
    user: str | None
    departments: tuple[str, ...]
    limits: tuple[Limit, ...]


@mark_own
class UsageApp:
    """`GET /` (a page, or JSON for whoever asks for it) and `GET /v1/usage` (JSON)."""

    def __init__(self, guard: Guard, *, tz: str = "UTC") -> None:
        """Raises `ConfigurationError`: the guard has no identity, or the time zone is none."""
        if guard.identity is None:
            raise ConfigurationError(
                "usage_app: the guard has no identity, so every caller would be shown the figures of all; "
                "give Guard(identity=...) an ApiKeys, ScopeUser, JwtIdentity or TrustedHeaders"
            )
        Calendar("day", tz)
        self._guard = guard
        self._tz = tz

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await serve(self._answer, scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = route_path(request.scope)
        if path.startswith("/static/") and (found := STATIC().get(path.removeprefix("/static/"))):
            return Response(found[0], media_type=found[1], headers={"Cache-Control": "public, max-age=3600"})
        if path not in {"/", "/v1/usage"}:
            return _problem(ProblemError(404, "There is nothing here."))
        if request.method not in _READS:
            return _problem(ProblemError(405, "This can only be read.", headers={"Allow": "GET, HEAD"}))
        wants_page = path == "/" and _wants_page(request)
        try:
            limits = await self._limits(request)
        except ProblemError as problem:
            return self._page(request, None, problem) if wants_page else _problem(problem)
        return self._page(request, limits) if wants_page else json_answer(limits)

    def _page(self, request: Request, limits: Limits | None, problem: ProblemError | None = None) -> Response:
        root = str(request.scope.get("root_path", "")).rstrip("/")
        text = write(
            "usage.html",
            limits=limits,
            problem=problem,
            root=root,
            tz=self._tz,
            title="Usage",
            now_ms=self._guard.clock.now_ms(),
            url=_url(root),
        )
        status, headers = (200, {}) if problem is None else (problem.status, problem.headers)
        return Response(text, status, {"Vary": "Accept", **headers}, media_type="text/html; charset=utf-8")

    async def _limits(self, request: Request) -> Limits:
        guard = self._guard
        resolver = guard.identity
        if resolver is None:  # a change of the configuration has taken it away
            raise ProblemError(404, "This service does not tell its callers apart, so there is nothing to show.")
        try:
            identity = resolver(request.scope)
        except IdentityError as error:
            raise ProblemError(error.status, error.message) from None
        if identity is None:
            raise ProblemError(
                401, "Send the credential that you call this service with.", headers={"WWW-Authenticate": "Bearer"}
            )
        context = Context(
            caller=identity.caller,
            user=identity.user,
            departments=identity.departments,
            agent=identity.agent,
            tags=identity.tags,
            params=identity.params,
        )
        try:
            rows = await _rows(guard, context)
        except StorageError as error:
            _log.warning("usage: %s", error)
            raise ProblemError(
                503, "The store does not answer. Try again in a moment.", headers={"Retry-After": "5"}
            ) from None
        everything = guard.engine.disclose == "all"
        limits = [_limit(row, shown=row.owned or everything) for row in rows if row.enforce and row.limit is not None]
        return Limits(
            caller=identity.caller, user=identity.user, departments=identity.departments, limits=tuple(limits)
        )


async def _rows(guard: Guard, context: Context) -> list[StandingRow]:
    """Every limit that a call of theirs would meet, whichever the model: one that may not be called hides no quota."""
    found = {_key(row): row for row in (await guard.standing(context, _ANY_CALL)).rows}
    if "department" in known_scopes(guard.policies):
        for name in context.departments:
            pairs = await guard.meters_of("department", name)
            meters, readings = [meter for meter, _ in pairs], [reading for _, reading in pairs]
            for row in standing_of(meters, readings, None, guard.clock.now_ms()):
                found.setdefault(_key(row), row)
    return list(found.values())


def _key(row: StandingRow) -> tuple[object, ...]:
    return row.policy, row.scope, row.subject, row.unit, row.window


def _limit(row: StandingRow, *, shown: bool) -> Limit:
    def told(amount: int | None) -> str | None:
        if amount is None or not shown:
            return None
        return dollars(amount) if row.unit == "nanousd" else str(amount)

    return Limit(
        policy=row.policy,
        scope=row.scope,
        subject=row.subject if shown else None,
        unit="usd" if row.unit == "nanousd" else str(row.unit),
        window=row.window,
        limit=told(row.limit),
        used=told(row.used),
        held=told(row.held),
        remaining=told(row.remaining),
        resets_at_ms=row.resets_at_ms,
        raised_until_ms=row.raised_until_ms if shown else None,
        share=round((row.used + row.held) / row.limit, 4) if shown and row.limit else 1.0 if shown else None,
    )


def _problem(problem: ProblemError) -> Response:
    response = json_answer(problem.body(), problem.status, media="application/problem+json")
    response.headers.update(problem.headers)
    return response


def _wants_page(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    page, data = accept.find("text/html"), accept.find("application/json")
    return page >= 0 and (data < 0 or page < data)


def _url(root: str) -> object:
    return lambda path, **query: f"{root}{path}" + (f"?v={query['v']}" if "v" in query else "")
