"""The pages: each reads what it shows and gives it to its template."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from starlette.responses import RedirectResponse, Response

from asgi_llm_guard.admin import gathered, live
from asgi_llm_guard.admin.asked import Asked, ProblemError
from asgi_llm_guard.admin.budgets import budget_of
from asgi_llm_guard.admin.deeds import UNSAID, deed
from asgi_llm_guard.admin.pages import STATIC, page
from asgi_llm_guard.admin.periods import RANGES, Period, read_period
from asgi_llm_guard.admin.sheet import MOST_ROWS, file_name, sheet
from asgi_llm_guard.control import AuditQuery
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.ledger import UsageQuery
from asgi_llm_guard.ledger.refusals import SHADOW
from asgi_llm_guard.windows import Calendar

__all__ = [
    "audit",
    "department",
    "departments",
    "file",
    "health",
    "overview",
    "refusals",
    "sessions",
    "usage_file",
    "usage_of_all",
]

_log = logging.getLogger("asgi_llm_guard")

_LATEST: Final = 50
_LIVE: Final = 100
_AUDIT_PAGE: Final = 100
_YEAR_MS: Final = 335 * 86_400_000  # with the month that it falls into, the twelve latest


def period_of(asked: Asked, default: str = "24h") -> Period:
    return read_period(asked.query, asked.now_ms, tz=asked.desk.options.tz, default=default)


async def overview(asked: Asked) -> Response:
    desk, period = asked.desk, period_of(asked)
    report, by_department, by_model, now_held, refused, (limits, left_out) = await asyncio.gather(
        gathered.over_time(desk, period),
        gathered.groups(desk, period, "department"),
        gathered.groups(desk, period, "model"),
        gathered.held(desk),
        gathered.refused_by_policy(desk, period),
        gathered.budgets(desk),
    )
    spend, calls = (None, None) if report is None else gathered.charts(report, period)
    return page(
        asked,
        "overview.html",
        active="overview",
        period=period,
        ranges=RANGES,
        total=None if report is None else report.total,
        spend=spend,
        calls=calls,
        by_department=by_department,
        by_model=by_model,
        held=now_held,
        refused=refused,
        refused_count=sum(count for _, code, count in refused if code != SHADOW),
        budgets=limits,
        left_out=left_out,
        recent=len(desk.recent.latest(1)),
        health=desk.guard.health(),
    )


async def departments(asked: Asked) -> Response:
    desk, period = asked.desk, period_of(asked, "30d")
    names, used = await asyncio.gather(
        gathered.departments_known(desk), gathered.groups(desk, period, "department", limit=500)
    )
    state = None if desk.control is None else await desk.control.state()
    by_name = {group.name: group for group in used}
    names = list(dict.fromkeys([*(name for name in by_name if name is not None), *names]))  # the dearest first
    limits, left_out = await desk.budgets(("department", name) for name in names)
    budgets = {name: [budget for budget in limits if budget.subject == name] for name in names}
    order = asked.query.get("sort")
    if order == "name":
        names.sort(key=str.casefold)
    elif order == "limit":
        names.sort(key=lambda name: -max((budget.share for budget in budgets[name]), default=-1))
    else:
        order = "cost"
    return page(
        asked,
        "departments.html",
        active="departments",
        period=period,
        ranges=RANGES,
        names=names,
        used=by_name,
        nobody=by_name.get(None),
        budgets=budgets,
        order=order,
        left_out=left_out,
        quotas={} if state is None else state.departments,
        elsewhere=desk.quotas(),
        administered=state is not None,
    )


async def department(asked: Asked) -> Response:
    name = asked.query.get("name", "")
    if not name:
        return RedirectResponse(asked.url("/departments"), 303)
    desk, period = asked.desk, period_of(asked, "30d")
    where = {"department": name}
    # Whole months, so that each bar is what the month has cost.
    first_ms, _ = Calendar("month", period.tz).bounds(min(asked.now_ms - _YEAR_MS, period.since_ms))
    months = Period(name="custom", since_ms=max(0, first_ms), until_ms=period.until_ms, tz=period.tz)
    report, models, users, agents, (limits, _), monthly = await asyncio.gather(
        gathered.over_time(desk, period, where),
        gathered.groups(desk, period, "model", where=where),
        gathered.people(desk, period, where=where),
        gathered.groups(desk, period, "agent", where=where),
        desk.budgets([("department", name)]),
        gathered.by_month(desk, months, where),
    )
    spend, calls = (None, None) if report is None else gathered.charts(report, period)
    state = None if desk.control is None else await desk.control.state()
    return page(
        asked,
        "department.html",
        active="departments",
        name=name,
        period=period,
        ranges=RANGES,
        total=None if report is None else report.total,
        spend=spend,
        calls=calls,
        monthly=monthly,
        models=models,
        users=users,
        agents=agents,
        budgets=limits,
        quota=None if state is None else state.departments.get(name),
        elsewhere=name in desk.quotas(),
        administered=state is not None,
    )


async def usage_file(asked: Asked) -> Response:
    """What the overview, or the page of a department, sums up: as a file."""
    desk, period, name = asked.desk, period_of(asked), asked.query.get("name")
    if desk.ledger is None:
        raise ProblemError(409, "No ledger is configured, so nothing is known of past usage.")
    if period.problem is not None:
        raise ProblemError(422, period.problem)
    report = await desk.ledger.usage(
        UsageQuery(
            since_ms=period.since_ms,
            until_ms=period.until_ms,
            by=(period.unit, "model"),
            where={"department": name} if name else {},
            tz=period.tz,
            order="key",
            limit=MOST_ROWS,
        )
    )
    if report.left_out:
        raise ProblemError(
            422,
            f"The file would have {MOST_ROWS + report.left_out:,} rows, and may have {MOST_ROWS:,}. Take a shorter time, or "
            "asgi-llm-guard ledger export, which has no end.",
        )
    told = {"Content-Disposition": f'attachment; filename="{file_name(period)}"'}
    return Response(sheet(report, period), media_type="text/csv; charset=utf-8", headers=told)


async def sessions(asked: Asked) -> Response:
    find = asked.query.get("find", "").strip()
    order: live.Order = next((each for each in live.ORDERS if each == asked.query.get("sort")), "last")
    told = await live.live_sessions(asked.desk, limit=_LIVE + 1, find=find, order=order)
    found, more = told.sessions[:_LIVE], len(told.sessions) > _LIVE
    searched = find or order != "last"
    return page(
        asked,
        "sessions.html",
        active="sessions",
        sessions=list(zip(found, await live.iterated(asked.desk, found), strict=True)),
        more=more,
        find=find,
        order=order,
        orders=live.ORDERS,
        tells=told.tells_open,
        looked_at=live.MOST_SESSIONS if searched and not told.whole else None,
        administered=asked.desk.control is not None,
        tz=asked.desk.options.tz,
    )


async def refusals(asked: Asked) -> Response:
    desk, period = asked.desk, period_of(asked)
    policy = asked.query.get("policy") or None
    counted = await gathered.refused_by_policy(desk, period)
    return page(
        asked,
        "refusals.html",
        active="refusals",
        period=period,
        ranges=RANGES,
        counted=counted,
        most=max((count for _, _, count in counted), default=0),
        policy=policy,
        latest=desk.recent.latest(_LATEST, policy=policy),
        kept=desk.options.refusals_kept,
        ledger=desk.ledger is not None,
    )


async def audit(asked: Asked) -> Response:
    desk = asked.desk
    entries = None
    actor, target = asked.query.get("actor") or None, asked.query.get("target") or None
    before = asked.query.get("before", "")
    seq = int(before) if before.isascii() and before.isdecimal() and len(before) < 15 else None
    if desk.control is not None:
        entries = await desk.control.audit(AuditQuery(actor=actor, target=target, before=seq, limit=_AUDIT_PAGE))
    return page(
        asked,
        "audit.html",
        active="audit",
        entries=None if entries is None else [(entry, deed(entry, desk.options.tz)) for entry in entries],
        actor=actor or "",
        target=target or "",
        most=_AUDIT_PAGE,
        none_there=UNSAID,
        tz=asked.desk.options.tz,
    )


async def health(asked: Asked) -> Response:
    guard = asked.desk.guard
    try:
        now_held = await gathered.held(asked.desk)
    except StorageError as error:  # when this page is needed most
        _log.warning("administration: open calls are not known: %s", error)
        now_held = None
    return page(
        asked,
        "health.html",
        active="health",
        health=guard.health(),
        storage=type(guard.storage).__name__,
        policies=guard.policies,
        ledger=asked.desk.ledger is not None,
        control=asked.desk.control is not None,
        held=now_held,
        tz=asked.desk.options.tz,
    )


async def usage_of_all(asked: Asked) -> Response:
    """Every limit of one scope and subject, and the form that resets them."""
    scope, subject = asked.query.get("scope", ""), asked.query.get("subject", "")
    rows = []
    if scope:
        try:
            found = await asked.desk.guard.meters_of(scope, subject, caller=asked.query.get("caller") or None)
        except ConfigurationError as error:
            raise ProblemError(422, str(error), field="scope") from None
        rows = [(meter, reading, budget_of(meter, reading, asked.now_ms)) for meter, reading in found]
    return page(
        asked,
        "limits.html",
        active="raises",
        scope=scope,
        subject=subject,
        caller=asked.query.get("caller", ""),
        rows=rows,
        administered=asked.desk.control is not None,
        tz=asked.desk.options.tz,
    )


async def file(asked: Asked) -> Response:
    found = STATIC().get(asked.params["name"])
    if found is None:
        raise ProblemError(404, "There is no such file.")
    raw, media, digest = found
    kept = "public, max-age=31536000, immutable" if asked.query.get("v") == digest else "no-cache"
    return Response(raw, media_type=media, headers={"Cache-Control": kept})
