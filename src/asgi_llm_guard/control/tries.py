"""Refused tries in the audit: the first of an hour row by row, the rest counted, so that nobody fills a disk with them.

Rule 1: the first `FIRST` tries of an actor and verb within an hour have a row each, and one more row says that from there on
they are counted. When the hour is over, a row says how many more there were.

Rule 2: all actors together have `MOST_ROWS` such rows within an hour, and `MOST_COUNTS` are counted by name. Those who come
later are counted, and at last all of them together. Of one actor `MOST_VERBS` are counted by themselves, and all others
together: methods of HTTP can be made up, and whoever does so takes no other actor's place.

Rule 3: what was counted is in the database, for all processes: a count ends with its row in the audit, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final, NamedTuple

from asgi_llm_guard.control.changes import Actor
from asgi_llm_guard.sql import Connection

__all__ = [
    "FIRST",
    "MOST_COUNTS",
    "MOST_ROWS",
    "MOST_VERBS",
    "SEVERAL",
    "Counted",
    "count",
    "counted_before",
    "has_ended",
]

FIRST: Final = 50
MOST_ROWS: Final = 1_000
MOST_COUNTS: Final = 200
MOST_VERBS: Final = 8
SEVERAL: Final = "(several)"
"""The target, and where it is about many the actor and verb, of a row that stands for several tries."""

_HOUR_MS: Final = 3_600_000


class Counted(NamedTuple):
    """What a row says of tries that have none of their own."""

    actor: Actor
    verb: str
    why: str


def count(connection: Connection, actor: str, verb: str, at_ms: int, *, add: Callable[[Counted | None], None]) -> None:
    """Count a try; `add` is called where it is to have a row: with `None` its own, else one that says this."""
    hour_ms = at_ms - at_ms % _HOUR_MS
    found = connection.execute("SELECT actor, verb, tries, told FROM control_tries WHERE hour_ms = ?", (hour_ms,))
    known = {(name, what): (tries, told) for name, what, tries, told in found}
    key = (actor, verb)
    if key not in known and sum(name == actor for name, _ in known) >= MOST_VERBS:
        key = (actor, SEVERAL)
    if key not in known and len(known) >= MOST_COUNTS:
        key = (SEVERAL, SEVERAL)
    tries, told = known.get(key, (0, 0))
    rows = sum(each for _, each in known.values())
    if told < FIRST and rows < MOST_ROWS and key == (actor, verb):
        add(None)
        told += 1
    elif tries == told:  # the first that has no row
        add(
            Counted(
                Actor(name=key[0]),
                key[1],
                f"too many tries: those of {_whose(*key)} are counted, and told when it ends",
            )
        )
    connection.execute(
        "INSERT INTO control_tries (hour_ms, actor, verb, tries, told) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (hour_ms, actor, verb) DO UPDATE SET tries = excluded.tries, told = excluded.told",
        (hour_ms, *key, tries + 1, told),
    )


def _whose(actor: str, verb: str) -> str:
    if actor == SEVERAL:
        return "all who come later within this hour"
    return "this actor's other verbs" if verb == SEVERAL else "this actor and verb"


def has_ended(connection: Connection, at_ms: int) -> bool:
    """Whether there are counts of hours that are over, which belong into the audit."""
    hour_ms = at_ms - at_ms % _HOUR_MS
    return bool(connection.execute("SELECT 1 FROM control_tries WHERE hour_ms < ? LIMIT 1", (hour_ms,)))


def counted_before(connection: Connection, at_ms: int) -> Iterable[Counted]:
    """What was counted in hours that are over, each once: whoever asks puts it into the audit in this transaction."""
    hour_ms = at_ms - at_ms % _HOUR_MS
    rows = connection.execute(
        "SELECT hour_ms, actor, verb, tries, told FROM control_tries WHERE hour_ms < ? ORDER BY hour_ms, actor, verb",
        (hour_ms,),
    )
    if rows:
        connection.execute("DELETE FROM control_tries WHERE hour_ms < ?", (hour_ms,))
    for since_ms, actor, verb, tries, told in rows:
        if tries > told:
            yield Counted(Actor(name=actor), verb, f"{tries - told} more tries {_hour(since_ms)} were refused")


def _hour(since_ms: int) -> str:
    since = datetime.fromtimestamp(since_ms / 1000, UTC)
    return f"from {since:%Y-%m-%d %H:%M} to {since.replace(minute=59, second=59):%H:%M:%S} UTC"
