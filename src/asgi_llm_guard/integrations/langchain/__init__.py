"""LangChain: callbacks that guard every chat model and LLM they are given to, and a chat model over the gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgi_llm_guard.integrations.langchain.callbacks import AsyncGuardCallback, GuardCallback

if TYPE_CHECKING:
    from asgi_llm_guard.integrations.langchain.chat_model import GatewayChatModel, StreamFailed

__all__ = ["AsyncGuardCallback", "GatewayChatModel", "GuardCallback", "StreamFailed"]


def __getattr__(name: str) -> Any:
    """The chat model brings the gateway with it, which callbacks do without."""
    if name in ("GatewayChatModel", "StreamFailed"):
        from asgi_llm_guard.integrations.langchain import chat_model

        return getattr(chat_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
