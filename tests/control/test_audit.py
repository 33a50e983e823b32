"""The audit: who did what, rows that stay as they are, and what shows where one is missing. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.control.kit import ANNA, BEN, CLOCK_MS, SECRET, run_sql

from asgi_llm_guard.control import Actor, AuditEntry, AuditQuery, Control
from asgi_llm_guard.control.audit import Seals
from asgi_llm_guard.control.state import Head
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

COLUMNS = "seq, at_ms, version, actor, role, address, verb, target, old, new, reason, refused, digest"


async def some_changes(control: Control) -> None:
    await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA, reason="first")
    await control.put("agent", "writer", {"max_iterations": 9}, actor=BEN, reason="more")
    await control.put("department", "research", {"daily_cost": "5"}, actor=ANNA)
    await control.remove("agent", "writer", actor=BEN, reason="gone")


async def test_every_change_says_who_did_it(control: Control, clock: FrozenClock) -> None:
    """S6: a row has the actor, the role, the address, what was and what is, the reason and the instant."""
    clock.advance(ms=7)
    await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA, reason="first")
    state = await control.put("agent", "writer", {"max_iterations": 9}, actor=BEN, reason="it does more\r\nX: now")

    (row, _) = await control.audit()

    assert row == AuditEntry(
        seq=2,
        at_ms=CLOCK_MS + 7,
        version=state.version,
        actor="ben",
        role="operator",
        address="10.1.2.4",
        verb="put",
        target="agent:writer",
        old='{"max_iterations":5,"params":{}}',
        new='{"max_iterations":9,"params":{}}',
        reason="it does more  X: now",
        refused=None,
        digest=row.digest,
    )
    assert state.head == (2, row.digest)


async def test_tries_that_were_refused_are_there(control: Control) -> None:
    """T13, S6: a try with a wrong value, one that came too late and one that was noted each leave a row, and no change."""
    await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    for value, expected in (({"max_iterations": float("nan")}, None), ({"max_iterations": 6}, 0)):
        with pytest.raises(Exception, match="writer"):
            await control.put("agent", "writer", value, actor=BEN, expected=expected)
    with pytest.raises(ConfigurationError, match="kind"):
        await control.put("planet", "mars", {}, actor=BEN)  # type: ignore[arg-type]  # the point
    before = await control.version()
    await control.note("reset", "user:mia", actor=BEN, reason="asked", refused="role operator may not")

    refused = await control.audit(AuditQuery(refused=True))

    assert [(row.actor, row.verb, row.target) for row in refused] == [
        ("ben", "reset", "user:mia"),
        ("ben", "put", "planet:mars"),
        ("ben", "put", "agent:writer"),
        ("ben", "put", "agent:writer"),
    ]
    assert [str(row.refused).partition(":")[0] for row in refused] == [
        "role operator may not",
        "invalid",
        "conflict",
        "invalid",
    ]
    assert all(row.version == before for row in refused)
    assert await control.version() == before


async def test_rows_are_found(control: Control, clock: FrozenClock) -> None:
    """Rows are found by who, what, whom, when and whether; the newest first, page by page."""
    await some_changes(control)
    clock.advance(seconds=60)
    await control.note("stop", "session:s1", actor=BEN, old={"open": 1}, new=None)

    async def found(**query: object) -> list[int]:
        return [row.seq for row in await control.audit(AuditQuery(**query))]  # type: ignore[arg-type]  # fields of it

    assert await found() == [5, 4, 3, 2, 1]
    assert await found(actor="ben") == [5, 4, 2]
    assert await found(target="agent:writer") == [4, 2, 1]
    assert await found(target="agent:") == [4, 2, 1]
    assert await found(verb="remove") == [4]
    assert await found(since_ms=CLOCK_MS + 60_000) == [5]
    assert await found(until_ms=CLOCK_MS + 60_000) == [4, 3, 2, 1]
    assert await found(refused=False, limit=2) == [5, 4]
    assert await found(before=4, limit=2) == [3, 2]
    for limit in (0, 10_001, True, 1.5):
        with pytest.raises(ConfigurationError, match="limit"):
            AuditQuery(limit=limit)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE control_audit SET actor = 'nobody' WHERE seq = 2",
        "DELETE FROM control_audit WHERE seq = 2",
        "DELETE FROM control_audit",
        "INSERT INTO control_audit SELECT 9, at_ms, version, actor, role, address, verb, target, old, new, reason, refused, digest FROM control_audit WHERE seq = 2",
    ],
)
async def test_the_database_refuses_to_change_a_row(control: Control, database_url: str, statement: str) -> None:
    """S6: the database itself lets nobody change, remove or slip in a row."""
    await some_changes(control)
    with pytest.raises(Exception, match="append-only"):
        run_sql(database_url, statement)
    assert (await control.verify_audit()).rows == 4


async def test_no_row_is_replaced(control: Control, database_url: str) -> None:
    """S6: nor by the ways in which a database forgets that it removes: SQLite's REPLACE, PostgreSQL's TRUNCATE."""
    await some_changes(control)
    with pytest.raises(Exception, match="append-only"):
        if database_url.startswith("sqlite"):
            run_sql(database_url, "INSERT OR REPLACE INTO control_audit SELECT * FROM control_audit WHERE seq = 2")
        else:
            run_sql(database_url, "TRUNCATE control_audit")
    assert (await control.verify_audit()).sound


def disarm(url: str) -> None:
    """Whoever owns the database can take its triggers away."""
    if url.startswith("sqlite"):
        for name in ("update", "delete", "insert"):
            run_sql(url, f"DROP TRIGGER control_audit_{name}")
    else:
        run_sql(url, "ALTER TABLE control_audit DISABLE TRIGGER ALL")


@pytest.mark.parametrize(
    "statement, broken_at, why",
    [
        ("DELETE FROM control_audit WHERE seq = 2", 2, "missing"),
        ("DELETE FROM control_audit WHERE seq = 4", 4, "at the end are missing"),
        ("UPDATE control_audit SET actor = 'nobody' WHERE seq = 3", 3, "was changed"),
        ("UPDATE control_audit SET new = NULL WHERE seq = 1", 1, "was changed"),
        ("UPDATE control_audit SET digest = 'ab' WHERE seq = 4", 4, "was changed"),
    ],
)
async def test_what_was_done_to_the_rows_shows(
    control: Control, database_url: str, statement: str, broken_at: int, why: str
) -> None:
    """S6: where the triggers were taken away, a row that was removed or changed is found by its number."""
    await some_changes(control)
    sound = await control.verify_audit()
    assert (sound.sound, sound.rows, sound.unsealed) == (True, 4, 0)

    disarm(database_url)
    run_sql(database_url, statement)
    broken = await control.verify_audit()

    assert not broken.sound
    assert broken.broken_at == broken_at
    assert why in broken.why


async def test_a_forged_row_breaks_the_chain(control: Control, database_url: str) -> None:
    """S6: a row that somebody without the secret has put in the place of another does not go with the row after it."""
    await some_changes(control)
    first, second = run_sql(database_url, f"SELECT {COLUMNS} FROM control_audit WHERE seq < 3 ORDER BY seq")
    forged = (*second[:3], "nobody", *second[4:-1])
    disarm(database_url)
    digest = Seals([]).seal(first[-1], forged)
    run_sql(database_url, "UPDATE control_audit SET actor = 'nobody', digest = ? WHERE seq = 2", (digest,))
    broken = await control.verify_audit()
    assert (broken.broken_at, broken.unsealed) == (3, 1)


async def test_a_shortened_audit_shows_by_what_was_kept_elsewhere(control: Control, database_url: str) -> None:
    """S6: rows that were removed from the end together with the note of how many there are show by an earlier head."""
    await some_changes(control)
    published = (await control.state()).head
    disarm(database_url)
    run_sql(database_url, "DELETE FROM control_audit WHERE seq = 4")
    run_sql(
        database_url,
        "UPDATE control_meta SET audit_seq = 3, audit_digest = (SELECT digest FROM control_audit WHERE seq = 3)",
    )

    assert (await control.verify_audit()).sound
    shortened = await control.verify_audit(since=published)

    assert (shortened.broken_at, shortened.why) == (4, "rows at the end are missing")


async def test_another_audit_in_its_place_shows(
    control: Control, database_url: str, open_control: Callable[[], Control]
) -> None:
    """S6: a whole audit that was put in the place of another shows by an earlier head, and rows that were added past this
    package by the note of how many there are."""
    await some_changes(control)
    await control.note("more", "all", actor=ANNA)
    other = Head(2, "ab" * 32)
    replaced = await control.verify_audit(since=other)
    assert (replaced.broken_at, replaced.why) == (2, "another row was there before")
    (last,) = run_sql(database_url, f"SELECT {COLUMNS} FROM control_audit WHERE seq = 5")
    row = (6, *last[1:-1])
    values = (*row, Seals([]).seal(last[-1], row))
    run_sql(database_url, f"INSERT INTO control_audit ({COLUMNS}) VALUES ({', '.join('?' * 13)})", values)
    added = await control.verify_audit()
    assert (added.sound, added.why) == (False, "the row was changed, or rows were added by somebody else")


async def test_rows_without_the_secret_are_counted(
    control: Control, open_control: Callable[[], Control], database_url: str
) -> None:
    """S6: with a secret, rows that somebody without it has written are counted, and an old secret still holds."""
    await some_changes(control)
    stranger = Control(database_url)
    await stranger.put("agent", "mole", {"max_iterations": 1}, actor=Actor(name="anna"))
    await stranger.aclose()
    assert (await control.verify_audit()).unsealed == 1

    rotated = Control(database_url, secret=["another-secret-of-the-control", SECRET])
    await rotated.put("agent", "mole", {"max_iterations": 2}, actor=ANNA)
    checked = await rotated.verify_audit()
    await rotated.aclose()
    assert (checked.sound, checked.rows, checked.unsealed) == (True, 6, 1)
    assert not (await control.verify_audit()).sound, "it does not know the newer secret"


async def test_rows_have_no_digest_of_a_key(control: Control) -> None:
    """T25: what the audit says of a key is who it is and how it begins."""
    _, key = await control.new_key("svc", actor=ANNA, departments=["research"])
    (row,) = await control.audit()
    assert (row.verb, row.target, row.old) == ("new_key", f"key:{key.id}", None)
    assert json.loads(str(row.new)) == {
        "caller": "svc", "created_ms": CLOCK_MS, "departments": ["research"], "params": {}, "prefix": key.prefix, "tags": [],
    }  # fmt: skip


def test_an_actor_has_a_name() -> None:
    """Nobody changes anything without a name."""
    for name in ("", "  ", None, "\x00", "\u200b", "\u202e \n"):
        with pytest.raises(ConfigurationError, match="actor"):
            Actor(name=name)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("field", ["since_ms", "until_ms", "before"])
def test_queries_are_whole_numbers(field: str) -> None:
    """What no database could compare is refused by its name."""
    for value in (10**30, -(10**30), 1.5, "1", True):
        given: dict[str, Any] = {field: value}
        with pytest.raises(ConfigurationError, match=f"audit: {field}"):
            AuditQuery(**given)
