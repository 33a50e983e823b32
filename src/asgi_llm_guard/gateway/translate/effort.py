"""How much a model is to think: OpenAI's efforts as Anthropic's budgets and efforts, and back.

Source: the types of anthropic 2.11 and openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

import re
from typing import Final, Literal

from asgi_llm_guard.gateway.translate.fields import Fields, wrong

__all__ = ["BUDGETS", "LEAST_BUDGET", "Thinking", "effort_of", "effort_of_thinking", "takes_budget", "thinking_for"]

Thinking = Literal["adaptive", "budget"]
"""How an Anthropic model is told to think: by an effort that it sees to itself, or by a number of tokens."""

BUDGETS: Final[dict[str, int]] = {
    "minimal": 1_024,
    "low": 2_048,
    "medium": 8_192,
    "high": 16_384,
    "xhigh": 32_768,
    "max": 65_536,
}
"""Thinking tokens for an effort."""
LEAST_BUDGET: Final = 1_024
"""The provider takes none smaller."""

_EFFORTS: Final = ("none", *BUDGETS)
# The models that think, and do not know the adaptive way.
_BY_BUDGET: Final = re.compile(r"claude-(?:3-7-|(?:opus|sonnet|haiku)-4(?:-[015])?(?:$|[@:-](?=\d{6}|latest|v\d)|@))")


def takes_budget(model: str) -> bool:
    """Whether an Anthropic model, under any platform's name for it, is told by a number of tokens."""
    return _BY_BUDGET.search(model) is not None


def effort_of(budget: int) -> str:
    """The least effort that has at least this budget."""
    return next((effort for effort, tokens in BUDGETS.items() if tokens >= budget), "max")


def thinking_for(effort: str, most_tokens: int, thinking: Thinking, path: str) -> dict[str, object]:
    """The members of an Anthropic request for an effort. A budget is kept within the limit of output tokens.

    Raises:
        BodyError: there is no such effort, or no budget fits into the limit.
    """
    if effort not in _EFFORTS:
        raise wrong(path, f"expected one of {', '.join(_EFFORTS)}")
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if thinking == "adaptive":
        known = "low" if effort == "minimal" else effort
        return {"thinking": {"type": "adaptive"}, "output_config": {"effort": known}}
    budget = min(BUDGETS[effort], most_tokens - 1)
    if budget < LEAST_BUDGET:
        least = LEAST_BUDGET + 1
        raise wrong(path, f"thinking takes an output limit of at least {least} tokens, the request has {most_tokens}")
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def effort_of_thinking(thinking: Fields | None, effort: str | None) -> str | None:
    """OpenAI's effort for the two members that Anthropic has for it; `None`: as much as the model does by itself.

    An effort goes before a budget, which cannot be told exactly.

    Raises:
        BodyError: the kind of thinking cannot be expressed.
    """
    if thinking is None:
        return effort
    kind = thinking.needed("type")
    budget = thinking.whole("budget_tokens")
    thinking.hints("display")
    thinking.done()
    if kind == "disabled":
        return effort or "none"
    if kind == "adaptive":
        return effort
    if kind != "enabled":
        raise wrong(thinking.at("type"), "expected adaptive, disabled or enabled")
    if budget is None:
        raise wrong(thinking.at("budget_tokens"), "required, got none")
    return effort or effort_of(budget)
