"""One thing that was found, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

__all__ = ["Finding", "Severity", "worst"]

Severity = Literal["error", "warning", "note"]
"""`error`: a limit does not hold, or calls fail. `warning`: it may come to that, or costs are not seen. `note`: know it."""

_ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "note")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen, and what to do about it."""

    severity: Severity
    code: str
    """Names the check, for programs: `middleware_order`, `unpriced_model`, …"""
    seen: str
    next_step: str


def worst(findings: Iterable[Finding]) -> Severity | None:
    """The gravest severity among findings; `None`: there are none."""
    seen = {finding.severity for finding in findings}
    return next((severity for severity in _ORDER if severity in seen), None)
