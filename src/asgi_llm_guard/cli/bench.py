"""`bench`: how long admission and settlement take on the configured storage, from here."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.common import Tool, command_options, confirm, progress, run
from asgi_llm_guard.cli.tables import Column, count, table

if TYPE_CHECKING:
    from asgi_llm_guard.guard import Guard

__all__ = ["bench"]

_POLICY: Final = "asgi-llm-guard-bench"
_MOST_CALLS: Final = 100_000


@click.command()
@command_options
@click.option("--calls", type=click.IntRange(10, _MOST_CALLS), default=1_000, show_default=True, help="How many.")
@click.option("--parallel", type=click.IntRange(1, 1_000), default=8, show_default=True, help="How many at a time.")
@click.option("--seconds", type=click.IntRange(1, 600), default=30, show_default=True, help="At most so long.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def bench(tool: Tool, calls: int, parallel: int, seconds: int, *, yes: bool) -> None:
    """Measure admission and settlement on the configured storage.

    Calls take from counters of their own (the policy asgi-llm-guard-bench), which are reset in the end, and leave no
    usage record. The storage is loaded meanwhile: a service that runs on it is slower.

    Exit codes: 0 measured; 4 the storage is away.
    """
    settings = tool.settings()
    scheme = settings.storage.get_secret_value().partition(":")[0]
    if scheme != "memory":
        confirm(f"Make {calls:,} test calls on the configured storage ({scheme})?", yes=yes)
    tool.tell_made("storage", settings)
    guard = tool.guard(settings, makes=("storage",))
    with progress("calls", length=calls) as bar:
        measured = run(_measure(guard, calls=calls, parallel=parallel, seconds=seconds, told=bar))
    tool.show({"storage": scheme} | measured, lambda: _text(measured))


async def _measure(guard: Guard, *, calls: int, parallel: int, seconds: int, told: Any) -> dict[str, Any]:
    from asgi_llm_guard.claims import Bundle, Claim, Granted, Meter, Rule, Settlement, Unit, meter_key
    from asgi_llm_guard.errors import StorageError
    from asgi_llm_guard.windows import Calendar, Rolling, Window

    def meter(scope: str, unit: Unit, window: Window) -> Meter:
        return Meter(
            key=meter_key(_POLICY, unit, window, scope),
            policy=_POLICY,
            scope=scope,
            subject="bench",
            unit=unit,
            rule=Rule.BUDGET,
            limit=2**52,
            window=window,
        )

    meters = [
        meter("user", Unit.NANOUSD, Calendar("day", "UTC")),
        meter("department", Unit.NANOUSD, Calendar("month", "UTC")),
        meter("user", Unit.TOKENS, Rolling(3_600_000)),
        meter("session", Unit.CALLS, Rolling(3_600_000)),
    ]
    storage, engine = guard.storage, guard.engine
    admit: list[float] = []
    settle: list[float] = []
    numbers = iter(range(calls))
    until = time.perf_counter() + seconds

    async def worker() -> None:
        for _ in numbers:
            if time.perf_counter() > until:
                return
            bundle = Bundle(engine.new_id(), tuple(Claim(each, 1_000) for each in meters))
            began = time.perf_counter()
            answer = await storage.reserve(engine.owner, ((bundle,),))
            admitted = time.perf_counter()
            if not isinstance(answer, Granted):
                raise StorageError(f"bench: the storage refused a call of the bench: {type(answer).__name__}")
            await storage.settle([Settlement(bundle.call_id, (900,) * len(meters), None, answer.receipts)])
            settle.append(time.perf_counter() - admitted)
            admit.append(admitted - began)
            if not len(admit) % 50:
                told(len(admit))

    began = time.perf_counter()
    try:
        await asyncio.gather(*(worker() for _ in range(parallel)))
        lasted = time.perf_counter() - began
    finally:
        try:
            await storage.reset(meters)
        finally:
            await guard.aclose()
    return {
        "calls": len(admit),
        "parallel": parallel,
        "claims": len(meters),
        "calls_per_s": round(len(admit) / lasted),
        "admit_us": _quantiles(admit),
        "settle_us": _quantiles(settle),
    }


def _quantiles(seconds: list[float]) -> dict[str, int]:
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: round(ordered[int(share * (len(ordered) - 1))] * 1e6) for name, share in shares.items()}


def _text(measured: dict[str, Any]) -> str:
    columns = [Column("µs", keep=True), *(Column(name, align="right") for name in ("p50", "p95", "p99"))]
    rows = [(name, *measured[f"{name}_us"].values()) for name in ("admit", "settle")]
    return (
        f"{table(columns, rows)}\n\n{count(measured['calls'])} calls of {measured['claims']} claims each, "
        f"{measured['parallel']} at a time: {count(measured['calls_per_s'])} a second"
    )
