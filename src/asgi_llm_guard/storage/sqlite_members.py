"""The live ids of `Distinct` meters, in tables: how many there are is kept, not counted."""

from __future__ import annotations

import sqlite3

from asgi_llm_guard.storage.counting import GRACE_MS
from asgi_llm_guard.storage.sqlite_tables import UPSERT_CROWD, UPSERT_MEMBER

__all__ = ["SqliteMembers"]


class _Crowd:
    __slots__ = ("first_ms", "last_ms", "live")

    def __init__(self, live: int, first_ms: int, last_ms: int) -> None:
        self.live = live
        self.first_ms = first_ms
        self.last_ms = last_ms


class SqliteMembers:
    """`counting.Members` over the tables `crowds` and `members`. Works inside the writer's transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._crowds: dict[str, _Crowd | None] = {}
        self._changed: set[str] = set()
        self._tidied_to = ""

    def look(self, key: str, member: str, now_ms: int) -> tuple[int, bool]:
        crowd = self._crowd(key)
        if crowd is None:
            return 0, False
        if crowd.first_ms <= now_ms:
            gone = self._connection.execute("DELETE FROM members WHERE key = ? AND until_ms <= ?", (key, now_ms))
            self._leave(key, crowd, gone.rowcount)
        return crowd.live, self._until(key, member) is not None

    def touch(self, key: str, member: str, until_ms: int) -> None:
        crowd = self._crowd(key)
        if crowd is None:
            crowd = self._crowds[key] = _Crowd(0, until_ms, until_ms)
        before = self._until(key, member)
        until_ms = max(until_ms, crowd.last_ms)
        self._connection.execute(UPSERT_MEMBER, (key, member, until_ms))
        crowd.last_ms = until_ms
        if before is None:
            crowd.live += 1
        elif before == crowd.first_ms:
            self._find_first(key, crowd)
        self._changed.add(key)

    def ends(self, key: str) -> tuple[int, int] | None:
        crowd = self._crowd(key)
        return None if crowd is None else (crowd.first_ms, crowd.last_ms)

    def clear(self, key: str) -> None:
        if self._crowd(key) is not None:
            self._connection.execute("DELETE FROM members WHERE key = ?", (key,))
            self._crowds[key] = None
            self._changed.add(key)

    def write(self) -> None:
        """Write the crowds that have changed."""
        for key in self._changed:
            crowd = self._crowds[key]
            if crowd is None:
                self._connection.execute("DELETE FROM crowds WHERE key = ?", (key,))
            else:
                self._connection.execute(UPSERT_CROWD, (key, crowd.live, crowd.first_ms, crowd.last_ms))
        self._changed.clear()

    def forget(self) -> None:
        """Forget what was read: the tables may have changed."""
        self._crowds.clear()
        self._changed.clear()

    def tidy(self, now_ms: int, *, rows: int) -> None:
        """Remove at most `rows` ids of crowds all of whose ids expired long ago."""
        crowds = self._connection.execute(
            "SELECT key, last_ms FROM crowds WHERE key > ? ORDER BY key LIMIT ?", (self._tidied_to, rows)
        ).fetchall()
        self._tidied_to = crowds[-1][0] if len(crowds) == rows else ""
        for key, last_ms in crowds:
            if last_ms + GRACE_MS <= now_ms and rows > 0:
                removed = self._connection.execute(
                    "DELETE FROM members WHERE key = ?1 AND member IN (SELECT member FROM members WHERE key = ?1 LIMIT ?2)",
                    (key, rows),
                ).rowcount
                rows -= removed
                crowd = self._crowd(key)
                if crowd is not None:
                    self._leave(key, crowd, removed)
        self.write()

    def _crowd(self, key: str) -> _Crowd | None:
        if key not in self._crowds:
            row = self._connection.execute(
                "SELECT live, first_ms, last_ms FROM crowds WHERE key = ?", (key,)
            ).fetchone()
            self._crowds[key] = None if row is None else _Crowd(*row)
        return self._crowds[key]

    def _until(self, key: str, member: str) -> int | None:
        row = self._connection.execute(
            "SELECT until_ms FROM members WHERE key = ? AND member = ?", (key, member)
        ).fetchone()
        return None if row is None else row[0]

    def _leave(self, key: str, crowd: _Crowd, count: int) -> None:
        crowd.live -= count
        if crowd.live:
            self._find_first(key, crowd)
        else:
            self._crowds[key] = None
        self._changed.add(key)

    def _find_first(self, key: str, crowd: _Crowd) -> None:
        (crowd.first_ms,) = self._connection.execute(
            "SELECT min(until_ms) FROM members WHERE key = ?", (key,)
        ).fetchone()
