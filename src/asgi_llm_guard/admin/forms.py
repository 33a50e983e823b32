"""What forms do: log in and out, and the changes that people make by hand."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import unquote

from starlette.responses import RedirectResponse, Response

from asgi_llm_guard.admin import administer, gate
from asgi_llm_guard.admin.asked import Asked, ProblemError, converted
from asgi_llm_guard.admin.bodies import NewKey, NewRaise, NewStop, Reset
from asgi_llm_guard.admin.cookies import clear_cookie, set_cookie
from asgi_llm_guard.admin.kinds import EditedKind
from asgi_llm_guard.admin.pages import done, page
from asgi_llm_guard.admin.sessions import LOGIN_COOKIE, SESSION_COOKIE
from asgi_llm_guard.control import Actor, Key
from asgi_llm_guard.control.data import shown as shown_value
from asgi_llm_guard.control.values import UNLIMITED
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.standing import known_scopes

__all__ = [
    "edit",
    "entries",
    "key_new",
    "key_revoke",
    "key_rotate",
    "keys",
    "login",
    "login_page",
    "logout",
    "raise_end",
    "raise_new",
    "raises",
    "remove",
    "reset",
    "save",
    "stop_end",
    "stop_new",
]

_log = logging.getLogger("asgi_llm_guard")

Handler = Callable[[Asked], Awaitable[Response]]

_INSIDE: Final = re.compile(r"/[A-Za-z0-9._~/-]*(\?[^\s\\]*)?", re.ASCII)
_LOGIN_MS: Final = 3_600_000
_IDS: Final = frozenset({"scope", "subject", "caller"})
"""Fields that are percent-encoded where the form says `quoted`: a field of a form keeps no line breaks as they are."""


# --------------------------------------------------------------------------------------- login


async def login_page(asked: Asked) -> Response:
    return _login_form(asked, 200, None)


async def login(asked: Asked) -> Response:
    desk, request = asked.desk, asked.request
    if not desk.sessions.login_token_holds(
        request.cookies.get(LOGIN_COOKIE, ""), asked.form.get("login_token", ""), asked.now_ms
    ):
        return _login_form(asked, 403, "This form is too old, or cookies are switched off. Try again.")
    try:
        credential = await gate.log_in(desk, request, asked.form.get("token", "").strip())
    except ProblemError as problem:
        response = _login_form(asked, problem.status, problem.detail)
        response.headers.update(problem.headers)
        return response
    session, value = desk.sessions.begin(credential, asked.now_ms)
    actor = Actor(name=credential.name, role=credential.role, address=asked.address)
    try:
        await desk.note("login", f"session:{session.mark}", actor=actor)
    except StorageError as error:
        _log.warning("administration: nobody can log in: %s", error)
        api = f"{asked.request.url.scheme}://{asked.request.url.netloc}{asked.url('/api/v1/health')}"
        response = _login_form(
            asked,
            503,
            "A log-in cannot be written into the audit at the moment, since the database of the administration data does "
            "not answer; so nobody can log in by this form. The log of the service says what is wrong with it. Try again in "
            "a moment. Limits, keys and stops hold meanwhile as they were, and the API can be read with the token: "
            f"curl -H 'Authorization: Bearer …' {api}",
        )
        response.headers["Retry-After"] = "5"
        return response
    response = RedirectResponse(asked.root + _inside(asked.form.get("next", "")), 303)
    set_cookie(asked, response, SESSION_COOKIE, value, desk.sessions.absolute_ms)
    clear_cookie(asked, response, LOGIN_COOKIE)
    return response


async def logout(asked: Asked) -> Response:
    assert asked.session is not None, "a form has the token of one"  # noqa: S101
    told = await asked.desk.end(asked.session, administer.actor_of(asked))
    response = RedirectResponse(asked.url("/login", done="left" if told else "left_here"), 303)
    clear_cookie(asked, response, SESSION_COOKIE)
    return response


def _login_form(asked: Asked, status: int, problem: str | None) -> Response:
    token = asked.desk.sessions.login_token(asked.now_ms)
    wanted = _inside(asked.form.get("next") or asked.query.get("next", ""))
    response = page(asked, "login.html", active="", status=status, login_token=token, wanted=wanted, problem=problem)
    set_cookie(asked, response, LOGIN_COOKIE, token, _LOGIN_MS)
    return response


def _inside(wanted: str) -> str:
    """A path inside the application to go on to; never another site's."""
    return wanted if _INSIDE.fullmatch(wanted) and not wanted.startswith("//") else "/"


# -------------------------------------------------------------------------------------- entries


def entries(kind: EditedKind) -> Handler:
    """The list of a kind."""

    async def run(asked: Asked) -> Response:
        state = None if asked.desk.control is None else await asked.desk.control.state()
        rows = (
            ()
            if state is None
            else [(name, shown_value(entry.value), entry) for name, entry in state.of(kind.kind).items()]
        )
        return page(asked, "entries.html", active=kind.slug, kind=kind, rows=rows, administered=state is not None)

    return run


def edit(kind: EditedKind) -> Handler:
    """The form of one entry, or of a new one."""

    async def run(asked: Asked) -> Response:
        name = asked.query.get("name", "")
        entry = None
        if name:
            entry = (await administer.control_of(asked).state()).of(kind.kind).get(name)
        if entry is not None:
            value = shown_value(entry.value)
            return _form(asked, kind, name, kind.shown(value), value, entry.version)
        quota = asked.desk.quotas().get(name) if kind.kind == "department" else None
        value = {"tz": asked.desk.options.tz} if kind.kind == "department" else {}
        if quota is not None:  # what holds now, to be changed
            limits = {field.name: getattr(quota, field.name) for field in kind.fields}
            value = {field: UNLIMITED if limit is None else limit for field, limit in limits.items()}
        return _form(asked, kind, name, kind.shown(value), value, 0, inherited=quota is not None)

    return run


def save(kind: EditedKind) -> Handler:
    """Keep what the form of an entry says."""

    async def run(asked: Asked) -> Response:
        form = asked.form
        name, reason = form.get("name", "").strip(), form.get("reason", "").strip()
        expected = _version(form.get("version", ""))
        fields = {field.name: form.get(field.name, "") for field in kind.fields}
        ticked = {field.name: "unlimited" for field in kind.fields if form.get(f"{field.name}.unlimited")}
        try:
            _filled(name, "name", f"{kind.name_label}: write its name.")
            _filled(reason, "reason", "Reason: say why, for the audit.")
            await administer.put(asked, kind.kind, name, kind.value(form), reason=reason, expected=expected)
        except ProblemError as problem:
            if problem.status not in {409, 422}:
                raise
            return _form(
                asked, kind, name, fields, ticked, expected, problem=problem, reason=reason, status=problem.status
            )
        return done(asked, f"/{kind.slug}", "saved")

    return run


def remove(kind: EditedKind) -> Handler:
    """Remove an entry."""

    async def run(asked: Asked) -> Response:
        form = asked.form
        reason = _filled(form.get("reason", "").strip(), "reason", "Reason: say why, for the audit.")
        await administer.remove(
            asked, kind.kind, form.get("name", ""), reason=reason, expected=_version(form.get("version", ""))
        )
        return done(asked, f"/{kind.slug}", "removed")

    return run


def _form(
    asked: Asked,
    kind: EditedKind,
    name: str,
    fields: dict[str, str],
    value: dict[str, Any],
    version: int,
    *,
    problem: ProblemError | None = None,
    reason: str = "",
    status: int = 200,
    inherited: bool = False,
) -> Response:
    unlimited = {field.name for field in kind.fields if field.unlimited and value.get(field.name) == "unlimited"}
    current = None if problem is None else problem.more.get("current")
    return page(
        asked,
        "entry.html",
        active=kind.slug,
        status=status,
        kind=kind,
        name=name,
        fields=fields,
        unlimited=unlimited,
        version=version,
        problem=problem,
        inherited=inherited,
        reason=reason,
        current=kind.shown(current) if isinstance(current, dict) else None,
        current_value=current,
        current_version=0 if problem is None else problem.more.get("version", 0),
    )


# ------------------------------------------------------------------------------ raises and stops


async def raises(asked: Asked) -> Response:
    state = None if asked.desk.control is None else await asked.desk.control.state()
    now_ms = asked.now_ms
    return page(
        asked,
        "raises.html",
        active="raises",
        administered=state is not None,
        stops=[] if state is None else [entry.value for entry in state.stops.values() if entry.value.holds(now_ms)],
        raises=[]
        if state is None
        else [entry.value for entry in state.raises.values() if now_ms < entry.value.until_ms],
        policies=list(dict.fromkeys(policy.name for policy in asked.desk.guard.policies)),
        scopes=known_scopes(asked.desk.guard.policies),
        wanted=asked.query,
        tz=asked.desk.options.tz,
    )


async def stop_new(asked: Asked) -> Response:
    await administer.stop(asked, _told(asked, NewStop))
    return done(asked, _back(asked), "stopped")


async def stop_end(asked: Asked) -> Response:
    await administer.end(asked, "stop", asked.form.get("id", ""), reason=asked.form.get("reason", ""))
    return done(asked, "/raises", "released")


async def raise_new(asked: Asked) -> Response:
    await administer.raise_limit(asked, _told(asked, NewRaise))
    return done(asked, "/raises", "raised")


async def raise_end(asked: Asked) -> Response:
    await administer.end(asked, "raise", asked.form.get("id", ""), reason=asked.form.get("reason", ""))
    return done(asked, "/raises", "lowered")


async def reset(asked: Asked) -> Response:
    wanted = _told(asked, Reset)
    await administer.reset(asked, wanted)
    return done(asked, "/limits", "reset", scope=wanted.scope, subject=wanted.subject, caller=wanted.caller or None)


def _told(asked: Asked, kind: type[Any]) -> Any:
    """What a form says, without the fields that were left empty."""
    told: dict[str, object] = {}
    quoted = bool(asked.form.get("quoted"))
    for name in kind.__struct_fields__:
        text = asked.form.get(name, "").strip()
        if text:
            told[name] = unquote(text) if quoted and name in _IDS else text
    if isinstance(amount := told.get("amount"), str):
        told["amount"] = amount.replace(",", "").replace("\N{NO-BREAK SPACE}", "")  # as pages show them
    for name in ("departments", "tags", "policies"):
        if isinstance(lines := told.get(name), str):
            told[name] = [line.strip() for line in re.split(r"[\n,]", lines) if line.strip()]
    try:
        return converted(told, kind)
    except ProblemError as problem:
        if problem.field == "amount":
            problem.detail = "Expected a number such as 12.50 or 20,000,000."
        problem.detail = f"{problem.field}: {problem.detail}"
        raise


def _back(asked: Asked) -> str:
    return "/sessions" if asked.form.get("back") == "sessions" else "/raises"


# ---------------------------------------------------------------------------------------- keys


async def keys(asked: Asked) -> Response:
    state = None if asked.desk.control is None else await asked.desk.control.state()
    return page(
        asked,
        "keys.html",
        active="keys",
        administered=state is not None,
        keys=[] if state is None else _by_caller([entry.value for entry in state.keys.values()], asked.now_ms),
        tz=asked.desk.options.tz,
    )


def _by_caller(keys: Sequence[Key], now_ms: int) -> list[Key]:
    """Those that are over last."""
    return sorted(keys, key=lambda key: (not key.is_active(now_ms), key.caller.casefold(), -key.created_ms))


async def key_new(asked: Asked) -> Response:
    secret, key = await administer.make_key(asked, _told(asked, NewKey))
    return page(asked, "key.html", active="keys", secret=secret, key=key, replaced=None)


async def key_rotate(asked: Asked) -> Response:
    name = asked.form.get("id", "")
    reason = _filled(asked.form.get("reason", "").strip(), "reason", "Reason: say why, for the audit.")
    secret, key = await administer.rotate(asked, name, overlap=asked.form.get("overlap", "") or "1d", reason=reason)
    return page(asked, "key.html", active="keys", secret=secret, key=key, replaced=name)


async def key_revoke(asked: Asked) -> Response:
    reason = _filled(asked.form.get("reason", "").strip(), "reason", "Reason: say why, for the audit.")
    await administer.revoke(asked, asked.form.get("id", ""), reason=reason)
    return done(asked, "/keys", "revoked")


def _filled(text: str, field: str, otherwise: str) -> str:
    if not text:
        raise ProblemError(422, otherwise, field=field)
    return text


def _version(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 17):
        raise ProblemError(422, "The form does not say which version it was made from.", field="version")
    return int(text)
