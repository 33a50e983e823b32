"""What changed between two price snapshots: for people to read, and as overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

__all__ = ["Diff", "compare", "overrides"]

Json = Mapping[str, Any]

SUSPICIOUS: Final = 10
"""A rate that changes by more than this factor is a mistake more often than news."""
UNPRICED: Final = frozenset({"source", "context", "max_output", "filled", "also"})
"""What an entry has besides prices."""
PER_TOKEN: Final = 10**6
"""Rates are shown in $ for a million tokens (characters, milliseconds): a pico-USD each is $ 10^-6 for a million."""
EACH: Final = {"per_call": 10**12, "per_image": 10**12, "per_web_search": 10**12, "per_search_unit": 10**12}
"""And these in $ for one."""


_TOKENS: Final = (
    "input",
    "output",
    "cache_read",
    "cache_write",
    "cache_write_1h",
    "audio_input",
    "audio_output",
    "audio_cache_read",
    "image_input",
    "image_output",
    "image_cache_read",
    "reasoning",
)
_WRITTEN: Final[Mapping[str, tuple[str, Decimal]]] = {
    **{name: (name, Decimal(PER_TOKEN)) for name in _TOKENS},
    **{name: (name, Decimal(each)) for name, each in EACH.items()},
    "per_audio_ms": ("per_audio_minute", Decimal(10**12) / 60_000),
    "per_character": ("per_million_characters", Decimal(10**6)),
}
"""How overrides call a rate, and how many pico-USD are one of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Lines by what happened."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    suspicious: tuple[str, ...]
    """Those of `changed` that change a rate by more than `SUSPICIOUS`, or make it free or no longer free."""

    def __bool__(self) -> bool:
        """Whether anything changed but the date."""
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        lines = [
            *(f"added       {line}" for line in self.added),
            *(f"removed     {line}" for line in self.removed),
            *(f"changed     {line}" for line in self.changed if line not in self.suspicious),
            *(f"SUSPICIOUS  {line}" for line in self.suspicious),
        ]
        counts = f"{len(self.added)} added, {len(self.removed)} removed, {len(self.changed)} changed"
        return "\n".join([*lines, f"{counts}, {len(self.suspicious)} of them suspicious"])


def compare(old: Json, new: Json) -> Diff:
    """What is different in the snapshot `new`: models, and of those that both have, rates and limits."""
    before, after = dict(_models(old)), dict(_models(new))
    changed, suspicious = [], []
    for name in sorted(before.keys() & after.keys()):
        was, now = dict(_figures(before[name])), dict(_figures(after[name]))
        pairs = [(key, was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys())]
        told = [_change(key, one, other) for key, one, other in pairs if one != other]
        if told:
            line = f"{name}: {'; '.join(told)}"
            changed.append(line)
            if any(_is_suspicious(key, one, other) for key, one, other in pairs):
                suspicious.append(line)
    return Diff(
        added=tuple(_listed(name, after[name]) for name in sorted(after.keys() - before.keys())),
        removed=tuple(_listed(name, before[name]) for name in sorted(before.keys() - after.keys())),
        changed=tuple(changed),
        suspicious=tuple(suspicious),
    )


def overrides(old: Json, new: Json) -> tuple[str, tuple[str, ...]]:
    """What is new or different in the snapshot `new`, as a TOML file of overrides over `old`; and the models of which
    some of it cannot be written so: rates of long contexts, of dates and of service tiers."""
    before = dict(_models(old))
    tables: list[str] = []
    left_out: list[str] = []
    for name, entry in sorted(_models(new)):
        was, now = dict(_figures(before.get(name, {}))), dict(_figures(entry))
        differing = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key) and key not in UNPRICED}
        if differing - _WRITTEN.keys():
            left_out.append(name)
        if differing & _WRITTEN.keys():
            lines = [f'["{name}"]']
            for key, (written, unit) in _WRITTEN.items():
                if isinstance(rate := now.get(key), int):
                    lines.append(f"{written} = {(Decimal(rate) / unit).normalize():f}")
            tables.append("\n".join(lines))
    return "".join(f"{table}\n\n" for table in tables), tuple(left_out)


def _models(snapshot: Json) -> Iterator[tuple[str, Json]]:
    for provider, listed in snapshot["providers"].items():
        for name, entry in listed["models"].items():
            yield f"{provider}/{name}", entry


def _figures(entry: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every figure of an entry, by where it stands in it."""
    for key, value in entry.items():
        name = f"{prefix}{key}"
        if key == "above":
            for start, rates in value:
                yield from _figures(rates, f"{prefix}above {start} ")
        elif key == "dated":
            for rates in value:
                when = rates.get("since") or rates.get("hours") or 0
                yield from _figures(rates, f"{prefix}from {when} ")
        elif key == "tiers":
            for tier, prices in value.items():
                for number, rates in enumerate(prices):
                    yield from _figures(rates, f"{prefix}{tier}{f' {number + 1}' if number else ''} ")
        elif isinstance(value, Mapping):
            yield from _figures(value, f"{name} ")
        else:
            yield name, tuple(value) if isinstance(value, list) else value


def _change(key: str, one: object, other: object) -> str:
    percent = ""
    if _is_rate(key) and isinstance(one, int) and isinstance(other, int) and one:
        percent = f" ({(other - one) / one:+.0%})"
    return f"{key} {_shown(key, one)} -> {_shown(key, other)}{percent}"


def _is_suspicious(key: str, one: object, other: object) -> bool:
    if not _is_rate(key) or not isinstance(one, int) or not isinstance(other, int):
        return False
    small, large = sorted((one, other))
    return large > small * SUSPICIOUS


def _is_rate(key: str) -> bool:
    return key.rpartition(" ")[2] not in UNPRICED | {"since", "hours"}


def _shown(key: str, value: object) -> str:
    if value is None:
        return "-"
    if not _is_rate(key) or not isinstance(value, int):
        return str(value)
    return f"{value / EACH.get(key.rpartition(' ')[2], PER_TOKEN):g}"


def _listed(name: str, entry: Json) -> str:
    rates = [f"{key} {_shown(key, value)}" for key, value in _figures(entry) if _is_rate(key) and " " not in key]
    return f"{name}: {', '.join(rates)}"
