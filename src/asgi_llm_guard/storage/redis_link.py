"""The connections of one event loop to a Redis or Valkey: one server, a master behind Sentinels, or a cluster.

A link is for scripts that are handed over synchronously, in the order of `submit`, and answered in
that order. It never sends again what may have been executed: who submits repeats by call id.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

from asgi_llm_guard.storage.breaker import FAILURES, Breaker
from asgi_llm_guard.storage.redis_address import Address, Endpoint
from asgi_llm_guard.storage.redis_answers import info_fields, version_of
from asgi_llm_guard.storage.redis_cluster import Cluster, key_slot
from asgi_llm_guard.storage.redis_expiry import Expiry
from asgi_llm_guard.storage.redis_node import Node
from asgi_llm_guard.storage.redis_sentinel import Sentinels
from asgi_llm_guard.storage.redis_wire import Call, LinkError, Trailing, pack

__all__ = ["Link", "LinkError", "LinkState", "Script", "ServerInfo"]

LinkState: TypeAlias = Literal["up", "down"]
OnChange: TypeAlias = Callable[[LinkState, str], None]

TIMEOUT_S: Final = 0.25
MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the name that the server knows it by."""

    text: str
    sha: str = field(init=False)
    """SHA-1 of the text, in hexadecimal."""
    name: bytes = field(init=False, repr=False)
    """The same, as it is sent."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())
        object.__setattr__(self, "name", self.sha.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself. `None` and empty: it does not tell."""

    name: str
    """`Redis` or `Valkey`; others call themselves Redis."""
    version: tuple[int, ...]
    role: str | None
    replicas: int | None
    """How many are connected."""
    maxmemory_policy: str | None
    maxmemory: int | None
    """Bytes; 0 is no limit."""
    aof: bool | None
    rdb: bool | None
    """Whether snapshots are taken by themselves. Often `None`, for it takes the right to CONFIG GET."""

    @property
    def is_valkey(self) -> bool:
        return self.name == "Valkey"


class Link:
    """Connects by its first call. Belongs to the event loop it was made in, and to the process.

    `on_change` is called once per change: `("down", reason)` when a server is left alone after
    several failures in a row, `("up", "")` when all answer again. It is called by the event loop and
    must not raise.
    """

    def __init__(
        self,
        address: Address,
        *,
        scripts: Sequence[Script],
        timeout_s: float = TIMEOUT_S,
        failures: int = FAILURES,
        most: int = MOST,
        on_change: OnChange | None = None,
    ) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._time = monotonic  # some event loops show the instant at which their turn began
        self._timeout_s = timeout_s
        self._failures = failures
        self._most = most
        self._scripts = [script.text.encode() for script in scripts]
        self._on_change = on_change
        self._down: set[object] = set()
        self._closed = False
        self._expiry = Expiry(self._loop, timeout_s, self._expire)
        self._in_cluster = address.kind == "cluster"
        self._cluster = self._make_cluster() if self._in_cluster else None
        self._servers = self._cluster or self._make_node()
        self._put: Callable[[Call], None] = self._servers.put
        _links.add(self)

    def submit(
        self, script: Script, key: bytes, args: Sequence[bytes | str | int], *, timeout_s: float = 0.0
    ) -> asyncio.Future[Any]:
        """Hand over one run of a script with one key. Handed over when this returns.

        The future gets the reply as it came: ints, bytes, lists, `None`. A timeout below that of the
        link is that of the link. A cancelled future drops only itself: the call is still made.

        Raises (the future):
            LinkError: no reply, or an error; `sent` says whether it may have been executed.
        """
        future = self._loop.create_future()
        packed = pack((b"EVALSHA", script.name, b"1", key, *args))
        slot = key_slot(key) if self._in_cluster else 0
        own = self._timeout_s
        self._put(Call(future, packed, self._time(), max(own, timeout_s), slot))
        return future

    def submit_command(
        self, *parts: bytes | str | int, key: bytes = b"", timeout_s: float = 0.0, trailing: bool = False
    ) -> asyncio.Future[Any]:
        """Hand over any other command, in the same order. `key` says which node of a cluster it is for.

        `trailing` is for what means something only right behind the call before it, such as WAIT: when
        that one has to be sent again because its script was not loaded, this one follows it. It must be
        harmless to repeat.
        """
        future = self._loop.create_future()
        made = Trailing if trailing else Call
        slot = key_slot(key) if self._in_cluster else 0
        self._put(made(future, pack(parts), self._time(), max(timeout_s, self._timeout_s), slot))
        return future

    async def command(self, *parts: bytes | str | int, key: bytes = b"", timeout_s: float = 0.0) -> Any:
        """`submit_command`, and its reply."""
        return await self.submit_command(*parts, key=key, timeout_s=timeout_s)

    async def server_info(self, key: bytes = b"") -> ServerInfo:
        """Ask the server (of a cluster: the one that has the key) about itself. For warnings at start-up.

        Raises:
            LinkError: it did not answer, or is too old: Redis before 7.0, Valkey before 8.0.
        """
        sections = ("server", "replication", "persistence", "memory")
        asked = [self.submit_command("INFO", section, key=key) for section in sections]
        asked.append(self.submit_command("CONFIG", "GET", "save", key=key))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            # The server answered, only not to this: what it does not tell is unknown.
            if isinstance(answer, BaseException) and not (isinstance(answer, LinkError) and answer.code):
                raise answer
        *infos, save = answers
        fields: dict[str, str] = {}
        for info in infos:
            fields |= info_fields(info)
        name, version = version_of(fields)
        return ServerInfo(
            name=name,
            version=version,
            role=fields.get("role"),
            replicas=_number(fields.get("connected_slaves")),
            maxmemory_policy=fields.get("maxmemory_policy"),
            maxmemory=_number(fields.get("maxmemory")),
            aof=fields["aof_enabled"] == "1" if "aof_enabled" in fields else None,
            rdb=bool(save[1]) if isinstance(save, list) and len(save) == 2 else None,
        )

    @property
    def in_flight(self) -> int:
        """How many calls have no answer yet, waiting for a connection included."""
        return self._servers.in_flight

    @property
    def state(self) -> LinkState:
        return "down" if self._down else "up"

    def is_up(self, key: bytes) -> bool:
        """Whether the server that has the key is not left alone; in a cluster others may be."""
        down = self._down
        if not down or self._cluster is None:
            return not down
        return self._cluster not in down and self._cluster.node_of(key_slot(key)) not in down

    async def aclose(self) -> None:
        """Take no more calls, wait a little for those under way, and close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._servers.aclose(2 * self._timeout_s)
        finally:
            self._expiry.cancel()

    def _expire(self, now: float) -> float | None:
        return self._servers.expire(now)

    def _make_node(self, endpoint: Endpoint | None = None, cluster: Cluster | None = None) -> Node:
        address = self.address
        if address.kind == "sentinel":
            find = Sentinels(address).find
        else:
            find = partial(_known, endpoint or address.endpoints[0])
        return Node(
            address,
            find,
            endpoint=endpoint,
            scripts=self._scripts,
            timeout_s=self._timeout_s,
            most=self._most,
            expiry=self._expiry,
            breaker=Breaker(clock=self._time, failures=self._failures),
            on_change=self._changed,
            redirects=cluster,
        )

    def _make_cluster(self) -> Cluster:
        return Cluster(
            self.address,
            self._make_node,
            timeout_s=self._timeout_s,
            most=self._most,
            expiry=self._expiry,
            breaker=Breaker(clock=self._time, failures=self._failures),
            on_change=self._changed,
        )

    def _changed(self, server: object, reason: str) -> None:
        before = self.state
        if reason:
            self._down.add(server)
        else:
            self._down.discard(server)
        if self.state != before and self._on_change is not None:
            self._on_change(self.state, reason)

    def _forked(self) -> None:
        """In a child: the connection is the parent's, and is not to be written to."""
        self._servers.refuse(f"the link was made by the process that this one ({os.getpid()}) was forked from")


async def _known(endpoint: Endpoint) -> Endpoint:
    return endpoint


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link._forked()  # noqa: SLF001 - our own, and nobody else's business


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
