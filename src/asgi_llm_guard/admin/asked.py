"""What a handler is given, what it answers, and how bodies are read.

Rule 1: a number that is not finite, a number below zero where none can be, a `null`, and text that no store could keep
are refused with the name of their field. `null` never stands for "take the limit away".

Rule 2: a body is read whole, and no longer than `MAX_BODY_BYTES`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from asgi_llm_guard.admin.options import ROLES, AdminCredential, Role
from asgi_llm_guard.admin.sessions import Session
from asgi_llm_guard.admin.shown import cut

if TYPE_CHECKING:
    from asgi_llm_guard.admin.desk import Desk

__all__ = [
    "MAX_BODY_BYTES",
    "Asked",
    "ProblemError",
    "check_told",
    "converted",
    "fields_of",
    "json_answer",
    "parsed",
    "read_json",
]

T = TypeVar("T")

MAX_BODY_BYTES: Final = 262_144
_SAFE: Final = "/:@!$&'()*+,=~"
_PATH: Final = re.compile(r" - at `\$\.?(.*?)`$")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_FIELD: Final = re.compile(r"field `(.*?)`")


class ProblemError(Exception):
    """The answer is a problem (RFC 9457)."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: object,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.field = field
        self.headers = dict(headers or {})
        self.more = more

    def body(self) -> dict[str, object]:
        told: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.field is not None:
            told["field"] = self.field
        return told | self.more


class Asked:
    """One request, and who makes it."""

    __slots__ = ("body", "credential", "desk", "form", "params", "query", "request", "session")

    def __init__(
        self, desk: Desk, request: Request, credential: AdminCredential | None, session: Session | None
    ) -> None:
        self.desk = desk
        self.request = request
        self.credential = credential
        self.session = session
        self.query: Mapping[str, str] = dict(request.query_params)
        self.params: Mapping[str, str] = request.path_params
        self.form: Mapping[str, str] = {}
        """What a form says; empty for the API."""
        self.body: Any = None
        """What the API was sent, as the route's `takes`."""

    @property
    def now_ms(self) -> int:
        return self.desk.now_ms

    @property
    def address(self) -> str:
        return self.request.client.host if self.request.client is not None else ""

    @property
    def root(self) -> str:
        """The path that the application is mounted at, as browsers write it: cookies are for that path."""
        return quote(str(self.request.scope.get("root_path", "")).rstrip("/"), safe=_SAFE, errors="replace")

    def may(self, role: Role) -> bool:
        """Whether whoever asks has at least this role."""
        return self.credential is not None and ROLES[self.credential.role] >= ROLES[role]

    def url(self, path: str, **query: object) -> str:
        """A link inside the application."""
        told = {name: str(value) for name, value in query.items() if value is not None}
        return f"{self.root}{path}" + (f"?{urlencode(told)}" if told else "")


# -------------------------------------------------------------------------------------- bodies


async def _raw(request: Request) -> bytes:
    """Raises `ProblemError`: it is too long."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise ProblemError(413, f"A body may have {MAX_BODY_BYTES} bytes at most.")
    return bytes(raw)


async def fields_of(request: Request) -> dict[str, str]:
    """The fields of a form, and the last of several of one name; those of list fields are joined by line breaks.

    Raises:
        ProblemError: it is no form, or too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ProblemError(415, "Expected a form: application/x-www-form-urlencoded.")
    try:
        pairs = parse_qsl((await _raw(request)).decode(), keep_blank_values=True, errors="strict", max_num_fields=200)
    except ValueError:
        raise ProblemError(400, "The form cannot be read.") from None
    fields: dict[str, str] = {}
    for name, value in pairs:
        fields[name] = f"{fields[name]}\n{value}" if name in fields else value
    return fields


async def read_json(request: Request, kind: type[T]) -> T:
    """The body of a request to the API.

    Raises:
        ProblemError: it is no JSON (400), too long (413), of another type (415), or says what cannot be (422).
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ProblemError(415, "Expected a body of type application/json.")
    try:
        told = parsed(await _raw(request))
    except (ValueError, RecursionError):
        raise ProblemError(400, "The body is not valid JSON, or has a key twice.") from None
    return converted(told, kind)


def converted(told: object, kind: type[T], *, strict: bool = True) -> T:
    """What was told, as `kind`.

    Raises:
        ProblemError: 422; names the field.
    """
    check_told(told, "")
    try:
        return msgspec.convert(told, kind, strict=strict)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _PATH.search(text)
        named = _FIELD.search(text)
        place = ".".join(part for part in ((at[1] if at else ""), (named[1] if named else "")) if part)
        raise ProblemError(422, _PATH.sub("", text) + ".", field=place or "body") from None


def parsed(raw: str | bytes) -> object:
    """What JSON says.

    Raises:
        ValueError: it is none, or has a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(raw, object_pairs_hook=_once)


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a key is there twice")
    return told


def check_told(told: object, place: str) -> None:
    """Refuse by rule 1 what was told at this place, and in it.

    Raises:
        ProblemError: 422.
    """
    if told is None:
        raise ProblemError(
            422,
            f"{place or 'body'}: null is no value. Leave the field out, or say what it is to be.",
            field=place or "body",
        )
    if isinstance(told, float) and not math.isfinite(told):
        raise ProblemError(422, f"{place or 'body'}: expected a finite number.", field=place or "body")
    if isinstance(told, str) and not told.isprintable() and _SURROGATE.search(told):
        where = cut(place) or "body"
        raise ProblemError(422, f"{where}: has half a character (a lone surrogate) in it.", field=where)
    if isinstance(told, dict):
        for key, value in told.items():
            check_told(key, place)
            check_told(value, f"{place}.{key}" if place else str(key))
    elif isinstance(told, list):
        for number, value in enumerate(told):
            check_told(value, f"{place}[{number}]")


def json_answer(told: object, status: int = 200, *, media: str = "application/json") -> Response:
    return Response(msgspec.json.encode(told), status, media_type=media)
