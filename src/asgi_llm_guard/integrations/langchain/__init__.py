"""LangChain: callbacks that guard every chat model and LLM they are given to."""

from asgi_llm_guard.integrations.langchain.callbacks import AsyncGuardCallback, GuardCallback

__all__ = ["AsyncGuardCallback", "GuardCallback"]
