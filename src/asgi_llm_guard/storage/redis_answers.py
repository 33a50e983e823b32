"""What a server answers besides replies: errors, with what to do about them, and whether it is fit to be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asgi_llm_guard.storage.redis_wire import LinkError, ServerError

__all__ = ["MAX_TRIES", "info_fields", "see_fit", "translated", "version_of"]

MAX_TRIES: Final = 5
"""A call that is sent back so often is not sent again."""

# The server refused these before anything was executed, or at the first write of the script.
_NOT_EXECUTED: Final = frozenset(
    {
        "ASK", "BUSY", "CLUSTERDOWN", "CROSSSLOT", "LOADING", "MASTERDOWN", "MISCONF", "MOVED", "NOAUTH", "NOPERM",
        "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY", "TRYAGAIN",
    }
)  # fmt: skip

_NEXT_STEPS: Final[Mapping[str, str]] = {
    "ASK": "the server belongs to a cluster: write redis+cluster:// in the URL",
    "BUSY": "a script of somebody keeps the server; see SCRIPT KILL",
    "CLUSTERDOWN": "the cluster does not serve this slot; see CLUSTER INFO",
    "CROSSSLOT": "the keys of one call are in several slots; give the namespace one hash tag",
    "LOADING": "the server is reading its data set; it is asked again",
    "MASTERDOWN": "the replica has lost its master; the master is looked up again",
    "MISCONF": "the server cannot save its data set and refuses writes; see its log and disk",
    "MOVED": "the server belongs to a cluster: write redis+cluster:// in the URL",
    "NOAUTH": "the server wants a password; put it into the URL",
    "NOPERM": "the user may not do this; it needs EVALSHA, SCRIPT LOAD, PING and INFO, and the namespace's keys",
    "NOREPLICAS": "too few replicas are connected; see min-replicas-to-write",
    "OOM": "the server has reached maxmemory; raise it, or give the guard a server of its own with noeviction",
    "READONLY": "the server is a replica; the master is looked up again",
    "TRYAGAIN": "the slot is being moved to another node; try again",
    "WRONGTYPE": "a key of this namespace is somebody else's; choose another namespace",
}


def translated(error: ServerError, where: object, *, in_cluster: bool = False) -> LinkError:
    """What a server answered, with the next step."""
    code = error.code
    step = f"; {_NEXT_STEPS[code]}" if code in _NEXT_STEPS else ""
    if in_cluster and code in {"MOVED", "ASK"}:
        step = f", as {MAX_TRIES} nodes in a row sent the call elsewhere; see CLUSTER SLOTS of each"
    said = str(error).rstrip(".")
    return LinkError(f"redis: {where} answered: {said}{step}", sent=code not in _NOT_EXECUTED, code=code)


def info_fields(reply: object) -> dict[str, str]:
    """The lines of an INFO reply; none if it was refused."""
    if not isinstance(reply, bytes):
        return {}
    lines = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines() if ":" in line)
    return {name: value for name, _, value in lines}


def version_of(server: Mapping[str, str]) -> tuple[str, tuple[int, ...]]:
    """`("Redis", (7, 0, 15))`; no numbers if the server does not tell."""
    name, text = ("Valkey", server["valkey_version"]) if "valkey_version" in server else ("Redis", "")
    text = text or server.get("redis_version", "")
    return name, tuple(int(part) for part in text.split(".") if part.isdigit())


def see_fit(where: object, server: object, replication: object, *loaded: object) -> None:
    """Look at the replies to the set-up. What the server does not tell is taken for right.

    Raises:
        LinkError: it is too old, it is a replica, it did not load the scripts, or it is gone.
    """
    for reply in (server, replication, *loaded):
        if isinstance(reply, LinkError):
            raise reply
    name, version = version_of(info_fields(server))
    if version and version[0] < (8 if name == "Valkey" else 7):
        raise LinkError(
            f"redis: {where} is {name} {'.'.join(map(str, version))}; needed is Redis 7.0 or Valkey 8.0, or later",
            sent=False,
            code="VERSION",
        )
    if info_fields(replication).get("role", "master") != "master":
        raise LinkError(f"redis: {where} is a replica; {_NEXT_STEPS['READONLY']}", sent=False, code="READONLY")
    for reply in (server, *loaded):
        # INFO may be forbidden; a script that is not loaded cannot be called.
        if isinstance(reply, ServerError) and (reply is not server or reply.code == "NOAUTH"):
            raise translated(reply, where)
