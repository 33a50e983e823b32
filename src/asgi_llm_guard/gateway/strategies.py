"""In which order the deployments of a group are tried. Pure: figures in, an order out.

| strategy | first comes |
|---|---|
| `usage` | the one that would have used the smallest share of its rpm or tpm, this call included |
| `weighted` | each in turn, as often as its weight says |
| `least_busy` | the one with the fewest calls in flight |
| `lowest_latency` | the one whose answers begin soonest |
| `lowest_cost` | the one that this call costs least at |

Equal ones come in random order. All stay in the order: which of them may be called is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.stats import Stats

__all__ = [
    "STRATEGIES",
    "Candidate",
    "LeastBusy",
    "LowestCost",
    "LowestLatency",
    "Strategy",
    "Usage",
    "Weighted",
    "strategy_named",
]

_NEVER: Final = float("inf")


class Random(Protocol):
    """What is needed of `random.Random`."""

    def random(self) -> float: ...


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment that a call could go to, and what the call would be there."""

    name: str
    weight: float = 1
    """How often it comes first, against the others. 0: only when no other is left."""
    rpm: int | None = None
    tpm: int | None = None
    tokens: int = 0
    """At most so many tokens does the call use."""
    cost_nanousd: int | None = None
    """At most so much does the call cost; `None`: no price is known."""


class Strategy(Protocol):
    """Which deployment to try first, and which ones after it."""

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:
        """The places of all `candidates`, the one to be tried first in front."""
        ...


class Usage:
    """The smallest share of what a deployment takes in a minute, by requests or by tokens, whichever is larger.

    One without such a limit is taken to have the highest of the others'; where none has one, the fewest tokens
    decide, and among equal ones the fewest requests.
    """

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:
        rpm = max((each.rpm for each in candidates if each.rpm is not None), default=None)
        tpm = max((each.tpm for each in candidates if each.tpm is not None), default=None)

        def share(each: Candidate) -> tuple[float, ...]:
            requests = stats.requests(each.name) + 1
            tokens = stats.tokens(each.name) + each.tokens
            if rpm is None and tpm is None:
                return tokens, requests
            return (max(_share(requests, each.rpm, rpm), _share(tokens, each.tpm, tpm)),)

        return _sorted(candidates, share, random)


def _share(used: int, own: int | None, highest: int | None) -> float:
    limit = highest if own is None else own
    if limit is None:
        return 0
    return used / limit if limit else _NEVER


class Weighted:
    """Each deployment in turn, in proportion to its weight, evenly spread. Keeps where it is; one for each group.

    Who was away for a while has at most one turn to make up for. The turns of one that refuses are spread over the
    others in the same proportion, so each of the first places is taken in turn by itself: by who is before it.
    """

    _TURNS: Final = 3
    """Places that are taken in turn; behind them the weight decides."""
    _MOST: Final = 4096

    def __init__(self) -> None:
        self._credit: dict[frozenset[str], dict[str, float]] = {}
        """By those who are before a place, what each of the others has for it."""

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:  # noqa: ARG002 - see `Strategy.order`
        if len(self._credit) > self._MOST:
            self._credit.clear()
        left = list(range(len(candidates)))
        order: list[int] = []
        while left and len(order) < self._TURNS:
            place = self._turn([candidates[at] for at in left], frozenset(candidates[at].name for at in order), random)
            order.append(left.pop(place))
        rest = _sorted([candidates[at] for at in left], lambda each: (-each.weight,), random)
        return order + [left[at] for at in rest]

    def _turn(self, candidates: Sequence[Candidate], before: frozenset[str], random: Random) -> int:
        total = sum(each.weight for each in candidates)
        credit = self._credit.setdefault(before, {})
        for each in candidates:
            # Who is not among the candidates keeps what it has, which is never more than about a turn.
            credit[each.name] = credit.get(each.name, 0) + (each.weight / total if total else 0)
        first = _sorted(candidates, lambda each: (not each.weight, -credit[each.name]), random)[0]
        credit[candidates[first].name] -= 1
        return first


class LeastBusy:
    """The fewest calls in flight."""

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:
        return _sorted(candidates, lambda each: (stats.in_flight(each.name),), random)


class LowestLatency:
    """The shortest time to the first byte, as a moving average. Within a tenth of the best all are equal; of these the
    one with the fewest calls in flight.

    One that was not measured within the last minute is tried by one call, and by more only where none was measured.
    """

    _EQUAL: Final = 1.1

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:
        measured = {each.name: first_ms for each in candidates if (first_ms := stats.first_ms(each.name)) is not None}
        near = min(measured.values(), default=0) * self._EQUAL

        def place(each: Candidate) -> tuple[float, ...]:
            busy, first_ms = stats.in_flight(each.name), measured.get(each.name)
            if first_ms is None:
                return (0, 0, busy) if not busy else (2, 0, busy)
            return 1, max(first_ms, near), busy

        return _sorted(candidates, place, random)


class LowestCost:
    """The lowest upper bound of what the call costs; without a price last. Of equal ones the fewest calls in flight."""

    def order(self, candidates: Sequence[Candidate], stats: Stats, random: Random, /) -> list[int]:
        def place(each: Candidate) -> tuple[float, ...]:
            return _NEVER if each.cost_nanousd is None else each.cost_nanousd, stats.in_flight(each.name)

        return _sorted(candidates, place, random)


STRATEGIES: Final[Mapping[str, Callable[[], Strategy]]] = MappingProxyType(
    {
        "usage": Usage,
        "weighted": Weighted,
        "least_busy": LeastBusy,
        "lowest_latency": LowestLatency,
        "lowest_cost": LowestCost,
    }
)
"""Makes a strategy, by the name that settings have for it. Each group of deployments has one of its own."""


def strategy_named(name: str) -> Strategy:
    """A new strategy of this name; dashes are as good as underscores.

    Raises:
        ConfigurationError: there is none; the message lists them.
    """
    make = STRATEGIES.get(name.replace("-", "_").lower()) if isinstance(name, str) else None
    if make is None:
        raise ConfigurationError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return make()


def _sorted(
    candidates: Sequence[Candidate], place: Callable[[Candidate], Iterable[float]], random: Random
) -> list[int]:
    keys = [(*place(each), random.random()) for each in candidates]
    return sorted(range(len(candidates)), key=keys.__getitem__)
