"""The administration page as an ASGI application. Mount it where you like: `app.mount("/admin", guard.admin_app(…))`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from asgi_llm_guard.admin import gate
from asgi_llm_guard.admin.asked import Asked, ProblemError, fields_of, json_answer, read_json
from asgi_llm_guard.admin.cookies import set_cookie
from asgi_llm_guard.admin.desk import Desk
from asgi_llm_guard.admin.mounted import serve
from asgi_llm_guard.admin.options import AdminOptions
from asgi_llm_guard.admin.pages import page
from asgi_llm_guard.admin.sessions import SESSION_COOKIE
from asgi_llm_guard.admin.shown import cut
from asgi_llm_guard.admin.table import VERBS
from asgi_llm_guard.admin.verbs import Verb
from asgi_llm_guard.control import NewerRelease
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.ledger import NotKeptError
from asgi_llm_guard.marks import mark_own
from asgi_llm_guard.routes import route_path

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from asgi_llm_guard.guard import Guard

__all__ = ["AdminApp"]

_log = logging.getLogger("asgi_llm_guard")

_NO_STORE: Final = (
    "A store that this needs does not answer: the storage of the limits, the ledger, or the administration data. "
    "The log of the service says which, and why. Try again in a moment."
)


@mark_own
class AdminApp:
    """Pages, forms and an API over one guard. `GuardMiddleware` neither counts nor refuses its requests."""

    def __init__(self, guard: Guard, options: AdminOptions) -> None:
        self.desk = Desk(guard, options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await serve(self._answer, scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = route_path(request.scope)
        api = path.startswith("/api/")
        asked = Asked(self.desk, request, None, None)
        try:
            credential, session = await gate.identify(self.desk, request)
            asked.credential, asked.session = credential, session
            found = VERBS.find(request.method, path)
            if not isinstance(found, tuple):
                found = await self._missing(asked, found)
            verb, asked.params = found
            await gate.admit(asked, verb.role)
            await self._read(verb, asked)
            response: Response = await verb.run(asked)
            # What a page asks for by itself keeps nobody logged in who has left.
            if session is not None and verb.path != "/logout" and "x-refresh" not in request.headers:
                value = self.desk.sessions.renewed(session, self.desk.now_ms)
                if value is not None:
                    set_cookie(asked, response, SESSION_COOKIE, value, self.desk.sessions.absolute_ms)
        except ProblemError as problem:
            return _problem(asked, problem, api=api)
        except StorageError as error:
            _log.warning("administration: %s: %s", request.url.path, error)
            return _problem(asked, ProblemError(503, _NO_STORE, headers={"Retry-After": "5"}), api=api)
        except NewerRelease as error:
            return _problem(asked, ProblemError(503, str(error)), api=api)
        except (NotKeptError, ConfigurationError) as error:  # what nobody can be told, and what cannot be asked
            return _problem(asked, ProblemError(422, str(error)), api=api)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:  # noqa: BLE001 - the last resort of a page
            # What is said of it must not be more than that it went wrong.
            _log.exception("administration: %s failed", request.url.path)
            return _problem(
                asked, ProblemError(500, "Something went wrong here; the log of the service says what."), api=api
            )
        else:
            return response

    async def _missing(self, asked: Asked, allowed: Any) -> tuple[Verb, dict[str, str]]:
        """Raises `ProblemError`, to strangers the same for what is there and for what is not."""
        await gate.admit(asked, "viewer")
        if allowed:
            names = sorted({*allowed, *(["HEAD"] if "GET" in allowed else [])})
            raise ProblemError(405, f"This takes {', '.join(names)}.", headers={"Allow": ", ".join(names)})
        raise ProblemError(404, "There is nothing here.")

    async def _read(self, verb: Verb, asked: Asked) -> None:
        if verb.kind == "form":
            gate.check_origin(asked)
            asked.form = await fields_of(asked.request)
            if verb.role is not None and not (
                asked.session is not None
                and self.desk.sessions.form_token_holds(asked.session, asked.form.get("form_token", ""))
            ):
                raise ProblemError(
                    403, "This form is not from a page of this session. Go back, load the page anew, and send it again."
                )
        elif verb.kind == "api":
            _check_query(verb, asked)
        if verb.kind == "api" and verb.method != "GET":
            if asked.session is not None:
                raise ProblemError(403, "What changes something takes a token here: Authorization: Bearer …")
            if verb.takes is not None:
                asked.body = await read_json(asked.request, verb.takes)


def _check_query(verb: Verb, asked: Asked) -> None:
    """Refuse what would else be passed over: a filter that was mistyped answers for everybody."""
    known = [param.name for param in verb.params]
    given = asked.request.query_params.multi_items()
    for name, value in given:
        shown = cut(name)
        if name not in known:
            there = ", ".join(known) or "none"
            raise ProblemError(422, f"There is no parameter {shown!r} here; there is {there}.", field=shown)
        if not value:
            raise ProblemError(422, f"{name}: is empty; leave it out.", field=name)
    if twice := next((name for name in asked.query if sum(name == other for other, _ in given) > 1), None):
        raise ProblemError(422, f"{twice}: is there twice.", field=twice)


def _problem(asked: Asked, problem: ProblemError, *, api: bool) -> Response:
    if api:
        response = json_answer(problem.body(), problem.status, media="application/problem+json")
    elif problem.status == 401 and asked.request.method in {"GET", "HEAD"}:
        path = route_path(asked.request.scope)
        query = asked.request.url.query
        wanted = path + (f"?{query}" if query else "")
        response = RedirectResponse(asked.url("/login") + (f"?next={quote(wanted)}" if wanted != "/" else ""), 303)
    else:
        response = page(asked, "error.html", active="", status=problem.status, problem=problem)
    response.headers.update(problem.headers)
    return response
