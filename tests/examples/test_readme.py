"""README.md: it says first what this is, stays short, and shows what really comes back."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.test_docs import Block, blocks

from asgi_llm_guard.testing import asgi_client

README = Path(__file__).parents[2] / "README.md"
PAGE = README.read_text("utf-8")
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
WAIT = re.compile(r'("retry_after_s": ?|retry-after: |t=)\d+')


def the_block(language: str) -> Block:
    (block,) = (block for block in blocks(PAGE) if block.language == language)
    return block


def without_instants(text: str) -> str:
    """`text` with what depends on the time of day, or on chance, taken out."""
    return WAIT.sub(r"\g<1>N", INSTANT.sub("INSTANT", text))


@pytest.fixture
async def refusal(tmp_path: Path) -> AsyncIterator[httpx2.Response]:
    """What the README's app answers to the fourth call of a session."""
    program: dict[str, Any] = {"__name__": "app"}
    with chdir(tmp_path):
        exec(compile(the_block("python").code, "README.md", "exec", dont_inherit=True), program)
        async with program["guard"] as guard, asgi_client(program["app"]) as client:
            asked: dict[str, Any] = {"params": {"question": "hello"}, "headers": {"x-session-id": "s1"}}
            admitted = [(await client.post("/ask", **asked)).status_code for _ in range(3)]
            assert admitted == [200, 200, 200]
            assert [record.outcome for record in await guard.storage.records()] == ["measured"] * 3
            yield await client.post("/ask", **asked)


@pytest.mark.anyio
async def test_refusal_is_literal(refusal: httpx2.Response) -> None:
    """The refusal in the README is the one that comes back: status, headers and body; only instants differ."""
    head, _, body = the_block("http").code.partition("\n\n")
    headers = [f"{name}: {value}" for name, value in refusal.headers.items() if name != "content-length"]

    status = f"HTTP/1.1 {refusal.status_code} {refusal.reason_phrase}"
    assert without_instants(head).splitlines() == without_instants("\n".join([status, *headers])).splitlines()
    shown, real = (json.loads(without_instants(text).replace("N,", "0,")) for text in (body, refusal.text))
    assert shown == real
    assert list(shown) == list(real)


def test_first_line_says_what_it_is_and_is_not() -> None:
    """Who reads one line knows that this is about budgets, quotas, loops and cache scope, and not about content."""
    assert PAGE.splitlines()[0] == ("# asgi-llm-guard: budgets, quotas, loops and cache scope — not content moderation")


def test_it_is_short() -> None:
    """The page is read in two minutes, and the app fits on a screen."""
    assert 330 <= len(PAGE.split()) <= 480
    assert len(PAGE.partition("```")[0].split()) <= 110
    assert len(the_block("python").code.splitlines()) < 20


def test_every_promise_has_its_test() -> None:
    """Each of the six promises links to a test file that exists."""
    promises = re.findall(r"^- \*\*(?:.+\n)(?:  .+\n)*", PAGE, re.MULTILINE)
    linked = [re.findall(r"\]\((tests/[^)]+\.py)\)", promise) for promise in promises]

    assert len(promises) == 6
    assert all(linked)
    assert [path for paths in linked for path in paths if not (README.parent / path).is_file()] == []
