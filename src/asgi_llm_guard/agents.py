"""The registry of agents: what code or a file says, and what operators lay over it while it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["AgentRegistry"]

Limits = Mapping[str, Mapping[str, object]]


class _Snapshot(NamedTuple):
    version: int
    limits: Limits


class AgentRegistry(Mapping[str, Mapping[str, object]]):
    """Limits by agent. What is laid over it wins, agent by agent. From any thread; entries were checked before."""

    __slots__ = ("_base", "_lock", "_over", "_snapshot")

    def __init__(self, agents: Limits | None = None) -> None:
        self._base = dict(agents or {})
        self._over: Limits = {}
        self._lock = threading.Lock()
        self._snapshot = _Snapshot(1, MappingProxyType(self._base))

    @property
    def snapshot(self) -> tuple[int, Limits]:
        """The version, which grows with every change, and the limits of one instant; the mapping never changes."""
        return self._snapshot

    def lay_over(self, agents: Limits) -> None:
        """Have these win over the registry's own from now on, in place of those that did before."""
        with self._lock:
            self._over = dict(agents)
            self._change()

    def replace(self, agents: Limits) -> None:
        """Have these be the registry's own from now on; what is laid over them stays."""
        with self._lock:
            self._base = dict(agents)
            self._change()

    def _change(self) -> None:
        limits: dict[str, Any] = {**self._base, **self._over}
        if limits != self._snapshot.limits:
            self._snapshot = _Snapshot(self._snapshot.version + 1, MappingProxyType(limits))

    def __getitem__(self, agent: str) -> Mapping[str, object]:
        return self._snapshot.limits[agent]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshot.limits)

    def __len__(self) -> int:
        return len(self._snapshot.limits)
