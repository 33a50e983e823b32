"""How the subjects of limits are named: to people, and in the keys of meters.

A subject becomes the parts of a storage key. The parts start with the kind of the subject, so a
caller that is named `anonymous` is another subject than the anonymous caller, and a session is
always a session *of its caller*.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from asgi_llm_guard.claims import escape

__all__ = ["ANONYMOUS", "PART_LENGTH", "Subject", "bounded", "callers_named", "has_parts", "sessions_named"]

ANONYMOUS: Final = "anonymous"
"""The shown name of the caller that nobody has verified."""
PART_LENGTH: Final = 200
"""Longer parts are digested in keys."""

_DIGEST: Final = "sha256~"


class Subject(NamedTuple):
    """One of those that a limit holds for."""

    name: str
    """For people to read."""
    parts: tuple[str, ...]
    """The end of the storage key: no two subjects have the same parts."""


def callers_named(name: str) -> tuple[Subject, ...]:
    """The callers that are shown under this name: two, where it is that of all who are not verified."""
    verified = Subject(name, ("caller", name))
    return (Subject(name, (ANONYMOUS,)), verified) if name == ANONYMOUS else (verified,)


def sessions_named(caller: str, session: str) -> tuple[Subject, ...]:
    """The session of this id of the callers that are shown under that name."""
    return tuple(Subject(session, (*each.parts, "session", session)) for each in callers_named(caller))


def has_parts(key: str, subject: Subject) -> bool:
    """Whether the key of a meter is of that subject."""
    # Parts are escaped, so a colon is between two of them and nowhere else.
    return f":{':'.join([escape(bounded(part)) for part in subject.parts])}:" in f"{key}:"


def bounded(part: str) -> str:
    """A part of a key, of bounded length."""
    # A part that looks like a digest is digested as well, so that nobody can name another's long id.
    if len(part) <= PART_LENGTH and not part.startswith(_DIGEST):
        return part
    return _DIGEST + hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()
