"""The client hook of httpx and httpx2: transports that guard what the SDKs on top of them send.

    client = AsyncOpenAI(http_client=guard.httpx_client())
    client = httpx.AsyncClient(transport=AsyncGuardTransport(guard))

Both libraries have the same interface and different classes, and an SDK takes the one it was built on. A
transport answers each request with a response of the library that the request is of. `import httpx` does not
tell which that is: `httpx2.alias_httpx()` may have made it the other one.
"""

from __future__ import annotations

from asgi_llm_guard.httpx.clients import async_client, sync_client
from asgi_llm_guard.httpx.library import Library
from asgi_llm_guard.httpx.transports import AsyncGuardTransport, GuardTransport

__all__ = ["AsyncGuardTransport", "GuardTransport", "Library", "async_client", "sync_client"]
