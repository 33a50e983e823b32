"""`usage`, `top`, `sessions`: what the ledger says, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.booked import with_ledger
from asgi_llm_guard.cli.common import Tool, command_options, ledger_option, run
from asgi_llm_guard.cli.periods import Period, begin_of, period_options
from asgi_llm_guard.cli.tables import Column, count, instant, table, usd
from asgi_llm_guard.ledger.values import DIMENSIONS, TIMES

if TYPE_CHECKING:
    from asgi_llm_guard.ledger.values import Amounts, SessionUsage, UsageReport

__all__ = ["filters", "sessions", "top", "usage"]

_NOBODY: Final = "(none)"


def filters(values: Iterable[str]) -> dict[str, str | None]:
    """`department=research`, … as the ledger is asked for them.

    Raises:
        BadParameter: one of them is something else, or is there twice.
    """
    where: dict[str, str | None] = {}
    for value in values:
        name, equals, wanted = value.partition("=")
        if not equals or name not in DIMENSIONS or name in TIMES:
            known = ", ".join(each for each in DIMENSIONS if each not in TIMES)
            raise click.BadParameter(f"expected NAME=VALUE with one of {known}, got {value!r}")
        if name in where:
            raise click.BadParameter(f"{name} is given twice; a record has to be of one")
        where[name] = wanted or None
    return where


_where = click.option(
    "--where",
    multiple=True,
    callback=lambda _context, _parameter, values: filters(values),
    metavar="NAME=VALUE",
    help="Only these, such as department=research; NAME= : those without one. May be given several times.",
)


@click.command()
@command_options
@ledger_option
@period_options("month")
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(DIMENSIONS),
    default=("department",),
    show_default=True,
    metavar="DIMENSION",
    help=f"A row for each: {', '.join(DIMENSIONS)}. May be given several times.",
)
@_where
@click.option("--order", type=click.Choice(["cost", "calls", "key"]), help="Default: by cost; times by time.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many rows.")
def usage(
    tool: Tool,
    period: Period,
    tz: str,
    by: tuple[str, ...],
    where: dict[str, str | None],
    order: str | None,
    limit: int,
) -> None:
    """What was used in a period, by department, user, model, day, …

    By department and by tag a call counts in full for each of its own; the total counts it once.
    """
    _report(tool, period, tz, by, where, order or ("key" if by[:1] and by[0] in TIMES else "cost"), limit)


@click.command()
@command_options
@ledger_option
@period_options("24h")
@click.argument("dimension", type=click.Choice(DIMENSIONS), default="user", metavar="[DIMENSION]")
@_where
@click.option("--order", type=click.Choice(["cost", "calls"]), default="cost", show_default=True)
@click.option("--limit", "-n", type=click.IntRange(1, 1_000), default=10, show_default=True, help="How many.")
def top(
    tool: Tool, period: Period, tz: str, dimension: str, where: dict[str, str | None], order: str, limit: int
) -> None:
    """Who has used most: users, or any other DIMENSION (department, agent, model, session, …)."""
    _report(tool, period, tz, (dimension,), where, order, limit)


@click.command()
@command_options
@ledger_option
@click.option("--since", default="24h", show_default=True, metavar="WHEN", help="Sessions with calls since then.")
@click.option("--limit", "-n", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
def sessions(tool: Tool, since: str, limit: int) -> None:
    """Sessions with calls lately, the latest first: whose they are, how many calls, and what they cost."""
    since_ms = begin_of(since, name="--since")
    rows = run(with_ledger(tool, lambda ledger: ledger.sessions(since_ms=since_ms, limit=limit)))
    tool.show({"sessions": rows}, lambda: _sessions(rows))


# --------------------------------------------------------------------------------------- reports


def _report(
    tool: Tool,
    period: Period,
    tz: str,
    by: Sequence[str],
    where: dict[str, str | None],
    order: str,
    limit: int,
) -> None:
    from asgi_llm_guard.ledger.values import UsageQuery

    asked: dict[str, Any] = {"by": tuple(dict.fromkeys(by)), "where": where, "tz": tz, "order": order, "limit": limit}
    query = UsageQuery(since_ms=period[0], until_ms=period[1], **asked)
    report = run(with_ledger(tool, lambda ledger: ledger.usage(query)))
    document = {
        "since_ms": query.since_ms,
        "until_ms": query.until_ms,
        "by": query.by,
        "rows": report.rows,
        "total": report.total,
        "left_out": report.left_out,
    }
    tool.show(document, lambda: _usage(report, query.by))


def _usage(report: UsageReport, by: Sequence[str]) -> str:
    if not report.total.records:
        return "Nothing was used in this period."
    unpriced = report.total.unpriced > 0
    columns = [
        *(Column(name.upper(), keep=name in TIMES) for name in by),
        Column("CALLS", align="right"),
        Column("COST", align="right"),
        *([Column("UNPRICED", align="right")] if unpriced else []),
        Column("INPUT", align="right"),
        Column("OUTPUT", align="right"),
        Column("CACHED", align="right"),
        Column("ERRORS", align="right"),
    ]

    def figures(amounts: Amounts) -> tuple[object, ...]:
        return (
            amounts.calls,
            usd(amounts.cost_nanousd),
            *([amounts.unpriced] if unpriced else []),
            amounts.input_tokens,
            amounts.output_tokens,
            amounts.cached,
            amounts.errors,
        )

    rows = [(*(_NOBODY if part is None else part for part in row.key), *figures(row.amounts)) for row in report.rows]
    names = ("total", *("" for _ in by[1:])) if by else ()
    text = table(columns, [*rows, (*names, *figures(report.total))])
    if report.left_out:
        text += f"\n… and {count(report.left_out)} more rows (--limit), which are in the total"
    if unpriced:
        text += (
            f"\n{count(report.total.unpriced)} records have no price: they are not free, and not in the cost; "
            "`asgi-llm-guard check` names their models"
        )
    return text


def _sessions(rows: Sequence[SessionUsage]) -> str:
    if not rows:
        return "No session has made a call since."
    columns = [
        Column("SESSION"),
        Column("CALLER"),
        Column("AGENT"),
        Column("DEPARTMENTS"),
        Column("CALLS", align="right"),
        Column("COST", align="right"),
        Column("FIRST (UTC)", keep=True),
        Column("LAST (UTC)", keep=True),
    ]
    lines = [
        (
            row.session,
            row.caller,
            row.agent,
            ", ".join(row.departments) or None,
            row.calls,
            usd(row.cost_nanousd),
            instant(row.first_ms)[:16],
            instant(row.last_ms)[:16],
        )
        for row in rows
    ]
    return table(columns, lines)
