"""What the SQLite storage says of files that it cannot use, and what happens to the file it uses."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.storage.sqlite_kit import CENT, draft, money, take

from asgi_llm_guard.claims import Claim, Granted, Settlement
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.storage.sqlite_file import check_file_system, check_sqlite, file_system

pytestmark = pytest.mark.anyio


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        SqliteStorage(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The folder is not made silently: the error names it."""
    assert "does not exist; make it" in refusal(tmp_path / "missing" / "guard.db")


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    """A folder in the place of the file is refused."""
    assert "is a folder" in refusal(tmp_path)


def test_another_files_content_is_left_alone(tmp_path: Path) -> None:
    """A file that is no database is refused and not overwritten."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all, but long enough to have a header of its own " * 20)
    before = path.read_bytes()
    assert "not a database" in refusal(path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """A database whose first page was overwritten is refused with advice to restore it."""
    path = tmp_path / "guard.db"
    SqliteStorage(path)
    damaged = bytearray(path.read_bytes())
    damaged[100:4096] = os.urandom(3996)
    path.write_bytes(damaged)
    assert "restore it from a backup" in refusal(path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A SQLite file with the tables of another program is refused, and gets none of ours."""
    path = tmp_path / "theirs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    assert "another program" in refusal(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    """A file of another release names both versions and the way out."""
    path = tmp_path / "guard.db"
    SqliteStorage(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert re.search("version 99.*version 4.*export it", refusal(path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Without the right to write beside the file the storage is refused when it is made, not at the first request."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    for above in (tmp_path, *tmp_path.parents):
        if above.name.startswith(("test_", "popen-", "pytest-")):
            above.chmod(0o755)  # pytest's own folders are private to the user who runs it
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        assert "let this user write to the file and its folder" in refusal(folder / "guard.db")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"synchronous": "OFF"}, "synchronous: expected NORMAL or FULL, got 'OFF'"),
        ({"timeout_s": 0}, "timeout_s: expected a positive number of seconds, got 0"),
        ({"lapse_ms": 0}, "lapse_ms: expected a positive number of milliseconds, got 0"),
        ({"tombstone_ms": -1}, "tombstone_ms: expected a positive number of milliseconds, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    """A setting that cannot be is refused by name."""
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        SqliteStorage(tmp_path / "guard.db", **settings)  # type: ignore[arg-type]


def test_memory_is_not_a_file() -> None:
    """`:memory:` is refused: each connection would have a database of its own."""
    with pytest.raises(ConfigurationError, match="for memory use memory://"):
        SqliteStorage(":memory:")


def test_an_old_sqlite_is_refused() -> None:
    """A SQLite library older than 3.35 is refused, with both versions."""
    check_sqlite((3, 35, 0))
    with pytest.raises(ConfigurationError, match=r"SQLite 3\.35\.0 or newer is needed, this Python has 3\.34\.1"):
        check_sqlite((3, 34, 1))


MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
server:/export /mnt/share nfs4 rw 0 0
/dev/vdb /mnt/share/fast ext4 rw 0 0
box:/x /mnt/two\\040words fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/srv", "ext4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/deep", "nfs4"),
        ("/mnt/share/fast/x", "ext4"),
        ("/mnt/shared", "ext4"),
        ("/mnt/two words/x", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(folder: str, kind: str) -> None:
    """The type of the file system comes from the longest mount point that the folder lies under."""
    assert file_system(Path(folder), MOUNTS) == kind


def test_network_file_systems_are_refused() -> None:
    """Locks that do not hold across hosts are no ground for exact limits; the error names another storage."""
    check_file_system(Path("/srv/guard.db"), "ext4")
    with pytest.raises(
        ConfigurationError, match=r"/srv/guard\.db: lies on a network file system \(nfs4\).*of one host"
    ):
        check_file_system(Path("/srv/guard.db"), "nfs4")


async def test_state_survives_reopening(tmp_path: Path) -> None:
    """What one storage object was told, the next one on the same file knows."""
    path = tmp_path / "guard.db"
    first = SqliteStorage(path, synchronous="FULL")
    granted = await take(first, "a", Claim(money(), CENT))
    await first.aclose()
    second = SqliteStorage(path)
    again = await take(second, "a", Claim(money(), CENT))
    assert isinstance(granted, Granted)
    assert isinstance(again, Granted)
    assert (again.receipts, again.replayed) == (granted.receipts, True)
    await second.aclose()


async def test_a_removed_file_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    """When the file is deleted while in use, operations fail until it is back; nothing is granted from scratch."""
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path)
    await take(storage, "a", Claim(money(), CENT))
    moved = path.rename(tmp_path / "moved.db")
    with pytest.raises(StorageError, match="was removed or replaced while in use"):
        await take(storage, "b", Claim(money(), CENT))
    moved.rename(path)
    assert [reading.held for reading in await storage.read([money()])] == [CENT]
    await storage.aclose()


async def test_a_file_removed_before_its_first_use_does_not_come_back_empty(tmp_path: Path) -> None:
    """A file that is gone when it is opened again is an error, and no empty one is left in its place."""
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path)
    path.unlink()
    with pytest.raises(StorageError, match="unable to open database file"):
        await storage.open_holds()
    assert not path.exists()
    await storage.aclose()


async def test_reports_can_query_the_ledger(tmp_path: Path) -> None:
    """One row per call; departments are charged in full each, and a grand total counts the row once."""
    path = tmp_path / "guard.db"
    storage = SqliteStorage(path)
    record = draft("a", departments=("research", "sales"), cost_nanousd=7 * CENT, session="s'1")
    await storage.settle([Settlement("a", (), record)])
    await storage.aclose()
    with closing(sqlite3.connect(path)) as connection:
        split = connection.execute(
            "SELECT value, sum(cost_nanousd) FROM ledger, json_each(departments) GROUP BY value ORDER BY value"
        ).fetchall()
        total = connection.execute("SELECT sum(cost_nanousd), session FROM ledger").fetchone()
    assert split == [("research", 7 * CENT), ("sales", 7 * CENT)]
    assert total == (7 * CENT, "s'1")
