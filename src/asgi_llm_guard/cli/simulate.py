"""`simulate`: replay a past period under other policies."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.booked import ledger_of
from asgi_llm_guard.cli.common import Tool, command_options, ledger_option, progress, run
from asgi_llm_guard.cli.failures import Exit
from asgi_llm_guard.cli.periods import Period, period_options
from asgi_llm_guard.cli.tables import Column, count, instant, table, usd
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.windows import duration_ms

if TYPE_CHECKING:
    from asgi_llm_guard.cli.considered import PassedOver
    from asgi_llm_guard.ledger import Ledger
    from asgi_llm_guard.simulate import Comparison, Misfit, Simulation
    from asgi_llm_guard.usage import UsageRecord

__all__ = ["simulate"]

_BATCH: Final = 2_000
_MOST_COUNTS: Final = 10_000_000
_BOUNDS: Final = ("hold_wait_s", "session_limit", "anonymous_session_limit", "session_overflow", "session_ttl")
_SHADOW: Final = ".shadow"


def _length_ms(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int:
    try:
        return 0 if value is None else duration_ms(value, name="--warm-up")
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.argument("candidate", type=click.Path(exists=True, dir_okay=False), required=False)
@command_options
@ledger_option
@period_options("7d")
@click.option(
    "--warm-up",
    callback=_length_ms,
    metavar="TIME",
    help="Replay so much before the period, too, so that counters begin as they were: as long as the longest window.",
)
@click.option("--against", type=click.Choice(["shadow"]), help="Compare with what shadows reported in the period.")
@click.option("--apart", is_flag=True, help="Ask each policy by itself, as a shadow: none takes anything from another.")
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many subjects to show.")
@click.option(
    "--refusals", type=click.File("w", lazy=False), metavar="FILE", help="Write each refusal there, as JSON lines."
)
def simulate(
    tool: Tool,
    candidate: str | None,
    period: Period,
    tz: str,  # noqa: ARG001 - of the period
    warm_up: int,
    against: str | None,
    top: int,
    refusals: IO[str] | None,
    *,
    apart: bool,
) -> None:
    """Replay a past period under the policies of CANDIDATE: who would have been refused?

    CANDIDATE is a settings file; its policies, routes, agents, departments and prices decide. The usage records are
    those of --config. Without CANDIDATE, the policies of --config itself are replayed.

    What was refused then is in no ledger, and what a caller would have done after a refusal nobody knows: every call is
    asked by itself. With --against shadow the result is compared, hour by hour and policy by policy, with what the
    policies of CANDIDATE reported when they ran as shadows of the same names.

    Exit codes: 0 replayed; 1 there are no records; 1 with --against, too, where there was nothing to compare, less than
    99 % agree, or a policy would have refused here of which there is no report; 4 the ledger is away.
    """
    found, compared, over = run(
        _simulate(
            tool,
            candidate,
            period,
            warm_up_ms=warm_up,
            against=against is not None,
            apart=apart or against is not None,
            refusals=refusals,
        )
    )
    document: dict[str, Any] = {
        "since_ms": period[0],
        "until_ms": period[1],
        "simulation": found,
        "not_considered": over,
    }
    if compared is not None:
        document["agreement"] = _agreement(compared)
    tool.show(document, lambda: _text(found, compared, over, top))
    if not found.records or (compared is not None and not compared.holds):
        raise click.exceptions.Exit(Exit.FOUND)


async def _simulate(
    tool: Tool,
    candidate: str | None,
    period: Period,
    *,
    warm_up_ms: int,
    against: bool,
    apart: bool,
    refusals: IO[str] | None,
) -> tuple[Simulation, Comparison | None, Sequence[PassedOver]]:
    from asgi_llm_guard.cli.considered import Holders, administered, holders_of, passed_over, seen
    from asgi_llm_guard.settings import load_settings
    from asgi_llm_guard.settings.build import build_replacement
    from asgi_llm_guard.simulate import Simulator

    settings = tool.settings()
    chosen = settings if candidate is None else load_settings(candidate)
    arguments = build_replacement(chosen, identity=False)
    arguments |= {name: value for name in _BOUNDS if (value := getattr(chosen, name)) is not None}
    policies, routes = arguments["policies"], arguments["routes"] or ()
    whose = chosen if chosen.identity is not None or chosen.control is not None else settings
    state, unread = await administered(tool, whose)
    holders = Holders(holders_of(whose, state))
    deployments: Counter[str] = Counter()
    simulator = Simulator(
        policies,
        routes=routes,
        apart=apart,
        hold_wait_s=arguments.get("hold_wait_s", 0.25),
        found=None if refusals is None else lambda misfit: _write(refusals, misfit),
        params=holders.params if holders else None,
        arguments=arguments,
    )
    guard = tool.guard(settings, needs=("storage", "ledger"))
    try:
        ledger = ledger_of(tool, guard)
        since_ms, until_ms = period
        records = seen(_records(ledger, since_ms - warm_up_ms, until_ms), deployments)
        total = await _how_many(ledger, since_ms - warm_up_ms, until_ms)
        with progress("replaying", length=total) as bar:
            found = await simulator.run(records, since_ms=since_ms, progress=bar)
        names = [policy.name for policy in (*policies, *(policy for route in routes for policy in route.extra))]
        if against and guard.books is not None:
            await guard.books.catch_up()  # what shadows have said lately
        compared = await _compared(ledger, found, period, names) if against else None
        over = passed_over(
            settings,
            holders=holders,
            deployments=deployments,
            refused=await _refused(ledger, period),
            policies=names,
            state=state,
            unread=unread,
            clamps=apart and any(route.clamp for route in routes),
            now_ms=time.time_ns() // 1_000_000,
        )
    finally:
        await guard.aclose()
    return found, compared, over


async def _records(ledger: Ledger, since_ms: int, until_ms: int) -> AsyncIterator[Sequence[UsageRecord]]:
    from asgi_llm_guard.ledger.values import RecordQuery

    query = RecordQuery(since_ms=max(0, since_ms), until_ms=until_ms, limit=_BATCH)
    async for batch in ledger.stream(query):
        yield batch


async def _how_many(ledger: Ledger, since_ms: int, until_ms: int) -> int:
    from asgi_llm_guard.ledger.values import UsageQuery

    report = await ledger.usage(UsageQuery(since_ms=max(0, since_ms), until_ms=until_ms))
    return report.total.records


async def _refused(ledger: Ledger, period: Period) -> Counter[str]:
    """How often each policy has refused in the period."""
    from asgi_llm_guard.ledger.values import RefusalQuery
    from asgi_llm_guard.simulate.report import plain_name

    rows = await ledger.refusals(RefusalQuery(since_ms=period[0], until_ms=period[1], limit=_MOST_COUNTS))
    refused: Counter[str] = Counter()
    for row in rows:
        if plain_name(row.policy) == row.policy:
            refused[row.policy] += row.count
    return refused


async def _compared(ledger: Ledger, found: Simulation, period: Period, names: Sequence[str]) -> Comparison:
    from asgi_llm_guard.ledger.values import RefusalQuery
    from asgi_llm_guard.simulate import compare
    from asgi_llm_guard.simulate.report import plain_name

    since_ms, until_ms = period
    rows = await ledger.refusals(RefusalQuery(since_ms=since_ms, until_ms=until_ms, limit=_MOST_COUNTS))
    reports = [(row.hour_ms, plain_name(row.policy), row.count) for row in rows if plain_name(row.policy) != row.policy]
    return compare(found, reports, [plain_name(name) for name in names], since_ms=since_ms, until_ms=until_ms)


def _agreement(compared: Comparison) -> dict[str, Any]:
    agreed = compared.agreement
    return {
        "since_ms": compared.since_ms,
        "until_ms": compared.until_ms,
        "calls": compared.calls,
        "policies": compared.policies,
        "not_compared": compared.missing,
        "decisions": 0 if agreed is None else agreed.decisions,
        "both": None if agreed is None else agreed.both,
        "only_simulated": None if agreed is None else agreed.only_simulated,
        "only_reported": None if agreed is None else agreed.only_reported,
        "share": None if agreed is None else agreed.share,
    }


def _write(file: IO[str], misfit: Misfit) -> None:
    import msgspec

    file.write(json.dumps(msgspec.to_builtins(misfit)) + "\n")


# ----------------------------------------------------------------------------------------- text


def _text(found: Simulation, compared: Comparison | None, over: Sequence[PassedOver], top: int) -> str:
    if not found.records:
        return "There are no usage records in this period."
    period = f"{instant(found.first_ms)} to {instant(found.last_ms)} UTC"
    parts = [f"{count(found.records)} records of {period}, {usd(found.cost_nanousd)}"]
    share = found.refused / found.records
    would = f"{count(found.refused)} of them would have been refused ({share:.1%}), {usd(found.refused_nanousd)}"
    notes = [
        f"{count(number)} {text}"
        for number, text in (
            (found.unknown, "at a cost that is not known"),
            (found.followed, "with their first attempt"),
            (found.shorter, "that would have fit with a lower output limit"),
        )
        if number
    ]
    watched = [row for row in found.policies if not row.enforced]
    if found.refused or not watched:
        parts.append(click.style(would, bold=True) + (f": {', '.join(notes)}" if notes else ""))
    if watched:
        misfits = (
            f"{count(sum(row.calls for row in watched))} times a policy that was asked by itself would have refused"
        )
        parts.append(click.style(misfits, bold=True))
    if found.policies:
        columns = [
            Column("POLICY"),
            Column("CODE"),
            Column("CALLS", align="right"),
            Column("COST", align="right"),
            Column("FIRST (UTC)", keep=True),
            Column("LAST (UTC)", keep=True),
        ]
        rows = [
            (
                row.policy,
                row.code if row.enforced else "would (shadow)",
                row.calls,
                usd(row.cost_nanousd),
                instant(row.first_ms)[:16],
                instant(row.last_ms)[:16],
            )
            for row in found.policies
        ]
        parts.append(table(columns, rows))
        columns = [
            Column("SCOPE"),
            Column("WHO"),
            Column("POLICY"),
            Column("CALLS", align="right"),
            Column("COST", align="right"),
            Column("FIRST (UTC)", keep=True),
        ]
        lines = [
            (
                row.scope or None,
                row.subject or None,
                row.policy,
                row.calls,
                usd(row.cost_nanousd),
                instant(row.first_ms)[:16],
            )
            for row in found.subjects[:top]
        ]
        parts.append(table(columns, lines))
        if len(found.subjects) > top:
            parts[-1] += f"\n… and {count(len(found.subjects) - top)} more (--top)"
    if found.clamped:
        parts.append(
            f"{count(found.clamped)} would have been admitted with a lower output limit (clamp); the answers of "
            f"{count(found.cut)} were longer than that"
        )
    if compared is not None:
        parts.append(_told(compared))
    if over:
        passed = [
            f"  {each.told}" + (f" ({count(each.records)} records)" if each.records is not None else "")
            for each in over
        ]
        parts.append("\n".join(["Not considered in this run:", *passed]))
    return "\n\n".join(parts)


def _told(compared: Comparison) -> str:
    agreed = compared.agreement
    if compared.since_ms == compared.until_ms:
        return "Nothing to compare: the period has no whole hour in it, and reports are kept by the hour."
    hours = f"{instant(compared.since_ms)[:16]} to {instant(compared.until_ms)[:16]} UTC"
    missing = ", ".join(
        f"{policy} ({count(number)} misfits here)" if number else policy for policy, number in compared.missing.items()
    )
    none = f"the ledger has no report of a shadow of {missing}: it did not run then, or would have refused nothing"
    if agreed is None:
        return f"Nothing to compare in {hours}: {none if missing else 'there are no calls'}."
    text = (
        f"{agreed.share:.2%} of {count(agreed.decisions)} decisions agree with what shadows reported "
        f"({', '.join(compared.policies)}, {count(compared.calls)} calls, {hours}): {count(agreed.both)} misfits on both "
        f"sides, {count(agreed.only_simulated)} only here, {count(agreed.only_reported)} only there"
    )
    return f"{text}\nNot compared: {none}." if missing else text
