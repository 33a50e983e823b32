"""Who is let in: every request passes here, and every one that is not let in leaves a trace.

Rule 1: the role is the table's, and it is looked at before anything of the request is.

Rule 2: credentials of callers are no credentials here, and their tries are noted as such.

Rule 3: a form is taken only from a page of this session: by its token, and by the origin that the browser names.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from starlette.requests import Request

from asgi_llm_guard.admin.asked import Asked, ProblemError
from asgi_llm_guard.admin.options import ROLES, AdminCredential, Role
from asgi_llm_guard.admin.sessions import SESSION_COOKIE, Session
from asgi_llm_guard.admin.shown import cut
from asgi_llm_guard.identity.base import IdentityError

if TYPE_CHECKING:
    from asgi_llm_guard.admin.desk import Desk

__all__ = ["admit", "check_origin", "identify", "log_in"]

_log = logging.getLogger("asgi_llm_guard")

_TARGET: Final = 200
_UNKNOWN: Final = "This token is not known here, or has expired."


async def identify(desk: Desk, request: Request) -> tuple[AdminCredential | None, Session | None]:
    """Whose request it is: by the token of its header, else by the session of its cookie.

    Raises:
        ProblemError: it shows a token that is none of ours (403), or its address has shown too many (429).
    """
    shown = request.headers.getlist("authorization")
    if shown:
        scheme, _, token = shown[0].partition(" ")
        if len(shown) > 1 or scheme.lower() != "bearer":
            raise await _failed(desk, request, "The Authorization header must say Bearer, once.")
        found = desk.options.find(token.strip(), desk.now_ms)
        if found is None:
            caller = _caller(desk, request)
            raise await (_failed(desk, request, _UNKNOWN) if caller is None else _refused_caller(desk, request, caller))
        return found, None
    value = request.cookies.get(SESSION_COOKIE)
    known = desk.sessions.read(value, desk.now_ms) if value else None
    if known is None or await desk.has_ended(known[0]):
        return None, None
    session, credential = known
    return credential, session


async def admit(asked: Asked, role: Role | None) -> None:
    """Let whoever asks do what takes this role.

    Raises:
        ProblemError: they may not (403), or nobody is logged in (401).
    """
    if role is None:
        return
    desk, request, credential = asked.desk, asked.request, asked.credential
    if credential is None:
        caller = _caller(desk, request)
        if caller is not None:
            raise await _refused_caller(desk, request, caller)
        raise ProblemError(
            401, "Log in, or send the token of an administrator.", headers={"WWW-Authenticate": 'Bearer realm="admin"'}
        )
    if ROLES[credential.role] < ROLES[role]:
        await desk.note_refused(
            verb=request.method,
            target=_target(request),
            name=credential.name,
            role=credential.role,
            address=asked.address,
            why=f"needs the role {role}",
        )
        raise ProblemError(403, f"This needs the role {role}; {credential.name} is {credential.role}.")


def check_origin(asked: Asked) -> None:
    """Refuse what another site's page has sent.

    Raises:
        ProblemError: 403.
    """
    headers = asked.request.headers
    origin = headers.get("origin")
    if origin is None:
        if headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            raise ProblemError(403, "This form was sent from another site.")
        return
    own = headers.get("host", "")
    if origin not in asked.desk.options.origins and (not own or origin.partition("://")[2] != own):
        raise ProblemError(
            403,
            "This form was sent from another site. Behind a proxy that changes the Host header, name its origin in AdminOptions(origins=...).",
        )


async def log_in(desk: Desk, request: Request, token: str) -> AdminCredential:
    """Whose token a login form has brought.

    Raises:
        ProblemError: nobody's (403), or its address has brought too many wrong ones (429).
    """
    found = desk.options.find(token, desk.now_ms)
    if found is None:
        raise await _failed(desk, request, _UNKNOWN)
    return found


def _patience(desk: Desk, request: Request) -> None:
    wait_s = desk.failures.wait_s(_address(request), desk.now_ms)
    if wait_s is not None:
        raise ProblemError(
            429,
            f"Too many wrong tokens came from this address. Try again in {wait_s} s.",
            headers={"Retry-After": str(wait_s)},
        )


async def _failed(desk: Desk, request: Request, detail: str) -> ProblemError:
    _patience(desk, request)
    if desk.failures.add(_address(request), desk.now_ms):
        await _note(desk, request, _caller(desk, request))
    return ProblemError(403, detail)


async def _refused_caller(desk: Desk, request: Request, caller: str) -> ProblemError:
    """Not counted as a guess: whoever the service knows by name guesses nothing."""
    if desk.failures.note(desk.now_ms, caller):
        await _note(desk, request, caller)
    return ProblemError(403, "This is the credential of a caller. It opens nothing here.")


async def _note(desk: Desk, request: Request, caller: str | None) -> None:
    await desk.note_refused(
        verb=request.method,
        target=_target(request),
        name=caller or "nobody",
        role="none" if caller is None else "caller",
        address=_address(request),
        why="not the credential of an administrator",
    )


def _caller(desk: Desk, request: Request) -> str | None:
    """The caller that the service itself would take this request for; `None`: nobody that it knows."""
    if desk.guard.identity is None:
        return None
    try:
        identity = desk.guard.identity(request.scope)
    except IdentityError:
        return None
    except Exception:  # noqa: BLE001 - resolvers are code of others
        # A resolver that stands on middleware which is not around this application.
        _log.exception("identity: the resolver failed on a request to the administration page")
        return None
    return None if identity is None else identity.caller


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _target(request: Request) -> str:
    return cut(request.url.path, _TARGET)
