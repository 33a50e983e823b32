"""Rate cards: what one model's tokens cost, by bucket, size of input, instant and service tier, and what else it bills.

Amounts are pico-USD (10^-12), whole numbers: $1 per million tokens is 1,000,000 pico-USD per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from asgi_llm_guard.context import CacheWrites, Call
from asgi_llm_guard.pricing.snapshot import Entry, Price

__all__ = ["WEB_SEARCH", "Ceiling", "Fees", "RateCard", "Rates", "Sheet", "input_kind", "tier_name"]

DAY_MS: Final = 86_400_000
MINUTE_MS: Final = 60_000
_MAX_CACHED: Final = 256

WEB_SEARCH: Final = 35 * 10**9
"""Pico-USD for a web search of a model whose list price has none: the dearest that there is, $35 for a thousand.
Source: https://ai.google.dev/gemini-api/docs/pricing, grounding with Google Search of Gemini 2.5 (2026-11)."""

_TIERS: Final = {
    "batch": "batch",
    "batches": "batch",
    "fast": "fast",
    "flex": "flex",
    "priority": "priority",
    "service_tier_flex": "flex",
    "service_tier_priority": "priority",
    "ultrafast": "ultrafast",
}
#: A request for one is answered, and billed, as another: OpenAI's `fast` comes back as `priority`.
_SERVED_AS: Final = {"fast": ("fast", "priority"), "priority": ("fast", "priority")}


class Rates(msgspec.Struct, frozen=True, gc=False):
    """Pico-USD for one token of each bucket. What a provider does not price apart costs what it is a part of."""

    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    audio_input: int
    audio_output: int
    audio_cache_read: int
    image_input: int
    image_output: int
    image_cache_read: int
    reasoning: int
    per_call: int
    """Pico-USD for each call, on top."""

    def dearest(self, other: Rates) -> Rates:
        """For each bucket the higher of the two."""
        return Rates(*(max(getattr(self, name), getattr(other, name)) for name in self.__struct_fields__))


class Fees(msgspec.Struct, frozen=True, gc=False):
    """Pico-USD for one of what is billed besides tokens, or instead of them. `None`: no price is known."""

    image: int | None = None
    audio_ms: int | None = None
    character: int | None = None
    web_search: int | None = None
    search_unit: int | None = None


Sheet = tuple[tuple[int, Rates], ...]
"""What holds at one instant on one tier: rates by the size of input above which they hold, ascending from 0."""

Ceiling = tuple[tuple[int, tuple[int, ...], int], ...]
"""Upper bounds by the size of input: (above so many tokens, input rates by `input_kind`, output rate), never falling."""

_KINDS: Final = {
    ("none", False): 0,
    ("none", True): 1,
    ("5m", False): 2,
    ("5m", True): 3,
    ("1h", False): 4,
    ("1h", True): 5,
}


def input_kind(cache_writes: CacheWrites, *, audio: bool) -> int:
    """Which of a ceiling's input rates holds for a call that can write so much to a cache, and may have audio."""
    return _KINDS[cache_writes, audio]


#: What each bucket is a part of, and so costs if it has no price of its own.
_PART_OF: Final = {
    "input": None,
    "output": None,
    "cache_read": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "audio_input": "input",
    "audio_output": "output",
    "audio_cache_read": "cache_read",
    "image_input": "input",
    "image_output": "output",
    "image_cache_read": "cache_read",
    "reasoning": "output",
    "per_call": None,
}
_FEES: Final = {
    "per_image": "image",
    "per_audio_ms": "audio_ms",
    "per_character": "character",
    "per_web_search": "web_search",
    "per_search_unit": "search_unit",
}


def tier_name(name: str | None) -> str | None:
    """A service tier as prices know it; `None` is the standard one, and any that has no price of its own."""
    return _TIERS.get(name.lower()) if isinstance(name, str) else None


class RateCard:
    """The price of one model. Immutable; remembers the sheets it has worked out."""

    __slots__ = (
        "_ceilings",
        "_entry",
        "_given",
        "_grain",
        "_per_call",
        "_sheets",
        "also",
        "by_unit",
        "context_window",
        "fees",
        "max_output_tokens",
        "model",
        "provider",
        "source",
        "stated",
        "steady",
        "steady_ceiling",
    )

    def __init__(
        self,
        *,
        provider: str | None,
        model: str,
        entry: Entry,
        source: str,
        given: Mapping[str, int] | None = None,
        dearest: bool = False,
    ) -> None:
        self.provider = provider
        self.model = model
        """The name of the entry that the price is taken from."""
        self.source = source
        """Where the price comes from, and its date."""
        self.also = entry.also
        """What the provider bills besides, and no figure here includes (file searches, pages)."""
        self.stated = given is not None
        """The service states this price itself."""
        self._given = dict(given or {})
        self.context_window = self._given.pop("context_window", entry.context)
        """The largest input in tokens, where known."""
        self.max_output_tokens = self._given.pop("max_output_tokens", entry.max_output)
        """The largest output in tokens, where known."""
        stated = {name: self._given.pop(key) for key, name in _FEES.items() if key in self._given}
        listed = {name: getattr(entry, key) for key, name in _FEES.items()}
        if self._given.get("input") == 0 == self._given.get("output"):
            listed = dict.fromkeys(listed, 0)  # free as a whole, but for what is stated
        self.fees = Fees(**(listed | stated))
        """What is billed in other units than tokens."""
        self.by_unit = entry.input is None and "input" not in self._given
        """It is billed by such units only: tokens have no price."""
        self._entry = entry if dearest else msgspec.structs.replace(entry, alt=None)
        prices: list[Price] = [entry, *entry.dated, *(price for tier in entry.tiers.values() for price in tier)]
        self._grain = MINUTE_MS if any(price.hours for price in prices) else DAY_MS
        self._sheets: dict[tuple[int, str | None], Sheet] = {}
        self._ceilings: dict[tuple[int, str | None], Ceiling] = {}
        self._per_call = self._sheet(0, None)[0][1].per_call
        self.steady: Sheet | None = None if entry.dated else self._sheet(0, None)
        """The standard sheet, if it is the same at every instant."""
        self.steady_ceiling: Ceiling | None = None if entry.dated or entry.tiers else self._ceiling(0, None)

    def __repr__(self) -> str:
        return f"RateCard({self.provider}/{self.model}, {self.source})"

    @property
    def per_call(self) -> int:
        """Pico-USD for each call, whatever it uses."""
        return self._per_call

    def rates(self, at_ms: int, *, input_tokens: int = 0, service_tier: str | None = None) -> Rates:
        """The rates of a call with so many input tokens."""
        sheet = self.sheet(at_ms, tier_name(service_tier))
        return next(rates for above, rates in reversed(sheet) if input_tokens > above or above == 0)

    def sheet(self, at_ms: int, tier: str | None) -> Sheet:
        """What holds at an instant, on a tier as `tier_name` gives it."""
        if tier is None and self.steady is not None:
            return self.steady
        key = (at_ms // self._grain, tier)
        sheet = self._sheets.get(key)
        if sheet is None:
            if len(self._sheets) >= _MAX_CACHED:
                self._sheets.clear()
            sheet = self._sheets[key] = self._sheet(key[0] * self._grain, tier)
        return sheet

    def fees_of(self, call: Call) -> int | None:
        """Pico-USD for all that a call can be billed besides tokens; `None`: it is billed by what the call bounds not."""
        if not (call.web_searches or call.images or call.audio_ms or call.characters or call.search_units):
            return None if self.by_unit else 0
        fees = self.fees
        total = call.web_searches * (WEB_SEARCH if fees.web_search is None else fees.web_search)
        bounded = not self.by_unit
        for count, fee in (
            (call.images, fees.image),
            (call.audio_ms, fees.audio_ms),
            (call.characters, fees.character),
            (call.search_units, fees.search_unit),
        ):
            if count and fee is not None:
                total += count * fee
                bounded = True
        return total if bounded else None

    def ceiling(self, at_ms: int, tier: str | None) -> Ceiling:
        """What no call can exceed that is admitted at an instant and served within a day, on the standard
        tier, a cheaper one, or the one that is asked for."""
        key = (at_ms // DAY_MS, tier)
        ceiling = self._ceilings.get(key)
        if ceiling is None:
            if len(self._ceilings) >= _MAX_CACHED:
                self._ceilings.clear()
            ceiling = self._ceilings[key] = self._ceiling(key[0] * DAY_MS, tier)
        return ceiling

    # ------------------------------------------------------------------------- working it out

    def _ceiling(self, day_ms: int, tier: str | None) -> Ceiling:
        tiers = {None, *({"flex", "batch", *_SERVED_AS.get(tier or "", (tier,))} & self._entry.tiers.keys())}
        sheets = [self._sheet(at_ms, name) for at_ms in self._changes(day_ms, day_ms + 2 * DAY_MS) for name in tiers]
        ceiling = []
        inputs, output_rate = (0,) * len(_KINDS), 0
        for above in sorted({above for sheet in sheets for above, _ in sheet}):
            for rates in (rates for sheet in sheets for start, rates in sheet if start == above):
                inputs = tuple(map(max, inputs, _input_rates(rates)))
                output_rate = max(output_rate, rates.output, rates.audio_output, rates.image_output, rates.reasoning)
            ceiling.append((above, inputs, output_rate))
        return tuple(ceiling)

    def _changes(self, from_ms: int, until_ms: int) -> Iterator[int]:
        """The start of a span, and every instant in it at which some price begins or ends."""
        yield from_ms
        prices = [*self._entry.dated, *(price for tier in self._entry.tiers.values() for price in tier)]
        for price in prices:
            if from_ms < price.since < until_ms:
                yield price.since
            for minute in price.hours or ():
                for day_ms in range(from_ms, until_ms, DAY_MS):
                    yield day_ms + minute * MINUTE_MS

    def _sheet(self, at_ms: int, tier: str | None) -> Sheet:
        standard: Price = self._entry
        for price in reversed(self._entry.dated):
            if _holds(price, at_ms):
                standard = price
                break
        variants = [price for price in self._entry.tiers.get(tier or "", ()) if _holds(price, at_ms)]
        alternatives = [self._entry.alt] if self._entry.alt is not None else []
        starts = {above for price in (standard, *variants, *alternatives) for above, _ in price.above}
        base = _fill(_rates_above(standard, 0))
        sheet = []
        for start in (0, *sorted(starts - {0})):
            merged = _rates_above(standard, start)
            for variant in reversed(variants):  # the first one wins, so it comes last
                merged |= _rates_above(variant, start)
            rates = _fill(merged)
            for alternative in alternatives:
                rates = rates.dearest(_fill(_rates_above(alternative, start)))
            sheet.append((start, _scaled(rates, base, self._given) if self._given else rates))
        return tuple(sheet)


def _input_rates(rates: Rates) -> tuple[int, ...]:
    """The dearest rate of input, by `input_kind`."""
    text = max(rates.input, rates.cache_read, rates.image_input, rates.image_cache_read)
    audio = max(text, rates.audio_input, rates.audio_cache_read)
    written = rates.cache_write, max(rates.cache_write, rates.cache_write_1h)
    return (text, audio, *(max(rate, kind) for rate in written for kind in (text, audio)))


def _holds(price: Price, at_ms: int) -> bool:
    if at_ms < price.since:
        return False
    if price.hours is None:
        return True
    first, last = price.hours
    minute = at_ms % DAY_MS // MINUTE_MS
    return first <= minute < last if first <= last else minute >= first or minute < last


def _rates_above(price: Price, start: int) -> dict[str, int]:
    """The rates that a price gives for inputs of just over `start` tokens."""
    holding = price
    for above, raised in price.above:
        if above <= start:
            holding = raised
    given = {name: getattr(price, name) for name in _GIVEN} | {
        name: value for name in _GIVEN if (value := getattr(holding, name)) is not None
    }
    return {name: value for name, value in given.items() if value is not None}


_GIVEN: Final = (*_PART_OF, "video_input", "video_output")


def _fill(given: Mapping[str, int]) -> Rates:
    """Rates for every bucket. Video is not told apart in usage: text is charged like it, where it is dearer."""
    rates: dict[str, int] = {}
    for name, whole in _PART_OF.items():
        rates[name] = given[name] if name in given else rates[whole] if whole else 0
        rates[name] = max(rates[name], given.get(f"video_{name}", 0))
    return Rates(**rates)


def _scaled(rates: Rates, base: Rates, given: Mapping[str, int]) -> Rates:
    """Rates in proportion to what an override gives for the base.

    What it does not give follows what it is a part of: a discount on input is one on cached input.
    """
    scaled: dict[str, int] = {}
    for name in _PART_OF:
        by: str | None = name
        while by is not None and by not in given:
            by = _PART_OF[by]
        value = getattr(rates, name)
        if by is not None:
            unit = getattr(base, by)
            value = -(-value * given[by] // unit) if unit else given[by]
        scaled[name] = value
    if {"input", "output"} <= given.keys() and "per_call" not in given:
        scaled["per_call"] = 0  # the whole price was given, and this is no part of it
    return Rates(**scaled)
