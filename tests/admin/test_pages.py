"""What the pages show."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Final

import pytest
from tests.admin.kit import HOSTILE, NOW_MS, Desk, desk, fill, hidden, person, record

from asgi_llm_guard import Context, DepartmentQuota, LimitExceeded, Quota, QuotaBook
from asgi_llm_guard.admin.desk import MOST_SUBJECTS
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
    assert "and 1 call of unknown cost" in text
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
    assert "1 open call<" in text
    assert re.search(
        r'<svg class="chart"[^>]*aria-labelledby="spend-title spend-desc"><title id="spend-title">Spend per hour</title><desc',
        text,
    )
    assert text.count("<caption") == 2
    scales = re.findall(r'<div class="scale" aria-hidden="true">(.*?)</div>', text)
    assert [re.findall(r"<span>(.*?)</span>", scale) for scale in scales] == [["$0.02", "$0.01", "0"], ["1", "", "0"]]
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


async def test_users_without_a_name_are_their_callers(page: Desk) -> None:
    """C9: what was called for no user stands under its caller among the users, in the order of cost."""
    await fill(
        page.guard,
        [
            record(1, user=None, caller="dear", cost_nanousd=9),
            record(2, user="mia", cost_nanousd=5),
            record(3, user=None, caller="cheap", cost_nanousd=1),
            record(4, user=None, caller=None, cost_nanousd=0),
        ],
    )
    text = (await page.client("viewer").get("/admin/department?name=research")).text
    table = text.partition("<h2>Users</h2>")[2].partition("</section>")[0]
    found = re.findall(r'data-label="User">(.*?)\s*<svg', table)
    names = ["dear caller", "mia", "cheap caller", "no user"]
    assert [re.sub(r"<[^>]*>", "", each) for each in found] == names


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


async def test_sessions_say_how_far_they_are(tmp_path: Path) -> None:
    """B3, M13: a live session is shown with the iterations that are counted of it and its limit, which is the agent's where
    it has one; open calls count."""
    made = desk(tmp_path, agents={"crawler": {"max_iterations": 2}})
    for caller, session, agent in (("a", "short", "crawler"), ("a", "short", "crawler"), ("b", "long", None)):
        async with (
            made.guard.open(Context(caller=caller, session=session, agent=agent)),
            made.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
        ):
            pass
    async with (
        made.guard.open(Context(caller="b", session="long")),
        made.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
        made.guard.open(Context(caller="c")),
        made.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
    ):
        text = (await made.client("viewer").get("/admin/sessions")).text
    rows = [re.sub(r"<[^>]*>| held", "", cell) for cell in re.findall(r'data-label="Iterations">(.*?)</td>', text)]
    assert sorted(rows) == ["2 of 2", "2 of 25", "not counted"]
    assert '<span class="warn">2</span> <span class="minor">of 2</span>' in text
    await made.aclose()


async def test_sessions_are_found(page: Desk) -> None:
    """Live sessions are found by whose they are, and stand in the order that was asked for."""
    await fill(
        page.guard,
        [
            record(1, session="dear", cost_nanousd=10**10, caller="Anna", user="zoe", at_ms=NOW_MS - 9_000),
            record(2, session="late", cost_nanousd=1, caller="ben", at_ms=NOW_MS - 1_000),
            *(record(n, session="busy", cost_nanousd=2, agent="crawler", at_ms=NOW_MS - 5_000) for n in (3, 4)),
        ],
    )
    client = page.client("viewer")

    async def shown(query: str) -> list[str]:
        text = (await client.get(f"/admin/sessions{query}")).text
        return re.findall(r'data-label="Session"><bdi>(.*?)</bdi>', text)

    assert await shown("") == await shown("?sort=odd") == ["late", "busy", "dear"]
    assert await shown("?sort=cost") == ["dear", "busy", "late"]
    assert await shown("?sort=calls") == ["busy", "late", "dear"]
    assert await shown("?find=anna") == ["dear"]
    assert await shown("?find=zoe") == ["dear"]
    assert await shown("?find=CRAWL&sort=cost") == ["busy"]
    assert await shown("?find=research&sort=cost") == ["dear", "busy", "late"]
    assert "No session of the last hour has" in (await client.get("/admin/sessions?find=nobody")).text


async def test_more_sessions_than_are_shown(page: Desk) -> None:
    """A hundred sessions are shown, and that there are more; each of them is found by its name."""
    await fill(page.guard, [record(number, session=f"session-{number}") for number in range(101)])
    client = page.client("viewer")
    text = (await client.get("/admin/sessions")).text
    assert (text.count('data-label="Session"'), "There are more." in text) == (100, True)
    for number in range(101):
        assert f"<bdi>session-{number}</bdi>" in (await client.get(f"/admin/sessions?find=session-{number}")).text


async def test_more_sessions_than_are_looked_at(page: Desk) -> None:
    """Of very many sessions the latest are looked through, and the page says so, also where none of them is found."""
    await fill(page.guard, [record(number, session=f"session-{number}") for number in range(2_000)])
    client = page.client("viewer")
    said = "the latest 2,000 sessions"
    assert said not in (await client.get("/admin/sessions?find=nobody")).text
    await fill(page.guard, [record(2_000, session="one-more")])
    for query in "find=nobody", "find=session-1", "sort=cost":
        assert said in (await client.get(f"/admin/sessions?{query}")).text
    assert said not in (await client.get("/admin/sessions")).text


async def test_quotas_of_code_and_files_are_seen_and_edited(page: Desk) -> None:
    """C7: a department whose quota stands in code is listed before it has ever called; its form has what holds now, and what
    is saved there holds instead until it is removed."""
    client = await page.browser("admin")
    listed = (await client.get("/admin/departments")).text
    assert ">research</bdi></a>" in listed
    assert "in code or a file" in listed
    form = (await client.get("/admin/departments/edit?name=research")).text
    assert "what code or a file says" in form
    for field, value in (("daily_cost", "10.00"), ("monthly_cost", "100.00"), ("daily_tokens", "1,000,000")):
        assert re.search(rf'name="{field}" value="{value}"', form), field
    assert re.search(r'name="monthly_tokens.unlimited" value="1" checked', form)
    assert re.search(r'name="models.unlimited" value="1" checked', form)
    data = {
        "form_token": hidden(form, "form_token"), "version": hidden(form, "version"), "name": hidden(form, "name"),
        "daily_cost": "7", "monthly_cost.unlimited": "1", "daily_tokens.unlimited": "1",
        "monthly_tokens.unlimited": "1", "models.unlimited": "1", "tz": "UTC", "reason": "less",
    }  # fmt: skip
    assert (await client.post("/admin/departments/edit", data=data)).status_code == 303
    await page.guard.chores.run("control")
    edited = (await client.get("/admin/departments/edit?name=research")).text
    assert ("what code or a file says" not in edited, 'value="7.00"' in edited) == (True, True)
    assert "in code or a file" not in (await client.get("/admin/departments")).text


async def test_orders_of_departments(tmp_path: Path) -> None:
    """Departments stand by cost, by how full their fullest limit is, or by name."""
    book = QuotaBook({name: DepartmentQuota(daily_cost=cost) for name, cost in (("b", "1"), ("A", "9"), ("c", "5"))})
    made = desk(tmp_path, policies=[Quota(book)])
    await fill(made.guard, [record(1, departments=("c",)), record(2, departments=("A",), cost_nanousd=1)])
    async with (
        made.guard.open(Context(caller="x", departments=("b",))),
        made.guard.call(model="openai/gpt-4o-mini", max_output_tokens=1_000),
    ):
        for query, order in (("", "cAb"), ("?sort=name", "Abc"), ("?sort=limit&range=7d", "bcA")):
            text = (await made.client("viewer").get(f"/admin/departments{query}")).text
            found = re.findall(r'data-label="Department"><a[^>]*><bdi>(.*?)</bdi>', text)
            assert (found[0], sorted(found)) == (order[0], ["A", "b", "c"]), query
            assert query != "?sort=name" or found == list(order)
    await made.aclose()


async def test_limits_that_were_not_looked_at_are_said(tmp_path: Path) -> None:
    """Of more departments than are looked at, the page says how many it left out, and looks at those that cost most."""
    book = QuotaBook({f"d{number:03}": DepartmentQuota(daily_cost="1") for number in range(MOST_SUBJECTS + 9)})
    made = desk(tmp_path, policies=[Quota(book)], storage="memory://", ledger=f"sqlite:///{tmp_path}/ledger.db")
    await fill(made.guard, [record(1, departments=("d208",))])
    client = made.client("viewer")
    overview = (await client.get("/admin/")).text
    assert "9 more departments were not looked at" in overview
    assert ">d208</bdi>" in overview.partition("Budgets and quotas")[2].partition("</section>")[0]
    assert "Limits of 9 more were not looked at" in (await client.get("/admin/departments")).text
    await made.aclose()


async def test_refusals_that_are_not_counted_yet(page: Desk) -> None:
    """Until the counts of all processes are in, the overview says that they are not, rather than that nothing was refused."""
    client = page.client("viewer")
    assert "Nothing was refused in this time" in (await client.get("/admin/")).text
    with pytest.raises(LimitExceeded):
        async with (
            page.guard.open(Context(caller="service-a", departments=("unknown",))),
            page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=10),
        ):
            pass
    text = (await client.get("/admin/")).text
    assert ("Nothing was refused" not in text, "None is counted in this time yet" in text) == (True, True)


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
