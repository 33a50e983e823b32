"""Tries that were refused, in numbers: the audit tells of all of them, and is bounded. On SQLite and PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from tests.control.kit import ANNA, run_sql

from asgi_llm_guard.control import Actor, AuditEntry, AuditQuery, Control
from asgi_llm_guard.control.tries import FIRST, MOST_COUNTS, MOST_ROWS, MOST_VERBS, SEVERAL
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

MALLORY = Actor(name="mallory", role="caller", address="10.9.9.9")


async def knock(control: Control, times: int, *, actor: Actor = MALLORY, verb: str = "DELETE") -> None:
    for number in range(times):
        await control.note(
            verb, f"/api/v1/keys/{number}", actor=actor, refused="not the credential of an administrator"
        )


def told_of(rows: list[AuditEntry]) -> int:
    """How many tries these rows tell of: one each, or as many as they say."""
    more = [re.match(r"(\d+) more tries", row.refused or "") for row in rows]
    return sum(int(found[1]) if found else row.target != SEVERAL for row, found in zip(rows, more, strict=True))


async def refused(control: Control) -> list[AuditEntry]:
    return list(await control.audit(AuditQuery(refused=True, limit=10_000)))


async def test_the_first_tries_have_a_row_each_and_the_rest_one_together(control: Control, clock: FrozenClock) -> None:
    """T13, S6: after the first 50 of an actor and verb within an hour, tries are counted; a row says so at once, and one
    says how many when the hour is over. Not one is missing."""
    await knock(control, FIRST + 30)

    rows = await refused(control)
    assert [row.target for row in rows] == [SEVERAL, *(f"/api/v1/keys/{number}" for number in reversed(range(FIRST)))]
    assert (rows[0].actor, rows[0].verb) == ("mallory", "DELETE")
    assert rows[0].refused == "too many tries: those of this actor and verb are counted, and told when it ends"

    clock.advance(seconds=3_600)
    (last, *before) = await refused(control)
    assert before == rows
    assert (last.actor, last.verb, last.target) == ("mallory", "DELETE", SEVERAL)
    assert last.refused == "30 more tries from 2026-11-18 11:00 to 11:59:59 UTC were refused"
    assert told_of([last, *before]) == FIRST + 30
    assert await refused(control) == [last, *before]
    assert (await control.verify_audit()).sound


async def test_others_and_other_verbs_are_counted_by_themselves(control: Control, clock: FrozenClock) -> None:
    """T13: a flood of one hides no try of another one, nor one of another kind, nor one of the next hour; nor a change."""
    await knock(control, FIRST + 1)
    await knock(control, 1, verb="PUT")
    await knock(control, 1, actor=Actor(name="eve"))
    await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    with pytest.raises(ConfigurationError):
        await control.put("agent", "writer", {"max_iterations": -1}, actor=ANNA)

    newest = [(row.actor, row.verb, row.target) for row in (await control.audit())[:4]]
    assert newest == [
        ("anna", "put", "agent:writer"),
        ("anna", "put", "agent:writer"),
        ("eve", "DELETE", "/api/v1/keys/0"),
        ("mallory", "PUT", "/api/v1/keys/0"),
    ]
    clock.advance(seconds=3_600)
    await knock(control, 1)
    assert [row.target for row in await control.audit()][:2] == ["/api/v1/keys/0", SEVERAL]


async def test_many_who_try_are_bounded_together(control: Control, database_url: str, clock: FrozenClock) -> None:
    """T9, T13: with however many names, an hour has so many rows at most, and so many counts; all tries are told."""
    made = 0
    for number in range(MOST_COUNTS + 40):
        times = FIRST if number < MOST_ROWS // FIRST else 2
        await knock(control, times, actor=Actor(name=f"bot-{number}"))
        made += times

    ((counts,),) = run_sql(database_url, "SELECT COUNT(*) FROM control_tries")
    ((rows,),) = run_sql(database_url, "SELECT COUNT(*) FROM control_audit")
    assert counts == MOST_COUNTS + 1
    assert rows <= MOST_ROWS + counts

    clock.advance(seconds=3_600)
    found = await refused(control)
    assert told_of(found) == made
    assert len(found) <= MOST_ROWS + 2 * counts
    assert [row.refused for row in found if row.actor == SEVERAL and "later" in (row.refused or "")] == [
        "too many tries: those of all who come later within this hour are counted, and told when it ends"
    ]
    assert run_sql(database_url, "SELECT COUNT(*) FROM control_tries") == [(0,)]


async def test_verbs_that_are_made_up_hide_nobody_else(control: Control, clock: FrozenClock) -> None:
    """T13: whoever tries by ever other verbs is counted by the first ones, and then by all others together: who comes
    after is told by name, with a row."""
    for number in range(MOST_COUNTS + 5):
        await knock(control, 1, verb=f"VERB{number}")
    await knock(control, 1, actor=Actor(name="eve"))

    (newest, *_) = await refused(control)
    assert (newest.actor, newest.verb, newest.target) == ("eve", "DELETE", "/api/v1/keys/0")
    clock.advance(seconds=3_600)
    found = await refused(control)
    assert told_of(found) == MOST_COUNTS + 5 + 1
    assert [(row.actor, row.verb, row.refused) for row in found if row.target == SEVERAL] == [
        (
            "mallory",
            SEVERAL,
            f"{MOST_COUNTS + 5 - MOST_VERBS} more tries from 2026-11-18 11:00 to 11:59:59 UTC were refused",
        ),
        ("mallory", SEVERAL, "too many tries: those of this actor's other verbs are counted, and told when it ends"),
    ]


async def test_counts_are_those_of_all_processes(open_control: Callable[[], Control], clock: FrozenClock) -> None:
    """What one process has counted another one goes on with, and whoever comes first after the hour tells it, once."""
    one, other = open_control(), open_control()
    await knock(one, FIRST)
    await knock(other, 5)
    clock.advance(seconds=7_200)
    await other.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    assert told_of(await refused(one)) == told_of(await refused(other)) == FIRST + 5


async def test_tables_of_before_get_the_counts(open_control: Callable[[], Control], database_url: str) -> None:
    """S19: a database that was made before there were counts takes them when it is opened."""
    first = open_control()
    await first.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    run_sql(database_url, "DROP TABLE control_tries")
    again = open_control()
    await knock(again, 1)
    assert [row.seq for row in await again.audit()] == [2, 1]
