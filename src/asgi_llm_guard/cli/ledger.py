"""`ledger`: drain, export, reprice, rollup, retain, reconcile."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.booked import ledger_of, with_ledger
from asgi_llm_guard.cli.changing import follow
from asgi_llm_guard.cli.common import Tool, command_options, confirm, ledger_option, progress, run
from asgi_llm_guard.cli.failures import Exit
from asgi_llm_guard.cli.periods import Period, period_options
from asgi_llm_guard.cli.reports import filters
from asgi_llm_guard.cli.root import Late
from asgi_llm_guard.cli.tables import Column, count, instant, table, usd

if TYPE_CHECKING:
    from asgi_llm_guard.ledger import Ledger
    from asgi_llm_guard.ledger.drain import Drained
    from asgi_llm_guard.ledger.export import Exported
    from asgi_llm_guard.ledger.reprice import Repriced
    from asgi_llm_guard.ledger.values import Reconciliation, Retained

__all__ = ["drain", "export", "ledger", "reconcile", "reprice", "retain", "rollup"]

_PAUSE_S: Final = 2.0
_FILE: Final = "-"


@click.group(cls=Late)
def ledger() -> None:
    """Usage records: drain, export, reprice, rollup, retain, reconcile."""


ledger.listing = MappingProxyType(
    {
        "drain": ("ledger:drain", "Take new records from the storage into the ledger, exactly once."),
        "export": ("ledger:export", "Write a period as CSV, JSON Lines, Parquet or FOCUS."),
        "reprice": ("ledger:reprice", "Price a past period anew, beside what was charged."),
        "rollup": ("ledger:rollup", "Add new records to the sums of hours and days."),
        "retain": ("ledger:retain", "Remove what is older than it is to be kept."),
        "reconcile": ("ledger:reconcile", "Compare the sums with the records."),
    }
)


# ----------------------------------------------------------------------------------------- drain


@click.command()
@command_options
@ledger_option
@click.option("--follow", is_flag=True, help="Go on until SIGTERM or Ctrl-C.")
def drain(tool: Tool, *, follow: bool) -> None:
    """Take new records from the storage into the ledger, exactly once, and add them to the sums.

    Any number of processes may do it at the same time, and may be killed at any instant. The service does it by itself;
    this is for hosts where it should not, and to catch up. A SQLite storage writes into its ledger directly, so that
    there is only the adding up.

    Exit codes: 0 up to date; 1 records were lost (the stream dropped them before they were drained); 4 a store is away.
    """
    with progress("records") as bar:
        done, summed = run(_drain(tool, follow=follow, told=bar))
    document = {"drained": done, "rolled_up": summed}
    tool.show(document, lambda: _drained(done, summed))
    if done is not None and done.lost:
        raise click.exceptions.Exit(Exit.FOUND)


async def _drain(tool: Tool, *, follow: bool, told: Callable[[int], None]) -> tuple[Drained | None, int]:
    from asgi_llm_guard.ledger.drain import Drain, Drained
    from asgi_llm_guard.storage.streams import KeepsStreams

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    settings = tool.settings()
    tool.tell_made("ledger", settings)
    guard = tool.guard(settings, needs=("storage", "ledger"), makes=("ledger",))
    try:
        book = ledger_of(tool, guard)
        taking = Drain(guard.storage, book) if isinstance(guard.storage, KeepsStreams) else None
        done, summed = Drained(), 0
        while not stopped.is_set():
            if taking is not None:
                step = await taking.step()
                done += step
                told(done.records)
                if step.behind:
                    continue
                done += Drained(refusals=await taking.refusals())
            summed += await _roll_up(book)
            if taking is None and guard.books is not None:
                await guard.books.catch_up()  # refusals
            if not follow:
                break
            await _pause(stopped)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await guard.aclose()
    return (done if taking is not None else None), summed


async def _pause(stopped: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stopped.wait(), _PAUSE_S)
    except TimeoutError:
        return


async def _roll_up(book: Ledger) -> int:
    summed = 0
    while step := await book.roll_up():
        summed += step
    return summed


def _drained(done: Drained | None, summed: int) -> str:
    if done is None:
        return f"This storage writes into its ledger. {count(summed)} records were added to the sums."
    text = (
        f"{count(done.records)} records were taken over, {count(done.replaced)} were there already or replaced an "
        f"estimate; {count(summed)} were added to the sums; {count(done.refusals)} refusals were counted."
    )
    if done.lost:
        text += (
            f"\n{count(done.lost)} records were lost: the stream dropped them before they were drained. Drain more "
            "often, or raise max_records of the storage."
        )
    return text


# ---------------------------------------------------------------------------------------- export


@click.command()
@command_options
@ledger_option
@period_options("month")
@click.option(
    "--format", "format_", type=click.Choice(["csv", "jsonl", "parquet", "focus"]), default="csv", show_default=True
)
@click.option("--output", "-o", default=_FILE, metavar="FILE", help="Where to write; -: stdout.")
@click.option("--where", multiple=True, metavar="NAME=VALUE", help="As of `usage`.")
@click.option("--each-department", is_flag=True, help="A row for each department of a record, instead of one for all.")
@click.option("--gzip", is_flag=True, help="Compress it.")
def export(
    tool: Tool,
    period: Period,
    tz: str,  # noqa: ARG001 - of the period
    format_: str,
    output: str,
    where: tuple[str, ...],
    *,
    each_department: bool,
    gzip: bool,
) -> None:
    """Write a period as CSV, JSON Lines, Parquet or FOCUS: a row for each record.

    The sum of the file is the sum of the ledger, to the nano-dollar. A file is replaced when all of it was written.
    With --json, what was written is told on stdout; then --output must name a file.
    """
    if output == _FILE and tool.as_json:
        raise click.UsageError("--json tells on stdout what was written: name a file with --output")
    if output == _FILE and sys.stdout.isatty() and (gzip or format_ == "parquet"):
        raise click.UsageError("this is no text: name a file with --output")
    query = {"since_ms": period[0], "until_ms": period[1], "where": filters(where)}
    with progress("records") as bar:
        written = run(
            with_ledger(
                tool,
                lambda book: _export(
                    book,
                    query,
                    output,
                    {"format": format_, "gzip": gzip, "departments": "each" if each_department else "once"},
                    bar,
                ),
            )
        )
    if output != _FILE:
        tool.show({"file": output} | _builtins(written), lambda: _exported(written, output))


async def _export(
    book: Ledger, query: dict[str, Any], output: str, options: dict[str, Any], told: Callable[[int], None]
) -> Exported:
    from asgi_llm_guard.ledger.export import export as write
    from asgi_llm_guard.ledger.values import RecordQuery

    target = sys.stdout.buffer if output == _FILE else Path(output)
    return await write(book, RecordQuery(**query), target, progress=told, **options)


def _builtins(value: object) -> dict[str, Any]:
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(value)
    return document


def _exported(written: Exported, output: str) -> str:
    unpriced = f", {count(written.unpriced)} of them without a price" if written.unpriced else ""
    return (
        f"{count(written.records)} records{unpriced}, {count(written.rows)} rows, ${written.cost_usd}\n"
        f"{output}: {count(written.bytes)} bytes, sha256 {written.sha256}"
    )


# --------------------------------------------------------------------------------------- reprice


@click.command()
@command_options
@ledger_option
@period_options("month")
@click.option("--name", "version", required=True, metavar="NAME", help="What this version of the costs is called.")
@click.option("--dry-run", is_flag=True, help="Only say what would differ.")
def reprice(tool: Tool, period: Period, tz: str, version: str, *, dry_run: bool) -> None:  # noqa: ARG001 - of the period
    """Price a past period anew by the settings' prices, beside what was charged.

    What was charged stays as it is; the new costs are kept under NAME.
    """
    with progress("records") as bar:
        again = run(_reprice(tool, period, version, dry_run=dry_run, told=bar))
    tool.show(again, lambda: _repriced(again))


async def _reprice(tool: Tool, period: Period, version: str, *, dry_run: bool, told: Callable[[int], None]) -> Repriced:
    from asgi_llm_guard.ledger.reprice import reprice as price

    guard = tool.guard(needs=("storage", "ledger", "control"))
    try:
        book = ledger_of(tool, guard)
        await follow(guard)
        return await price(
            book,
            guard.prices,
            since_ms=period[0],
            until_ms=period[1],
            version=version,
            dry_run=dry_run,
            progress=told,
        )
    finally:
        await guard.aclose()


def _repriced(again: Repriced) -> str:
    columns = [
        Column("MODEL"),
        Column("RECORDS", align="right"),
        Column("CHARGED", align="right"),
        Column("REPRICED", align="right"),
        Column("DIFFERENCE", align="right"),
        Column("UNKNOWN", align="right"),
    ]
    rows = [
        (
            "total" if row is again.total else "/".join(part for part in (row.provider, row.model) if part) or None,
            row.records,
            usd(row.charged_nanousd),
            usd(row.repriced_nanousd),
            usd(row.difference_nanousd),
            row.unknown,
        )
        for row in (*again.models, again.total)
    ]
    told = "Nothing was kept (--dry-run)." if again.dry_run else f"Kept as {again.version!r}, beside what was charged."
    return f"{table(columns, rows)}\n\n{told}"


# -------------------------------------------------------------------------- rollup, retain, reconcile


@click.command()
@command_options
@ledger_option
def rollup(tool: Tool) -> None:
    """Add new records to the sums of hours and days. The service does it by itself."""
    summed = run(with_ledger(tool, _roll_up))
    tool.show({"rolled_up": summed}, lambda: f"{count(summed)} records were added to the sums.")


@click.command()
@command_options
@ledger_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def retain(tool: Tool, *, yes: bool) -> None:
    """Remove what is older than it is to be kept, once it is in the sums. The service does it by itself."""
    confirm("Remove records that are older than the settings keep them?", yes=yes)
    removed = run(with_ledger(tool, lambda book: book.retain()))
    tool.show({"removed": removed}, lambda: _retained(removed))


def _retained(removed: Retained) -> str:
    rows = [(name, getattr(removed, name)) for name in removed.__struct_fields__]
    return table([Column("REMOVED", keep=True), Column("ROWS", align="right")], rows)


@click.command()
@command_options
@ledger_option
@period_options("month")
def reconcile(tool: Tool, period: Period, tz: str) -> None:  # noqa: ARG001 - of the period
    """Compare the sums of hours and days with the records themselves.

    Exit codes: 0 they are equal; 1 they differ.
    """
    compared = run(with_ledger(tool, lambda book: book.reconcile(*period)))
    tool.show({"equal": compared.equal} | _builtins(compared), lambda: _reconciled(compared))
    if not compared.equal:
        raise click.exceptions.Exit(Exit.FOUND)


def _reconciled(compared: Reconciliation) -> str:
    period = f"{instant(compared.since_ms)[:10]} to {instant(compared.until_ms)[:10]} (UTC)"
    if compared.equal:
        total = compared.total
        return f"Equal: {count(total.records)} records, {usd(total.cost_nanousd)}, {period}"
    columns = [
        Column("DAY", keep=True),
        Column("SUMS", keep=True),
        Column("AMOUNT"),
        Column("RECORDS", align="right"),
        Column("ROLLED UP", align="right"),
    ]
    rows = [
        (instant(each.day_ms)[:10], each.table, each.amount, each.records, each.rolled_up)
        for each in compared.differences
    ]
    return f"They differ, {period}:\n\n{table(columns, rows)}"
