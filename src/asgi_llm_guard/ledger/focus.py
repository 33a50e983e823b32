"""Records as rows of FOCUS, the FinOps Open Cost and Usage Specification, version 1.2: one row for each call.

All mandatory columns are there, of the others those that have something to say, and what FOCUS has no column for begins
with `x_`. Costs are in US dollars, with nine decimals. What a guard knows is the price list's cost, so the four costs of
FOCUS are the same; the invoice is the provider's.

Source: https://focus.finops.org/focus-specification/v1-2/ (2025-05), columns and attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from asgi_llm_guard.ledger.columns import Column, Row, dollars, instant, second

__all__ = ["VERSION", "columns"]

VERSION: Final = "1.2"

_HOUR_MS: Final = 3_600_000


def columns(billing_account: str) -> tuple[Column, ...]:
    """The columns, in the order in which they are written. `billing_account`: whose account with its providers it is."""
    text, money, count, flag = _text, _money, _count, _flag
    account = _always(billing_account)
    return (
        # Mandatory
        money("BilledCost", _cost),
        text("BillingAccountId", account),
        text("BillingAccountName", account),
        text("BillingCurrency", _always("USD")),
        text("BillingPeriodEnd", lambda row: second(_month(row.record.at_ms, 1))),
        text("BillingPeriodStart", lambda row: second(_month(row.record.at_ms, 0))),
        text("ChargeCategory", _always("Usage")),
        text("ChargeClass", _always(None)),
        text("ChargeDescription", _description),
        text("ChargePeriodEnd", lambda row: second(_hour(row) + _HOUR_MS)),
        text("ChargePeriodStart", lambda row: second(_hour(row))),
        money("ContractedCost", _cost),
        money("EffectiveCost", _cost),
        text("InvoiceIssuerName", _provider),
        money("ListCost", _cost),
        count("PricingQuantity", _quantity),
        text("PricingUnit", _unit),
        text("ProviderName", _provider),
        text("PublisherName", _provider),
        text("ServiceCategory", _always("AI and Machine Learning")),
        text("ServiceName", _provider),
        # Conditional and recommended
        text("ChargeFrequency", _always("Usage-Based")),
        count("ConsumedQuantity", _quantity),
        text("ConsumedUnit", _unit),
        text("PricingCategory", _always("Standard")),
        text("ResourceId", lambda row: row.record.deployment),
        text("ResourceType", lambda row: None if row.record.deployment is None else "Deployment"),
        text("ServiceSubcategory", _always("Generative AI")),
        text("SkuId", lambda row: row.record.billed_model or row.record.model),
        text("SubAccountId", _department),
        text("SubAccountName", _department),
        text("Tags", lambda row: _json(dict.fromkeys(row.record.tags, True))),
        # What FOCUS has no column for
        text("x_CallId", lambda row: row.record.call_id),
        count("x_Attempt", lambda row: row.record.attempt),
        text("x_AdmittedAt", lambda row: instant(row.record.at_ms)),
        text("x_Caller", lambda row: row.record.caller),
        text("x_User", lambda row: row.record.user),
        text("x_Departments", lambda row: _json(row.record.departments)),
        text("x_Agent", lambda row: row.record.agent),
        text("x_Session", lambda row: row.record.session),
        text("x_Route", lambda row: row.record.route),
        text("x_Model", lambda row: row.record.model),
        text("x_Outcome", lambda row: row.record.outcome),
        flag("x_CostUnknown", lambda row: row.record.cost_nanousd is None),
        flag("x_CostEstimated", lambda row: row.record.outcome not in _EXACT),
        count("x_InputTokens", _usage("input_tokens")),
        count("x_OutputTokens", _usage("output_tokens")),
        count("x_CacheReadTokens", _usage("cache_read_tokens")),
        count("x_CacheWriteTokens", _usage("cache_write_tokens")),
        count("x_ReasoningTokens", _usage("reasoning_tokens")),
        text("x_PriceSource", lambda row: row.record.price_source),
    )


_EXACT: Final = frozenset({"measured", "provider_error", "not_dispatched", "cached"})

Value = Callable[[Row], Any]


def _text(name: str, value: Value) -> Column:
    return Column(name, "text", value)


def _money(name: str, value: Value) -> Column:
    return Column(name, "money", value)


def _count(name: str, value: Value) -> Column:
    return Column(name, "count", value)


def _flag(name: str, value: Value) -> Column:
    return Column(name, "flag", value)


def _always(value: str | None) -> Value:
    return lambda _row: value


def _usage(field: str) -> Value:
    return lambda row: None if row.record.usage is None else getattr(row.record.usage, field)


def _cost(row: Row) -> int:
    """A cost may not be empty in FOCUS: one that is unknown is 0, and says so in `x_CostUnknown`."""
    return row.record.cost_nanousd or 0


def _provider(row: Row) -> str:
    return row.record.provider or "unknown"


def _department(row: Row) -> str | None:
    """Where there are several, none of them is the only one to be charged."""
    departments = set(row.record.departments)
    return departments.pop() if len(departments) == 1 else None


def _tokens(row: Row) -> int | None:
    usage = row.record.usage
    return None if usage is None else usage.total_tokens


def _quantity(row: Row) -> int:
    tokens = _tokens(row)
    return 1 if tokens is None else tokens


def _unit(row: Row) -> str:
    return "Requests" if _tokens(row) is None else "Tokens"


def _description(row: Row) -> str:
    record = row.record
    tokens = _tokens(row)
    used = "tokens unknown" if tokens is None else f"{tokens} tokens"
    cost = "cost unknown" if record.cost_nanousd is None else f"${dollars(record.cost_nanousd)}"
    return f"Call of {record.provider or 'unknown'}/{record.model or 'unknown'}: {used}, {cost}, {record.outcome}"


def _hour(row: Row) -> int:
    return row.record.at_ms - row.record.at_ms % _HOUR_MS


def _month(at_ms: int, later: int) -> int:
    """When the month of an instant began, in UTC, or the one after it."""
    at = datetime.fromtimestamp(at_ms // 1000, UTC)
    months = at.year * 12 + at.month - 1 + later
    return int(datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC).timestamp()) * 1000


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
