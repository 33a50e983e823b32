"""Real host names, and a fake provider behind them."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

__all__ = ["Rerouted"]

if TYPE_CHECKING:
    # Each library asks for a base class of its own; at run time, for its methods alone.
    Transport: Any
else:
    Transport = object


class Rerouted(Transport):  # type: ignore[misc]
    """A transport of httpx or httpx2, sync or async, whose requests all go to one served provider.

    The `Host` header stays what it was: SDKs, and whatever watches them, keep the hosts that they know.

        http = httpx2.AsyncClient(transport=Rerouted(httpx2.AsyncHTTPTransport(), base_url))
        client = openai.AsyncOpenAI(api_key="any", http_client=http)    # calls https://api.openai.com
    """

    def __init__(self, transport: Any, base_url: str) -> None:
        """`transport`: the real one, of either library. `base_url`: what `FakeProvider.serve` gives."""
        self._transport = transport
        address = urlsplit(base_url)
        self._address = {"scheme": address.scheme, "host": address.hostname, "port": address.port}

    def handle_request(self, request: Any) -> Any:
        return self._transport.handle_request(self._moved(request))

    async def handle_async_request(self, request: Any) -> Any:
        return await self._transport.handle_async_request(self._moved(request))

    def _moved(self, request: Any) -> Any:
        return type(request)(
            request.method,
            request.url.copy_with(**self._address),
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions,
        )

    def close(self) -> None:
        self._transport.close()

    async def aclose(self) -> None:
        await self._transport.aclose()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(kind, error, trace)

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(kind, error, trace)
