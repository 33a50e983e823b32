"""Changes between processes: in force everywhere within two seconds, whoever writes them and whoever dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.control.kit import ANNA, SECRET
from tests.control.work import LIMIT_S, POLL_S, database, follow, follow_from_afar, write_and_die
from tests.servers import RedisServer
from tests.storage.sqlite_kit import workers

from asgi_llm_guard.control import Control

WITHIN_S = 2.0


@pytest.fixture(params=["sqlite", "redis"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where the database is, and which storage the processes share."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        (tmp_path / "redis").write_text(f"{server.url} {request.getfixturevalue('namespace')}")
    put(tmp_path, 1_000_000)
    return tmp_path


def put(folder: Path, limit: int) -> int:
    """Change the limit that the workers look at, from a process without a guard; the version of the change."""

    async def change() -> int:
        control = Control(database(folder), secret=SECRET)
        state = await control.put("agent", "writer", {"max_iterations": limit}, actor=ANNA)
        await control.aclose()
        return state.version

    return asyncio.run(change())


def answers(pipes: list[Connection]) -> list[tuple[list[float], int]]:
    """When each worker called, until it was refused, and by which version."""
    found = []
    for pipe in pipes:
        assert pipe.poll(2 * LIMIT_S)
        found.append(pipe.recv())
    assert None not in found, "a worker never followed"
    return found


def took_s(called_at: Sequence[float], changed_at: float) -> float:
    """How long a worker went on after a change. Where its machine let it wait for longer than it meant to, that is not
    counted: it could not have followed then.
    """
    times = [changed_at, *(at for at in called_at if at > changed_at)]
    return sum(min(after - before, 2 * POLL_S) for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_change_is_in_force_everywhere_within_two_seconds(folder: Path, count: int) -> None:
    """C16, M4: whoever writes it, every process keeps to a change within two seconds, over SQLite and over Redis."""
    with workers(count, follow, folder) as started:
        version = put(folder, 0)
        changed_at = time.time()
        seen = answers([pipe for _, pipe in started])
    assert {of for _, of in seen} == {version}
    assert max(took_s(called_at, changed_at) for called_at, _ in seen) < WITHIN_S


@pytest.mark.parametrize("writer", ["dies", pytest.param("put", marks=pytest.mark.slow)])
def test_who_does_not_reach_the_database_follows(folder: Path, writer: str) -> None:
    """S8: processes that only reach the storage follow within two seconds what another publishes, also where the writer is killed (kill -9)
    between its commit and anything else."""
    with workers(3, follow_from_afar, folder) as started:
        if writer == "dies":
            with workers(1, write_and_die, folder) as ((process, pipe),):
                pipe.send("go")
                process.join(LIMIT_S)
                assert process.exitcode == -9
        else:
            put(folder, 0)
        changed_at = time.time()
        seen = answers([pipe for _, pipe in started])
    assert len({version for _, version in seen}) == 1
    assert max(took_s(called_at, changed_at) for called_at, _ in seen) < WITHIN_S
