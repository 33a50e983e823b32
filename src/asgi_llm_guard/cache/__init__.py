"""The response cache: kept answers, each for those who may have it; see `docs/cache.md`."""

from __future__ import annotations

from asgi_llm_guard.cache.answers import ProviderAnswer
from asgi_llm_guard.cache.calls import CachedCall, Key, OpenCachedCall, OpenCachedCallSync
from asgi_llm_guard.cache.functions import FunctionCache
from asgi_llm_guard.cache.keys import CacheRequest, Unfit
from asgi_llm_guard.cache.lookup import Lookup
from asgi_llm_guard.cache.options import Cache
from asgi_llm_guard.cache.responses import ResponseCache
from asgi_llm_guard.cache.scoped import litellm_cache, scoped_prompt_cache_key

__all__ = [
    "Cache",
    "CacheRequest",
    "CachedCall",
    "FunctionCache",
    "Key",
    "Lookup",
    "OpenCachedCall",
    "OpenCachedCallSync",
    "ProviderAnswer",
    "ResponseCache",
    "Unfit",
    "litellm_cache",
    "scoped_prompt_cache_key",
]
