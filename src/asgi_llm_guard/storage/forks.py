"""Storages in a process that was forked: what their parent's calls hold is the parent's, and they begin anew."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["BeginsAnew", "begin_anew_after_fork"]


class BeginsAnew(Protocol):
    """Whatever has calls, connections or threads that a forked child must not touch."""

    def begin_anew(self) -> None:
        """In the child: go on with none of them."""
        ...


_all: weakref.WeakSet[BeginsAnew] = weakref.WeakSet()


def begin_anew_after_fork(storage: BeginsAnew) -> None:
    """Have every child that is forked from here on begin anew with `storage`, for as long as that is used."""
    _all.add(storage)


def _after_fork_in_child() -> None:
    for storage in list(_all):
        storage.begin_anew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
