"""Figures that no storage could keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import Budget, Context, Guard, Usage
from asgi_llm_guard.ledger import RecordQuery

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
async def test_a_usage_beyond_all_amounts_holds_up_no_other(kind: str, tmp_path: Path) -> None:
    """C9: an application that reports a usage no database has room for is charged the hold, and every call is recorded."""
    url = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{tmp_path}/guard.db",
        "redis": f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10",
    }[kind]
    guard = Guard([Budget("$5/daily")], storage=url, ledger=f"sqlite:///{tmp_path}/l.db" if kind == "redis" else None)
    assert guard.books is not None
    for tokens in (2**70, 2**63, 2**53, 3):
        async with (
            guard.open(Context(caller="ada")),
            guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50) as call,
        ):
            call.record(Usage(input_tokens=tokens, output_tokens=1))
    await guard.books.catch_up()
    assert guard.ledger is not None
    kept = [(one.outcome, one.tokens) for one in (await guard.ledger.records(RecordQuery())).items]
    await guard.aclose()

    assert sorted(kept, key=str) == [("measured", 4), *[("unmetered", 150)] * 3]
