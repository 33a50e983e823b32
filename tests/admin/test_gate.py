"""Who is let in, for every verb of the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from tests.admin.kit import CALLER_KEY, TOKENS, Desk, desk, hidden

from asgi_llm_guard.admin.options import ROLES, Role
from asgi_llm_guard.admin.table import VERBS
from asgi_llm_guard.admin.verbs import Verb

pytestmark = pytest.mark.anyio

_GUARDED: Final = [verb for verb in VERBS.verbs if verb.role is not None]
_CHANGING: Final = [verb for verb in _GUARDED if verb.method != "GET"]
_OPEN: Final = {("GET", "/static/{name}"), ("GET", "/login"), ("POST", "/login")}


def _name(verb: Verb) -> str:
    return f"{verb.method} {verb.path}"


def _path(verb: Verb) -> str:
    return "/admin" + re.sub(r"{[^}]*}", "some-name", verb.path)


async def _send(client: httpx2.AsyncClient, verb: Verb, **more: Any) -> httpx2.Response:
    if verb.kind == "form":
        return await client.request(verb.method, _path(verb), data={"form_token": "x"}, **more)
    return await client.request(verb.method, _path(verb), json={} if verb.takes else None, **more)


def test_what_is_open_to_everybody_is_named_here() -> None:
    """T13: nothing but the login and the style sheet is there without a credential, and nobody adds to it by accident."""
    assert {(verb.method, verb.path) for verb in VERBS.verbs if verb.role is None} == _OPEN


def test_every_change_takes_more_than_a_viewer() -> None:
    """S5: a viewer changes nothing; whatever is written about a quota, a key, a price or an agent takes an admin."""
    assert [_name(verb) for verb in _CHANGING if verb.role == "viewer"] == ["POST /logout"]
    for verb in _CHANGING:
        kind = verb.path.removeprefix("/api/v1").split("/")[1]
        if kind in {"departments", "agents", "keys", "prices", "knowledge-bases"}:
            assert verb.role == "admin", _name(verb)


@pytest.mark.parametrize("verb", _GUARDED, ids=_name)
async def test_callers_credentials_open_nothing_and_leave_a_trace(verb: Verb, page: Desk) -> None:
    """T13: the credential of a caller is answered 403 on every verb, changes nothing, and is in the audit."""
    version = await _version(page)
    for name, value in (("authorization", f"Bearer {CALLER_KEY}"), ("x-api-key", CALLER_KEY)):
        answer = await _send(page.client(headers={name: value}), verb)
        assert answer.status_code == 403, answer.text
        assert CALLER_KEY not in answer.text

    rows = await page.audit()
    assert [(row.actor, row.role, row.verb, row.target, bool(row.refused)) for row in rows] == [
        ("service-a", "caller", verb.method, _path(verb), True)
    ] * 2
    assert await _version(page) == version
    assert CALLER_KEY not in repr(rows)


@pytest.mark.parametrize("verb", _GUARDED, ids=_name)
async def test_nothing_answers_without_a_credential(verb: Verb, page: Desk) -> None:
    """T13: without a credential the API answers 401, pages lead to the login, and forms change nothing."""
    version = await _version(page)
    answer = await _send(page.client(), verb)

    if verb.kind in {"page", "file"}:  # what browsers ask for
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/admin/login")
    else:
        assert answer.status_code == 401
    assert await _version(page) == version


@pytest.mark.parametrize("verb", [verb for verb in _GUARDED if verb.role != "viewer"], ids=_name)
async def test_each_role_below_the_least_one_is_refused(verb: Verb, page: Desk) -> None:
    """T13, S5: whoever is known but has too low a role is answered 403, and the try is in the audit by their name."""
    assert verb.role is not None
    below: list[Role] = [role for role in TOKENS if ROLES[role] < ROLES[verb.role]]
    for role in below:
        answer = await _send(page.client(role), verb)
        assert answer.status_code == 403, answer.text

    rows = await page.audit()
    assert [(row.actor, row.role) for row in reversed(rows)] == [(role, role) for role in below]
    assert all(row.refused == f"needs the role {verb.role}" for row in rows)


@pytest.mark.parametrize("verb", [verb for verb in _GUARDED if verb.kind == "form"], ids=_name)
async def test_forms_are_taken_from_pages_of_their_session_only(verb: Verb, page: Desk) -> None:
    """A form without the token of the session, with another's, or from another site is answered 403."""
    assert verb.role is not None
    client = await page.browser(verb.role)
    version = await _version(page)
    for token in ("", "x", "A" * 43):
        answer = await client.request(verb.method, _path(verb), data={"form_token": token})
        assert answer.status_code == 403, answer.text
    token = hidden((await client.get("/admin/")).text, "form_token")
    for origin in ("https://evil.example", "null", "http://testserver.evil.example"):
        answer = await client.request(verb.method, _path(verb), data={"form_token": token}, headers={"origin": origin})
        assert answer.status_code == 403, answer.text
    del client.headers["origin"]
    answer = await client.request(
        verb.method, _path(verb), data={"form_token": token}, headers={"sec-fetch-site": "cross-site"}
    )
    assert answer.status_code == 403
    assert await _version(page) == version


@pytest.mark.parametrize("verb", [verb for verb in _CHANGING if verb.kind == "api"], ids=_name)
async def test_the_api_changes_nothing_for_a_cookie(verb: Verb, page: Desk) -> None:
    """What changes something takes a token: a page of another site can make a browser send a cookie, and no token."""
    client = await page.browser("admin")
    answer = await _send(client, verb)
    assert (answer.status_code, "Bearer" in answer.text) == (403, True)


async def test_methods_that_a_path_has_not_are_refused(page: Desk) -> None:
    """T13: callers are answered 403 on methods and paths that there are not, admins 405 and 404."""
    for method, path in (("PATCH", "/admin/api/v1/departments/x"), ("DELETE", "/admin/"), ("GET", "/admin/nowhere")):
        caller = await page.client(headers={"x-api-key": CALLER_KEY}).request(method, path)
        admin = await page.client("admin").request(method, path)
        assert (caller.status_code, admin.status_code) == (403, 404 if method == "GET" else 405)
    patched = await page.client("admin").request("PATCH", "/admin/api/v1/departments/x")
    assert patched.headers["allow"] == "DELETE, GET, HEAD, PUT"


async def test_wrong_tokens_are_counted_by_address(page: Desk) -> None:
    """After ten wrong tokens an address is told to wait; a right one is taken all the same, and the flood is in the audit
    ten times."""
    client = page.client(headers={"authorization": "Bearer " + "x" * 43})
    statuses = [(await client.get("/admin/api/v1/health")).status_code for _ in range(13)]
    assert statuses == [403] * 10 + [429] * 3
    assert (await client.get("/admin/api/v1/health")).headers["retry-after"] == "300"
    assert (await page.client("viewer").get("/admin/api/v1/health")).status_code == 200
    assert len(await page.audit()) == 10
    page.clock.advance(seconds=300)
    assert (await client.get("/admin/api/v1/health")).status_code == 403


async def test_the_login_form_counts_wrong_tokens_too(page: Desk) -> None:
    """A wrong token in the form is answered 403 with the form again, the eleventh 429; each is in the audit."""
    client = page.client(headers={"origin": "http://testserver"})
    statuses = []
    for _ in range(11):
        token = hidden((await client.get("/admin/login")).text, "login_token")
        answer = await client.post("/admin/login", data={"login_token": token, "token": "y" * 43})
        statuses.append(answer.status_code)
        assert "y" * 43 not in answer.text
    assert statuses == [403] * 10 + [429]
    assert len(await page.audit()) == 10


async def test_logins_need_the_forms_own_cookie(page: Desk) -> None:
    """A login form that another site has made up is not taken: its token has to be that of the browser's cookie."""
    client, other = page.client(), page.client()
    token = hidden((await client.get("/admin/login")).text, "login_token")
    data = {"login_token": token, "token": TOKENS["admin"]}
    assert (await other.post("/admin/login", data=data)).status_code == 403
    assert (await client.post("/admin/login", data=data, headers={"origin": "https://evil.example"})).status_code == 403
    assert (await client.post("/admin/login", data=data)).status_code == 303


async def test_logins_and_their_way_on(page: Desk) -> None:
    """A login is in the audit, leads to the page that was wanted, and never to another site."""
    client = page.client()
    wanted = (await client.get("/admin/departments?range=7d")).headers["location"]
    assert wanted == "/admin/login?next=/departments%3Frange%3D7d"
    for given, leads in (
        ("/departments?range=7d", "/admin/departments?range=7d"),
        ("//evil.example", "/admin/"),
        ("https://evil.example", "/admin/"),
        ("/\\evil.example", "/admin/"),
    ):
        token = hidden((await client.get("/admin/login")).text, "login_token")
        answer = await client.post(
            "/admin/login", data={"login_token": token, "token": TOKENS["viewer"], "next": given}
        )
        assert (answer.status_code, answer.headers["location"]) == (303, leads)
    assert {(row.actor, row.verb) for row in await page.audit()} == {("viewer", "login")}


async def test_a_login_that_cannot_be_audited(page: Desk) -> None:
    """While the administration data are away nobody logs in, since it could not be audited: the form says so, what is to be
    done, and what works meanwhile; that does work."""
    client = page.client(headers={"origin": "http://testserver"})
    token = hidden((await client.get("/admin/login")).text, "login_token")
    assert page.control is not None
    await page.control.aclose()
    data = {"login_token": token, "token": TOKENS["admin"], "next": "/keys"}
    answer = await client.post("/admin/login", data=data)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "llm_guard_admin" not in client.cookies
    assert "cannot be written into the audit" in answer.text
    assert "http://testserver/admin/api/v1/health" in answer.text
    assert hidden(answer.text, "next") == "/keys"
    health = await page.client("admin").get("/admin/api/v1/health")
    assert (health.status_code, health.json()["ready"]) == (200, True)


async def test_sessions_end(page: Desk) -> None:
    """A session ends when it was idle for half an hour, twelve hours after its login, and with the log-out."""
    client = await page.browser("viewer")
    for _ in range(24):
        page.clock.advance(seconds=29 * 60)
        assert (await client.get("/admin/health")).status_code == 200
    page.clock.advance(seconds=29 * 60)
    assert (await client.get("/admin/health")).status_code == 303  # 12 hours and 5 minutes

    client = await page.browser("viewer")
    page.clock.advance(seconds=31 * 60)
    assert (await client.get("/admin/health")).status_code == 303

    client = await page.browser("viewer")
    kept = client.cookies["llm_guard_admin"]
    token = hidden((await client.get("/admin/")).text, "form_token")
    assert (await client.post("/admin/logout", data={"form_token": token})).status_code == 303
    again = page.client(headers={"cookie": f"llm_guard_admin={kept}"})
    assert (await again.get("/admin/health")).status_code == 303


async def test_a_log_out_holds_in_every_process(page: Desk, tmp_path: Path) -> None:
    """Who logs out in one process is logged out in all of them with the answer, and stays so while the administration
    data are away; other sessions go on."""
    other = desk(tmp_path)
    client, staying = await page.browser("viewer"), await page.browser("viewer")
    copies = [
        other.client(headers={"cookie": f"llm_guard_admin={each.cookies['llm_guard_admin']}"})
        for each in (client, staying)
    ]
    assert [(await copy.get("/admin/health")).status_code for copy in copies] == [200, 200]
    token = hidden((await client.get("/admin/")).text, "form_token")
    left = await client.post("/admin/logout", data={"form_token": token})
    assert left.headers["location"] == "/admin/login?done=left"
    assert [(await copy.get("/admin/health")).status_code for copy in copies] == [303, 200]
    assert [(row.actor, row.verb) for row in await page.audit(verb="logout")] == [("viewer", "logout")]
    assert other.control is not None
    await other.control.aclose()
    assert [(await copy.get("/admin/health")).status_code for copy in copies] == [303, 200]
    await other.aclose()


async def test_a_log_out_that_nobody_can_be_told_of(page: Desk) -> None:
    """While the administration data are away a log-out holds in its process alone, and says so; the credential is nowhere
    taken for less."""
    client = await page.browser("viewer")
    kept = client.cookies["llm_guard_admin"]
    token = hidden((await client.get("/admin/health")).text, "form_token")
    assert page.control is not None
    await page.control.aclose()
    left = await client.post("/admin/logout", data={"form_token": token})
    assert left.headers["location"] == "/admin/login?done=left_here"
    assert "other processes" in (await client.get(left.headers["location"])).text
    again = page.client(headers={"cookie": f"llm_guard_admin={kept}"})
    assert (await again.get("/admin/health")).status_code == 303


async def test_a_log_out_without_administration_data(tmp_path: Path) -> None:
    """Where nothing is administered a log-out holds in its process, and says that it holds there alone."""
    made = desk(tmp_path, control=False)
    client = await made.browser("viewer")
    kept = client.cookies["llm_guard_admin"]
    token = hidden((await client.get("/admin/health")).text, "form_token")
    left = await client.post("/admin/logout", data={"form_token": token})
    assert left.headers["location"] == "/admin/login?done=left_here"
    again = made.client(headers={"cookie": f"llm_guard_admin={kept}"})
    assert (await again.get("/admin/health")).status_code == 303
    await made.aclose()


async def test_pages_that_refresh_themselves_keep_nobody_logged_in(page: Desk) -> None:
    """A page that was left open and asks for its live part again and again ends with the idle time all the same."""
    client = await page.browser("viewer")
    for _ in range(3):
        page.clock.advance(seconds=9 * 60)
        answer = await client.get("/admin/sessions", headers={"x-refresh": "1"})
        assert answer.status_code == 200
    page.clock.advance(seconds=4 * 60)
    assert (await client.get("/admin/sessions", headers={"x-refresh": "1"})).status_code == 303


async def test_logs_have_a_line_for_each_try(page: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """T16: a path with control characters in it is one record of the log, in one line."""
    answer = await page.client("viewer").delete("/admin/api/v1/departments/a%0BX: y%1B[31m%E2%80%AE")
    assert answer.status_code == 403
    told = [record.getMessage() for record in caplog.records if "refused to viewer" in record.getMessage()]
    assert len(told) == 1
    assert told[0].isprintable()
    assert all(row.target.isprintable() for row in await page.audit())


async def test_cookies_that_somebody_else_made(page: Desk) -> None:
    """A cookie of another secret, a changed one, and that of the login form are no session."""
    client = await page.browser("admin")
    good = client.cookies["llm_guard_admin"]
    token = hidden((await page.client().get("/admin/login")).text, "login_token")
    body, _, mac = good.partition(".")
    for value in (f"{body}x.{mac}", f"{body}.{mac[:-2]}xx", body, "", ".", "x" * 5000, token):
        answer = await page.client(headers={"cookie": f"llm_guard_admin={value}"}).get("/admin/health")
        assert answer.status_code == 303, value


async def test_session_cookies_are_out_of_reach(page: Desk) -> None:
    """The cookie is for this path alone, out of reach of scripts and other sites, and of plain http where there is https."""
    for scheme in ("http", "https"):
        client = page.client(headers={"origin": f"{scheme}://testserver"})
        shown = await client.get(f"{scheme}://testserver/admin/login")
        answer = await client.post(
            f"{scheme}://testserver/admin/login",
            data={"login_token": hidden(shown.text, "login_token"), "token": TOKENS["admin"]},
        )
        cookie = answer.headers.get_list("set-cookie")[0].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "path=/admin" in cookie
        assert ("secure" in cookie) == (scheme == "https")


@pytest.mark.parametrize(
    "path", ["/admin/", "/admin/login", "/admin/static/admin.css", "/admin/api/v1/health", "/admin/no"]
)
async def test_every_answer_is_kept_in(path: str, page: Desk) -> None:
    """No script, style, frame or form of anybody else: the headers of every answer say so."""
    answer = await page.client("admin").get(path)
    policy = answer.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    if "static" not in path:
        assert answer.headers["cache-control"] == "no-store"


async def test_pages_have_no_style_or_script_of_their_own(page: Desk) -> None:
    """No page has an inline script, style or handler: the policy would not run it."""
    client = await page.browser("admin")
    for verb in _GUARDED:
        if verb.kind == "page":
            text = (await client.get(_path(verb), params={"name": "research"})).text
            assert "<style" not in text
            assert re.search(r"<script(?! src=)", text) is None
            assert re.search(r"\s(style|on[a-z]+)\s*=", text) is None, verb.path


async def test_nothing_is_there_without_being_mounted(tmp_path: Path) -> None:
    """T13: off by default: a guard serves no administration page until somebody mounts one."""
    made = desk(tmp_path)
    made.service.router.routes.pop(0)
    assert (await made.client("admin").get("/admin/")).status_code == 404
    await made.aclose()


async def _version(page: Desk) -> int:
    assert page.control is not None
    return (await page.control.state()).version
