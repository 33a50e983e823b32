"""`make torture`: real processes under load, killed and cut off at random; then the books are compared.

Ends by itself after at most three minutes. Status 1: a promise was broken, or check-then-record broke none,
in which case the run has proved nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.torture.load import Load
from tests.torture.rig import Plan, Result, play, start_up

_LONGEST_S: Final = 180.0
_SETTLING_S: Final = 10.0
"""What a round may take beside its load."""


def plans(storages: Sequence[str], *, short: bool, seed: int) -> Iterator[Plan]:
    """The rounds, storage by storage."""
    for storage in storages:
        if short:
            yield Plan(
                name="killed",
                storage=storage,
                load=Load(seed=seed, calls=1_500),
                seconds=4,
                lapse_ms=3_000 if storage == "redis" else 2_000,
                kill_every_s=None if storage == "memory" else 0.6,
                fault_every_s=0.3 if storage == "redis" else None,
            )
        else:
            yield Plan(name="calm", storage=storage, load=Load(seed=seed, calls=12_000), seconds=10)
            if storage != "memory":
                yield Plan(
                    name="killed", storage=storage, load=Load(seed=seed, calls=20_000), seconds=15, kill_every_s=0.7
                )
                yield Plan(
                    name="leases, calm",
                    storage=storage,
                    load=Load(seed=seed, calls=8_000, leased=True),
                    seconds=8,
                )
                yield Plan(
                    name="leases, killed",
                    storage=storage,
                    load=Load(seed=seed, calls=20_000, leased=True),
                    seconds=10,
                    kill_every_s=0.7,
                )
            if storage == "redis":
                yield Plan(
                    name="cut off",
                    storage=storage,
                    load=Load(seed=seed, calls=12_000),
                    seconds=12,
                    lapse_ms=10_000,  # so that nobody lapses only because no heartbeat comes through
                    fault_every_s=0.3,
                )
                yield Plan(
                    name="leases, cut off",
                    storage=storage,
                    load=Load(seed=seed, calls=8_000, leased=True),
                    seconds=8,
                    lapse_ms=10_000,
                    fault_every_s=0.3,
                )
                yield Plan(
                    name="both",
                    storage=storage,
                    load=Load(seed=seed, calls=20_000),
                    seconds=15,
                    lapse_ms=10_000,
                    kill_every_s=0.7,
                    fault_every_s=0.3,
                )
        yield Plan(
            name="check-then-record",
            storage=storage,
            load=Load(seed=seed, calls=300 if short else 2_000),
            seconds=3 if short else 10,
            naive=True,
        )


_HEAD = (
    f"{'storage':8} {'round':18} {'s':>5} {'kills':>5} {'faults':>6} {'jobs':>7} {'calls':>7} {'refused':>7} "
    f"{'keys':>5} {'over':>5} {'worst':>7} {'phantom':>8} {'wrong':>5}"
)


def line(result: Result) -> str:
    plan, verdict, counted = result.plan, result.verdict, result.counted
    phantom = f"{verdict.phantom / verdict.billed:8.2%}" if verdict.billed and not plan.naive else f"{'':8}"
    refused = counted["refused jobs"] + counted["refused calls"]
    return (
        f"{plan.storage:8} {plan.name:18} {result.seconds:5.1f} {result.kills:5} {result.faults.total():6} "
        f"{verdict.jobs:7} {verdict.calls:7} {refused:7} {verdict.keys:5} {verdict.over:5} {verdict.worst:7.1%} "
        f"{phantom} {verdict.found:5}"
    )


def report(result: Result) -> dict[str, Any]:
    """The same for programs."""
    plan, verdict = result.plan, result.verdict
    return {
        "storage": plan.storage,
        "round": plan.name,
        "seed": plan.load.seed,
        "seconds": round(result.seconds, 1),
        "kills": result.kills,
        "faults": dict(result.faults),
        "counted": dict(result.counted),
        "looks": result.looks,
        "jobs": verdict.jobs,
        "calls": verdict.calls,
        "keys": verdict.keys,
        "over": verdict.over,
        "worst": verdict.worst,
        "billed_nanousd": verdict.billed,
        "charged_nanousd": verdict.charged,
        "phantom_nanousd": None if plan.naive else verdict.phantom,
        "killed_calls": verdict.killed_calls,
        "late": verdict.late,
        "problems": verdict.problems,
        "found": verdict.found,
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--storage", action="append", choices=["sqlite", "redis", "memory"], help="sqlite and redis")
    parser.add_argument("--short", action="store_true", help="at most 20 seconds")
    parser.add_argument("--only", metavar="NAME", help="only rounds of which the name contains this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", action="store_true", help="one line of JSON for each round")
    options = parser.parse_args(arguments)
    storages = options.storage or ["sqlite", "redis"]
    say = sys.stderr.write if options.json else sys.stdout.write
    say(f"seed {options.seed}\n{_HEAD}\n")
    wrong = False
    end = time.monotonic() + _LONGEST_S
    context = start_up()
    with tempfile.TemporaryDirectory(prefix="guard-torture-") as folder:
        chosen = plans(storages, short=options.short, seed=options.seed)
        for number, plan in enumerate(plan for plan in chosen if (options.only or "") in plan.name):
            left_s = end - time.monotonic() - _SETTLING_S
            result = play(
                replace(plan, seconds=max(1.0, min(plan.seconds, left_s))), context, Path(folder) / str(number)
            )
            say(line(result) + "\n")
            if plan.naive and not result.verdict.over:
                result.verdict.problem("check-then-record passed no limit: this run could not have seen a fault")
            for problem in result.verdict.problems:
                say(f"    {problem}\n")
            wrong |= result.verdict.found > 0
            if options.json:
                sys.stdout.write(json.dumps(report(result)) + "\n")
            sys.stdout.flush()
    say("something is wrong\n" if wrong else "all promises were kept\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
