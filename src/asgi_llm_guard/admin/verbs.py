"""The table of what can be asked of the administration page: one row for each method of each path.

Who may do what, what the OpenAPI document says and what is tested for every verb all come from this table, so a verb
that is added is guarded, described and tested, or is not there.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec
from starlette.responses import Response
from starlette.routing import compile_path

from asgi_llm_guard.admin.asked import Asked
from asgi_llm_guard.admin.options import Role

__all__ = ["Handler", "Param", "Verb", "Verbs"]

Handler = Callable[[Asked], Awaitable[Response]]
Kind = Literal["page", "form", "api", "file"]


class Param(msgspec.Struct, frozen=True):
    """A parameter of the query."""

    name: str
    told: str
    schema: Mapping[str, Any] = MappingProxyType({"type": "string", "minLength": 1})
    required: bool = False


class Verb(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    """A template; `{name:path}` for names that may have slashes in them."""
    role: Role | None
    """The least role; `None`: whoever asks, logged in or not."""
    kind: Kind
    run: Handler
    told: str = ""
    """In the OpenAPI document."""
    takes: type[Any] | None = None
    """What a request of the API is sent as."""
    gives: Any = None
    """What it answers with; `None`: nothing."""
    gives_list: bool = False
    status: int = 200
    params: tuple[Param, ...] = ()
    conflicts: bool = False
    """It may answer 409."""
    finds: bool = False
    """It may answer 404."""


class Verbs:
    """Finds the verb of a request."""

    def __init__(self, verbs: Sequence[Verb]) -> None:
        self.verbs: Final = tuple(verbs)
        # Names may have line breaks in them, which are refused as names, and not as paths that are not there.
        made = [(compile_path(verb.path), verb) for verb in self.verbs]
        self._patterns = [
            (re.compile(found.pattern, re.DOTALL), convertors, verb) for (found, _, convertors), verb in made
        ]

    def find(self, method: str, path: str) -> tuple[Verb, dict[str, str]] | Sequence[str]:
        """The verb and the parameters in its path, or else the methods that the path has: none, if it is not there."""
        allowed: list[str] = []
        wanted = "GET" if method == "HEAD" else method
        for pattern, convertors, verb in self._patterns:
            match = pattern.match(path)
            if match is None:
                continue
            if verb.method == wanted:
                return verb, {name: str(convertors[name].convert(value)) for name, value in match.groupdict().items()}
            allowed.append(verb.method)
        return allowed
