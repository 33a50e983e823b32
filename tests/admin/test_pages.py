"""What the pages show."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Final

import pytest
from tests.admin.kit import HOSTILE, NOW_MS, Desk, desk, fill, hidden, person, record

from asgi_llm_guard import Context, LimitExceeded
from asgi_llm_guard.admin.table import VERBS
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.stops import Stop

pytestmark = pytest.mark.anyio

_PAGES: Final = [verb.path for verb in VERBS.verbs if verb.kind == "page" and verb.role is not None]
_DAY_MS: Final = 86_400_000


@pytest.mark.parametrize("path", _PAGES)
async def test_pages_without_anything_say_what_to_do(path: str, page: Desk) -> None:
    """Every page of a guard that was never called answers, as HTML."""
    answer = await page.client("admin").get(f"/admin{path}", follow_redirects=True)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<h1>" in answer.text


@pytest.mark.parametrize("path", _PAGES)
async def test_pages_without_ledger_and_administration_data(path: str, tmp_path: Path) -> None:
    """Every page of a guard that keeps neither a ledger nor administration data says so, and how to have them."""
    made = desk(tmp_path, control=False, storage="memory://", ledger=None)
    answer = await made.client("admin").get(f"/admin{path}", follow_redirects=True)
    if path.endswith("/edit"):
        assert answer.status_code in {200, 409}
    else:
        assert answer.status_code == 200
    await made.aclose()


async def test_ids_of_others_are_text(page: Desk) -> None:
    """T16: ids with markup, line breaks and changes of direction are shown as what they are, on every page."""
    await fill(
        page.guard,
        [
            record(
                1, departments=(HOSTILE,), session=HOSTILE, agent=HOSTILE, model=HOSTILE, caller=HOSTILE, user=HOSTILE
            ),
            record(2, departments=("x" * 250,), session="a\r\nSet-Cookie: x=y", agent="b" * 250, model='"><img src=x>'),
        ],
    )
    with pytest.raises(LimitExceeded):
        async with (
            page.guard.open(Context(caller=HOSTILE, departments=(HOSTILE,), session="a\r\nb")),
            page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
        ):
            pass
    assert page.control is not None
    await page.control.put(
        "stop", "s1", {"scope": "session", "subject": "a'b", "caller": "<b>c"}, actor=person("<i>"), reason="<u>why"
    )
    client = page.client("admin")
    for path in (
        *_PAGES,
        "/department?name=" + "%3Cscript%3Ealert('x')%3C/script%3E%E2%80%AEgnp.exe",
        "/limits?scope=department&subject=%3Cb%3E",
    ):
        text = re.sub(r'<input type="hidden"[^>]*>', "", (await client.get(f"/admin{path}")).text)
        for markup in ("<script>alert", "<img", "<b>c", "<i>", "<u>why", "\u202e", "a\r\n"):
            assert markup not in text, (path, markup)
    text = (await client.get("/admin/department", params={"name": HOSTILE})).text
    assert html.unescape(re.search(r"<h1><bdi>(.*?)</bdi></h1>", text)[1]) == HOSTILE.replace("\u202e", "\\u{202e}")  # type: ignore[index]


async def test_headers_take_nothing_from_ids(page: Desk) -> None:
    """T16: a name with a line break in it changes no header of an answer."""
    client = await page.browser("operator")
    token = hidden((await client.get("/admin/raises")).text, "form_token")
    answer = await client.post(
        "/admin/stops",
        data={"form_token": token, "scope": "caller", "subject": "a\r\nSet-Cookie: x=y", "lasts": "1h", "reason": "r"},
    )
    assert answer.status_code in {303, 422}
    assert "x=y" not in repr(answer.headers.get_list("set-cookie"))


async def test_unknown_cost_is_no_zero(page: Desk) -> None:
    """Calls of which no price is known are shown as unknown beside the sum, and never as $0.00 or as a part of it."""
    await fill(page.guard, [record(1), record(2, cost_nanousd=None, model="new-model"), record(3, cost_nanousd=0)])
    text = (await page.client("viewer").get("/admin/")).text
    assert "and 1 calls of unknown cost" in text
    assert "+ 1 unknown" in text
    assert ">$0.0125<" not in text  # above a cent it is rounded, and exact in the title
    assert 'title="$0.0125">$0.01</span>' in text


async def test_the_overview(page: Desk) -> None:
    """The overview has the sums of the range, each chart as a picture with title and description and as a table, and
    every limit with what is left and where it will be."""
    await fill(page.guard, [record(number, at_ms=NOW_MS - number * 3_600_000) for number in range(1, 30)])
    async with (
        page.guard.open(Context(caller="service-a", user="mia", departments=("research",))),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=100),
    ):
        text = (await page.client("viewer").get("/admin/")).text
    assert "<dt>Calls</dt><dd>23</dd>" in text
    assert "1 open calls" in text
    assert re.search(
        r'<svg class="chart"[^>]*aria-labelledby="spend-title spend-desc"><title id="spend-title">Spend per hour</title><desc',
        text,
    )
    assert text.count("<caption") == 2
    assert "research" in text
    assert (
        "too early"
        not in text.partition("Budgets and quotas")[2].partition("</section>")[0].partition("a day (UTC)")[0]
    )
    for given, calls in (("7d", 30), ("30d", 30)):
        text = (await page.client("viewer").get(f"/admin/?range={given}&tz=Europe/Berlin")).text
        assert f"<dt>Calls</dt><dd>{calls}</dd>" in text


async def test_ranges_of_ones_own(page: Desk) -> None:
    """A custom range is taken in its time zone; one that cannot be is said, with the usual one in its place."""
    await fill(page.guard, [record(1, at_ms=NOW_MS - 10 * _DAY_MS), record(2)])
    client = page.client("viewer")
    for query, calls, problem in (
        ("range=custom&since=2026-11-12T00:00&until=2026-11-13T00:00", 1, None),
        ("range=custom&since=2026-11-13T00:00&until=2026-11-12T00:00", 1, "must end after"),
        ("range=custom&since=x&until=y", 1, "needs a first and a last"),
        ("range=custom&since=0001-01-01T00:00&until=9999-12-31T23:59", 1, "no longer than two years"),
        ("range=99y", 1, "not known"),
        ("tz=Mars/Olympus", 1, "time zone is not known"),
    ):
        text = (await client.get(f"/admin/?{query}")).text
        assert f"<dt>Calls</dt><dd>{calls}</dd>" in text, query
        assert (problem is None) == ("This is the usual range" not in text), query
        assert problem is None or problem in text


async def test_ranges_that_are_no_longer_kept(page: Desk) -> None:
    """Where retention has removed what a range would need, the page says so, and since when."""
    assert page.guard.ledger is not None
    await fill(page.guard, [record(1, at_ms=NOW_MS - 600 * _DAY_MS), record(2)])
    await page.guard.ledger.roll_up()
    await page.guard.ledger.retain()
    query = "range=custom&since=2025-03-01T05:00&until=2025-05-01T00:00&tz=Asia/Kolkata"
    answer = await page.client("viewer").get(f"/admin/?{query}")
    assert (answer.status_code, "This cannot be" in answer.text) == (422, True)


async def test_a_store_that_is_away(page: Desk, tmp_path: Path) -> None:
    """Where the store does not answer, a page says so with 503, and names nothing of it."""
    assert page.control is not None
    await page.control.state()
    await page.guard.storage.aclose()
    answer = await page.client("viewer").get("/admin/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "sqlite" not in answer.text.lower()
    assert (await page.client("viewer").get("/admin/api/v1/sessions")).headers[
        "content-type"
    ] == "application/problem+json"


async def test_health_while_the_storage_is_away(page: Desk) -> None:
    """The page of health is there when it is needed: of a storage that does not answer it says so, and shows the rest; other
    pages lead to it."""
    client = page.client("viewer")
    await page.guard.storage.aclose()
    answer = await client.get("/admin/health")
    assert answer.status_code == 200
    assert "The storage does not answer" in answer.text
    assert "iterations" in answer.text
    assert 'href="/admin/health">Health' in (await client.get("/admin/sessions")).text.partition("<main")[2]


async def test_the_page_of_a_department(page: Desk) -> None:
    """A department's page has its sums alone, its limits, models, users and agents, and days and months as bars."""
    await fill(
        page.guard,
        [
            record(1),
            record(2, user="ben", model="gpt-5"),
            record(3, departments=("sales",), user="zoe"),
            record(4, departments=("sales", "research")),
        ],
    )
    text = (await page.client("viewer").get("/admin/department", params={"name": "research"})).text
    assert "<dt>Calls</dt><dd>3</dd>" in text
    assert "Spend per day" in text
    assert "Spend per month" in text
    for name in ("mia", "ben", "gpt-5", "writer"):
        assert name in text
    assert "zoe" not in text


async def test_live_sessions(page: Desk) -> None:
    """Sessions with open calls come first, with what they hold; each has a button that stops it, for operators."""
    await fill(page.guard, [record(1), record(2, session="old", at_ms=NOW_MS - 2 * 3_600_000)])
    async with (
        page.guard.open(Context(caller="without")),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=100),
        page.guard.open(Context(caller="service-a", session="busy")),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=100),
    ):
        text = (await page.client("operator").get("/admin/sessions")).text
        seen = (await page.client("viewer").get("/admin/sessions")).text
    assert text.index("busy") < text.index("session-1")
    assert ">old<" not in text
    assert "held" in text
    assert ('value="busy"' in text, 'value="busy"' in seen) == (True, False)


async def test_refusals_are_explained(page: Desk) -> None:
    """A refusal is shown with its message, every figure of every limit that refused, and whose call it was."""
    with pytest.raises(LimitExceeded):
        async with (
            page.guard.open(Context(caller="service-a", departments=("unknown",), session="s9")),
            page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
        ):
            pass
    with pytest.raises(LimitExceeded) as refused:
        async with (
            page.guard.open(Context(caller="service-a", user="mia", departments=("research",))),
            page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=2_000_000),
        ):
            pass
    text = (await page.client("viewer").get("/admin/refusals")).text
    assert "no quota is set for the department" in html.unescape(text)
    assert "s9" in text
    assert refused.value.denied.policy in text
    assert "Asked for" in text
    alone = (await page.client("viewer").get("/admin/refusals?policy=nobody")).text
    assert "refused nothing by this policy" in alone


async def test_raises_and_stops(page: Desk) -> None:
    """Stops and raises that hold are shown with what they are of; those that are over are not."""
    assert page.control is not None
    for name, until_ms in (("now", NOW_MS + 1), ("past", NOW_MS - 1)):
        await page.control.put(
            "stop",
            f"stop-{name}",
            Stop(scope="agent", subject=f"agent-{name}", until_ms=until_ms, id=f"stop-{name}"),
            actor=person("a"),
        )
        raised = Raise(policy=f"policy-{name}", unit="usd", amount=5, until_ms=until_ms, id=f"raise-{name}")
        await page.control.put("raise", f"raise-{name}", raised, actor=person("a"))
    text = (await page.client("viewer").get("/admin/raises")).text
    assert "agent-now" in text
    assert "policy-now" in text
    assert "$5.00" in text
    assert "past" not in text


async def test_health_and_policies(page: Desk) -> None:
    """The page of health says whether this process is ready, and which policies are asked in which order."""
    text = (await page.client("viewer").get("/admin/health")).text
    assert "Ready" in text
    assert text.index("quota") < text.index("provider_budget") < text.index("iterations")
    assert "{" not in text
    assert "ok since 2026-11-22 12:00:00" in text.partition("<dt>Administration data</dt>")[2]


async def test_everything_has_a_label(page: Desk) -> None:
    """Every field that is shown has a label, every table header cells, every page one heading and a way past the navigation."""
    client = page.client("admin")
    for path in _PAGES:
        text = (await client.get(f"/admin{path}", params={"name": "research"}, follow_redirects=True)).text
        assert text.count("<h1") == 1, path
        assert 'class="skip" href="#main"' in text
        assert '<html lang="en">' in text
        labelled = set(re.findall(r'<label for="([^"]+)"', text))
        without = re.sub(r"<label[^>]*>.*?</label>", "", text, flags=re.DOTALL)
        for field in re.findall(r"<(?:input|select|textarea)[^>]*>", without):
            identity = re.search(r'id="([^"]+)"', field)
            assert 'type="hidden"' in field or (identity and identity[1] in labelled), (path, field)
        for table in re.findall(r"<table.*?</table>", text, flags=re.DOTALL):
            assert 'scope="col"' in table, path


async def test_times_say_their_zone(page: Desk) -> None:
    """Every page says in which time zone its times are: that of the range, or the one that pages begin with."""
    client = page.client("viewer")
    assert "Times are of the zone Asia/Tokyo." in (await client.get("/admin/?range=7d&tz=Asia/Tokyo")).text
    for path in ("raises", "keys", "sessions", "limits?scope=department&subject=research"):
        assert "Times are of the zone UTC." in (await client.get(f"/admin/{path}")).text
