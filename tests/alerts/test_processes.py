"""Alerts over several processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.alerts.kit import SECRET, receiving_in_thread
from tests.alerts.work import CALLERS, spend_it_all
from tests.servers import RedisServer
from tests.storage.sqlite_kit import workers


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_once_over_all_processes(kind: str, tmp_path: Path, redis_server: RedisServer, namespace: str) -> None:
    """S3: while four processes use up the same budgets, each threshold of each subject is told by exactly one of them, and
    delivered exactly once."""
    where = tmp_path / "guard.db" if kind == "sqlite" else f"{redis_server.url}#{namespace}"
    with receiving_in_thread() as receiver, workers(4, spend_it_all, Path(f"{where}@{receiver.port}")) as started:
        for _, pipe in started:
            pipe.send("spend")
        assert [pipe.recv() for _, pipe in started] == ["spent"] * 4
        for _, pipe in started:
            pipe.send("tell")
        heard = [pipe.recv() for _, pipe in started]
    wanted = Counter((caller, percent) for caller in CALLERS for percent in (50, 80, 95, 100))
    assert Counter(told for of in heard for told in of) == wanted
    assert Counter((got.json["subject"], got.json["threshold"]) for got in receiver.got) == wanted
    assert len({got.headers["x-guard-id"] for got in receiver.got}) == len(wanted)
    for got in receiver.got:
        got.check(SECRET)
