"""The API against its own document: schemathesis makes requests up, good ones and bad ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance
from tests.admin.kit import TOKENS, Desk, desk, options

from asgi_llm_guard.admin.table import VERBS

_HEADERS: Final = {"authorization": f"Bearer {TOKENS['admin']}"}
_DOCUMENT: Final = "/api/v1/openapi.json"
_API: Final = sorted({verb.path.replace(":path", "") for verb in VERBS.verbs if verb.kind == "api"} - {_DOCUMENT})
_NOT: Final = [
    ignored_auth,  # `test_gate.py` sends every verb without a credential, and with wrong ones
    positive_data_acceptance,  # which scopes, zones and policies there are is no matter of the document
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder: Path = tmp_path_factory.mktemp("schema")
    made = desk(folder)
    asyncio.run(made.guard.chores.run("control"))
    yield made
    asyncio.run(made.aclose())


@pytest.fixture(scope="module")
def operations(service: Desk) -> dict[str, list[Any]]:
    """Every operation of the document, by path."""
    schema = schemathesis.openapi.from_asgi(
        _DOCUMENT, service.guard.admin_app(options()), headers=_HEADERS, config=SchemathesisConfig()
    )
    found: dict[str, list[Any]] = {}
    for each in schema.get_all_operations():
        operation: Any = each.ok()  # type: ignore[union-attr]  # an error has none, and fails here
        found.setdefault(operation.path, []).append(operation)
    return found


def test_every_path_is_tried(operations: dict[str, list[Any]]) -> None:
    """What is tried below is everything that the document offers."""
    assert sorted(operations) == _API


@pytest.mark.parametrize("path", _API)
def test_answers_are_as_the_document_says(path: str, operations: dict[str, list[Any]]) -> None:
    """Of a few requests, good and bad, every answer has a status, a type and a shape that the document names, and none is 500."""
    _try(operations[path], 6)


@pytest.mark.slow
@pytest.mark.parametrize("path", _API)
def test_many_answers_are_as_the_document_says(path: str, operations: dict[str, list[Any]]) -> None:
    """The same of hundreds."""
    _try(operations[path], 300)


def _try(operations: list[Any], most: int) -> None:
    for operation in operations:
        texts = any(each.definition["schema"].get("type") == "string" for each in operation.query)
        leave_out = [*_NOT, negative_data_rejection] if texts else _NOT  # whatever stands in a query is a text
        for mode in GenerationMode:
            try:
                _check(operation, mode, most, leave_out)
            except hypothesis.errors.Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE, operation.label  # nothing of it can be wrong


def _check(operation: Any, mode: GenerationMode, most: int, leave_out: list[Any]) -> None:
    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(headers=_HEADERS, excluded_checks=leave_out)

    check()
