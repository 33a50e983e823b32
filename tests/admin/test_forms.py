"""Forms of every kind, as a browser without scripts sends them."""

from __future__ import annotations

import html
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.admin.kit import CALLER_KEY, NOW_MS, TOKENS, Desk, desk, hidden, options

from asgi_llm_guard import Budget, Concurrency, Context, Guard, RateLimit
from asgi_llm_guard.control import Actor, Control, ControlState, NewerRelease
from asgi_llm_guard.identity.base import Identity, IdentityError, Scope
from asgi_llm_guard.ledger import RefusalCount
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import OutageStorage, asgi_client

pytestmark = pytest.mark.anyio


async def _fill_in(client: httpx2.AsyncClient, shown: str, sent: str, **fields: str) -> httpx2.Response:
    """Load a page, and send a form of it."""
    page = await client.get(f"/admin{shown}")
    token = hidden(page.text, "form_token")
    return await client.post(f"/admin{sent}", data={"form_token": token, **fields})


async def test_departments(page: Desk) -> None:
    """C16: a quota is added, shown as it was written, changed and removed by its form; a limit that was left empty is asked for."""
    client = await page.browser("admin")
    good = {
        "name": "research",
        "version": "0",
        "daily_cost": "1,250.50",
        "monthly_cost.unlimited": "1",
        "daily_tokens": "2,000,000",
        "monthly_tokens.unlimited": "1",
        "models": "openai/*\r\n\r\nanthropic/claude-sonnet-4-5",
        "tz": "Europe/Berlin",
        "reason": "pilot",
    }
    empty = await _fill_in(client, "/departments/edit", "/departments/edit", **{**good, "daily_cost": ""})
    assert (empty.status_code, "write a limit, or tick that there is none" in empty.text) == (422, True)
    assert "pilot" in empty.text  # nothing has to be written again
    for field, value in (("name", ""), ("reason", ""), ("tz", "Mars"), ("daily_cost", "-1"), ("daily_tokens", "many")):
        wrong = await _fill_in(client, "/departments/edit", "/departments/edit", **{**good, field: value})
        assert wrong.status_code == 422, field
        assert 'aria-invalid="true"' in wrong.text or field == "reason", field
    assert (
        await _fill_in(client, "/departments/edit", "/departments/edit", **{**good, "version": "x"})
    ).status_code == 422

    done = await _fill_in(client, "/departments/edit", "/departments/edit", **good)
    assert (done.status_code, done.headers["location"]) == (303, "/admin/departments?done=saved")
    text = html.unescape((await client.get("/admin/departments/edit?name=research")).text)
    for shown in (
        'value="1250.50"',
        'value="2,000,000"',
        "openai/*\nanthropic/claude-sonnet-4-5",
        'value="Europe/Berlin"',
    ):
        assert shown in text
    version = hidden(text, "version")
    stale = await _fill_in(
        client, "/departments/edit?name=research", "/departments/edit", **{**good, "version": "0", "daily_cost": "7"}
    )
    assert stale.status_code == 409
    assert "Somebody else has changed it meanwhile" in stale.text
    gone = await _fill_in(
        client,
        "/departments/edit?name=research",
        "/departments/remove",
        name="research",
        version=version,
        reason="over",
    )
    assert gone.headers["location"] == "/admin/departments?done=removed"
    again = await _fill_in(
        client, "/departments", "/departments/remove", name="research", version=version, reason="over"
    )
    assert again.status_code in {404, 409}


@pytest.mark.parametrize(
    ("slug", "fields", "wrong", "shown"),
    [
        ("agents", {"max_iterations": "12", "params": '{"x_tier": "gold"}'}, {"params": "{"}, ["12", "gold"]),
        ("agents", {"max_iterations.unlimited": "1"}, {"params": "[1]"}, ["no limit"]),
        (
            "prices",
            {"name": "openai/gpt-5", "entry": '{"input": "1.10"}', "from_ms": str(NOW_MS)},
            {"entry": "x"},
            ["1.10", "2026-11-22 12:00"],
        ),
        (
            "prices",
            {
                "name": "openai/gpt-5",
                "entry": '{"input": "1"}',
                "from_ms": "2026-12-01",
                "until_ms": "2026-12-31T09:30+01:00",
            },
            {"from_ms": "soon"},
            ["2026-12-01 00:00", "2026-12-31 08:30"],
        ),
        ("knowledge-bases", {"cache": "1", "acl": "d1"}, {"acl": ""}, ["yes", "d1"]),
    ],
)
async def test_other_kinds(
    slug: str, fields: dict[str, str], wrong: dict[str, str], shown: list[str], page: Desk
) -> None:
    """C16: agents, prices and knowledge bases are added by their forms, listed, and named in the audit; what is malformed is said."""
    client = await page.browser("admin")
    told = {"name": "one", "version": "0", "reason": "r", **fields}
    assert (await _fill_in(client, f"/{slug}/edit", f"/{slug}/edit", **{**told, **wrong})).status_code == 422
    done = await _fill_in(client, f"/{slug}/edit", f"/{slug}/edit", **told)
    assert done.status_code == 303, done.text
    text = (await client.get(f"/admin/{slug}")).text
    assert [part for part in shown if part not in text] == []
    edited = await client.get(f"/admin/{slug}/edit", params={"name": told["name"]})
    assert edited.status_code == 200
    if "until_ms" in fields:
        assert 'value="2026-12-31T08:30:00Z"' in edited.text
    assert (await page.audit())[0].reason == "r"


async def test_raises_stops_and_resets(page: Desk) -> None:
    """S8: an operator stops, releases, raises, ends and resets by forms; each is in the audit with its reason."""
    client = await page.browser("operator")
    stopped = await _fill_in(client, "/raises", "/stops", scope="agent", subject="crawler", lasts="", reason="loops")
    assert stopped.headers["location"] == "/admin/raises?done=stopped"
    assert "it is released" in (await client.get("/admin/raises?done=stopped")).text
    quoted = await _fill_in(
        client, "/raises", "/stops", quoted="1", scope="session", subject="a%2Fb", caller="c%26d", lasts="1h", reason="r", back="sessions"
    )  # fmt: skip
    assert quoted.headers["location"] == "/admin/sessions?done=stopped"
    assert page.control is not None
    stops = (await page.control.state()).stops
    assert {(each.value.subject, each.value.caller) for each in stops.values()} == {("crawler", None), ("a/b", "c&d")}
    for name in stops:
        ended = await _fill_in(client, "/raises", "/stops/end", id=name, reason="fine")
        assert ended.headers["location"] == "/admin/raises?done=released"
    assert (await _fill_in(client, "/raises", "/stops", scope="agent", subject="", reason="r")).status_code == 422
    assert (await _fill_in(client, "/raises", "/stops", scope="planet", subject="x", reason="r")).status_code == 422
    assert (await _fill_in(client, "/raises", "/stops/end", id="nobody", reason="r")).status_code == 404

    raised = await _fill_in(
        client, "/raises", "/raises", policy="quota", amount="5", unit="usd", lasts="1d", reason="deadline"
    )
    assert raised.headers["location"] == "/admin/raises?done=raised"
    name = next(iter((await page.control.state()).raises))
    assert (
        (await _fill_in(client, "/raises", "/raises/end", id=name, reason="over"))
        .headers["location"]
        .endswith("lowered")
    )
    for wrong in ({"amount": "-5"}, {"amount": "0"}, {"lasts": "9999mo"}, {"unit": "ids"}):
        fields = {"policy": "quota", "amount": "5", "unit": "usd", "lasts": "1d", "reason": "r", **wrong}
        assert (await _fill_in(client, "/raises", "/raises", **fields)).status_code == 422, wrong

    reset = await _fill_in(
        client,
        "/limits?scope=user&subject=mia",
        "/limits/reset",
        quoted="1",
        scope="user",
        subject="mia",
        reason="new week",
    )
    assert reset.headers["location"] == "/admin/limits?scope=user&subject=mia&done=reset"
    assert (
        await _fill_in(client, "/raises", "/limits/reset", scope="planet", subject="x", reason="r")
    ).status_code == 422
    assert (await client.get("/admin/limits?scope=planet&subject=x")).status_code == 422
    assert {row.reason for row in await page.audit(actor="operator")} >= {
        "loops",
        "fine",
        "deadline",
        "over",
        "new week",
    }


async def test_keys(page: Desk) -> None:
    """A key is made, rotated and revoked by forms; it is shown on the page that answers, and on no other."""
    client = await page.browser("admin")
    made = await _fill_in(
        client, "/keys", "/keys", caller="crm", user="ada", departments="sales, research", lasts="90d", reason="new"
    )
    assert made.status_code == 200
    secret = made.text.partition('id="secret">')[2].partition("<")[0]
    assert secret.startswith("lg-")
    assert page.control is not None
    key = next(iter((await page.control.state()).keys.values())).value
    assert (key.departments, key.expires_at_ms) == (("sales", "research"), NOW_MS + 90 * 86_400_000)
    rotated = await _fill_in(client, "/keys", "/keys/rotate", id=key.id, overlap="1h", reason="regular")
    assert (rotated.status_code, key.id in rotated.text, secret in rotated.text) == (200, True, False)
    for overlap, reason, status in (("soon", "r", 422), ("1h", "", 422)):
        assert (
            await _fill_in(client, "/keys", "/keys/rotate", id=key.id, overlap=overlap, reason=reason)
        ).status_code == status
    assert (await _fill_in(client, "/keys", "/keys/rotate", id="nobody", reason="r")).status_code == 404
    assert (await _fill_in(client, "/keys", "/keys/revoke", id=key.id, reason="leak")).status_code == 303
    assert (await _fill_in(client, "/keys", "/keys/revoke", id=key.id, reason="again")).status_code in {303, 422}
    assert (await _fill_in(client, "/keys", "/keys/revoke", id="nobody", reason="leak")).status_code == 404
    assert (await _fill_in(client, "/keys", "/keys/revoke", id=key.id, reason="")).status_code == 422
    assert (await _fill_in(client, "/keys", "/keys", caller="", reason="r")).status_code == 422
    text = (await client.get("/admin/keys")).text
    assert "revoked" in text
    assert secret not in text


async def test_bodies_that_are_no_forms(page: Desk) -> None:
    """What is no form, too long, or has too many fields is refused as such."""
    client = await page.browser("operator")
    for content, kind, status in (
        (b"{}", "application/json", 415),
        (b"a=" + b"x" * 300_000, "application/x-www-form-urlencoded", 413),
        (b"a=%ff", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"a=1" for _ in range(500)), "application/x-www-form-urlencoded", 400),
    ):
        answer = await client.post("/admin/stops", content=content, headers={"content-type": kind})
        assert answer.status_code == status


# --------------------------------------------------------------------------- what goes wrong


async def test_refusals_stand_where_the_audit_does_not(page: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Where a refused try cannot be written into the audit, it is refused all the same, and the log says so."""
    assert page.control is not None
    await page.control.aclose()
    with caplog.at_level(logging.WARNING, "asgi_llm_guard"):
        answer = await page.client(headers={"x-api-key": CALLER_KEY}).get("/admin/")
    assert answer.status_code == 403
    assert [record.getMessage() for record in caplog.records if "not in the audit" in record.getMessage()]


class _Strange:
    """A resolver that does what the request says."""

    def __call__(self, scope: Scope, /) -> Identity | None:
        wanted = dict(scope["headers"]).get(b"x-who", b"")
        if wanted == b"malformed":
            raise IdentityError("The header is malformed.")
        if wanted == b"broken":
            raise KeyError("session")
        return Identity(caller=wanted.decode()) if wanted else None


async def test_resolvers_that_fail_open_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resolver that refuses the request, or breaks because its middleware is elsewhere, lets nobody in and breaks no page."""
    made = desk(tmp_path, identity=_Strange())
    for who, status in (("malformed", 401), ("broken", 401), ("mia", 403)):
        assert (await made.client(headers={"x-who": who}).get("/admin/api/v1/health")).status_code == status
    assert (await made.client("viewer", headers={"x-who": "broken"}).get("/admin/api/v1/health")).status_code == 200
    assert (await made.client(headers={"x-who": "malformed"}).get("/usage/v1/usage")).status_code == 400
    assert "the resolver failed" in caplog.text
    await made.aclose()


async def test_headers_of_two_tokens(page: Desk) -> None:
    """Another scheme, or two Authorization headers, are refused before a token is looked at."""
    client = page.client()
    assert (await client.get("/admin/", headers={"authorization": "Basic eA=="})).status_code == 403
    twice = [("authorization", "Bearer a"), ("authorization", "Bearer b")]
    assert (await client.get("/admin/", headers=twice)).status_code == 403
    assert (await client.get("/admin/", headers={"cookie": "\x00=;;llm_guard_admin"})).status_code == 303


class _Broken(Guard):
    """A guard with a mistake in it."""

    def health(self) -> dict[str, object]:
        raise RuntimeError("canary of an error")


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_what_breaks_says_nothing(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody expected is a 500, which says nothing of it; the log says all."""
    guard = _Broken()
    async with asgi_client(guard.admin_app(options())) as client:
        answer = await client.get(path, headers={"authorization": f"Bearer {TOKENS['viewer']}"})
        assert (await client.get("/api/v1/keys")).status_code == 401  # nobody is a caller without an identity
    assert (answer.status_code, "Something went wrong here" in answer.text) == (500, True)
    assert "canary" not in answer.text
    assert "canary of an error" in caplog.text
    await guard.aclose()


async def test_callers_pages_while_the_store_is_away() -> None:
    """While the store is away, a caller is told to come back, with no word of the store."""
    storage = OutageStorage(MemoryStorage())
    guard = Guard([Budget("$5/1d", per="caller")], storage=storage, identity=_Strange())
    async with asgi_client(guard.usage_app()) as client:
        assert (await client.get("/v1/usage", headers={"x-who": "mia"})).status_code == 200
        storage.down()
        answer = await client.get("/v1/usage", headers={"x-who": "mia"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        storage.up()
        head = await client.head("/", headers={"x-who": "mia", "accept": "text/html"})
        assert (head.status_code, head.content) == (200, b"")
        assert (await client.get("/static/admin.css")).status_code == 200
    await guard.aclose()


async def test_callers_read_their_limits_in_words() -> None:
    """T15: on the callers' page money is rounded, with all of it beside it, numbers are grouped, and a limit without a window
    says so."""
    policies: list[Policy] = [Concurrency(4, per="caller"), Budget(["$5/daily", "2000000 tokens/daily"], per="caller")]
    guard = Guard(policies, identity=_Strange())
    async with asgi_client(guard.usage_app()) as client:
        async with (
            guard.open(Context(caller="mia")),
            guard.call(model="openai/gpt-4o-mini", input_tokens=1_234, max_output_tokens=10),
        ):
            pass
        text = (await client.get("/", headers={"x-who": "mia", "accept": "text/html"})).text
        used = (await client.get("/v1/usage", headers={"x-who": "mia"})).json()["limits"][1]["remaining"]
    assert "at the same time" in text
    assert "when a call ends" in text
    assert "None" not in text
    assert f'title="${used}">$5.00</span>' in text
    assert "2,000,000\N{NO-BREAK SPACE}tokens" in text
    await guard.aclose()


async def test_callers_see_problems_as_a_page() -> None:
    """T15: who opens the callers' page in a browser is told in words what is wrong, with the same status as programs."""
    storage = OutageStorage(MemoryStorage())
    guard = Guard([Budget("$5/1d", per="caller")], storage=storage, identity=_Strange())
    async with asgi_client(guard.usage_app()) as client:
        client.headers["accept"] = "text/html"
        stranger = await client.get("/")
        assert (stranger.status_code, stranger.headers["www-authenticate"]) == (401, "Bearer")
        assert stranger.headers["content-type"] == "text/html; charset=utf-8"
        assert "Send the credential" in stranger.text
        storage.down()
        away = await client.get("/", headers={"x-who": "mia"})
        assert (away.status_code, "does not answer" in away.text, away.headers["retry-after"]) == (503, True, "5")
        data = await client.get("/v1/usage")
        assert (data.status_code, data.headers["content-type"]) == (401, "application/problem+json")
    await guard.aclose()


@pytest.mark.parametrize("kind", ["admin", "usage"])
async def test_lifespan_and_sockets(kind: str) -> None:
    """Served alone, both apps start and stop in order, and close a WebSocket."""
    guard = Guard(identity=_Strange())
    app: Any = guard.admin_app(options()) if kind == "admin" else guard.usage_app()
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    told = iter(["lifespan.startup", "lifespan.shutdown", "websocket.connect"])

    async def receive() -> Any:
        return {"type": next(told)}

    await app({"type": "lifespan"}, receive, send)
    await app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
    await guard.aclose()


async def test_nothing_to_reset_without_administration_data(tmp_path: Path) -> None:
    """Without administration data nothing is changed, since nothing could be audited; what is read is read."""
    made = desk(tmp_path, control=False, ledger=None, storage="memory://")
    client = made.client("admin")
    for path in ("departments", "keys", "audit"):
        answer = await client.get(f"/admin/api/v1/{path}")
        assert (answer.status_code, "control=" in answer.json()["detail"]) == (409, True)
    assert (await client.post("/admin/api/v1/stops", json={"scope": "all", "reason": "r"})).status_code == 409
    assert (await client.get("/admin/api/v1/health")).status_code == 200
    assert (await made.client(headers={"x-api-key": CALLER_KEY}).get("/admin/")).status_code == 403
    await made.aclose()


async def test_clients_that_leave_while_they_send(page: Desk) -> None:
    """A client that leaves in the middle of its body is no error of the service."""
    app = page.guard.admin_app(options())
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    headers = [(b"authorization", f"Bearer {TOKENS['operator']}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/v1/stops", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 400


async def test_cookies_of_other_applications(page: Desk) -> None:
    """A cookie of another application with a name that is none hides no session."""
    client = await page.browser("viewer")
    kept = client.cookies["llm_guard_admin"]
    odd = page.client(headers={"cookie": f"a:b[c]=d; llm_guard_admin={kept}; e=f"})
    assert (await odd.get("/admin/health")).status_code == 200


def test_without_the_extra() -> None:
    """Without jinja2, what is missing is said, and how to install it."""
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from asgi_llm_guard import Guard\n"
        "from asgi_llm_guard.errors import NotInstalledError\n"
        "for make in (lambda g: g.admin_app(None), lambda g: g.usage_app()):\n"
        "    try: make(Guard())\n"
        "    except NotInstalledError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.count("pip install 'asgi-llm-guard[admin]'") == 2


async def test_storages_that_tell_less(tmp_path: Path) -> None:
    """Over a storage that keeps no records and cannot list its calls the pages say what they do not know, and never zero."""
    made = desk(tmp_path, storage=LimitsStorage("memory://"), policies=[RateLimit("60/minute", per="caller")])
    client = made.client("admin")
    assert made.guard.ledger is None
    overview = (await client.get("/admin/")).text
    for told in (
        "No ledger is configured",
        "this storage cannot list open calls",
        '<span class="unknown">unknown</span>',
    ):
        assert told in overview
    assert "$0.00" not in overview.partition("Budgets")[0]
    assert '<span class="unknown">unknown</span>' in overview.partition("<dt>Refused</dt>")[2].partition("</div>")[0]
    assert "Nothing was refused" not in overview
    for path, told in (
        ("/department?name=research", "Limits"),
        ("/departments", "No department has a quota or has called yet"),
        ("/sessions", "cannot list open calls"),
        ("/refusals", "No ledger is configured"),
        ("/health", "none is configured"),
    ):
        assert told in (await client.get(f"/admin{path}")).text, path
    for path in ("usage", "calls"):
        assert (await client.get(f"/admin/api/v1/{path}")).status_code == 409
    assert (await client.get("/admin/api/v1/refusals")).json() == {
        "counts": [],
        "next_until_ms": None,
        "latest": [],
    }
    await made.aclose()


async def test_refusals_of_all_processes(page: Desk) -> None:
    """What the ledger has counted is summed up by policy and code, on the pages and by the API."""
    assert page.guard.ledger is not None
    hour_ms = NOW_MS - 3_600_000
    counts = [
        RefusalCount(
            hour_ms=hour_ms - each * 3_600_000, policy="quota", scope="department", code="quota_exceeded", count=each
        )
        for each in (1, 2, 3)
    ]
    await page.guard.ledger.add_refusals(counts)
    assert "quota exceeded" in (await page.client("viewer").get("/admin/refusals")).text
    told = (await page.client("viewer").get("/admin/api/v1/refusals", params={"policy": "quota"})).json()
    assert sum(each["count"] for each in told["counts"]) == 6
    ended = await page.client("operator").delete("/admin/api/v1/raises/nobody")
    assert ended.status_code == 404


class _Newer(Control):
    """Administration data that a newer release has written."""

    async def state(self) -> ControlState:
        raise NewerRelease("control: there are entries of a kind that this release does not know")


async def test_data_of_a_newer_release(tmp_path: Path) -> None:
    """Administration data that this release cannot read are said to be that, with 503, and not shown as empty."""
    made = desk(tmp_path, control=False)
    made.guard.control = _Newer(f"sqlite:///{tmp_path}/newer.db")
    answer = await made.client("viewer").get("/admin/agents")
    assert (answer.status_code, "does not know" in answer.text) == (503, True)
    await made.guard.control.aclose()
    made.guard.control = None
    await made.aclose()


async def test_files_and_pages_that_there_are_not(page: Desk) -> None:
    """A file that there is not, a department without a name, and limits of nothing lead somewhere."""
    client = page.client("viewer")
    assert (await client.get("/admin/static/passwd")).status_code == 404
    assert (await client.get("/admin/static/..%2Foptions.py")).status_code == 404
    assert (await client.get("/admin/department")).headers["location"] == "/admin/departments"
    stale = await client.get("/admin/static/admin.css?v=old")
    assert stale.headers["cache-control"] == "no-cache"


async def test_the_audit_is_read_to_its_beginning(page: Desk) -> None:
    """The audit is shown a page at a time, down to its first row."""
    assert page.control is not None
    actor = Actor(name="mia", role="admin")
    for number in range(150):
        await page.control.note("try", f"target-{number}", actor=actor)
    client = page.client("operator")
    first = (await client.get("/admin/audit?actor=mia")).text
    older = re.search(r'href="([^"]+)">Older', first)
    assert older is not None
    second = (await client.get(html.unescape(older[1]))).text
    assert ("target-149<" in first, "target-0<" in first) == (True, False)
    assert ("target-149<" in second, "target-0<" in second, "Older" in second) == (False, True, False)
    rows = (await client.get("/admin/api/v1/audit", params={"before": "3"})).json()
    assert [row["seq"] for row in rows] == [2, 1]
