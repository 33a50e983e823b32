"""Entries in the memory of one process; see `entries.py`."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from asgi_llm_guard.storage.entries import EPOCH_MS, Bounds, InFlight, Kept, Leading, check_entry

__all__ = ["MemoryEntries"]

_PURGE: Final = 2  # entries looked at for each one that is begun: the rest is at most about as much as what is alive


class _Entry:
    """A claim, or with a value what is kept."""

    __slots__ = ("at_ms", "epochs", "names", "note", "token", "until_ms", "value")

    def __init__(self, token: str, until_ms: int, names: tuple[str, ...], epochs: tuple[str, ...], note: str) -> None:
        self.token = token
        self.until_ms = until_ms
        self.names = names
        self.epochs = epochs
        self.note = note
        self.value: bytes | None = None
        self.at_ms = 0


class MemoryEntries:
    """One space. `begin` gives the instant of an operation, and refuses it once the storage is closed."""

    def __init__(self, begin: Callable[[], int], bounds: Bounds) -> None:
        self.bounds = bounds
        self._lock = threading.Lock()
        self._begin = begin
        self._entries: dict[str, _Entry] = {}
        self._line: deque[str] = deque()
        """Every key once: whose turn it is to be looked at."""
        self._values: OrderedDict[str, int] = OrderedDict()
        """The size of each value, in the order in which they were stored."""
        self._bytes = 0
        self._epochs: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """The epoch of a name, and until when it is remembered; who was asked for last comes last."""

    async def find(self, key: str) -> Kept | None:
        with self._lock:
            now_ms = self._begin()
            entry = self._live(key, now_ms)
            if entry is None or entry.value is None:
                return None
            return Kept(entry.value, entry.note, now_ms - entry.at_ms)

    async def begin(
        self, key: str, token: str, *, claim_ms: int, names: Sequence[str] = (), note: str = "", fresh: bool = False
    ) -> Kept | Leading | InFlight:
        check_entry(ttl_ms=claim_ms)
        with self._lock:
            now_ms = self._begin()
            epochs = tuple([self._epoch(name, now_ms) for name in names])
            entry = self._live(key, now_ms)
            if entry is not None and entry.value is not None and (not fresh or entry.token == token):
                return Kept(entry.value, entry.note, now_ms - entry.at_ms)
            if entry is not None and entry.value is None and entry.token != token:
                return InFlight(entry.note, entry.until_ms - now_ms)
            self._put(key, _Entry(token, now_ms + claim_ms, tuple(names), epochs, note), now_ms)
            return Leading()

    async def prolong(self, key: str, token: str, *, claim_ms: int) -> bool:
        check_entry(ttl_ms=claim_ms)
        with self._lock:
            now_ms = self._begin()
            entry = self._live(key, now_ms)
            if entry is None or entry.token != token or entry.value is not None:
                return False
            entry.until_ms = now_ms + claim_ms
            return True

    async def store(self, key: str, token: str, value: bytes, *, ttl_ms: int) -> bool:
        check_entry(ttl_ms=ttl_ms)
        with self._lock:
            now_ms = self._begin()
            entry = self._entries.get(key)
            if entry is None or entry.token != token:
                return False
            if self._live(key, now_ms) is None or len(value) > self.bounds.max_value_bytes:
                self._drop(key)
                return False
            if entry.value is None:
                entry.value, entry.at_ms, entry.until_ms = value, now_ms, now_ms + ttl_ms
                self._values[key] = len(value)
                self._bytes += len(value)
                self._shrink()
            return key in self._entries

    async def abandon(self, key: str, token: str) -> None:
        with self._lock:
            self._begin()
            entry = self._entries.get(key)
            if entry is not None and entry.token == token and entry.value is None:
                self._drop(key)

    async def forget(self, key: str) -> None:
        with self._lock:
            self._begin()
            self._drop(key)

    async def bump(self, name: str) -> None:
        with self._lock:
            now_ms = self._begin()
            self._epochs.pop(name, None)
            self._epoch(name, now_ms)

    def size(self) -> dict[str, int]:
        """How much is kept of each sort, and how many bytes all values have."""
        with self._lock:
            values = len(self._values)
            claims = len(self._entries) - values
            return {"values": values, "claims": claims, "bytes": self._bytes, "epochs": len(self._epochs)}

    def _epoch(self, name: str, now_ms: int) -> str:
        found = self._epochs.pop(name, None)
        epoch = found[0] if found is not None and found[1] > now_ms else secrets.token_hex(8)
        self._epochs[name] = (epoch, now_ms + EPOCH_MS)
        while self._epochs[first := next(iter(self._epochs))][1] <= now_ms:
            del self._epochs[first]
        return epoch

    def _live(self, key: str, now_ms: int) -> _Entry | None:
        """What is there, and neither over nor of an epoch that has ended."""
        entry = self._entries.get(key)
        if entry is None or entry.until_ms <= now_ms:
            return None
        for name, epoch in zip(entry.names, entry.epochs, strict=True):
            if self._epochs.get(name, ("", 0))[0] != epoch:
                return None
        return entry

    def _put(self, key: str, entry: _Entry, now_ms: int) -> None:
        if key in self._entries:
            self._forget_value(key)
        else:
            for _ in range(min(_PURGE, len(self._line))):
                due = self._line.popleft()
                if due in self._entries:
                    if self._live(due, now_ms) is None:
                        self._drop(due)
                    else:
                        self._line.append(due)
            self._line.append(key)
        self._entries[key] = entry

    def _shrink(self) -> None:
        while len(self._values) > self.bounds.max_entries or self._bytes > self.bounds.max_bytes:
            self._drop(next(iter(self._values)))

    def _drop(self, key: str) -> None:
        # It stays in the line until its turn comes.
        self._forget_value(key)
        self._entries.pop(key, None)

    def _forget_value(self, key: str) -> None:
        self._bytes -= self._values.pop(key, 0)
