"""The page for users says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.denials.values import CODES, NOW_MS, fitting, meter, refused, stuck

from asgi_llm_guard.claims import Rule
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.denials import deny, refuse
from asgi_llm_guard.money import NANO
from asgi_llm_guard.windows import Calendar
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.refusals import render

PAGE = (Path(__file__).parents[2] / "docs" / "denials.md").read_text(encoding="utf-8")


def test_the_body_on_the_page_is_the_one_that_is_sent() -> None:
    """The JSON shown for OpenAI is, member for member and in order, what a client gets."""
    denied = deny(refused(stuck(meter(Rule.ITERATIONS, 25, policy="loop"), used=25, wait_ms=3_600_000)), None)
    [shown] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert json.dumps(json.loads(shown)) == json.dumps(json.loads(render(denied, dialect="openai").body))


def test_the_code_on_the_page_runs() -> None:
    """The settings shown are accepted."""
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/denials.md", "exec"), {})


def test_the_table_on_the_page_names_every_code_with_its_status() -> None:
    """Every code has its row, and the row the status that is sent."""
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 5]
    for code in CODES:
        status = str(refuse(Refusal(policy="p", code=code, message="m")).status)
        [row, *_] = [row for row in rows if f"`{code}`" in row[2]]
        assert status in row[3]


def test_the_fields_on_the_page_are_the_ones_that_are_sent() -> None:
    """The `RateLimit` lines shown are what these two limits give."""
    budget = meter(Rule.BUDGET, 10 * NANO, policy="purse", window=Calendar("day"))
    receipts = (
        fitting(meter(Rule.RATE, 60, policy="rpm"), used=47),
        stuck(budget, amount=0, used=587_500_000, wait_ms=50_400_000),
    )
    for name, value in rate_limit_headers(receipts, NOW_MS):
        assert f"\n{name.decode()}: {value.decode()}\n".lower() in PAGE.lower()
