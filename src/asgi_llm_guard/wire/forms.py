"""A strict, bounded look into a request's form (`multipart/form-data`), as `peek` looks into JSON.

Parsers of forms differ where there is room: which of two equal names counts, what a quote in a name means, what
stands before the first boundary. A form that two of them may read differently is refused.

Source: RFC 7578; RFC 2046 §5.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

import msgspec

from asgi_llm_guard.wire.peek import GUARDED, MAX_KEYS, BodyError, BodyView, read_body

__all__ = ["FormFile", "FormView", "read_any", "read_form"]

_BOUNDARY: Final = re.compile(rb'(?i)multipart/form-data\s*;\s*boundary=(?:"([^"\\\r\n]{1,70})"|([^\s";,\\]{1,70}))\s*')
_DISPOSITION: Final = re.compile(
    rb'(?i)form-data\s*;\s*name="([^"\\\r\n]*)"'
    rb'(\s*;\s*filename="(?:[^"\\\r\n]|\\.)*")?(\s*;\s*filename\*=[^\s;"]+)?\s*'
)
_MOST_HEADER_BYTES: Final = 4_096
_PLAIN: Final = frozenset({b"7bit", b"8bit", b"binary"})
_DIGITS: Final = re.compile(r"[0-9]{1,18}")


class FormFile(msgspec.Struct, frozen=True):
    """A file in a form."""

    field: str
    content: memoryview
    """A view into the body, which is not copied."""


class FormView(BodyView):
    """A form, read like a JSON object: a field is a text, and a number or boolean where it is read as one.

    `metadata.session_id` is the field `metadata[session_id]`. Lists and files are no members.
    """

    __slots__ = ("_texts", "files")

    def __init__(self, body: bytes, texts: dict[str, str], files: Sequence[FormFile]) -> None:
        super().__init__(body, {name: msgspec.Raw(msgspec.json.encode(text)) for name, text in texts.items()})
        self._texts = texts
        self.files = tuple(files)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all fields that are no files, their names included."""
        return sum(len(name.encode()) + len(text.encode()) for name, text in self._texts.items())

    def get(self, path: str) -> object | None:
        name, *inner = path.split(".")
        return self._texts.get(name + "".join(f"[{part}]" for part in inner))

    def inside(self, name: str) -> BodyView | None:  # noqa: ARG002 - a form has no objects
        return None

    def whole(self, name: str, *, least: int, most: int) -> int | None:
        text = self._texts.get(name)
        if not text:
            return None
        if not _DIGITS.fullmatch(text) or not least <= int(text) <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}", "something else")
        return int(text)

    def flag(self, name: str) -> bool:
        text = self._texts.get(name)
        if text in (None, "", "false", "False"):
            return False
        if text in ("true", "True"):
            return True
        raise self._wrong(name, "true or false", "something else")

    def replace(self, changes: object) -> NoReturn:
        """Refuse: a form is sent as it is.

        Raises:
            BodyError: always.
        """
        del changes
        raise BodyError("invalid_request", 400, "the body is a form, which this route cannot change")


def read_any(body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> BodyView:
    """A view of a request body, whichever of the two kinds its headers say it is; without a type it is JSON.

    Raises:
        BodyError: as `read_body` and `read_form`.
    """
    for name, value in headers:
        if len(name) == 12 and name.lower() == b"content-type" and value[:10].lower() == b"multipart/":
            return read_form(body, value)
    return read_body(body)


def read_form(body: bytes, content_type: bytes) -> FormView:
    """A view of a form. No name occurs twice, except those that end in `[]` and those of files.

    The work is linear in the body's length; there are at most `MAX_KEYS` fields.

    Raises:
        BodyError: 400, anything else.
    """
    matched = _BOUNDARY.fullmatch(content_type)
    if matched is None:
        raise _malformed("content-type: expected multipart/form-data with a boundary and no other parameter")
    mark = b"--" + (matched[1] or matched[2])
    if not body.startswith(mark + b"\r\n"):
        raise _malformed("the form does not start with its boundary")
    texts: dict[str, str] = {}
    files: list[FormFile] = []
    view = memoryview(body)
    ending = b"\r\n" + mark
    start = len(mark) + 2
    for _ in range(MAX_KEYS):
        head = body.find(b"\r\n\r\n", start, start + _MOST_HEADER_BYTES)
        end = body.find(ending, max(head, start))
        if head < 0 or end < head + 2:
            raise _malformed("a field of the form has no end, or too long a header")
        field, is_file = _field(body[start:head])
        content_at = min(head + 4, end)
        if is_file:
            files.append(FormFile(field, view[content_at:end]))
        else:
            _take(texts, field, body[content_at:end])
        start = end + len(ending)
        if body[start : start + 2] == b"--":
            if body[start + 2 :] not in (b"", b"\r\n"):
                raise _malformed("something follows the end of the form")
            return FormView(body, texts, files)
        if body[start : start + 2] != b"\r\n":
            raise _malformed("a boundary of the form is followed by something else")
        start += 2
    raise _malformed(f"the form has more than {MAX_KEYS} fields")


def _field(head: bytes) -> tuple[str, bool]:
    """The name of a part by its headers, and whether it is a file."""
    name, is_file = None, False
    for line in head.split(b"\r\n"):
        key, colon, value = line.partition(b":")
        key, value = key.lower(), value.strip()
        if not colon or key.strip() != key or not key:
            raise _malformed("a header of a field of the form is malformed")
        if key == b"content-disposition":
            matched = _DISPOSITION.fullmatch(value)
            if matched is None or name is not None:
                raise _malformed("a field of the form has no name, or one that can be read in two ways")
            name, is_file = matched[1], bool(matched[2] or matched[3])
        elif key == b"content-transfer-encoding" and value.lower() not in _PLAIN:
            raise _malformed("a field of the form is encoded; send it as it is")
    if name is None:
        raise _malformed("a field of the form has no name, or one that can be read in two ways")
    try:
        return name.decode("utf-8"), is_file
    except UnicodeDecodeError:
        raise _malformed("the name of a field of the form is not UTF-8") from None


def _take(texts: dict[str, str], field: str, content: bytes) -> None:
    if field.endswith("[]"):
        return
    if field not in GUARDED and (known_as := field.casefold()) in GUARDED:
        raise BodyError("invalid_request", 400, f"the form: {known_as} must be written in lower case", known_as)
    if field in texts:
        name = field if field in GUARDED else "a field"
        raise BodyError("invalid_request", 400, f"the form: {name} occurs twice", field if field in GUARDED else None)
    try:
        texts[field] = content.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("a field of the form is not UTF-8") from None


def _malformed(message: str) -> BodyError:
    return BodyError("invalid_request", 400, message)
