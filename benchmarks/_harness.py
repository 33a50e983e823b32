"""Measures alternatives against each other, in one process and in turns.

Machines are shared and noisy, and noise comes in waves: two alternatives that are measured one
after the other measure the weather. So every round times a block of each, in an order that
changes from round to round, and ratios are taken within a round. Read the ratios first: p10 is
the quiet machine, the median the usual one, min and max say how far to trust them.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Result", "compare", "compare_async", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The samples of one alternative: seconds per operation, one for each round."""

    name: str
    samples_s: Sequence[float]
    ratios: Sequence[float]
    """To the first alternative in the same round; 1 is as fast, 2 takes twice as long."""

    @property
    def quiet_s(self) -> float:
        return percentile(self.samples_s, 10)

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)


def compare(
    alternatives: Mapping[str, Callable[[], object]], *, operations: int, rounds: int = 30, seed: int = 1
) -> list[Result]:
    """Time `operations` calls of each alternative per round. The first one is what the others are compared to."""
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    for order in _rounds(list(alternatives), rounds, seed):
        for name in order:
            samples[name].append(_block(alternatives[name], operations))
    return _results(samples)


async def compare_async(
    alternatives: Mapping[str, Callable[[], Awaitable[object]]],
    *,
    operations: int,
    tasks: int = 1,
    rounds: int = 30,
    seed: int = 1,
) -> list[Result]:
    """As `compare`, for coroutines: `operations` in all, spread over as many `tasks` at a time.

    With several tasks a sample is the wall-clock time per operation, the inverse of the throughput.
    """
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    for order in _rounds(list(alternatives), rounds, seed):
        for name in order:
            samples[name].append(await _async_block(alternatives[name], operations, tasks))
    return _results(samples)


def table(results: Sequence[Result], *, title: str = "") -> str:
    """The results as a Markdown table."""
    lines = [f"### {title}", ""] if title else []
    lines += [
        "| | quiet (p10) | median | min … max | ratio p10 | ratio median | ratio min … max |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        spread = f"{duration(min(result.samples_s))} … {duration(max(result.samples_s))}"
        ratios = f"{min(result.ratios):.2f} … {max(result.ratios):.2f}"
        lines.append(
            f"| {result.name} | {duration(result.quiet_s)} | {duration(result.median_s)} | {spread} "
            f"| {percentile(result.ratios, 10):.2f} | {statistics.median(result.ratios):.2f} | {ratios} |"
        )
    return "\n".join(lines)


def percentile(samples: Sequence[float], percent: float) -> float:
    """By nearest rank: a value that was measured, not one between two."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def duration(seconds: float) -> str:
    """`850 ns`, `12.3 µs`, `4.56 ms`, `1.20 s`."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _rounds(names: list[str], rounds: int, seed: int) -> list[list[str]]:
    """An order for each round, and one more before them that warms up and is thrown away by `_results`."""
    rng = random.Random(seed)
    return [rng.sample(names, len(names)) for _ in range(rounds + 1)]


def _block(operation: Callable[[], object], operations: int) -> float:
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        for _ in range(operations):
            operation()
        return (time.perf_counter() - begun) / operations
    finally:
        gc.enable()


async def _async_block(operation: Callable[[], Awaitable[object]], operations: int, tasks: int) -> float:
    async def worker(count: int) -> None:
        for _ in range(count):
            await operation()

    counts = [operations // tasks + (number < operations % tasks) for number in range(tasks)]
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        if tasks == 1:
            await worker(operations)
        else:
            await asyncio.gather(*map(worker, counts))
        return (time.perf_counter() - begun) / operations
    finally:
        gc.enable()


def _results(samples: Mapping[str, Sequence[float]]) -> list[Result]:
    measured = {name: values[1:] for name, values in samples.items()}
    base = next(iter(measured.values()))
    return [
        Result(name=name, samples_s=values, ratios=[own / first for own, first in zip(values, base, strict=True)])
        for name, values in measured.items()
    ]
