"""Why an answer ended, in the words of both APIs."""

from __future__ import annotations

from typing import Final

__all__ = ["finish_reason", "stop_reason"]

_FINISH: Final[dict[object, str]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_STOP: Final[dict[object, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


def finish_reason(stop: object) -> str:
    """OpenAI's word for Anthropic's; words that are not known count as a natural end."""
    return _FINISH.get(stop, "stop") if isinstance(stop, str) else "stop"


def stop_reason(finish: object, *, called: bool, refused: bool, sequence: str | None) -> str:
    """Anthropic's word for OpenAI's. `called`: tools are; `refused`: in the model's own words; `sequence`: what the
    answer ended at, where a server tells it. Servers that answer `stop` beside calls mean the calls."""
    word = _STOP.get(finish, "end_turn") if isinstance(finish, str) else "end_turn"
    if word == "end_turn":
        if called:
            return "tool_use"
        if refused:
            return "refusal"
        if sequence:
            return "stop_sequence"
    return word
