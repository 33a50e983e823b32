"""A gateway over a fake provider, and what LangChain's standard tests ask of pytest's plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import respx
from tests.langchain.kit import Stage, staged


@pytest.fixture(scope="package")
def provided() -> Iterator[Stage]:
    """One provider and one gateway for all: they take longer to start than all tests together."""
    with staged() as stage:
        yield stage


@pytest.fixture
def stage(provided: Stage) -> Iterator[Stage]:
    """The gateway, and nothing held there when the test has ended."""
    provided.provider.requests.clear()
    yield provided
    provided.settled()


@pytest.fixture
def benchmark() -> Callable[[Callable[[], Any]], Any]:
    """Runs what is to be timed, once."""
    return lambda work: work()


@pytest.fixture
def vcr() -> SimpleNamespace:
    """Says that there is a recording: the fake provider needs none."""
    return SimpleNamespace(responses=[True])


@pytest.fixture
def snapshot() -> None:
    """Of the serialised model, which is none: a gateway is an object of its process."""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pictures and sounds that the standard tests download are four bytes."""
    monkeypatch.setenv("LANGCHAIN_TESTS_USER_AGENT", "tests")
    with respx.mock(assert_all_called=False) as router:
        router.get(url__regex=r"https://(raw\.githubusercontent\.com|upload\.wikimedia\.org|www\.w3\.org)/.*").respond(
            200, content=b"\x89PNG"
        )
        yield
