"""`reset`, `raise`, `kill`: what an operator changes while the service runs. Every change is audited."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.changing import actor, administered, follow
from asgi_llm_guard.cli.common import Tool, check_reason, command_options, confirm, control_option, reason_option, run
from asgi_llm_guard.cli.failures import Exit
from asgi_llm_guard.cli.periods import end_of
from asgi_llm_guard.cli.tables import Column, instant, table, usd
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.claims import Meter, Reading
    from asgi_llm_guard.guard import Guard

__all__ = ["kill", "raise_", "reset"]

_SCOPES: Final = ("user", "session", "caller", "agent", "department", "model", "provider", "tag", "global")
_STOPPED: Final = ("caller", "user", "session", "agent", "department", "model", "all")
_UNITS: Final = ("usd", "tokens", "calls", "slots")

_caller = click.option("--caller", help="Of a session: whose it is, since two callers may use the same id.")


# ---------------------------------------------------------------------------------------- reset


@click.command()
@command_options
@control_option
@click.argument("scope", type=click.Choice(_SCOPES), metavar="SCOPE")
@click.argument("subject", default="")
@_caller
@click.option("--policy", "policies", multiple=True, help="Only what this policy counts. May be given several times.")
@click.option("--dry-run", is_flag=True, help="Only show what would be set back.")
@reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(
    tool: Tool,
    scope: str,
    subject: str,
    caller: str | None,
    policies: tuple[str, ...],
    reason: str,
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    """Set what somebody has used back to zero: SCOPE is user, session, caller, agent, department, model, ….

    Windows begin anew. What open calls hold stays held. With administration data the reset is audited.

    Exit codes: 0 set back; 1 nothing was used; 4 the storage is away.
    """
    if (scope == "global") != (not subject):
        raise click.UsageError("expected no SUBJECT with global, and the name of one with any other SCOPE")
    if not dry_run and not yes:  # asked outside of the event loop, which would keep the first Ctrl-C to itself
        seen = run(_reset(tool, scope, subject, caller, policies, reason, dry_run=True))
        if seen:
            counters = "1 counter" if len(seen) == 1 else f"{len(seen)} counters"
            confirm(f"Set {counters} of {f'{scope} {subject}'.strip()} back to zero?", yes=yes)
    done = run(_reset(tool, scope, subject, caller, policies, reason, dry_run=dry_run))
    document = {"scope": scope, "subject": subject, "caller": caller, "dry_run": dry_run, "meters": done}
    tool.show(document, lambda: _meters(done, dry_run=dry_run))
    if not done:
        raise click.exceptions.Exit(Exit.FOUND)


async def _reset(
    tool: Tool,
    scope: str,
    subject: str,
    caller: str | None,
    policies: Sequence[str],
    reason: str,
    *,
    dry_run: bool,
) -> list[dict[str, Any]]:
    guard = tool.guard(needs=("storage", "control"))
    try:
        await follow(guard)
        limits = await guard.meters_of(scope, subject, caller=caller)
        found = [(meter, reading) for meter, reading in limits if not policies or meter.policy in policies]
        if policies and not found:
            known = ", ".join(dict.fromkeys(meter.policy for meter, _ in limits)) or "none"
            raise ConfigurationError(
                f"--policy: {', '.join(policies)} has no limit for a {scope}; those that have one: {known}"
            )
        shown = [_shown(meter, reading) for meter, reading in found if reading.used or reading.held]
        if dry_run or not shown:
            return shown
        await guard.reset(scope, subject, caller=caller, policies=policies)
        await _note(guard, "reset", f"{scope}:{subject}", reason, shown)
        return shown
    finally:
        await guard.aclose()


async def _note(guard: Guard, verb: str, target: str, reason: str, old: object) -> None:
    if guard.control is not None:
        await guard.control.note(verb, target, actor=actor(), reason=reason, old=old)


def _shown(meter: Meter, reading: Reading) -> dict[str, Any]:
    return {
        "policy": meter.policy,
        "scope": meter.scope,
        "subject": meter.subject,
        "unit": meter.unit.value,
        "limit": meter.limit,
        "used": reading.used,
        "held": reading.held,
        "resets_at_ms": reading.resets_at_ms,
    }


def _meters(rows: Sequence[dict[str, Any]], *, dry_run: bool) -> str:
    if not rows:
        return "Nothing is used of their limits."
    columns = [
        Column("POLICY"),
        Column("SCOPE"),
        Column("SUBJECT"),
        Column("USED", align="right"),
        Column("HELD", align="right"),
        Column("LIMIT", align="right"),
        Column("RESETS (UTC)", keep=True),
    ]

    def amount(row: dict[str, Any], name: str) -> object:
        value = row[name]
        return usd(value) if row["unit"] == "nanousd" else value

    lines = [
        (
            row["policy"],
            row["scope"],
            row["subject"] or None,
            *(amount(row, name) for name in ("used", "held", "limit")),
            instant(row["resets_at_ms"])[:16],
        )
        for row in rows
    ]
    told = "would be set back (--dry-run)" if dry_run else "were set back to zero"
    return f"{table(columns, lines)}\n\nThese {told}."


# ---------------------------------------------------------------------------------------- raise


@click.command("raise")
@command_options
@control_option
@click.argument("policy")
@click.argument("amount")
@click.option("--unit", type=click.Choice(_UNITS), help="What AMOUNT is in; default: usd where it begins with $.")
@click.option("--until", "until", required=True, metavar="WHEN", help="When it ends: 2h, 1d, 2026-12-01, ….")
@click.option("--scope", type=click.Choice(_SCOPES), help="Of a policy that counts in several scopes, only this one.")
@click.option("--subject", help="Only this one's limit; default: everybody's under the policy.")
@_caller
@click.option("--id", "id_", help="Its name; the same one replaces it. Default: made from what it raises.")
@reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def raise_(
    tool: Tool,
    policy: str,
    amount: str,
    unit: str | None,
    until: str,
    scope: str | None,
    subject: str | None,
    caller: str | None,
    id_: str | None,
    reason: str,
    *,
    yes: bool,
) -> None:
    """Lift the limits of POLICY by AMOUNT ($20, 100000 with --unit tokens) for a while.

    Every process follows within two seconds. When it ends, the old limit holds again, whatever was used meanwhile.

    Exit codes: 0 in force; 3 there is no administration data, or no such policy; 5 somebody has changed it meanwhile.
    """
    control = administered(tool, makes=True)
    until_ms = end_of(until, name="--until")
    money = amount.startswith("$")
    if unit is None and not money:
        raise click.UsageError("--unit: expected usd, tokens, calls or slots, or an AMOUNT such as $20")
    if money and unit not in {None, "usd"}:
        raise click.UsageError(f"AMOUNT: {amount} is money, and --unit is {unit}")
    name = id_ or "-".join(part for part in (policy, scope, subject, time.strftime("%Y%m%d-%H%M%S")) if part)
    value: dict[str, Any] = {
        "policy": policy,
        "unit": unit or "usd",
        "amount": amount.removeprefix("$"),
        "until_ms": until_ms,
        "scope": scope,
        "subject": subject,
        "caller": caller,
        "reason": reason,
    }
    value = {field: given for field, given in value.items() if given is not None}
    control.knows_policy(policy)
    control.can_raise(value)
    if subject is None:
        confirm(f"Lift the limit of everybody under {policy} by {amount}?", yes=yes)
    run(control.do(lambda it: it.put("raise", name, value, actor=actor(), reason=reason)))
    document = {"id": name} | value
    whose = f" of {subject}" if subject else ""
    tool.show(document, lambda: f"{policy}{whose}: {amount} more until {instant(until_ms)} UTC ({name}).")


# ----------------------------------------------------------------------------------------- kill


@click.command()
@command_options
@control_option
@click.argument("scope", type=click.Choice(_STOPPED), required=False, metavar="SCOPE")
@click.argument("subject", default="")
@_caller
@click.option("--until", "until", metavar="WHEN", help="When it ends: 2h, 1d, …; default: until it is lifted.")
@click.option("--id", "id_", help="Its name; default: SCOPE:SUBJECT.")
@click.option("--list", "listing", is_flag=True, help="Show the stops that hold.")
@click.option("--lift", metavar="ID", help="Take a stop back.")
@click.option(
    "--reason",
    default="",
    callback=check_reason,
    metavar="TEXT",
    help="Why; kept in the audit beside your name. Needed but for --list.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def kill(
    tool: Tool,
    scope: str | None,
    subject: str,
    caller: str | None,
    until: str | None,
    id_: str | None,
    lift: str | None,
    reason: str,
    *,
    listing: bool,
    yes: bool,
) -> None:
    """Stop a caller, user, session, agent, department, a model, or everything (SCOPE all).

    New requests and calls of theirs are refused (403, `stopped`), and what is running ends: streams are cut, and what
    they used is charged. Every process follows within two seconds.

    Exit codes: 0 done; 1 there is no such stop; 3 there is no administration data; 5 somebody has changed it meanwhile.
    """
    if sum((scope is not None, listing, lift is not None)) != 1:
        raise click.UsageError("expected one of SCOPE [SUBJECT], --list, and --lift ID")
    control = administered(tool, makes=scope is not None)
    if listing:
        rows = run(control.do(_stops))
        tool.show({"stops": rows}, lambda: _listed(rows))
        return
    if not reason:
        raise click.UsageError("--reason: say why; it is kept in the audit")
    if lift is not None:
        run(control.do(lambda it: it.remove("stop", lift, actor=actor(), reason=reason)))
        tool.show({"lifted": lift}, lambda: f"{lift} is lifted.")
        return
    assert scope is not None  # noqa: S101 - one of the three is
    from asgi_llm_guard.stops import Stop

    until_ms = None if until is None else end_of(until, name="--until")
    Stop(scope=scope, subject=subject, caller=caller, until_ms=until_ms)  # type: ignore[arg-type]  # one of the choices
    who = "everything" if scope == "all" else f"{scope} {subject}"
    ends = "until it is lifted" if until_ms is None else f"until {instant(until_ms)} UTC"
    confirm(f"Stop {who} {ends}, and end what is running?", yes=yes)
    name = id_ or (scope if scope == "all" else f"{scope}:{subject}" + (f"@{caller}" if caller else ""))
    value: dict[str, Any] = {"scope": scope, "subject": subject, "reason": reason}
    value |= {field: given for field, given in (("caller", caller), ("until_ms", until_ms)) if given is not None}
    run(control.do(lambda it: it.put("stop", name, value, actor=actor(), reason=reason)))
    tool.show({"id": name} | value, lambda: f"Stopped: {who}, {ends}. Take it back with: kill --lift {name}")


async def _stops(control: Any) -> list[dict[str, Any]]:
    state = await control.state()
    now_ms = time.time_ns() // 1_000_000
    return [
        {
            "id": name,
            "scope": entry.value.scope,
            "subject": entry.value.subject,
            "caller": entry.value.caller,
            "until_ms": entry.value.until_ms,
            "reason": entry.value.reason,
            "version": entry.version,
        }
        for name, entry in state.stops.items()
        if entry.value.holds(now_ms)
    ]


def _listed(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "Nothing is stopped."
    columns = [Column("ID"), Column("SCOPE", keep=True), Column("WHO"), Column("UNTIL (UTC)", keep=True), Column("WHY")]
    lines = [
        (
            row["id"],
            row["scope"],
            row["subject"] or None,
            instant(row["until_ms"])[:16] if row["until_ms"] is not None else "lifted",
            row["reason"] or None,
        )
        for row in rows
    ]
    return table(columns, lines)
