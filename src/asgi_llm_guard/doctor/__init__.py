"""What is wrong with a guard in use, or will be: findings over its configuration, its application and its records. Pure."""

from __future__ import annotations

from asgi_llm_guard.doctor.application import GuardedPath, examine_application, guards_of
from asgi_llm_guard.doctor.configuration import (
    Pricing,
    examine_clock,
    examine_guard,
    examine_prices,
    examine_records,
    examine_store,
    models_named,
)
from asgi_llm_guard.doctor.findings import Finding, Severity, worst
from asgi_llm_guard.doctor.names import Known, Named, examine_names, examine_raises, named_by

__all__ = [
    "Finding",
    "GuardedPath",
    "Known",
    "Named",
    "Pricing",
    "Severity",
    "examine_application",
    "examine_clock",
    "examine_guard",
    "examine_names",
    "examine_prices",
    "examine_raises",
    "examine_records",
    "examine_store",
    "guards_of",
    "models_named",
    "named_by",
    "worst",
]
