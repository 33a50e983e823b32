"""What can be asked for, as the two APIs list models. Pure."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["anthropic_list", "anthropic_model", "openai_list", "openai_model"]

_OWNER = "asgi-llm-guard"
_EPOCH = "1970-01-01T00:00:00Z"
"""For a time that is not known, as Anthropic's API says it."""


def openai_model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": _OWNER}


def openai_list(names: Sequence[str]) -> dict[str, object]:
    return {"object": "list", "data": [openai_model(name) for name in names]}


def anthropic_model(name: str) -> dict[str, object]:
    return {"type": "model", "id": name, "display_name": name, "created_at": _EPOCH}


def anthropic_list(names: Sequence[str]) -> dict[str, object]:
    """All of them on one page, whatever page was asked for."""
    first, last = (names[0], names[-1]) if names else (None, None)
    return {
        "data": [anthropic_model(name) for name in names],
        "has_more": False,
        "first_id": first,
        "last_id": last,
    }
