"""What a usage record says of its call: who asked, what was held, what it cost, and when it began and ended."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.simulate.report import Misfit, plain_name
from asgi_llm_guard.storage.base import LAPSE_MS
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Place", "Recorded", "context_of", "end_ms", "misfit_of", "place_of"]

Place = tuple[int, str, int]
"""Where a record stands among others: its instant, its process, and which one of that process's it is."""

_NO_PARAMS: Final[Mapping[str, object]] = MappingProxyType({})
_MOST_MODELS: Final = 4096
_AS_HELD: Final = frozenset({"unmetered", "unknown", "unseen", "expired", "cached"})
"""Outcomes whose record has the tokens that were held."""


class Recorded:
    """Calls as they were described, from what was recorded of them, by these prices where that does not tell."""

    def __init__(self, prices: PriceBook) -> None:
        self._prices = prices
        self._ratios: dict[tuple[str | None, str | None], list[int]] = {}
        """For each model, tokens that were held, and nano-USD for them."""

    def call(self, record: UsageRecord) -> Call | None:
        """The call as it was described; `None`: it was not, before it was made."""
        if record.model is None:
            return None
        estimate = record.estimate_nanousd
        if estimate is None and record.cost_nanousd is not None:
            return None
        given = record.usage.input_tokens if record.usage is not None else None
        tokens = record.tokens or 0
        call = Call(
            provider=record.provider,
            model=record.model,
            deployment=record.deployment,
            input_tokens=min(given or 0, tokens),
            output_tokens=tokens - min(given or 0, tokens),
            cache_writes="none",
            may_have_audio=False,
        )
        if estimate is None:  # it had no price then; it may have one now
            return self._prices.quote(call, record.at_ms)
        quote = self._prices.quote(call, record.at_ms)
        output = self._output(record, call, estimate, quote)
        # What of it the input alone makes up, so that a lower output limit is worth what it would have been.
        input_nanousd = max(0, estimate - -(-output * quote.output_picousd // 1000))
        return msgspec.structs.replace(
            call,
            output_tokens=output,
            cost_nanousd=estimate,
            input_nanousd=input_nanousd,
            output_picousd=quote.output_picousd,
        )

    def _output(self, record: UsageRecord, call: Call, estimate: int, quote: Call) -> int:
        """The output tokens that were held: with the input, as many as cost what was held."""
        if not estimate or record.outcome in _AS_HELD:
            return call.output_tokens
        if len(self._ratios) >= _MOST_MODELS:
            self._ratios.clear()
        ratio = self._ratios.setdefault((record.provider, record.model), [0, 0])
        if record.outcome == "provider_error":  # nothing says what was asked: as others of this model
            return estimate * ratio[0] // ratio[1] if ratio[1] else 0
        output = call.output_tokens
        if quote.output_picousd:
            output = max(output, (estimate - quote.input_nanousd) * 1000 // quote.output_picousd)
        ratio[0] += call.input_tokens + output
        ratio[1] += estimate
        return output

    def cost(self, record: UsageRecord) -> int | None:
        """What it cost; `None`: no price is known."""
        if record.cost_nanousd is not None or record.usage is None:
            return record.cost_nanousd
        return self._prices.cost(record.provider, record.model or "", record.usage, record.at_ms).nanousd

    def cut(self, record: UsageRecord, limit: int) -> tuple[UsageRecord, bool]:
        """The record of a call whose answer may have had so many tokens at most, and whether it had more."""
        usage = record.usage
        if record.outcome in _AS_HELD and record.outcome != "cached":  # charged what was held, which is less now
            return msgspec.structs.replace(record, usage=None, cost_nanousd=None, tokens=None), False
        if usage is None or usage.output_tokens is None or usage.output_tokens <= limit:
            return record, False
        shorter = msgspec.structs.replace(
            usage,
            output_tokens=limit,
            reasoning_tokens=None if usage.reasoning_tokens is None else min(usage.reasoning_tokens, limit),
        )
        model = record.model or ""
        was = self._prices.cost(record.provider, model, usage, record.at_ms).nanousd
        is_ = self._prices.cost(record.provider, model, shorter, record.at_ms).nanousd
        cost = self.cost(record)
        if cost is not None and was is not None and is_ is not None:
            cost = max(0, cost - (was - is_))
        tokens = None if record.tokens is None else max(0, record.tokens - (usage.output_tokens - limit))
        return msgspec.structs.replace(record, usage=shorter, cost_nanousd=cost, tokens=tokens), True


def context_of(record: UsageRecord, params: Mapping[str, object] = _NO_PARAMS) -> Context:
    """Who asked, and with `params` the limits of their own."""
    return Context(
        params=params,
        caller=record.caller,
        user=record.user,
        departments=record.departments,
        agent=record.agent,
        session=record.session,
        tags=record.tags,
        request_id=record.request_id,
        route=record.route,
    )


def misfit_of(
    record: UsageRecord,
    policy: str,
    code: str,
    scope: str,
    subject: str,
    *,
    enforced: bool,
    requested: int | None = None,
    used: int | None = None,
    held: int | None = None,
    limit: int | None = None,
) -> Misfit:
    """What a policy says of a record's call."""
    return Misfit(
        at_ms=record.at_ms,
        call_id=record.call_id,
        request_id=record.request_id,
        policy=plain_name(policy),
        code=code,
        scope=scope,
        subject=subject,
        enforced=enforced,
        route=record.route,
        model=record.model,
        cost_nanousd=record.cost_nanousd,
        requested=requested,
        used=used,
        held=held,
        limit=limit,
    )


def end_ms(record: UsageRecord) -> int:
    """When it was settled; one of a process that died, when its owner had lapsed."""
    return record.at_ms + LAPSE_MS if record.ended_ms is None else max(record.ended_ms, record.at_ms)


def place_of(record: UsageRecord) -> Place:
    """By instant; within one, as its process gave the ids out."""
    owner, _, number = record.call_id.rpartition("-")
    try:
        return record.at_ms, owner, int(number, 16)
    except ValueError:
        return record.at_ms, record.call_id, 0
