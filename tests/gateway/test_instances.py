"""Several processes on one storage: together they send a deployment no more than it takes, and leave the same alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.gateway.processes_work import call_deployments, cool_down
from tests.servers import RedisServer
from tests.storage.sqlite_kit import workers


@pytest.fixture(params=["sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer, namespace: str) -> Path:
    """A storage that processes share."""
    return tmp_path / "guard.db" if request.param == "sqlite" else Path(f"{redis_server.url}#{namespace}")


def test_processes_fill_each_deployment_exactly(address: Path) -> None:
    """D9: of 200 calls of four processes at once each deployment gets as many as its rpm, tpm or budget has room for."""
    with workers(4, call_deployments, address) as started:
        for _, pipe in started:
            pipe.send("go")
        went = Counter(name for _, pipe in started for name in pipe.recv())
    assert went == {"a": 40, "b": 30, "c": 50, None: 80}


def test_processes_leave_the_same_deployments_alone(address: Path) -> None:
    """D3, conformance 79: of what three processes tell at once the longest cooldown is left, and a fourth knows it."""
    with workers(4, cool_down, address) as started:
        for (_, pipe), retry_after_s in zip(started, (60, 600, 300, None), strict=True):
            pipe.send(retry_after_s)
        assert [pipe.recv() for _, pipe in started] == ["told"] * 4
        left = []
        # One after another: whoever knows of a longer one than is stored tells it at its next look.
        for _, pipe in started:
            pipe.send("look")
            left.append(pipe.recv())
    assert [list(each) for each in left[1:]] == [["a"]] * 3
    assert all(590 < each["a"] <= 600.1 for each in left[1:])
