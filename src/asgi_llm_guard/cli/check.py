"""`check`: is the configuration valid, which route has which policies, and what is wrong with it in use."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.changing import follow
from asgi_llm_guard.cli.common import Tool, command_options, ledger_option, run, with_urls
from asgi_llm_guard.cli.failures import Exit
from asgi_llm_guard.cli.files import EVERY, Part
from asgi_llm_guard.cli.names import without_effect
from asgi_llm_guard.cli.tables import Column, safe, table, terminal_width
from asgi_llm_guard.errors import ConfigurationError, GuardError, StorageError

if TYPE_CHECKING:
    from asgi_llm_guard.doctor import Finding, GuardedPath
    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.settings import GuardSettings

__all__ = ["check"]

_MONTH_MS: Final = 30 * 86_400_000
_COLORS: Final = {"error": "red", "warning": "yellow", "note": "blue"}


@click.command()
@command_options
@ledger_option
@click.option(
    "--app", "app", metavar="MODULE:ATTRIBUTE", help="An application to look into: order of middleware, routes."
)
@click.option("--factory", is_flag=True, help="--app names a function that makes the application.")
@click.option(
    "--workers", type=click.IntRange(1), envvar="WEB_CONCURRENCY", default=1, help="How many processes serve."
)
@click.option("--offline", is_flag=True, help="Do not ask the storage or the ledger.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
def check(tool: Tool, app: str | None, workers: int, *, factory: bool, offline: bool, strict: bool) -> None:
    """Validate the configuration, and look for what is wrong with it in use.

    Each finding says what was seen and what to do. An error is a limit that does not hold; a warning may become one.
    With --app, middleware and routes are those of a real Starlette or FastAPI application, and the guard is its own.

    Exit codes: 0 nothing grave; 1 an error was found (with --strict: or a warning); 3 the configuration is not valid.
    """
    from asgi_llm_guard.doctor import worst

    application = None if app is None else _application(app, factory=factory)
    settings = tool.settings() if application is None or tool.path.exists() else None
    findings, paths = run(_examine(tool, settings, application, workers=workers, offline=offline))
    grave = worst(findings)
    failed = grave == "error" or (strict and grave == "warning")
    document = {"ok": not failed, "findings": findings, "routes": paths}
    tool.show(document, lambda: _text(findings, paths))
    if failed:
        raise click.exceptions.Exit(Exit.FOUND)


# ------------------------------------------------------------------------------------- examine


async def _examine(
    tool: Tool, settings: GuardSettings | None, application: object, *, workers: int, offline: bool
) -> tuple[list[Finding], list[GuardedPath]]:
    from asgi_llm_guard.doctor import examine_application, examine_guard, examine_prices, models_named

    findings: list[Finding] = []
    paths: list[GuardedPath] = []
    guards: list[Guard] = []
    own = None
    if application is not None:
        more, paths = examine_application(application)
        findings += more
        guards = _guards_of(application)
    absent = {} if settings is None else _absent(tool, settings)
    missing = "storage" in absent
    if settings is not None and not guards:
        own = _own_guard(tool, settings, absent, apart=offline or missing)
        guards = [own]
    findings += [
        _not_there(part, file) for part, file in absent.items() if part == "storage" or file != absent.get("storage")
    ]
    try:
        for guard in guards:
            if not offline and not missing:
                findings += await _ask_control(guard)
            extra = [policy for route in _routes(settings) for policy in route.extra] if settings is not None else []
            findings += examine_guard(
                guard,
                extra=extra,
                workers=workers,
                storage=_kind_of(guard) if settings is None else tool.storage_url(settings).partition(":")[0],
                routes_listed=settings is not None and settings.routes is not None,
                unlisted="pass" if settings is None else settings.unlisted,
                unpriced=_unpriced(settings),
                now_ms=time.time_ns() // 1_000_000,
            )
            deployments, aliases = _gateway(settings)
            named = models_named((*guard.policies, *extra), deployments, aliases)
            findings += examine_prices(guard.prices, [*named, *_of_departments(settings)])
            if not offline and not missing:
                findings += await _ask_store(guard)
                findings += await _ask_ledger(guard)
            models = [*(each.model for each in named), *(each.model for each in _of_departments(settings))]
            findings += without_effect(
                guard, settings, extra=extra, paths=paths, models=models, alone=application is None
            )
        if application is None and settings is not None and own is not None:
            paths = _listed(settings, own)
    finally:
        if own is not None:
            await own.aclose()
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.severity)), paths


def _own_guard(tool: Tool, settings: GuardSettings, absent: Mapping[Part, Path], *, apart: bool) -> Guard:
    """The guard of the settings; `apart`: in memory, so that nobody is asked. No file is made: of what is `absent`, too,
    there is one in memory."""
    needs: list[Part] = ["control"]
    if "ledger" not in absent:
        needs.append("ledger")
    # Those over `limits` take only some policies.
    if not apart or tool.storage_url(settings).startswith("limits+"):
        needs.append("storage")
    if "control" in absent:
        settings = with_urls(settings, {"control": "sqlite://:memory:"})
    return tool.guard(settings, needs=needs, makes=needs)


def _absent(tool: Tool, settings: GuardSettings) -> dict[Part, Path]:
    """The files that the settings name and that are not there.

    Raises:
        ConfigurationError: one that the command line names is not.
    """
    absent: dict[Part, Path] = {}
    for part in EVERY:
        if tool.told(part):
            tool.check(part, settings)
        elif (file := tool.missing(part, settings)) is not None:
            absent[part] = file
    return absent


async def _ask_store(guard: Guard) -> list[Finding]:
    from asgi_llm_guard.claims import Bundle
    from asgi_llm_guard.doctor import examine_clock, examine_store

    engine = guard.engine
    asked_ms = guard.clock.now_ms()
    try:
        # Changes nothing, and is answered with the storage's own clock: nobody holds a call of this id.
        answer = await engine.storage.amend(engine.owner, Bundle(engine.new_id(), ()))
    except StorageError as error:
        return [examine_store(error)]
    return examine_clock(answer.now_ms, asked_ms, guard.clock.now_ms())


async def _ask_ledger(guard: Guard) -> list[Finding]:
    from asgi_llm_guard.doctor import examine_records, examine_store

    ledger = guard.ledger
    if ledger is None or _kind_of(guard) == "memory":
        return []
    from asgi_llm_guard.ledger.values import UsageQuery

    now_ms = guard.clock.now_ms()
    query = UsageQuery(since_ms=now_ms - _MONTH_MS, until_ms=now_ms, by=("provider", "model"), order="calls")
    try:
        report = await ledger.usage(query)
    except StorageError as error:
        return [examine_store(error)]
    seen = []
    for row in report.rows:
        provider, model = row.key
        if model is not None:
            name = f"{provider}/{model}" if provider else model
            seen.append((name, row.amounts.calls, row.amounts.unpriced))
    return examine_records(guard.prices, seen)


async def _ask_control(guard: Guard) -> list[Finding]:
    from asgi_llm_guard.doctor import examine_store

    try:
        await follow(guard)
    except StorageError as error:
        return [examine_store(error)]
    return []


# ---------------------------------------------------------------------------- what the settings say


def _not_there(part: Part, file: Path) -> Finding:
    from asgi_llm_guard.doctor import Finding

    called = {"storage": "storage", "ledger": "ledger", "control": "database of administration data"}[part]
    return Finding(
        severity="note",
        code="no_file_yet",
        seen=f"the {called} {file} does not exist yet (looked at {file.absolute()})",
        next_step="nothing: the service makes it when it starts; a relative path is relative to where that is",
    )


def _kind_of(guard: Guard) -> str:
    return "memory" if type(guard.storage).__name__ == "MemoryStorage" else ""


def _unpriced(settings: GuardSettings | None) -> str:
    if settings is None or settings.prices is None:
        return "deny"
    unknown = settings.prices.unknown
    return unknown if isinstance(unknown, str) else "charge_as"


def _routes(settings: GuardSettings) -> Sequence[Any]:
    from asgi_llm_guard.settings import build_middleware_arguments

    return build_middleware_arguments(settings)["routes"] or ()


def _gateway(settings: GuardSettings | None) -> tuple[Sequence[Any], Sequence[str]]:
    if settings is None or settings.gateway is None:
        return (), ()
    from asgi_llm_guard.gateway.entries import parse_deployments
    from asgi_llm_guard.settings import build_gateway_arguments

    arguments = build_gateway_arguments(settings)
    return parse_deployments(arguments["deployments"]), tuple(arguments.get("aliases", {}).values())


def _of_departments(settings: GuardSettings | None) -> list[Any]:
    from asgi_llm_guard.doctor import Pricing

    return [
        Pricing(entry, f"department {name}")
        for name, department in (settings.departments if settings is not None else {}).items()
        for entry in department.models or ()
        if not entry.endswith("*")
    ]


def _listed(settings: GuardSettings, guard: Guard) -> list[GuardedPath]:
    """What the settings alone say of routes: those that they list, and what becomes of others."""
    from asgi_llm_guard.doctor import GuardedPath

    always = tuple(policy.name for policy in guard.policies)
    if settings.routes is None:
        paths = [GuardedPath(path="(all but GET, HEAD, OPTIONS)", methods=(), state="guarded", policies=always)]
    else:
        paths = [
            GuardedPath(
                path=route.path,
                methods=tuple(route.methods or ()),
                state="guarded",
                policies=(*always, *(policy.name for policy in route.extra)),
            )
            for route in _routes(settings)
        ]
        state = "refused" if settings.unlisted == "deny" else "passes"
        paths.append(GuardedPath(path="(others)", methods=(), state=state))
    return [*paths, *(GuardedPath(path=path, methods=(), state="passes") for path in settings.exempt)]


# --------------------------------------------------------------------------------- applications


def _application(named: str, *, factory: bool) -> object:
    module, separator, attribute = named.partition(":")
    if not separator or not attribute:
        raise click.UsageError(f"--app: expected MODULE:ATTRIBUTE such as main:app, got {named!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found() if factory else found
    except GuardError:
        raise
    except Exception as error:  # the application's own code, which may raise anything
        raise ConfigurationError(f"--app {named}: {type(error).__name__}: {error}") from error


def _guards_of(application: object) -> list[Guard]:
    from asgi_llm_guard.doctor import guards_of

    return guards_of(application)


# ----------------------------------------------------------------------------------------- text


def _text(findings: Sequence[Finding], paths: Sequence[GuardedPath]) -> str:
    parts = []
    if paths:
        columns = [Column("ROUTE"), Column("METHODS"), Column("", keep=True), Column("POLICIES")]
        rows = [(path.path, " ".join(path.methods), path.state, ", ".join(path.policies) or None) for path in paths]
        parts.append(table(columns, rows))
    for finding in findings:
        label = click.style(f"{finding.severity:<8}", fg=_COLORS[finding.severity], bold=True)
        lines = _wrapped(f"{safe(finding.seen)} [{finding.code}]", 9)
        lines += _wrapped(f"→ {safe(finding.next_step)}", 9, hang=2)
        parts.append(f"{label} {lines[0]}\n" + "\n".join(" " * 9 + line for line in lines[1:]))
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in _COLORS}
    told = ", ".join(
        f"{number} {severity}{'s' if number != 1 else ''}" for severity, number in counts.items() if number
    )
    parts.append(told or click.style("Nothing to find fault with.", fg="green"))
    return "\n\n".join(parts)


def _wrapped(text: str, indent: int, *, hang: int = 0) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text,
        (terminal_width() or 120) - indent,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
