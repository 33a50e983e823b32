"""`guard.health_app()`: whether this process lives, and whether it is able to decide. Pure ASGI; mounts anywhere.

    GET  /healthz    200 while the event loop turns; asks nothing
    GET  /readyz     200, or 503 and which of its checks failed

No ids, limits, counts of anybody's use, or addresses are shown, so that both may be open to everybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, date, datetime
from typing import Any, Final, Literal, Protocol

import msgspec

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.marks import mark_own_where_told
from asgi_llm_guard.routes import route_path
from asgi_llm_guard.windows import duration_ms

__all__ = ["HealthApp", "Probed"]

_log = logging.getLogger("asgi_llm_guard")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Check = Literal["ok", "failed", "lost", "slow", "stale", "skewed", "missing", "draining"]
"""What a check has found. Only `ok` is ready."""

_FRESH_MS: Final = 15_000
"""Three heartbeats: while the storage has answered one of them, it is not asked for a probe."""
_AGAIN_MS: Final = 5_000
_BOUND_S: Final = 1.0
_DAY_MS: Final = 86_400_000
_PATHS: Final = ("/healthz", "/readyz")


class _Prices(Protocol):
    @property
    def date(self) -> str: ...


class Probed(Protocol):
    """What is looked at: a `Guard`."""

    @property
    def clock(self) -> Clock: ...

    @property
    def draining(self) -> bool: ...

    @property
    def prices(self) -> _Prices: ...

    @property
    def beat_ms(self) -> int | None:
        """When the storage answered a heartbeat last."""
        ...

    @property
    def skew_ms(self) -> int:
        """How far the storage's clock was ahead then."""
        ...

    async def heartbeat(self) -> None: ...

    def health(self) -> dict[str, object]: ...


@mark_own_where_told
class HealthApp:
    """See the top of this file.

    A probe waits for the storage only if it has answered no heartbeat for 15 seconds (before the first admission
    nobody sends any); then for at most a second, at most every 5 seconds, and once for all who ask meanwhile.

    Args:
        guard: whose.
        max_price_age: prices that are older than this (`"90d"`) are not ready; `None`: their age is shown, and not judged.
        max_clock_skew_s: how far this process's clock may be from the storage's, in seconds. The storage's clock
            decides on windows; this process's, on the validity of prices and tokens of identity.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(self, guard: Probed, *, max_price_age: str | None = None, max_clock_skew_s: float = 30) -> None:
        if (
            isinstance(max_clock_skew_s, bool)
            or not isinstance(max_clock_skew_s, (int, float))
            or max_clock_skew_s <= 0
        ):
            raise ConfigurationError(f"max_clock_skew_s: expected seconds above 0, got {max_clock_skew_s!r}")
        self._guard = guard
        self._max_age_ms = None if max_price_age is None else duration_ms(max_price_age, name="max_price_age")
        self._max_skew_ms = max_clock_skew_s * 1000
        self._probing: asyncio.Task[bool] | None = None
        self._probed_ms: int | None = None
        self._slow = False

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._answer(scope, send)
        elif kind == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: _Scope, send: _Send) -> None:
        path, method = route_path(scope), scope["method"]
        told: dict[str, object]
        if path not in _PATHS:
            status, told = 404, {"status": "not found"}
        elif method not in {"GET", "HEAD"}:
            status, told = 405, {"status": "only GET and HEAD"}
        elif path == "/healthz":
            status, told = 200, {"status": "ok"}
        else:
            status, told = await self.ready()
        body = msgspec.json.encode(told)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})

    async def ready(self) -> tuple[int, dict[str, object]]:
        """The status of `/readyz`, and what it says."""
        guard = self._guard
        if not guard.draining:
            await self._ask_storage()
        days = self._price_days()
        checks = {
            "storage": self._storage(),
            "service": "draining" if guard.draining else "ok",
            "clock": "skewed" if abs(guard.skew_ms) > self._max_skew_ms else "ok",
            "prices": "stale" if self._max_age_ms is not None and days * _DAY_MS > self._max_age_ms else "ok",
            "control": self._control(),
        }
        ready = all(found == "ok" for found in checks.values())
        told: dict[str, object] = {"status": "ready" if ready else "not ready", "checks": checks, "prices_days": days}
        return (200 if ready else 503), told

    def _control(self) -> str:
        # Of those that are followed the last good ones stay in force; without any, nothing is decided.
        known = self._guard.health()["control"]
        return "missing" if isinstance(known, dict) and known["version"] is None else "ok"

    def _storage(self) -> str:
        if self._slow:
            return "slow"
        return str(self._guard.health()["storage"])

    def _price_days(self) -> int:
        shipped = date.fromisoformat(self._guard.prices.date)
        today = datetime.fromtimestamp(self._guard.clock.now_ms() / 1000, UTC).date()
        return max(0, (today - shipped).days)

    async def _ask_storage(self) -> None:
        guard, now_ms = self._guard, self._guard.clock.now_ms()
        if guard.beat_ms is not None and now_ms - guard.beat_ms < _FRESH_MS:
            self._slow = False
            return
        if self._probing is not None and self._probing.get_loop() is not asyncio.get_running_loop():
            self._probing = None  # its loop has ended before it
        if self._probing is None and (self._probed_ms is None or now_ms - self._probed_ms >= _AGAIN_MS):
            self._probed_ms = now_ms
            self._probing = asyncio.ensure_future(self._probe())
        if self._probing is not None:
            self._slow = not await asyncio.shield(self._probing)

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(_BOUND_S):
                await self._guard.heartbeat()
        except TimeoutError:
            return False
        except Exception:  # noqa: BLE001 - a probe answers, whatever the storage does
            _log.exception("the usage store could not be asked whether it is there")
            return False
        else:
            return True
        finally:
            self._probing = None


async def _live(receive: _Receive, send: _Send) -> None:
    """Served by itself, on a port of its own."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
