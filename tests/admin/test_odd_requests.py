"""Requests that no page sends: they are refused with a reason, change nothing, and break nothing."""

from __future__ import annotations

import html
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.admin.kit import NOW_MS, SECRET, TOKENS, Desk, hidden, options

from asgi_llm_guard import Budget, Context, Guard
from asgi_llm_guard.control import Control
from asgi_llm_guard.testing import FrozenClock, asgi_client

pytestmark = pytest.mark.anyio

_API = "/admin/api/v1"


async def _send(client: httpx2.AsyncClient, page: str, path: str, **fields: str) -> httpx2.Response:
    token = hidden((await client.get(f"/admin{page}")).text, "form_token")
    return await client.post(f"/admin{path}", data={"form_token": token, **fields})


@pytest.mark.parametrize("origin", ["null", "http://[", "http://testserver.evil", "testserver", "", "://", "file://"])
async def test_origins_that_are_none(origin: str, page: Desk) -> None:
    """T13: an Origin that names no site, or none that can be read, is another site's: 403, and no error."""
    client = page.client(headers={"origin": origin})
    answer = await client.post("/admin/login", data={"login_token": "x", "token": TOKENS["admin"]})
    assert answer.status_code == 403
    assert "another site" in answer.text


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "/agents/a", r'{"value": {"params": {"x_a": "\ud800"}}, "reason": "r"}', "value.params.x_a"),
        ("PUT", "/agents/a", r'{"value": {"params": {"x_\udfff": 1}}, "reason": "r"}', "value.params"),
        ("PUT", "/agents/a", r'{"value": {"max_iterations": 3}, "reason": "\ud800"}', "reason"),
        ("POST", "/stops", r'{"scope": "user", "subject": "\ud800", "reason": "r"}', "subject"),
        ("POST", "/resets", r'{"scope": "user", "subject": "\ud800", "reason": "r"}', "subject"),
        ("POST", "/keys", r'{"caller": "a", "tags": ["\ud800"], "reason": "r"}', "tags[0]"),
    ],
)
async def test_half_characters(method: str, path: str, body: str, field: str, page: Desk) -> None:
    """T16: text that cannot be written down is a 422 that names its field, wherever it stands."""
    answer = await page.client("admin").request(
        method, _API + path, content=body, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text


@pytest.mark.parametrize("params", [r'{"x_a": "\ud800"}', '{"x_a": null}', '{"x_a": NaN}', '{"x_a": 1, "x_a": 2}'])
async def test_tables_of_forms(params: str, page: Desk) -> None:
    """T13: what the API takes of no program, a form takes of nobody: null, NaN, half a character, a key twice."""
    client = await page.browser("admin")
    answer = await _send(
        client, "/agents/edit", "/agents/edit", name="a", max_iterations="5", params=params, version="0", reason="r"
    )
    assert answer.status_code == 422
    assert "Parameters of your own policies: " in answer.text
    assert page.control is not None
    assert not (await page.control.state()).agents


@pytest.mark.parametrize(
    ("query", "field"),
    [("where.department=a&where.department=b", "where.department"), ("limit=1&limit=500", "limit")],
)
async def test_parameters_that_are_there_twice(query: str, field: str, page: Desk) -> None:
    """A parameter that is given twice is refused: neither of the two is passed over."""
    answer = await page.client("viewer").get(f"{_API}/usage?{query}")
    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_reasons_have_an_end(page: Desk) -> None:
    """S6: a reason in the address is as long as one in a body at most; nothing is taken away for a longer one."""
    client = page.client("admin")
    made = (await client.post(f"{_API}/keys", json={"caller": "a", "reason": "r"})).json()
    address = f"{_API}/keys/{made['id']}"
    answer = await client.delete(address, params={"reason": "r" * 501})
    assert (answer.status_code, answer.json()["field"]) == (422, "reason")
    assert [key["active"] for key in (await client.get(f"{_API}/keys")).json()] == [True]
    assert (await client.delete(address, params={"reason": "r" * 500})).status_code == 204


@pytest.mark.parametrize(
    ("unit", "amount", "kept"),
    [("tokens", "20,000,000", 20_000_000), ("tokens", "20000000", 20_000_000), ("usd", "1,250.50", 1_250_500_000_000)],
)
async def test_raises_are_as_large_as_quotas(unit: str, amount: str, kept: int, page: Desk) -> None:
    """A limit of tokens is raised by tens of millions, and amounts may be written as the pages show them."""
    client = await page.browser("operator")
    answer = await _send(
        client, "/raises", "/raises", policy="quota", amount=amount, unit=unit, lasts="1d", reason="month end"
    )
    assert answer.status_code == 303, html.unescape(answer.text)
    assert page.control is not None
    assert [entry.value.more for entry in (await page.control.state()).raises.values()] == [kept]


async def test_amounts_that_are_none_are_explained(page: Desk) -> None:
    """A form says which field is wrong, and what to write there."""
    client = await page.browser("operator")
    answer = await _send(
        client, "/raises", "/raises", policy="quota", amount="a lot", unit="usd", lasts="1d", reason="r"
    )
    assert answer.status_code == 422
    assert "amount: Expected a number such as 12.50" in answer.text


async def test_a_session_that_was_reset_is_shown(page: Desk) -> None:
    """After the reset of a session its limits are shown, and not that its caller is missing."""
    client = await page.browser("operator")
    answer = await _send(
        client,
        "/limits?scope=session&subject=s%261&caller=service-a",
        "/limits/reset",
        quoted="1", scope="session", subject="s%261", caller="service-a", reason="r",
    )  # fmt: skip
    assert answer.status_code == 303
    shown = await client.get(answer.headers["location"])
    assert (shown.status_code, "Limits of session" in shown.text) == (200, True)


async def test_nothing_is_reset_that_cannot_be_audited(tmp_path: Path) -> None:
    """S6: while the administration data are away a reset is refused, and what was used stays used."""
    clock = FrozenClock(NOW_MS)
    folder = tmp_path / "control"
    folder.mkdir()
    control = Control(f"sqlite:///{folder}/control.db", secret=SECRET, clock=clock)
    guard = Guard([Budget("$50/1d", per="user")], control=control, clock=clock)
    async with asgi_client(Starlette(routes=[Mount("/admin", guard.admin_app(options()))])) as client:
        client.headers["authorization"] = f"Bearer {TOKENS['operator']}"
        async with (
            guard.open(Context(caller="a", user="mia")),
            guard.call(model="openai/gpt-4o-mini", input_tokens=1_000, max_output_tokens=1_000),
        ):
            pass
        before = [reading.used for _, reading in await guard.meters_of("user", "mia")]
        assert sum(before) > 0
        await control.aclose()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        answer = await client.post(f"{_API}/resets", json={"scope": "user", "subject": "mia", "reason": "r"})
        assert answer.status_code == 503, answer.text
        assert [reading.used for _, reading in await guard.meters_of("user", "mia")] == before
    await guard.aclose()


@pytest.mark.parametrize(
    ("mount", "written"), [("/verwaltung-ü", "/verwaltung-%C3%BC"), ("/x;Domain=evil", "/x%3BDomain=evil")]
)
async def test_cookies_are_for_the_path_that_browsers_write(mount: str, written: str, tmp_path: Path) -> None:
    """T13: cookies and links carry the mount's path percent-encoded: what stands in it is neither lost nor an attribute."""
    guard = Guard([], storage=f"sqlite:///{tmp_path}/guard.db")
    async with asgi_client(Starlette(routes=[Mount(mount, guard.admin_app(options()))])) as client:
        answer = await client.get(f"{written}/login")
        assert answer.status_code == 200
        attributes = answer.headers["set-cookie"].split("; ")[1:]
        assert sorted(attributes) == sorted(["HttpOnly", "Max-Age=3600", f"Path={written}", "SameSite=strict"])
        assert f'action="{written}/login"' in answer.text
    await guard.aclose()


@pytest.mark.parametrize(
    "path",
    [
        "/department?name=%00",
        "/audit?actor=%00&target=%00&before=0",
        "/limits?scope=user&subject=%00",
        "/departments/edit?name=%00",
        "/api/v1/refusals?policy=%00",
        "/api/v1/usage?where.user=%00",
        "/api/v1/limits?scope=user&subject=%00",
        "/api/v1/audit?actor=%00",
        "/api/v1/departments/%00",
    ],
)
async def test_names_that_nobody_can_have(path: str, page: Desk) -> None:
    """T16: a name that no record can have is not there, or refused, on every page and path; it breaks nothing."""
    answer = await page.client("admin").get(f"/admin{path}")
    assert answer.status_code in {200, 404, 422}, answer.text
