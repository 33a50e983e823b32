"""What has to be true of a SQLite file, and the queue of processes in front of its lock."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlite3

if sys.platform != "win32":
    import fcntl

__all__ = ["APPLICATION_ID", "QueueLock", "check_file_system", "check_sqlite", "file_system", "mounts", "next_step"]

APPLICATION_ID: Final = 0x4C4C4D47
"""`LLMG`, in the header of every file of ours."""

_OLDEST_SQLITE: Final = (3, 35, 0)

# Neither SQLite's shared memory nor its locks work across hosts.
_NETWORK: Final = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs",
})  # fmt: skip


def check_sqlite(version: tuple[int, ...]) -> None:
    """Whether the SQLite library is new enough.

    Raises:
        ConfigurationError: it is not.
    """
    if version < _OLDEST_SQLITE:
        seen, needed = ".".join(map(str, version)), ".".join(map(str, _OLDEST_SQLITE))
        raise ConfigurationError(
            f"SQLite {needed} or newer is needed, this Python has {seen}; use a newer Python build"
        )


def check_file_system(path: Path, kind: str) -> None:
    """Whether SQLite's locks work on this type of file system.

    Raises:
        ConfigurationError: it is one of the network.
    """
    if kind in _NETWORK:
        raise ConfigurationError(
            f"{path}: lies on a network file system ({kind}), where SQLite's locks are not reliable; "
            "use a local disk: its counters are for the processes of one host"
        )


def next_step(error: sqlite3.Error, *, waited_s: float) -> str:
    """What to do about a file that cannot be opened; `waited_s`: so long it was waited for others."""
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return "restore it from a backup, or give another path"
    if "locked" in text:
        return f"another program has kept it locked for {waited_s:.0f} s; find and end that program"
    return "let this user write to the file and its folder, or give another path"


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that `folder` lies on, by a table in the format of /proc/self/mounts.

    Empty if the table does not say.
    """
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, its_kind, *_ = line.split(" ", 3)
        point = point.replace("\\040", " ")
        # Of two mounts on one point the later one lies on top.
        if folder.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), its_kind
    return kind


def mounts() -> str:
    """This host's table of mounts; empty where there is none to read."""
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: nothing to ask
        return ""


_PAUSES_S: Final = (0.0,) + (0.000_2,) * 100
"""How a process looks for its turn before it queues: about 30 ms, the turns of a handful of others."""


class QueueLock:
    """A queue of processes in front of the database's lock, by `flock` on a file beside it.

    SQLite's busy handler polls with growing pauses, so under load one process can wait for long
    while others come and go; those who wait here are woken by the kernel. The lock orders, it
    does not protect: that is SQLite's.

    Windows has no `flock`; there SQLite's lock alone decides.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._waiting = False
        self._granted = threading.Semaphore(0)

    if sys.platform == "win32":

        def acquire(self, timeout_s: float) -> bool:  # noqa: ARG002 - one signature on every system
            return True

        def release(self) -> None: ...

        def close(self) -> None:
            os.close(self._file)

    else:

        def acquire(self, timeout_s: float) -> bool:
            """Wait for this process's turn, at most `timeout_s`. If that was in vain, the next call goes on waiting."""
            if not self._waiting:
                # Most waits are short, and a second thread takes longer to hand over than they last.
                for pause_s in _PAUSES_S:
                    if self._try():
                        return True
                    time.sleep(pause_s)
                # `flock` either does not wait, or waits without end: another thread does that, so that
                # this one can give up. It stands in the kernel's queue, so nobody is passed over for long.
                self._waiting = True
                threading.Thread(target=self._wait, name="asgi-llm-guard-flock", daemon=True).start()
            if not self._granted.acquire(timeout=timeout_s):
                return False
            self._waiting = False
            return True

        def release(self) -> None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

        def close(self) -> None:
            """Let go of the file; if a thread still waits for the lock, as soon as it has it."""
            if not self._waiting:
                os.close(self._file)
                return
            threading.Thread(target=self._close_later, name="asgi-llm-guard-flock", daemon=True).start()

        def _try(self) -> bool:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        def _wait(self) -> None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._granted.release()

        def _close_later(self) -> None:
            self._granted.acquire()
            # By name, not by closing: a process forked meanwhile has a copy that would keep the lock.
            self.release()
            os.close(self._file)
