"""A day of traffic: who asks for what, and when. Made from a seed, and of any size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

__all__ = ["BEGINS", "DEPARTMENTS", "LASTS_S", "MODELS", "USERS", "Ask", "Kind", "User", "batches"]

BEGINS: Final = datetime(2026, 10, 24, 22, tzinfo=UTC)
"""Midnight in Berlin, of the day on which clocks are set back there."""
LASTS_S: Final = 25 * 3600
"""That day has 25 hours."""

DEPARTMENTS: Final = ("research", "sales", "support", "legal", "platform")
MODELS: Final = ("model-a", "model-b", "model-c")

Kind = Literal["plain", "stream", "tool", "again", "flaky", "broken", "overage", "late", "left", "forbidden", "greedy"]
"""What happens to it:

`again`: it was asked before, and its answer may have been kept. `flaky`: fails once, then goes well. `broken`: fails
each time. `overage`: the answer is longer than the request allows. `late`: takes so long that its process is thought
dead. `left`: a stream whose client leaves. `forbidden`: a model that the department may not call. `greedy`: more than
the user's budget."""

_WEIGHTS: Final[dict[Kind, int]] = {
    "plain": 380, "stream": 200, "tool": 60, "again": 120, "flaky": 60, "broken": 20,
    "overage": 60, "late": 8, "left": 32, "forbidden": 30, "greedy": 30,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class User:
    name: str
    departments: tuple[str, ...]
    agent: str | None


def _users() -> tuple[User, ...]:
    users = []
    for number in range(20):
        first = DEPARTMENTS[number % 5]
        # A few belong to two departments, and two to none.
        departments = () if number in {7, 13} else (first, DEPARTMENTS[(number + 2) % 5])[: 1 + (number % 4 == 0)]
        users.append(User(f"user-{number}", departments, f"agent-{number % 3}" if number % 2 else None))
    return tuple(users)


USERS: Final = _users()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a client."""

    number: int
    kind: Kind
    user: User
    model: str
    text: str
    """What is asked: unique, but for those that were asked before."""
    max_tokens: int
    session: str


def batches(calls: int, *, seed: int, size: int = 32) -> Iterator[tuple[float, Sequence[Ask]]]:
    """Requests that are made at the same time, with the seconds since the day began. Most are made at noon."""
    chance = random.Random(seed)
    kinds, weights = zip(*_WEIGHTS.items(), strict=True)
    steps = max(1, -(-calls // size))
    numbers = iter(range(calls))
    # Hours are busy or quiet: the density of a triangle whose peak is at half of the day.
    at_s = sorted(chance.triangular(0, LASTS_S - 60, LASTS_S / 2) for _ in range(steps))
    for begun_s in at_s:
        asked = []
        for _, number in zip(range(size), numbers, strict=False):
            kind: Kind = chance.choices(kinds, weights)[0]
            user = USERS[number % len(USERS)] if kind == "again" else chance.choice(USERS)
            text = f"again {number % 7}" if kind == "again" else f"{kind} {number} " + "word " * chance.randrange(30)
            model = "model-forbidden" if kind == "forbidden" else chance.choice(MODELS)
            limit = 1_000_000_000 if kind == "greedy" else chance.randrange(4, 24)
            if kind == "again":
                model, limit = MODELS[0], 8
            asked.append(Ask(number, kind, user, model, text, limit, f"session-{number % 40}"))
        if asked:
            yield begun_s, asked
