"""A strict, bounded look into a JSON request body, without decoding what nobody asks for.

What the guard decides on must be what the server behind it reads. Parsers differ where JSON leaves
room (duplicate keys, other encodings, keys in another case), so a body that two parsers may read
differently is refused, and every other byte is left as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.decision import Code
from asgi_llm_guard.errors import GuardError

__all__ = ["GUARDED", "MAX_KEYS", "BodyError", "BodyView", "body_too_large", "check_encoding", "read_body"]

MAX_KEYS: Final = 1_000
"""The most keys that one object may have: bounds what a flood of keys costs, whatever the body's size."""

GUARDED: Final = frozenset(
    {
        "background",
        "best_of",
        "conversation",
        "input",
        "litellm_metadata",
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "models",
        "n",
        "previous_response_id",
        "prompt",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "session_id",
        "stream",
        "stream_options",
        "tools",
        "user",
    }
)
"""Keys that admission, metering or identity read. Only in this spelling: servers written in Go take
`Max_Tokens` for `max_tokens`, so any other case of them is refused."""

_SHORTEST_MEMBER: Final = 5
"""No member of an object takes fewer bytes, besides its name: a comma, two quotes, a colon, and a value."""

_KEY: Final = re.compile(rb'[ \t\r\n,{]*+("(?:[^"\\]|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+', re.DOTALL)
"""The next key of an object that is known to be well-formed, with what stands before and after it."""


class BodyError(GuardError):
    """The body is refused. The message never repeats text from the body, except names in `GUARDED`."""

    def __init__(self, code: Code, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.status = status
        self.message = message
        self.field = field
        """The path of the offending value, such as `max_tokens`; `None`: the body as a whole."""


class _Name(str):
    """A key of an object. Not `str` itself, because msgspec calls a hook only for types it does not know."""

    __slots__ = ()


_OBJECT: Final[Any] = dict[_Name, msgspec.Raw]
_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyView:
    """One JSON object of a request body. No key occurs twice in it; values are decoded when they are read.

    Reading an object inside it (`metadata`, `stream_options`) checks that object in the same way.
    Values that nobody reads are checked for JSON syntax only.
    """

    __slots__ = ("_inner", "_members", "_prefix", "body")

    def __init__(self, body: bytes, members: Mapping[str, msgspec.Raw], prefix: str = "") -> None:
        self.body = body
        self._members = members
        self._prefix = prefix
        self._inner: dict[str, BodyView] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def raw(self, name: str) -> bytes | None:
        """The value of the key `name` of this object, as it stands in the body; `None`: not there."""
        value = self._members.get(name)
        return None if value is None else bytes(value)

    def get(self, path: str) -> object | None:
        """The text, number or boolean at `path`, such as `user` or `metadata.session_id`; `None`: null or not there.

        Raises:
            BodyError: it is an object or a list, a number out of range, or something on the way to
                it is not an object.
        """
        if "." in path:
            name, _, rest = path.partition(".")
            inner = self.inside(name)
            return None if inner is None else inner.get(rest)
        name = path
        member = self._members.get(name)
        if member is None:
            return None
        value = bytes(member)
        if value[:1] in b"{[":
            raise self._wrong(name, "a text, a number, true, false or null", "an object or a list")
        try:
            return msgspec.json.decode(value)  # type: ignore[no-any-return]  # no container, so one of four
        except (msgspec.DecodeError, ValueError):  # 1e999, or an integer of thousands of digits
            raise self._wrong(name, "a number that fits 64 bits", "one out of range") from None

    def inside(self, name: str) -> BodyView | None:
        """The object under the key `name`; `None`: null or not there.

        Raises:
            BodyError: it is not an object, a key occurs twice in it, or it has more than `MAX_KEYS`.
        """
        member = self._members.get(name)
        if member is None:
            return None
        if name in self._inner:
            return self._inner[name]
        value = bytes(member)
        if value == b"null":
            return None
        if not value.startswith(b"{"):
            raise self._wrong(name, "an object", _kind(value))
        path = f"{self._prefix}{name}"
        inner = self._inner[name] = BodyView(value, _members(value, path), f"{path}.")
        return inner

    def text(self, name: str, *, longest: int) -> str | None:
        """The text under `name`, printable and from 1 to `longest` characters; `None`: null or not there.

        Raises:
            BodyError: it is anything else.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, "a text", _kind(self.raw(name) or b""))
        if not 0 < len(value) <= longest:
            raise self._wrong(name, f"1 to {longest} characters", str(len(value)))
        if not value.isprintable():
            raise self._wrong(name, "printable characters", "others")
        return value

    def whole(self, name: str, *, least: int, most: int) -> int | None:
        """The whole number under `name`, from `least` to `most`; `512.0` is 512. `None`: null or not there.

        Raises:
            BodyError: it is anything else; `true` and `"512"` are not numbers.
        """
        value = self.get(name)
        if value is None:
            return None
        if type(value) is int and least <= value <= most:
            return value
        expected = f"a whole number from {least} to {most}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, expected, _kind(self.raw(name) or b""))
        if not least <= value <= most or value != int(value):
            raise self._wrong(name, expected, f"{value:.15g}" if abs(value) < 1e15 else "one far out of range")
        return int(value)

    def flag(self, name: str) -> bool:
        """The boolean under `name`; null or not there is `False`.

        Raises:
            BodyError: it is anything else; `1` and `"true"` are not booleans.
        """
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(name, "true, false or null", _kind(self.raw(name) or b""))

    def replace(self, changes: Mapping[str, object]) -> bytes:
        """The body with other values under some keys of this object; new keys are added at its end.

        Values are encoded as JSON (`msgspec.Raw` as it is). Every other byte is kept.
        """
        body = self.body
        pieces: list[bytes] = []
        kept = at = 0
        for name, value in self._members.items():
            key = _KEY.match(body, at)
            assert key is not None, "the members of a well-formed object stand in the order of the body"  # noqa: S101
            at = key.end() + len(value)
            if name in changes:
                pieces += body[kept : key.end()], msgspec.json.encode(changes[name])
                kept = at
        added = [
            msgspec.json.encode(name) + b":" + msgspec.json.encode(value)
            for name, value in changes.items()
            if name not in self._members
        ]
        if added:
            end = body.index(b"}", at)
            pieces += body[kept:end], b"," if self._members else b"", b",".join(added)
            kept = end
        pieces.append(body[kept:])
        return b"".join(pieces)

    def _wrong(self, name: str, expected: str, got: str) -> BodyError:
        field = f"{self._prefix}{name}"
        return BodyError("invalid_request", 400, f"{field}: expected {expected}, got {got}", field)


def read_body(body: bytes) -> BodyView:
    """A view of a request body: one JSON object in UTF-8, no key twice, at most `MAX_KEYS` keys.

    The work is linear in the body's length, with few steps of Python per key. Nesting is bounded by
    the interpreter's recursion limit.

    Raises:
        BodyError: 400, anything else.
    """
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise _malformed(f"the body is not UTF-8 (byte {error.start})") from None
        if body.startswith(b"\xef\xbb\xbf"):
            raise _malformed("the body starts with a byte order mark; send UTF-8 without one")
    return BodyView(body, _members(body, None))


def check_encoding(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Accept the headers of a request whose body is sent as it is.

    Raises:
        BodyError: 415, there is a `content-encoding` other than `identity`.
    """
    names = dict(headers)
    if b"content-encoding" not in names and b"".join(names).islower():
        return  # as servers send them: in lower case
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise BodyError(
                "body_encoded", 415, "content-encoding: this route reads the body; send it without compression"
            )


def body_too_large(max_bytes: int, seen: int | None = None) -> BodyError:
    """The error for a body that has more than `max_bytes` bytes, by whoever counts them; `seen`: how many it has at least."""
    return BodyError(
        "body_too_large",
        413,
        f"the body has at least {seen or max_bytes + 1} bytes, and this route reads {max_bytes}; send a shorter one, "
        "or have the max_body_bytes of this service raised",
    )


def _members(data: bytes, path: str | None) -> Mapping[str, msgspec.Raw]:
    """The members of the object `data`, in its order; `path`: where it stands, `None` for the body itself."""
    try:
        found: dict[str, msgspec.Raw] = _MEMBERS.decode(data)
    except (msgspec.DecodeError, RecursionError):
        pass  # and the long way says why
    else:
        if 0 < len(found) <= MAX_KEYS:
            names = "".join(found)
            if names.isascii() and names.islower():  # so none differs from a guarded one by its case
                # What is left of the object besides these members. Where there is no room for one more, not
                # even the shortest of these a second time, they are all.
                left = len(data) - 1 - 4 * len(found) - len(names) - sum(map(len, found.values()))
                if left < _SHORTEST_MEMBER or left < _SHORTEST_MEMBER + min(map(len, found)):
                    return found
    return _members_one_by_one(data, path)


def _members_one_by_one(data: bytes, path: str | None) -> Mapping[str, msgspec.Raw]:
    names: set[str] = set()
    where = "the body" if path is None else path

    # dict[str, Raw] would keep the last one of two equal keys and not tell; the hook sees every key, decoded,
    # so "mo\u0064el" is "model".
    def unique(_: type, name: str) -> _Name:
        if name in names:
            known = path is None and name in GUARDED
            raise BodyError(
                "invalid_request", 400, f"{where}: {name if known else 'a key'} occurs twice", name if known else path
            )
        if path is None and name not in GUARDED and (known_as := name.casefold()) in GUARDED:
            raise BodyError("invalid_request", 400, f"{where}: {known_as} must be written in lower case", known_as)
        if len(names) == MAX_KEYS:
            raise BodyError("invalid_request", 400, f"{where}: more than {MAX_KEYS} keys", path)
        names.add(name)
        return _Name(name)

    try:
        members: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=_OBJECT, dec_hook=unique)
    except msgspec.ValidationError:
        raise _malformed(f"{where}: expected a JSON object, got {_kind(data)}") from None
    except msgspec.DecodeError as error:
        raise _malformed(f"{where}: {error}") from None
    except RecursionError:
        raise _malformed(f"{where}: nested too deeply") from None
    return members


def _malformed(message: str) -> BodyError:
    return BodyError("invalid_request", 400, message)


def _kind(value: bytes) -> str:
    """What the JSON text `value`, which is no object, is for people to read; nothing of its content."""
    match value.lstrip()[:1]:
        case b'"':
            return "a text"
        case b"[":
            return "a list"
        case b"t" | b"f":
            return "a boolean"
        case b"n":
            return "null"
        case _:
            return "a number"
