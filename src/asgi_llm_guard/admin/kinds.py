"""Kinds of administration data that are edited in the same way: what their fields are, and how a form says them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.admin.asked import ProblemError, check_told, parsed
from asgi_llm_guard.admin.bodies import AgentFields, DepartmentFields, KnowledgeBaseFields, PriceFields
from asgi_llm_guard.admin.shown import dollars
from asgi_llm_guard.control.values import UNLIMITED, Kind
from asgi_llm_guard.money import to_nano

__all__ = ["KINDS", "EditedKind", "Field"]

_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - everything here is UTC, and says so by its Z

Show = Literal["text", "money", "number", "instant", "lines", "json", "flag", "tz"]


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a form."""

    name: str
    label: str
    show: Show
    help: str = ""
    unlimited: bool = False
    """It is a limit, and there may be none."""
    optional: bool = False
    """Left empty, it is not said."""
    example: str = ""


class EditedKind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind."""

    kind: Kind
    slug: str
    title: str
    one: str
    about: str
    empty: str
    name_label: str
    fields: tuple[Field, ...]
    body: type[Any]

    def value(self, form: Mapping[str, str]) -> dict[str, Any]:
        """What a form says, as data.

        Raises:
            ProblemError: 422; a limit was left empty, and nobody said that there is to be none.
        """
        told: dict[str, Any] = {}
        for field in self.fields:
            text = form.get(field.name, "").strip()
            if field.unlimited and form.get(f"{field.name}.unlimited"):
                told[field.name] = UNLIMITED
            elif field.show == "flag":
                told[field.name] = bool(text)
            elif field.show == "lines":
                told[field.name] = [line.strip() for line in text.splitlines() if line.strip()]
            elif not text and field.optional:
                continue
            elif not text and field.unlimited:
                raise ProblemError(422, f"{field.label}: write a limit, or tick that there is none.", field=field.name)
            else:
                told[field.name] = _READERS.get(field.show, str)(text) if field.show != "json" else _table(field, text)
        return told

    def shown(self, value: Mapping[str, Any]) -> dict[str, str]:
        """Data as the fields of a form."""
        fields = {}
        for field in self.fields:
            told = value.get(field.name)
            if told is None or told == UNLIMITED:
                fields[field.name] = ""
            elif field.show == "lines":
                fields[field.name] = "\n".join(map(str, told))
            elif field.show == "json":
                fields[field.name] = json.dumps(told, indent=2, ensure_ascii=False, default=str)
            elif field.show == "flag":
                fields[field.name] = "1" if told else ""
            elif field.show == "money":
                fields[field.name] = dollars(to_nano(told))
            elif field.show == "instant":
                fields[field.name] = (_EPOCH + timedelta(milliseconds=told)).isoformat() + "Z"
            elif field.show == "number":
                fields[field.name] = f"{told:,}"
            else:
                fields[field.name] = str(told)
        return fields


def _number(text: str) -> int | str:
    plain = text.replace(",", "").replace("_", "").replace("\N{NO-BREAK SPACE}", "")
    return int(plain) if plain.isascii() and plain.isdecimal() and len(plain) < 20 else text


def _instant(text: str) -> int | str:
    """Milliseconds; what is no instant as it stands, for the answer to say so."""
    if text.isascii() and text.isdecimal():  # a year is none, and more digits are milliseconds already
        return _number(text) if len(text) > 4 else text
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    utc = at if at.tzinfo is None else at.astimezone(UTC).replace(tzinfo=None)
    return (utc - _EPOCH) // timedelta(milliseconds=1)


def _table(field: Field, text: str) -> Any:
    try:
        told = parsed(text)
    except (ValueError, RecursionError):
        raise ProblemError(422, f"{field.label}: is not valid JSON, or has a key twice.", field=field.name) from None
    if not isinstance(told, dict):
        raise ProblemError(422, f"{field.label}: expected a table such as {field.example}.", field=field.name)
    try:
        check_told(told, "")
    except ProblemError as problem:
        raise ProblemError(422, f"{field.label}: {problem.detail}", field=field.name) from None
    return told


_READERS: Final[Mapping[Show, Callable[[str], Any]]] = {
    "number": _number,
    "instant": _instant,
    "money": str,
    "text": str,
    "tz": str,
}

KINDS: Final = (
    EditedKind(
        kind="department",
        slug="departments",
        title="Departments",
        one="department",
        about="What each department may use a day and a month, and which models.",
        empty="No department has a quota yet. Add one; calls of departments without a quota are refused or let through "
        "as the Quota policy says.",
        name_label="Department",
        fields=(
            Field(
                name="daily_cost", label="Cost a day", show="money", unlimited=True, help="US dollars.", example="50"
            ),
            Field(
                name="monthly_cost",
                label="Cost a month",
                show="money",
                unlimited=True,
                help="US dollars.",
                example="1000",
            ),
            Field(name="daily_tokens", label="Tokens a day", show="number", unlimited=True, example="2,000,000"),
            Field(name="monthly_tokens", label="Tokens a month", show="number", unlimited=True, example="40,000,000"),
            Field(
                name="models",
                label="Models",
                show="lines",
                unlimited=True,
                help="One to a line, such as openai/gpt-5 or openai/*. An empty list allows none.",
            ),
            Field(
                name="tz",
                label="Time zone",
                show="tz",
                help="In which its days and months begin.",
                example="Europe/Berlin",
            ),
        ),
        body=DepartmentFields,
    ),
    EditedKind(
        kind="agent",
        slug="agents",
        title="Agents",
        one="agent",
        about="How many calls a session of each agent may make.",
        empty="No agent has limits of its own yet. Until one has, what the policies and keys say holds.",
        name_label="Agent",
        fields=(
            Field(name="max_iterations", label="Calls a session", show="number", unlimited=True, example="25"),
            Field(
                name="params",
                label="Parameters of your own policies",
                show="json",
                optional=True,
                help="A JSON table; names begin with x_.",
                example='{"x_tier": "gold"}',
            ),
        ),
        body=AgentFields,
    ),
    EditedKind(
        kind="price",
        slug="prices",
        title="Prices",
        one="price",
        about="Your own prices, in the place of the list prices.",
        empty="There are no prices of your own; list prices hold. Add one for a model that is missing or that you buy for less.",
        name_label="Model",
        fields=(
            Field(
                name="entry",
                label="US dollars for a million tokens",
                show="json",
                help="A JSON table of rates.",
                example='{"input": "2.50", "output": "10"}',
            ),
            Field(
                name="from_ms",
                label="Holds from",
                show="instant",
                optional=True,
                help="In UTC, such as 2026-12-01 or 2026-12-01T08:00; empty: at once.",
            ),
            Field(
                name="until_ms",
                label="Holds until",
                show="instant",
                optional=True,
                help="In UTC, such as 2026-12-31T12:00; empty: it does not end.",
            ),
        ),
        body=PriceFields,
    ),
    EditedKind(
        kind="knowledge_base",
        slug="knowledge-bases",
        title="Knowledge bases",
        one="knowledge base",
        about="Whether answers that come from a knowledge base are kept and given again.",
        empty="No knowledge base is set up here; what CacheScope says holds for all.",
        name_label="Knowledge base",
        fields=(
            Field(name="cache", label="Keep answers", show="flag"),
            Field(
                name="acl",
                label="Digest of its access list",
                show="text",
                optional=True,
                help="Answers are given only to those who asked under the same one.",
            ),
            Field(name="version", label="Version of its documents", show="text", optional=True),
        ),
        body=KnowledgeBaseFields,
    ),
)
