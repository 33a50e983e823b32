"""Copy all that one storage keeps into another: counters, open holds, owners, ids, tombstones and records.

Any storage to any other that can export and load: memory, SQLite, Redis. Nobody should use either meanwhile;
that the source stood still is checked.

    export   the source's lines go to a temporary file, one at a time
    load     the target takes all of them, or none if they are damaged
    compare  the target is exported again, and has to say the same as the file
    look     the source is exported again, and has to say the same as before

Two exports say the same if the lines of what is not over yet are the same, in any order: their counts, their
sums, and the sum of their SHA-256 digests (modulo 2^256). What is over (windows, tombstones and ids past their
end, at the instant of the later export) is left out on both sides, because storages forget it at different times.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

import msgspec

from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.counting import disposable
from asgi_llm_guard.storage.export import Line, cell_of_line, read_line, write_line

__all__ = ["Migrated", "Progress", "copy_storage", "open_and_copy"]

Progress = Callable[[Literal["export", "load", "compare", "look"], int], object]
"""Is told the stage, and how many lines it has seen: every 10,000, and at its end. May be called from a thread."""

_STEP: Final = 10_000
_SPOOL_BYTES: Final = 8 * 2**20
"""An export up to this size is kept in memory, a larger one in a temporary file."""
_MODULUS: Final = 2**256

Stage = Literal["export", "load", "compare", "look"]


class Migrated(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied, found alike on both sides: what is not over yet."""

    cells: int = 0
    """Counters."""
    members: int = 0
    """Live ids."""
    owners: int = 0
    """Processes that are alive, or have lapsed and were not told."""
    holds: int = 0
    tombstones: int = 0
    """Calls that have ended lately."""
    records: int = 0
    used: int = 0
    """Over all counters, whatever their units."""
    held: int = 0
    cost_nanousd: int = 0
    """Over all records."""
    digest: str = ""
    """Of all lines, in any order; in hexadecimal."""


async def copy_storage(source: Storage, target: Storage, *, progress: Progress | None = None) -> Migrated:
    """Copy everything from `source` into the empty `target`, and compare.

    The copying keeps no more in memory than a batch of lines; `target.load` keeps what it needs to take all
    or nothing, which for the storages here is the whole state once.

    Raises:
        StorageError: the target is not empty, the export is damaged (nothing was written), the target does
            not say the same afterwards, or the source was used meanwhile; the message says what to do.
    """
    report: Progress = progress or (lambda _stage, _lines: None)
    await _refuse_unless_empty(target)
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
        await _export(source, spool, report)
        spool.seek(0)
        await target.load(_reported(spool, "load", report))
        copied, compared_ms = await _tally_of(target, "compare", report)
        wanted = await _tally_of_file(spool, compared_ms)
        if copied != wanted:
            raise StorageError(
                f"copy: the target does not say what the source said: {_differences(wanted, copied)}; "
                "empty the target before anything uses it, and copy again"
            )
        later, looked_ms = await _tally_of(source, "look", report)
        before = await _tally_of_file(spool, looked_ms)
        if later != before:
            raise StorageError(
                f"copy: the source was used while it was copied: {_differences(before, later)}; stop everything that "
                "uses it, empty the target, and copy again"
            )
    return copied


async def open_and_copy(source_url: str, target_url: str, *, progress: Progress | None = None) -> Migrated:
    """As `copy_storage`, between two URLs such as `sqlite:///guard.db`; both storages are closed in the end.

    Raises:
        ConfigurationError: a URL is wrong, both are the same, or one means a memory that nobody shares.
        StorageError: as `copy_storage`; or the source is empty, which mostly is a mistaken address.
    """
    if source_url == target_url:
        raise ConfigurationError("copy: source and target are the same storage")
    for name, url in (("source", source_url), ("target", target_url)):
        if url.startswith("memory:"):
            raise ConfigurationError(f"copy: the {name} memory:// is nobody's but this process's; name another storage")
    if source_url.startswith("sqlite:///"):
        path = Path(source_url.removeprefix("sqlite:///").partition("?")[0])
        if not await asyncio.to_thread(path.exists):  # opening it would make it
            raise ConfigurationError(f"copy: the source {path} does not exist")
    async with AsyncExitStack() as opened:
        source = open_storage(source_url, clock=SystemClock())
        opened.push_async_callback(source.aclose)
        if await _is_empty(source):
            raise StorageError("copy: the source is empty, so nothing was copied; check its address")
        target = open_storage(target_url, clock=SystemClock())
        opened.push_async_callback(target.aclose)
        return await copy_storage(source, target, progress=progress)


# --------------------------------------------------------------------------------------- stages


async def _is_empty(storage: Storage) -> bool:
    async with aclosing(_lines_of(storage)) as lines:
        async for data in lines:
            line = read_line(data)
            if line.export is None and line.end is None:
                return False
    return True


async def _refuse_unless_empty(target: Storage) -> None:
    if not await _is_empty(target):
        raise StorageError(
            "copy: the target is not empty, or a guard is running on it, and nothing was changed; "
            "copy into a new file or namespace, or empty this one"
        )


async def _export(source: Storage, spool: IO[bytes], report: Progress) -> None:
    """Write the lines of an export to a file."""
    number = 0
    async with aclosing(_lines_of(source)) as lines:
        async for data in lines:
            spool.write(data)
            number += 1
            if not number % _STEP:
                report("export", number)
    report("export", number)


def _reported(lines: Iterable[bytes], stage: Stage, report: Progress) -> Iterator[bytes]:
    number = 0
    for number, line in enumerate(lines, start=1):
        yield line
        if not number % _STEP:
            report(stage, number)
    report(stage, number)


def _lines_of(storage: Storage) -> Any:
    """The export, which is an asynchronous generator in every storage."""
    return cast("Any", storage.export())


# --------------------------------------------------------------------------------------- tallies


class _Tally:
    """Counts, sums and digest of lines, without those of what is over at `now_ms`."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self._sums = dict.fromkeys(Migrated.__struct_fields__, 0)

    def add(self, data: bytes) -> None:
        line = read_line(data)
        sums = self._sums
        if line.cell is not None:
            _, cell = cell_of_line(line.cell)
            if disposable(cell, self._now_ms):
                return
            parts = None if line.cell[6] is None else sorted(line.cell[6])
            line = Line(cell=(*line.cell[:6], parts))
            sums["cells"] += 1
            sums["used"] += cell.used
            sums["held"] += cell.held
        elif line.member is not None:
            if line.member[2] <= self._now_ms:
                return
            sums["members"] += 1
        elif line.owner is not None:
            sums["owners"] += 1
        elif line.hold is not None:
            sums["holds"] += 1
        elif line.tombstone is not None:
            if line.tombstone[1][1] <= self._now_ms:
                return
            sums["tombstones"] += 1
        elif line.record is not None:
            sums["records"] += 1
            sums["cost_nanousd"] += line.record.cost_nanousd or 0
        else:
            return
        sums["digest"] = (sums["digest"] + int.from_bytes(hashlib.sha256(write_line(line)).digest())) % _MODULUS

    def result(self) -> Migrated:
        counts: dict[str, Any] = dict(self._sums)
        return Migrated(**counts | {"digest": f"{counts['digest']:064x}"})


async def _tally_of(storage: Storage, stage: Stage, report: Progress) -> tuple[Migrated, int]:
    """The tally of a storage as it is, and the instant that it is of."""
    number = exported_ms = 0
    tally = _Tally(0)
    async with aclosing(_lines_of(storage)) as lines:
        async for data in lines:
            if not number and (header := read_line(data).export) is not None:
                exported_ms = header.exported_ms
                tally = _Tally(exported_ms)
            tally.add(data)
            number += 1
            if not number % _STEP:
                report(stage, number)
    report(stage, number)
    return tally.result(), exported_ms


async def _tally_of_file(spool: IO[bytes], now_ms: int) -> Migrated:
    def read() -> Migrated:
        spool.seek(0)
        tally = _Tally(now_ms)
        for data in spool:
            tally.add(data)
        return tally.result()

    return await asyncio.to_thread(read)


def _differences(wanted: Migrated, found: Migrated) -> str:
    """What differs: `records 5 instead of 7`; the digest only where all else agrees."""
    counts = [name for name in Migrated.__struct_fields__ if name != "digest"]
    differing = [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in counts
        if getattr(found, name) != getattr(wanted, name)
    ]
    return ", ".join(differing) or "the digest of the lines"
