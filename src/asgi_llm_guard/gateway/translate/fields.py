"""Reading the objects of a request, each member once: what nobody reads is refused, and not dropped unseen."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from asgi_llm_guard.wire.peek import BodyError
from asgi_llm_guard.wire.shape import MOST_TOKENS, decode

__all__ = ["Fields", "arguments_of", "short_id", "wrong"]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,40}")


def wrong(path: str, message: str) -> BodyError:
    """The refusal of a request for the value at `path`."""
    return BodyError("invalid_request", 400, f"{path}: {message}", path)


class Fields:
    """The members of one object of a request. `null` is the same as none."""

    __slots__ = ("_left", "path")

    def __init__(self, value: object, path: str = "") -> None:
        """`path`: where the object is, for messages; empty for the body itself.

        Raises:
            BodyError: the value is no object.
        """
        if not isinstance(value, Mapping):
            raise wrong(path or "body", "expected an object")
        self._left = {name: member for name, member in value.items() if member is not None}
        self.path = path

    def at(self, name: str) -> str:
        """The path of a member."""
        return f"{self.path}.{name}" if self.path else name

    def wrong(self, name: str, message: str) -> BodyError:
        """The refusal for a member."""
        return wrong(self.at(name), message)

    def take(self, name: str) -> object:
        """A member of any type; `None`: there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A text; `None`: there is none."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "expected a text")
        return value

    def needed(self, name: str) -> str:
        """A text that has to be there."""
        value = self.text(name)
        if value is None:
            raise self.wrong(name, "required, got none")
        return value

    def flag(self, name: str) -> bool | None:
        """True or false; `None`: there is none."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "expected true or false")
        return value

    def number(self, name: str) -> float | None:
        """A finite number; `None`: there is none."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(name, "expected a number")
        return value

    def whole(self, name: str) -> int | None:
        """A whole number from 0; `None`: there is none."""
        value = self.take(name)
        if value is not None and (type(value) is not int or not 0 <= value <= MOST_TOKENS):
            raise self.wrong(name, f"expected a whole number from 0 to {MOST_TOKENS}")
        return value

    def inner(self, name: str) -> Fields | None:
        """An object; `None`: there is none."""
        value = self.take(name)
        return None if value is None else Fields(value, self.at(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list; nothing if there is no list."""
        return self.objects_of(self.take(name), name)

    def objects_of(self, value: object, name: str) -> Iterator[Fields]:
        """The objects of a list that was taken as the member `name`."""
        if value is not None and not isinstance(value, (list, tuple)):
            raise self.wrong(name, "expected a list")
        for index, item in enumerate(value or ()):
            yield Fields(item, f"{self.at(name)}[{index}]")

    def hints(self, *names: str) -> None:
        """Leave these out: an answer is right without them."""
        for name in names:
            self._left.pop(name, None)

    def without(self, name: str, *neutral: object) -> None:
        """Leave a member out that means nothing if it is one of the `neutral` values, and cannot be expressed else."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
            raise self.wrong(name, "cannot be expressed for this model's API; leave it out")

    def done(self) -> None:
        """Nothing may be left.

        Raises:
            BodyError: a member has not been read; names the first.
        """
        for name in self._left:
            # Other texts of a body are never repeated.
            known = name if isinstance(name, str) and _NAME.fullmatch(name) else "a member"
            raise self.wrong(known, "cannot be expressed for this model's API; leave it out")


def short_id(identifier: str) -> str:
    """An id that every API takes: up to 40 letters, digits, `_` and `-`. The same id always gives the same one."""
    if _ID.fullmatch(identifier):
        return identifier
    return "call_" + hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def arguments_of(text: object) -> dict[str, object] | None:
    """The arguments of a tool call from their JSON; no text is none of them. `None`: it is not an object."""
    if not isinstance(text, str):
        return {} if text is None else None
    if not text.strip():
        return {}
    try:
        value = decode(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    return value if isinstance(value, dict) else None
