"""The writer's thread: order, answers to any thread, errors that stay with who caused them, forks and exits."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import weakref
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tests.storage.sqlite_kit import CENT, AheadClock, draft, meter, money, slots, take

from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Settled, Settlement, Unit
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.storage.sqlite_file import QueueLock
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Distinct, Rolling

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guard.db"


# -------------------------------------------------------------------------- order and answers


async def test_a_settlement_comes_before_a_later_reserve(path: Path) -> None:
    """Rule 8: a hold that was handed to `settle` frees its slot for the next reserve, without being awaited."""
    storage = SqliteStorage(path)
    for n in range(50):
        assert isinstance(await take(storage, f"{n}", Claim(slots(1), 1)), Granted)
        storage.settle([Settlement(f"{n}", ())])
    await storage.aclose()


async def test_pending_answers_every_way_of_asking(path: Path) -> None:
    """A settlement may be awaited twice, asked for from a thread, and called back, before and after it is done."""
    storage = SqliteStorage(path)
    await take(storage, "a", Claim(money(), CENT))
    pending = storage.settle([Settlement("a", (CENT,))])
    called: list[object] = []
    pending.add_done_callback(called.append)
    expected = (Settled("a", "settled", (0,)),)
    for answer in await asyncio.gather(asyncio.to_thread(pending.result, 10), asyncio.to_thread(pending.result)):
        assert answer == expected
    assert await pending == await pending == expected
    assert pending.done()
    pending.add_done_callback(called.append)
    assert pending.result(0) == expected
    await storage.open_holds()  # callbacks of a turn are through before the next one is answered
    assert called == [pending, pending]
    await storage.aclose()


async def test_an_answer_that_takes_too_long_is_unknown(path: Path) -> None:
    """Asked for with a timeout, a settlement that is still queued is a StorageError; it is done all the same."""
    storage = SqliteStorage(path)
    await take(storage, "a", Claim(slots(1), 1))
    queue = os.open(f"{path}.lock", os.O_RDWR)
    fcntl.flock(queue, fcntl.LOCK_EX)
    pending = storage.settle([Settlement("a", (1,))])
    assert not pending.done()
    with pytest.raises(StorageError, match=r"no answer within 0\.01 s"):
        pending.result(0.01)
    fcntl.flock(queue, fcntl.LOCK_UN)
    os.close(queue)
    assert await pending == (Settled("a", "settled", (0,)),)
    assert await storage.open_holds() == 0
    await storage.aclose()


def test_settling_needs_no_event_loop(path: Path) -> None:
    """`settle` works in a thread that never had an event loop, and other loops get their own answers."""
    storage = SqliteStorage(path)
    asyncio.run(take_and_forget(storage))
    assert storage.settle([Settlement("a", (CENT,))]).result(10) == (Settled("a", "settled", (0,)),)
    asyncio.run(storage.aclose())


async def take_and_forget(storage: SqliteStorage) -> None:
    await take(storage, "a", Claim(money(), CENT))


async def test_a_failing_callback_harms_nobody(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a callback is logged; the writer goes on."""
    storage = SqliteStorage(path)
    storage.settle([Settlement("a", ())]).add_done_callback(lambda _: 1 / 0)
    assert await storage.open_holds() == 0
    assert await storage.open_holds() == 0
    await storage.aclose()
    assert "a callback" in caplog.text


async def test_a_loop_that_is_gone_is_not_missed(path: Path) -> None:
    """Answers to a loop that was closed meanwhile are dropped; all others still get theirs."""
    storage = SqliteStorage(path, timeout_s=30)
    queue = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(queue, fcntl.LOCK_EX)

    def ask_and_leave() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(storage.open_holds())
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()

    await asyncio.to_thread(ask_and_leave)
    fcntl.flock(queue, fcntl.LOCK_UN)
    assert await storage.open_holds() == 0
    os.close(queue)
    await storage.aclose()


# -------------------------------------------------------------------------------------- errors


async def test_one_impossible_operation_does_not_fail_its_neighbours(path: Path) -> None:
    """Of operations that share a transaction only the one that cannot be done fails, and says why."""
    storage = SqliteStorage(path)
    twice = (Claim(money(), 1), Claim(money(), 1))
    answers = await asyncio.gather(
        *[take(storage, f"{n}", *(twice if n == 7 else (Claim(money(), CENT),))) for n in range(20)],
        return_exceptions=True,
    )
    assert isinstance(answers[7], ValueError)
    assert sum(isinstance(answer, Granted) for answer in answers) == 19
    assert [reading.held for reading in await storage.read([money()])] == [19 * CENT]
    await storage.aclose()


async def test_an_operation_that_cannot_be_stored_is_a_storage_error(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What SQLite refuses fails alone, as a StorageError, and is logged with its cause."""
    storage = SqliteStorage(path)
    odd = Settlement("odd", (), draft("odd", cost_nanousd=2**70))
    good = storage.settle([Settlement("good", (), draft("good"))])
    bad = storage.settle([odd])
    assert await good == (Settled("good", "lost"),)
    with pytest.raises(StorageError, match="OverflowError"):
        await bad
    assert [record.call_id for record in await storage.records()] == ["good"]
    assert "an operation failed" in caplog.text
    await storage.aclose()


async def test_a_full_disk_fails_what_needs_room(path: Path) -> None:
    """With no page left, settlements with records fail as StorageError, and reading goes on; with room they succeed."""
    storage = SqliteStorage(path)
    await storage.open_holds()
    connection = storage._writer._database._connection  # type: ignore[union-attr]
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    long = [Settlement(f"{n}", (), draft(f"{n}", route="x" * 3000)) for n in range(30)]
    with pytest.raises(StorageError, match="database or disk is full"):
        await storage.settle(long)
    assert [reading.held for reading in await storage.read([money()])] == [0]
    assert await storage.records() == []
    connection.execute("PRAGMA max_page_count = 1000000")
    assert [settled.status for settled in await storage.settle(long)] == ["lost"] * 30
    assert len(await storage.records()) == 30
    await storage.aclose()


async def test_a_lock_that_is_never_released_is_an_error(path: Path) -> None:
    """Rule: locked past the timeout is a StorageError for all who wait, never a refusal; nothing was changed."""
    storage = SqliteStorage(path, timeout_s=0.05)
    await storage.open_holds()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answers = await asyncio.gather(
            *[take(storage, f"{n}", Claim(money(), 1)) for n in range(3)], return_exceptions=True
        )
        assert [type(answer).__mro__[1] for answer in answers] == [StorageError] * 3
        assert "locked for more than 0.05 s" in str(answers[0])
        other.execute("ROLLBACK")
    assert await storage.open_holds() == 0
    await storage.aclose()


async def test_a_queue_that_does_not_move_is_an_error(path: Path) -> None:
    """A process that is stopped in its turn makes others fail after their timeout; they go on when it does."""
    storage = SqliteStorage(path, timeout_s=0.05)
    await storage.open_holds()
    queue = os.open(f"{path}.lock", os.O_RDWR)
    fcntl.flock(queue, fcntl.LOCK_EX)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"locked for more than 0\.05 s"):
            await storage.open_holds()
    fcntl.flock(queue, fcntl.LOCK_UN)
    os.close(queue)
    storage._timeout_s = 5
    assert await asyncio.to_thread(until_answered, storage) == 0
    await storage.aclose()


def until_answered(storage: SqliteStorage) -> int:
    """The helper that waits for the lock needs a moment; each question waits for it again."""
    while True:
        try:
            return asyncio.run(storage.open_holds())
        except StorageError:
            pass


def test_a_queue_that_is_closed_while_waiting_lets_go(tmp_path: Path) -> None:
    """Closed while another process has the lock, it does not keep the lock once it gets it."""
    path = tmp_path / "queue"
    first, second = QueueLock(path), QueueLock(path)
    assert first.acquire(1)
    assert not second.acquire(0.01)
    second.close()
    first.release()
    assert first.acquire(5)
    first.release()
    first.close()


async def test_a_closed_storage_says_so(path: Path) -> None:
    """After `aclose` every operation is an error, used or unused before; closing twice is none."""
    for use in (True, False):
        storage = SqliteStorage(path)
        if use:
            await storage.open_holds()
        await storage.aclose()
        await storage.aclose()
        with pytest.raises(StorageError, match="is closed; open a new one"):
            await storage.open_holds()


async def test_closing_finishes_what_was_handed_over(path: Path) -> None:
    """All settlements handed over before `aclose` are in the file after it."""
    storage = SqliteStorage(path)
    for n in range(1000):
        storage.settle([Settlement(f"{n}", (), draft(f"{n}"))])
    await storage.aclose()
    storage = SqliteStorage(path)
    assert len(await storage.records()) == 1000
    await storage.aclose()


async def test_a_forgotten_storage_ends_its_thread(path: Path) -> None:
    """A storage that is dropped without `aclose` does not leave its thread behind."""
    storage = SqliteStorage(path)
    await storage.open_holds()
    thread = storage._writer._thread  # type: ignore[union-attr]
    gone = weakref.ref(storage)
    del storage
    gc.collect()
    assert gone() is None
    assert thread is not None
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_a_hold_written_after_a_rollback_can_be_read_by_others(path: Path) -> None:
    """What was rolled back together with a hold (its meters' templates) is written again with it."""
    storage = SqliteStorage(path)
    await storage.open_holds()
    queue = os.open(f"{path}.lock", os.O_RDWR)
    fcntl.flock(queue, fcntl.LOCK_EX)
    asked = asyncio.gather(storage.open_holds(), take(storage, "a", Claim(money(), CENT), owner="gone"))
    await asyncio.sleep(0)  # the first is a turn that waits for the lock; the others will share the next one
    odd = storage.settle([Settlement("odd", (), draft("odd", cost_nanousd=2**70))])
    fcntl.flock(queue, fcntl.LOCK_UN)
    os.close(queue)
    await asked
    with pytest.raises(StorageError, match="OverflowError"):
        await odd
    other = SqliteStorage(path, clock=AheadClock(60_000))
    assert (await other.heartbeat("survivor")).expired == ("a",)
    assert [(reading.used, reading.held) for reading in await other.read([money()])] == [(CENT, 0)]
    await storage.aclose()
    await other.aclose()


# ------------------------------------------------------------------------------ forks and exits


async def test_a_fork_does_not_share_the_connection(path: Path) -> None:
    """A process that is forked while the storage is in use goes on by itself, and so does its parent."""
    storage = SqliteStorage(path)
    await take(storage, "parent-0", Claim(money(), CENT))
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(storage,))
    child.start()
    for n in range(1, 50):
        await take(storage, f"parent-{n}", Claim(money(), CENT))
    await asyncio.to_thread(child.join)
    assert child.exitcode == 0
    assert [reading.held for reading in await storage.read([money()])] == [100 * CENT]
    await storage.aclose()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def in_child(storage: SqliteStorage) -> None:
    async def main() -> None:
        for n in range(50):
            assert isinstance(await take(storage, f"child-{n}", Claim(money(), CENT)), Granted)
        await storage.aclose()

    asyncio.run(main())


async def test_forks_under_load_neither_hang_nor_lose(path: Path) -> None:
    """Forks in the middle of turns leave every operation of the parent answered, exactly once."""
    storage = SqliteStorage(path)
    await storage.open_holds()
    context = multiprocessing.get_context("fork")
    tasks = [asyncio.create_task(take(storage, f"{n}", Claim(money(), CENT))) for n in range(300)]
    children: list[BaseProcess] = []
    for _ in range(5):
        await asyncio.sleep(0)
        child: BaseProcess = context.Process(target=in_child_once, args=(storage, f"child-{len(children)}"))
        child.start()
        children.append(child)
    assert all(isinstance(answer, Granted) for answer in await asyncio.gather(*tasks))
    for child in children:
        await asyncio.to_thread(child.join)
    assert [child.exitcode for child in children] == [0] * 5
    assert await storage.open_holds() == 305
    await storage.aclose()


def in_child_once(storage: SqliteStorage, call_id: str) -> None:
    asyncio.run(take(storage, call_id, Claim(money(), CENT)))


def test_the_interpreters_end_waits_for_settlements(path: Path) -> None:
    """A script that ends without closing the storage loses no settlement that it handed over."""
    script = f"""
        from asgi_llm_guard.claims import Settlement
        from asgi_llm_guard.storage.sqlite import SqliteStorage
        from asgi_llm_guard.usage import UsageRecord
        storage = SqliteStorage({str(path)!r})
        for n in range(2000):
            storage.settle([Settlement(f"{{n}}", (), UsageRecord(call_id=f"{{n}}", at_ms=n))])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM ledger").fetchone() == (2000,)


# ------------------------------------------------------------------------------- bounded tables


async def test_tables_do_not_grow_with_what_is_over(path: Path) -> None:
    """Expired cells, ids and tombstones are removed as work goes on; open holds and the ledger never are."""
    clock = FrozenClock(1_800_000_000_000)
    storage = SqliteStorage(path, clock=clock, lapse_ms=10**12)
    await take(storage, "kept", Claim(money(None, "kept"), CENT))
    for round_ in range(3):
        for n in range(400):
            call_id = f"{round_}-{n}"
            short = meter(Unit.CALLS, None, subject=call_id, window=Rolling(1000))
            ids = meter(Unit.IDS, None, subject=f"{call_id}", window=Distinct(1000))
            storage.settle([Settlement(f"cancelled-{call_id}", ())])
            await storage.reserve("me", [[Bundle(call_id, (Claim(short, 1), Claim(ids, 1, "x")), None)]])
            await storage.settle([Settlement(call_id, (1, 1))])
        clock.advance(seconds=3600)
    for n in range(2500):  # work on one meter, until the tables have been gone through
        await take(storage, f"later-{n}", Claim(money(None, "kept"), 0))
    counts = await asyncio.to_thread(table_sizes, path)
    assert counts == {"cells": 1, "crowds": 0, "members": 0, "tombstones": 0, "holds": 2501}
    await storage.aclose()


def table_sizes(path: Path) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("cells", "crowds", "members", "tombstones", "holds")
        }


async def test_distinct_ids_are_counted_without_reading_them(path: Path) -> None:
    """T9: the count of live ids is exact over restarts, expiry and reset."""
    clock = FrozenClock(1_800_000_000_000)
    ids: Meter = meter(Unit.IDS, 3, window=Distinct(10_000))
    storage = SqliteStorage(path, clock=clock)
    for n in range(3):
        assert isinstance(await take(storage, f"a{n}", Claim(ids, 1, f"id{n}")), Granted)
        clock.advance(seconds=1)
    assert not isinstance(await take(storage, "b", Claim(ids, 1, "new")), Granted)
    await storage.aclose()
    storage = SqliteStorage(path, clock=clock)
    assert isinstance(await take(storage, "c", Claim(ids, 1, "id0")), Granted)
    clock.advance(seconds=8)
    assert [reading.used for reading in await storage.read([ids])] == [2]
    assert isinstance(await take(storage, "d", Claim(ids, 1, "new")), Granted)
    await storage.reset([ids])
    assert [reading.used for reading in await storage.read([ids])] == [0]
    await storage.aclose()


def test_threads_of_one_process_share_a_storage(path: Path) -> None:
    """Four threads with event loops of their own spend one budget exactly."""
    storage = SqliteStorage(path)
    begin = threading.Barrier(4)
    granted: list[int] = []

    def work(number: int) -> None:
        async def main() -> None:
            begin.wait()
            answers = await asyncio.gather(
                *[take(storage, f"{number}-{n}", Claim(money(), 10 * CENT)) for n in range(25)]
            )
            granted.append(sum(isinstance(answer, Granted) for answer in answers))

        asyncio.run(main())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 50
    asyncio.run(storage.aclose())


async def test_load_into_a_used_storage_changes_nothing(path: Path, tmp_path: Path) -> None:
    """An import is refused by a storage that has state, which keeps it."""
    source, target = SqliteStorage(path), SqliteStorage(tmp_path / "other.db")
    await take(source, "a", Claim(money(), CENT))
    await take(target, "b", Claim(money(), 2 * CENT))
    with pytest.raises(StorageError, match="not empty"):
        await target.load([line async for line in source.export()])
    assert [reading.held for reading in await target.read([money()])] == [2 * CENT]
    await source.aclose()
    await target.aclose()


async def test_fork_after_a_storage_was_closed(tmp_path: Path) -> None:
    """A storage that was closed before stands in no fork's way: not the parent's, not the child's."""
    closed, used = SqliteStorage(tmp_path / "closed.db"), SqliteStorage(tmp_path / "used.db")
    assert await closed.open_holds() == 0
    assert await used.open_holds() == 0
    await closed.aclose()
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, child, 0))[1]) == 0
    assert await used.open_holds() == 0
    await used.aclose()
