"""The API: what it changes, what it refuses, and its document."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
import pytest
from tests.admin.kit import NOW_MS, Desk, fill, record

from asgi_llm_guard import Context, LimitExceeded
from asgi_llm_guard.admin.table import VERBS

pytestmark = pytest.mark.anyio

_DEPARTMENTS: Final = "/admin/api/v1/departments/research"


async def _put(page: Desk, value: dict[str, Any], **more: Any) -> Any:
    return await page.client("admin").put(_DEPARTMENTS, json={"value": value, "reason": "test", **more})


@pytest.mark.parametrize("field", ["daily_cost", "monthly_cost", "daily_tokens", "monthly_tokens"])
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "-1", "-0.5", "1e400", "null", '"-5"', '"nan"', "true", "[]"]
)
async def test_numbers_that_are_none(field: str, value: str, page: Desk) -> None:
    """T13, S5: NaN, infinities, negatives, null and other types are answered 422 with the name of the field, and change nothing."""
    assert page.control is not None
    version = (await page.control.state()).version
    answer = await page.client("admin").put(
        _DEPARTMENTS,
        content=f'{{"value": {{"{field}": {value}}}, "reason": "test"}}',
        headers={"content-type": "application/json"},
    )
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json"), answer.text
    assert answer.json()["field"] == f"value.{field}"
    assert (await page.control.state()).version == version


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"daily_cost": "99999999999"}, "value.daily_cost"),
        ({"tz": "Mars/Olympus"}, "tz"),
        ({"tz": None}, "value.tz"),
        ({"models": None}, "value.models"),
        ({"models": "openai/gpt-5"}, "value.models"),
        ({"limit": 5}, "value.limit"),
        ({"daily_tokens": 2**60}, "value.daily_tokens"),
        ({"daily_tokens": 1.5}, "value.daily_tokens"),
    ],
)
async def test_other_values_that_cannot_be(value: dict[str, Any], field: str, page: Desk) -> None:
    """Whatever else cannot be is answered 422 and named too."""
    answer = await _put(page, value)
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b'{"reason": "a", "reason": "b", "value": {}}', 400),
        (b"[" * 100_000, 400),
        (b'{"value": {}}', 422),
        (b'{"value": {}, "reason": ""}', 422),
        (b'{"value": {}, "reason": "r", "expected": null}', 422),
        (b" " * 300_000, 413),
    ],
)
async def test_bodies_that_are_none(body: bytes, status: int, page: Desk) -> None:
    """Bodies that are no JSON, have a key twice, lack a field or are too long are problems, and no errors."""
    answer = await page.client("admin").put(_DEPARTMENTS, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    answer = await page.client("admin").put(_DEPARTMENTS, content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415


async def test_departments_are_edited_at_run_time(page: Desk) -> None:
    """C16, S6: a quota that is put holds for the next call; what is left out stays; the audit has the actor, both values,
    the reason and the address."""
    first = await _put(page, {"daily_cost": "0.0001", "daily_tokens": 500_000}, expected=0)
    assert first.status_code == 200, first.text
    await page.guard.chores.run("control")
    with pytest.raises(LimitExceeded):
        async with (
            page.guard.open(Context(caller="a", departments=("research",))),
            page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=1_000),
        ):
            pass
    second = await _put(page, {"daily_cost": "unlimited"}, expected=first.json()["version"])
    assert second.json()["value"]["daily_cost"] == "unlimited"
    assert second.json()["value"]["daily_tokens"] == 500_000
    await page.guard.chores.run("control")
    async with (
        page.guard.open(Context(caller="a", departments=("research",))),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=1_000),
    ):
        pass

    row = (await page.audit(target="department:research"))[0]
    assert (row.actor, row.role, row.address, row.reason) == ("admin", "admin", "127.0.0.1", "test")
    assert row.old is not None
    assert row.new is not None
    assert ("0.0001" in row.old, "unlimited" in row.new) == (True, True)


async def test_knowledge_bases_are_edited_at_run_time(page: Desk) -> None:
    """C16: the cache settings of a knowledge base are data that an administrator edits; a malformed one is refused."""
    client = page.client("admin")
    path = "/admin/api/v1/knowledge-bases/handbook"
    refused = await client.put(path, json={"value": {"cache": True}, "reason": "r"})
    assert (refused.status_code, refused.json()["field"]) == (422, "acl")
    answer = await client.put(path, json={"value": {"cache": True, "acl": "d1"}, "reason": "r"})
    assert answer.json()["value"] == {"cache": True, "acl": "d1"}
    await page.guard.chores.run("control")
    assert page.control is not None
    assert page.control.knowledge_bases["handbook"]["cache"] is True
    assert (await client.delete(path, params={"reason": "r"})).status_code == 204
    assert (await client.get(path)).status_code == 404


async def test_conflicts_show_both(page: Desk) -> None:
    """Of two who saw the same version, the second is answered 409 with what is there now and what it wanted."""
    version = (await _put(page, {"daily_cost": "5"}, expected=0)).json()["version"]
    await _put(page, {"daily_cost": "6"}, expected=version)
    late = await _put(page, {"daily_cost": "7"}, expected=version)
    assert late.status_code == 409
    told = late.json()
    assert (told["current"]["daily_cost"].startswith("6"), told["yours"]["daily_cost"]) == (True, "7")
    again = await _put(page, {"daily_cost": "7"}, expected=told["version"])
    assert again.status_code == 200


async def test_names_with_slashes(page: Desk) -> None:
    """Models have slashes in their names, and are reached all the same."""
    path = "/admin/api/v1/prices/openai/gpt-5"
    answer = await page.client("admin").put(
        path, json={"value": {"entry": {"input": "1.10", "output": 8.8}}, "reason": "contract"}
    )
    assert answer.status_code == 200, answer.text
    assert (await page.client("viewer").get(path)).json()["name"] == "openai/gpt-5"


async def test_stops_raises_and_resets(page: Desk) -> None:
    """S8: operators stop, release, raise and reset; each is in force at once or with the next turn, and in the audit."""
    client = page.client("operator")
    async with (
        page.guard.open(Context(caller="a", user="mia", departments=("research",), session="s1")),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=1_000) as call,
    ):
        call.record({"model": "gpt-4o-mini", "usage": {"prompt_tokens": 1_000, "completion_tokens": 100}})
    stop = await client.post(
        "/admin/api/v1/stops",
        json={"scope": "session", "subject": "s1", "caller": "a", "lasts": "1h", "reason": "loops"},
    )
    assert stop.status_code == 201, stop.text
    await page.guard.chores.run("control")
    with pytest.raises(LimitExceeded) as refused:
        async with page.guard.open(Context(caller="a", session="s1")):
            pass
    assert refused.value.denied.code == "stopped"
    listed = (await client.get("/admin/api/v1/stops")).json()
    assert [each["value"]["until_ms"] for each in listed] == [NOW_MS + 3_600_000]
    assert (
        await client.delete(f"/admin/api/v1/stops/{stop.json()['id']}", params={"reason": "fine"})
    ).status_code == 204
    await page.guard.chores.run("control")
    async with page.guard.open(Context(caller="a", session="s1")):
        pass

    raised = await client.post(
        "/admin/api/v1/raises",
        json={"policy": "user_budget", "unit": "usd", "amount": "5", "lasts": "1d", "subject": "mia", "reason": "r"},
    )
    assert raised.status_code == 201, raised.text
    assert (await client.delete(f"/admin/api/v1/raises/{raised.json()['id']}")).status_code == 204
    wrong = await client.post(
        "/admin/api/v1/raises",
        json={"policy": "iterations", "unit": "usd", "amount": "5", "lasts": "1d", "reason": "r"},
    )
    assert (wrong.status_code, wrong.json()["field"]) == (422, "unit")

    done = await client.post("/admin/api/v1/resets", json={"scope": "user", "subject": "mia", "reason": "a new week"})
    assert done.status_code == 200, done.text
    assert max(each["used"] for each in done.json()) > 0
    after = await client.get("/admin/api/v1/limits", params={"scope": "user", "subject": "mia"})
    assert {each["used"] for each in after.json()} == {"0.00"}
    assert [row.verb for row in await page.audit(actor="operator")] == ["reset", "remove", "put", "remove", "put"]


async def test_keys_are_shown_once(page: Desk) -> None:
    """A new key is in its answer, and nowhere after that; rotated and revoked ones are told from active ones."""
    client = page.client("admin")
    made = (
        await client.post("/admin/api/v1/keys", json={"caller": "crm", "departments": ["sales"], "reason": "r"})
    ).json()
    rotated = await client.post(f"/admin/api/v1/keys/{made['id']}/rotation", json={"overlap": "1h", "reason": "r"})
    assert rotated.status_code == 201, rotated.text
    assert (await client.delete(f"/admin/api/v1/keys/{made['id']}", params={"reason": "leak"})).status_code == 204
    listed = await client.get("/admin/api/v1/keys")
    assert {each["id"]: each["active"] for each in listed.json()} == {made["id"]: False, rotated.json()["id"]: True}
    for text in (
        listed.text,
        (await client.get("/admin/keys")).text,
        (await client.get("/admin/audit")).text,
        (await client.get("/admin/api/v1/audit")).text,
    ):
        assert made["secret"] not in text
        assert rotated.json()["secret"] not in text
        assert "digest" not in text


async def test_usage_counts_once(page: Desk) -> None:
    """C9: by department every department has its calls in full, and the total has each once; filters and time zones hold."""
    await fill(
        page.guard, [record(1, departments=("a", "b")), record(2, departments=("a",)), record(3, departments=())]
    )
    client = page.client("viewer")
    told = (await client.get("/admin/api/v1/usage", params={"by": "department"})).json()
    assert {row["key"][0]: row["calls"] for row in told["rows"]} == {"a": 2, "b": 1, None: 1}
    assert (told["total"]["calls"], told["total"]["cost_usd"]) == (3, "0.0375")
    alone = (await client.get("/admin/api/v1/usage", params={"where.department": "b"})).json()
    assert alone["total"]["calls"] == 1
    for query, field in (
        ({"by": "planet"}, "by"),
        ({"tz": "Mars"}, "tz"),
        ({"since_ms": "-1"}, "since_ms"),
        ({"since_ms": "9" * 30}, "since_ms"),
        ({"until_ms": "1"}, "until_ms"),
        ({"where.planet": "x"}, "where.planet"),
        ({"limit": "0"}, "limit"),
    ):
        answer = await client.get("/admin/api/v1/usage", params=query)
        assert answer.status_code == 422, query
        assert answer.json()["field"] in {field, "tz"}, answer.text


async def test_open_calls_and_sessions(page: Desk) -> None:
    """Open calls of all processes are listed with what they hold."""
    async with (
        page.guard.open(Context(caller="a", session="s1")),
        page.guard.call(model="openai/gpt-4o-mini", max_output_tokens=1_000),
    ):
        client = page.client("viewer")
        calls = (await client.get("/admin/api/v1/calls")).json()
        sessions = (await client.get("/admin/api/v1/sessions")).json()
    assert [(each["caller"], each["session"]) for each in calls if each["model"]] == [("a", "s1")]
    assert [(each["session"], each["open"]) for each in sessions] == [("s1", 1)]


async def test_the_document_has_every_verb(page: Desk) -> None:
    """The OpenAPI document is valid JSON, names every verb of the API, and a schema for whatever is taken and given."""
    told = (await page.client("viewer").get("/admin/api/v1/openapi.json")).json()
    assert (told["openapi"], told["servers"]) == ("3.1.0", [{"url": "/admin"}])
    offered = {(method.upper(), path) for path, verbs in told["paths"].items() for method in verbs}
    assert offered == {(verb.method, verb.path.replace(":path", "")) for verb in VERBS.verbs if verb.kind == "api"}
    references = set(_references(told))
    assert references <= {f"#/components/schemas/{name}" for name in told["components"]["schemas"]}
    assert len({verb["operationId"] for verbs in told["paths"].values() for verb in verbs.values()}) == len(offered)


def _references(told: Any) -> Any:
    if isinstance(told, dict):
        if isinstance(told.get("$ref"), str):
            yield told["$ref"]
        for value in told.values():
            yield from _references(value)
    elif isinstance(told, list):
        for value in told:
            yield from _references(value)


async def test_answers_have_the_shape_that_is_told(page: Desk) -> None:
    """Every answer to a GET of the API is what the table says that it gives."""
    await fill(page.guard, [record(1)])
    await _put(page, {"daily_cost": "5"})
    client = page.client("admin")
    for verb in VERBS.verbs:
        if verb.kind == "api" and verb.method == "GET" and "{" not in verb.path:
            answer = await client.get(f"/admin{verb.path}")
            assert answer.status_code == 200, answer.text
            kind = list[verb.gives] if verb.gives_list else verb.gives  # type: ignore[name-defined]
            msgspec.json.decode(answer.content, type=kind)
            json.loads(answer.text)


@pytest.mark.parametrize("value", ["null", "NaN", "1e400", "[null]"])
async def test_nothing_hides_in_parameters(value: str, page: Desk) -> None:
    """T13: `null` in the parameters of a key would be a limit taken away; it is refused, and so is a number that is none."""
    answer = await page.client("admin").post(
        "/admin/api/v1/keys",
        content=f'{{"caller": "a", "params": {{"max_iterations": {value}}}, "reason": "r"}}',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"].startswith("params.max_iterations")
