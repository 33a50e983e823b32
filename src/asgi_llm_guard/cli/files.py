"""SQLite files that the settings or the command line name: are they there, and have they what they are asked for?

A path that is mistyped, or relative and read from another folder, would else become a new and empty database.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, get_args

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["EVERY", "Part", "check_file", "file_of", "missing_file"]

Part = Literal["storage", "ledger", "control"]
"""What is kept in a database of its own, or in the same file."""
EVERY: Final[tuple[Part, ...]] = get_args(Part)

_MAGIC: Final = b"SQLite format 3\x00"
_HEADER: Final = 100
_APPLICATION: Final = slice(68, 72)
"""Where the header has the id of the program whose file it is. Source: https://www.sqlite.org/fileformat2.html §1.3."""
_CALLED: Final[Mapping[Part, str]] = {"storage": "a storage", "ledger": "a ledger", "control": "administration data"}
_TABLE: Final[Mapping[Part, str]] = {"storage": "cells", "ledger": "ledger", "control": "control_meta"}
"""A table without which there is none of it."""
_MAKERS: Final[Mapping[Part, str]] = {
    "storage": "the service makes it when it starts, and `migrate --to` fills one from another storage",
    "ledger": "the service makes it when it starts, and so does `ledger drain`",
    "control": "the service makes it when it starts, or, where the settings name it, the first `kill`, `raise` or `keys new`",
}


def file_of(url: str) -> Path | None:
    """The file of a SQLite URL; `None`: it names none."""
    if not url.startswith("sqlite:///"):
        return None
    return Path(url.removeprefix("sqlite:///").partition("?")[0])


def missing_file(url: str) -> Path | None:
    """The file of a SQLite URL, if it is not there: opening it would make it.

    Raises:
        ConfigurationError: it cannot be looked at.
    """
    file = file_of(url)
    if file is None:
        return None
    try:
        return None if file.exists() else file
    except OSError as error:
        raise _unreadable(str(file), error) from error


def check_file(part: Part, url: str, *, said: str, new: bool = False, shared: bool = False) -> None:
    """Check that the file of a SQLite URL is there, and has that part in it. Other URLs are not looked at.

    `said`: what has named it. `new`: it is made where it is not there, and the part where the file has none. `shared`: the
    file is another part's, which may have come first.

    Raises:
        ConfigurationError: it is not there, is no SQLite file, or another one; says which path was looked at.
    """
    file = file_of(url)
    if file is None:
        return
    where = str(file) if file.is_absolute() else f"{file} (looked at {file.absolute()})"
    try:
        if not file.exists():
            if new:
                return
            raise ConfigurationError(f"{said}: there is no file {where}; correct the path; {_MAKERS[part]}")
        if not file.is_file():
            raise ConfigurationError(f"{said}: {where} is no file; give the path of one")
        problem = _problem(part, file, new=new or shared)
    except OSError as error:
        raise _unreadable(f"{said}: {where}", error) from error
    if problem is not None:
        raise ConfigurationError(f"{said}: {where} {problem}")


def _unreadable(said: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{said}: {error.strerror}; let this user read and write the file, or correct the path")


def _problem(part: Part, file: Path, *, new: bool) -> str | None:
    with file.open("rb") as opened:
        header = opened.read(_HEADER)
    if header and not header.startswith(_MAGIC):
        return "is no SQLite file; correct the path"
    has = _has(part, file) if header else False
    if has or has is None:  # what cannot be looked into is told by who opens it
        return None
    if header and int.from_bytes(header[_APPLICATION], "big") != _application_id():
        return "is the database of another program; correct the path"
    return None if new else f"has no {_CALLED[part].removeprefix('a ')} in it; correct the path; {_MAKERS[part]}"


def _has(part: Part, file: Path) -> bool | None:
    """Whether there is a part in the file; `None`: it cannot be looked into."""
    import sqlite3
    from contextlib import closing

    try:
        # Not `ro`, which leaves SQLite's own files beside it behind.
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            found = connection.execute(
                "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = ?", (_TABLE[part],)
            ).fetchone()
    except sqlite3.Error:
        return None
    return bool(found[0])


def _application_id() -> int:
    from asgi_llm_guard.sql.files import APPLICATION_ID

    return APPLICATION_ID
