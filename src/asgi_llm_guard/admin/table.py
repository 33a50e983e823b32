"""The table itself: every path of the administration page, with who may use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asgi_llm_guard.admin import api, bodies, forms, openapi, views
from asgi_llm_guard.admin.kinds import KINDS
from asgi_llm_guard.admin.verbs import Param, Verb, Verbs
from asgi_llm_guard.ledger import FILTERS

__all__ = ["VERBS"]

_WHOLE: Final = {"type": "integer", "minimum": 0, "maximum": 253_402_300_799_999}
_SINCE: Final = Param("since_ms", "Milliseconds since 1970; a day ago, if it is left out.", _WHOLE)
_UNTIL: Final = Param("until_ms", "Before this instant; now, if it is left out.", _WHOLE)
_LIMIT: Final = Param("limit", "At most so many rows.", {"type": "integer", "minimum": 1, "maximum": 500})
_EXPECTED: Final = Param("expected", "The version that was seen. Another one answers 409.", _WHOLE)
_REASON: Final = Param("reason", "For the audit.", {"type": "string", "minLength": 1, "maxLength": 500})


def _pages() -> Iterator[Verb]:
    yield Verb(method="GET", path="/static/{name}", role=None, kind="file", run=views.file)
    yield Verb(method="GET", path="/login", role=None, kind="page", run=forms.login_page)
    yield Verb(method="POST", path="/login", role=None, kind="form", run=forms.login)
    yield Verb(method="POST", path="/logout", role="viewer", kind="form", run=forms.logout)
    for path, view in (
        ("/", views.overview),
        ("/departments", views.departments),
        ("/department", views.department),
        ("/sessions", views.sessions),
        ("/refusals", views.refusals),
        ("/limits", views.usage_of_all),
        ("/raises", forms.raises),
        ("/keys", forms.keys),
        ("/health", views.health),
    ):
        yield Verb(method="GET", path=path, role="viewer", kind="page", run=view)
    yield Verb(method="GET", path="/usage.csv", role="viewer", kind="file", run=views.usage_file)
    yield Verb(method="GET", path="/audit", role="operator", kind="page", run=views.audit)
    for path, form in (
        ("/stops", forms.stop_new),
        ("/stops/end", forms.stop_end),
        ("/raises", forms.raise_new),
        ("/raises/end", forms.raise_end),
        ("/limits/reset", forms.reset),
    ):
        yield Verb(method="POST", path=path, role="operator", kind="form", run=form)
    for path, form in (
        ("/keys", forms.key_new),
        ("/keys/rotate", forms.key_rotate),
        ("/keys/revoke", forms.key_revoke),
    ):
        yield Verb(method="POST", path=path, role="admin", kind="form", run=form)
    for kind in KINDS:
        if kind.kind != "department":  # whose page has usage beside quotas
            yield Verb(method="GET", path=f"/{kind.slug}", role="viewer", kind="page", run=forms.entries(kind))
        yield Verb(method="GET", path=f"/{kind.slug}/edit", role="admin", kind="page", run=forms.edit(kind))
        yield Verb(method="POST", path=f"/{kind.slug}/edit", role="admin", kind="form", run=forms.save(kind))
        yield Verb(method="POST", path=f"/{kind.slug}/remove", role="admin", kind="form", run=forms.remove(kind))


def _api() -> Iterator[Verb]:
    yield Verb(
        method="GET", path="/api/v1/openapi.json", role="viewer", kind="api", run=_document, told="This document.",
        gives=dict,
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/usage", role="viewer", kind="api", run=api.usage, gives=bodies.UsageAnswer,
        told="What was used, by any dimensions.", conflicts=True,
        params=(
            _SINCE, _UNTIL, _LIMIT,
            Param("by", "Dimensions, separated by commas: `department,day`. A record counts in full in each of its departments."),
            Param("tz", "IANA time zone of hours, days and months."),
            *(Param(f"where.{name}", "Only records of this.") for name in FILTERS),
        ),
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/limits", role="viewer", kind="api", run=api.limits, gives=bodies.BudgetRow, gives_list=True,
        told="Limits in money and tokens with what is left of them: of one scope and subject, or of departments and providers: of the 200 that have cost most within 30 days.",
        params=(Param("scope", "`department`, `user`, …"), Param("subject", "Which one."), Param("caller", "Whose session.")),
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/calls", role="viewer", kind="api", run=api.calls, gives=bodies.OpenCallRow, gives_list=True,
        told="Calls that are open, of all processes.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/sessions", role="viewer", kind="api", run=api.sessions, gives=bodies.SessionRow,
        gives_list=True, told="Sessions with calls within the last hour: the 200 latest, those with open calls first.",
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/refusals", role="viewer", kind="api", run=api.refusals, gives=bodies.Refusals,
        told="How often was refused, and the latest refusals of this process. Counts are those of whole hours, the latest "
        "first; where `next_until_ms` is a number, older ones are left out.",
        params=(_SINCE, _UNTIL, _LIMIT, Param("policy", "Only of this policy.")),
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/audit", role="operator", kind="api", run=api.audit, gives=bodies.AuditRow, gives_list=True,
        told="What was done and tried, the newest first.", conflicts=True,
        params=(_LIMIT, Param("before", "Only entries with a lower `seq`.", _WHOLE), Param("actor", "Only by them."), Param("target", "Only of this: `department:research`, or `department:` for all.")),
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/health", role="viewer", kind="api", run=api.health, gives=bodies.HealthRow,
        told="How the guard of the process that answers is.",
    )  # fmt: skip
    for kind in KINDS:
        path = f"/api/v1/{kind.slug}"
        yield Verb(
            method="GET", path=path, role="viewer", kind="api", run=api.entry_list(kind), gives=bodies.EntryRow,
            gives_list=True, told=f"Every {kind.one}.", conflicts=True,
        )  # fmt: skip
        path += "/{name:path}"
        yield Verb(
            method="GET", path=path, role="viewer", kind="api", run=api.entry_get(kind), gives=bodies.EntryRow,
            told=f"One {kind.one}.", finds=True, conflicts=True,
        )  # fmt: skip
        yield Verb(
            method="PUT", path=path, role="admin", kind="api", run=api.entry_put(kind), takes=bodies.Change,
            gives=bodies.EntryRow, told=f"Add or change a {kind.one}. {kind.body.__doc__}", conflicts=True,
        )  # fmt: skip
        yield Verb(
            method="DELETE", path=path, role="admin", kind="api", run=api.entry_remove(kind), status=204,
            told=f"Remove a {kind.one}.", finds=True, conflicts=True, params=(_EXPECTED, _REASON),
        )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/stops", role="viewer", kind="api", run=api.temporary("stop"), gives=bodies.EntryRow,
        gives_list=True, told="What is stopped.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="POST", path="/api/v1/stops", role="operator", kind="api", run=api.stops_new, takes=bodies.NewStop,
        gives=bodies.Ended, status=201, told="Stop a caller, user, session, agent, department, model, or everything.",
        conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="DELETE", path="/api/v1/stops/{name:path}", role="operator", kind="api", run=api.stops_end, status=204,
        told="Let it go on.", finds=True, conflicts=True, params=(_REASON,),
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/raises", role="viewer", kind="api", run=api.temporary("raise"), gives=bodies.EntryRow,
        gives_list=True, told="Limits that are higher for a while.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="POST", path="/api/v1/raises", role="operator", kind="api", run=api.raises_new, takes=bodies.NewRaise,
        gives=dict[str, str], status=201, told="Raise a limit for a while.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="DELETE", path="/api/v1/raises/{name:path}", role="operator", kind="api", run=api.raises_end, status=204,
        told="End a raise.", finds=True, conflicts=True, params=(_REASON,),
    )  # fmt: skip
    yield Verb(
        method="POST", path="/api/v1/resets", role="operator", kind="api", run=api.reset, takes=bodies.Reset,
        gives=bodies.ResetRow, gives_list=True, told="Set what was used of a subject's limits to zero.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="GET", path="/api/v1/keys", role="viewer", kind="api", run=api.keys, gives=bodies.KeyRow, gives_list=True,
        told="Keys, without what could be used of them.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="POST", path="/api/v1/keys", role="admin", kind="api", run=api.keys_new, takes=bodies.NewKey,
        gives=bodies.KeyMade, status=201, told="A new key. It is in this answer, and nowhere else.", conflicts=True,
    )  # fmt: skip
    yield Verb(
        method="POST", path="/api/v1/keys/{name:path}/rotation", role="admin", kind="api", run=api.keys_rotate,
        takes=bodies.Rotation, gives=bodies.KeyMade, status=201, finds=True, conflicts=True,
        told="A new key in the place of another one, which goes on for a while.",
    )  # fmt: skip
    yield Verb(
        method="DELETE", path="/api/v1/keys/{name:path}", role="admin", kind="api", run=api.keys_revoke, status=204,
        told="Revoke a key at once.", finds=True, conflicts=True, params=(_REASON,),
    )  # fmt: skip


async def _document(asked: openapi.Asked) -> openapi.Response:
    return openapi.answer(asked, VERBS.verbs)


VERBS: Final = Verbs((*_pages(), *_api()))
