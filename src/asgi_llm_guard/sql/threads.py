"""Blocking work in a few threads of its own, for any event loop; a forked process gets new ones."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from asgi_llm_guard.errors import StorageError

__all__ = ["Threads"]

T = TypeVar("T")


class Threads:
    """Runs functions in at most `most` threads. They begin with the first function, and end with `close`."""

    def __init__(self, name: str, *, most: int) -> None:
        self._name = name
        self._most = most
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, from one of the threads."""
        return await asyncio.wrap_future(self._started().submit(work))

    def close(self) -> None:
        """Wait for what was begun, and end the threads."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None and self._pid == os.getpid():
            executor.shutdown()

    def _started(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise StorageError(f"{self._name}: is closed")
            if self._executor is None or self._pid != os.getpid():  # the parent's threads are not ours
                self._executor = ThreadPoolExecutor(self._most, thread_name_prefix="asgi-llm-guard-sql")
                self._pid = os.getpid()
            return self._executor
