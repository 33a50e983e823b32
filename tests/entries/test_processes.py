"""Single-flight between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.entries.work import KEYS, lead_or_follow
from tests.servers import RedisServer
from tests.storage.sqlite_kit import workers


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_of_all_processes_one_makes_each_value(
    kind: str, tmp_path: Path, redis_server: RedisServer, namespace: str
) -> None:
    """T8: each value is made by exactly one of several processes, and all others are given that one."""
    address = tmp_path / "guard.db" if kind == "sqlite" else Path(f"{redis_server.url}#{namespace}")
    with workers(3, lead_or_follow, address) as started:
        for _, pipe in started:
            pipe.send("go")
        found = [pipe.recv() for _, pipe in started]
    for n in range(KEYS):
        assert sum(made for made, _ in (of[n] for of in found)) == 1
        assert len({value for _, value in (of[n] for of in found)}) == 1
