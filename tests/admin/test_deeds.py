"""Rows of the audit in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.admin.deeds import Difference, deed
from asgi_llm_guard.control import AuditEntry


def _entry(verb: str, target: str, old: object = None, new: object = None, **more: Any) -> AuditEntry:
    told = {name: None if value is None else json.dumps(value) for name, value in (("old", old), ("new", new))}
    return AuditEntry(
        seq=1, at_ms=0, version=1, actor="anna", role="admin", address="", verb=verb, target=target,
        reason="", digest="", **{"refused": None, **told, **more},
    )  # fmt: skip


_STOP = {"scope": "session", "subject": "s:1", "caller": "mia"}
_RAISE = {"policy": "quota", "unit": "usd", "amount": "12.500000000", "scope": "department", "subject": "sales"}


@pytest.mark.parametrize(
    ("entry", "verb", "what"),
    [
        (_entry("put", "department:a:b", new={"tz": "UTC"}), "add", "department a:b"),
        (_entry("put", "department:a", {"tz": "UTC"}, {"tz": "Asia/Tokyo"}), "change", "department a"),
        (_entry("remove", "knowledge_base:kb", {"cache": True}), "remove", "knowledge base kb"),
        (_entry("put", "stop:stop-1", new=_STOP), "stop", "session s:1 of mia"),
        (_entry("put", "stop:stop-1", new={"scope": "all"}), "stop", "everything"),
        (_entry("remove", "stop:stop-1", old=_STOP), "release", "session s:1 of mia"),
        (_entry("put", "raise:raise-1", new=_RAISE), "raise", "quota by $12.50 for department sales"),
        (_entry("put", "raise:r", new={**_RAISE, "unit": "tokens", "amount": "5"}), "raise", "quota by 5 tokens for department sales"),
        (_entry("put", "raise:r", new={**_RAISE, "amount": "much", "scope": None}), "raise", "quota by $much for sales"),
        (_entry("remove", "raise:raise-1"), "end of a raise", "raise raise-1"),
        (_entry("new_key", "key:k1", new={"caller": "svc"}), "make", "key k1 of svc"),
        (_entry("logout", "session:0ab"), "log-out", "session 0ab"),
        (_entry("reset", "department:a", old={"limits": []}), "reset", "department a"),
        (_entry("POST", "/admin/keys", refused="needs the role admin"), "POST", "/admin/keys"),
    ],
)  # fmt: skip
def test_rows_in_words(entry: AuditEntry, verb: str, what: str) -> None:
    """C16: a row says in words what was done and to whom: a stop whom it stopped, a raise what it raised, a key whose it
    is; what is no entry stands as it is."""
    assert deed(entry, "UTC")[:2] == (verb, what)


def test_only_what_differs_is_shown() -> None:
    """Of a change the fields that differ are shown, with what they were and are; what there was not is a dash."""
    told = deed(
        _entry(
            "put", "department:a", {"tz": "UTC", "daily_cost": "5"}, {"tz": "UTC", "daily_cost": "7", "models": ["m"]}
        ),
        "UTC",
    )
    assert told.differences == (Difference("daily cost", "5", "7"), Difference("models", "\N{EN DASH}", '["m"]'))
    ends = deed(_entry("put", "stop:s", new={"scope": "all", "until_ms": 0}), "Asia/Tokyo").differences[1]
    assert ends == Difference("until", "\N{EN DASH}", "1970-01-01 09:00")
    assert deed(_entry("put", "x:y", [1], [2]), "UTC").differences == (Difference("all", "[1]", "[2]"),)
    assert deed(_entry("put", "x:y", [1], [1]), "UTC").differences == ()


@given(verb=st.text(), target=st.text(), old=st.none() | st.text(), new=st.none() | st.text() | st.just('{"scope": 1}'))
def test_whatever_a_row_says_is_shown(verb: str, target: str, old: str | None, new: str | None) -> None:
    """A row that others have written, of which nothing is as expected, is shown as what it is."""
    told = deed(_entry(verb, target).__class__(**{**_fields(_entry(verb, target)), "old": old, "new": new}), "UTC")
    assert isinstance(told.what, str)


def _fields(entry: AuditEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in AuditEntry.__struct_fields__}
