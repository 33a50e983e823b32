"""The price book: bounds before a call, costs after it, and what happens where no price is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing import overrides as _overrides
from asgi_llm_guard.pricing.bill import picousd
from asgi_llm_guard.pricing.cards import RateCard, input_kind, tier_name
from asgi_llm_guard.pricing.snapshot import MAX_NAME, Entry, Snapshot, bundled, candidates, provider_id
from asgi_llm_guard.usage import Usage

__all__ = ["Cost", "OnConflict", "PriceBook", "TrustReported", "Unknown"]

TrustReported = Literal["missing", "always", "never"]
Unknown = Literal["deny", "allow"] | Mapping[str, str]
OnConflict = Literal["genai", "max"]

UNPRICED: Final = "unpriced (allowed)"
REPORTED: Final = "reported by provider"
_MAX_CACHED: Final = 4096
"""Names come from callers: what is remembered of them is bounded."""


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a call cost."""

    nanousd: int | None
    """`None`: unknown, because no price is known, or because the usage is not."""
    source: str | None = None
    """Where the price comes from, and its date; `None`: no price is known."""
    billed_model: str | None = None
    """The model that the price was taken from."""


_BLANK: Final = Entry(source="override")
_UNKNOWN: Final = Cost(None)
_ALLOWED: Final = Cost(0, UNPRICED)


class PriceBook:
    """Prices of models. Immutable: another set of prices is another book.

    Looked up in this order: what the service states itself (`overrides`), then the snapshot that ships
    with the package. Neither is ever fetched from anywhere.
    """

    __slots__ = (
        "_by_call",
        "_cards",
        "_charge_as",
        "_given",
        "_on_conflict",
        "_origin",
        "_origins",
        "_snapshot",
        "_trust_reported",
        "_unknown",
        "overrides",
    )

    def __init__(
        self,
        snapshot: Snapshot | None,
        *,
        overrides: Mapping[str, object] | str | Path | None = None,
        unknown: Unknown = "deny",
        on_conflict: OnConflict = "genai",
        trust_reported: TrustReported = "missing",
        origins: Mapping[str, str] | None = None,
    ) -> None:
        """`snapshot`: `None` takes the one of this release, when it is first needed. `origins`: where the overrides of
        these models come from, for people to read. The rest as `PriceBook.snapshot`."""
        if on_conflict not in ("genai", "max"):
            raise ConfigurationError(f"on_conflict: expected 'genai' or 'max', got {on_conflict!r}")
        if trust_reported not in ("missing", "always", "never"):
            raise ConfigurationError(f"trust_reported: expected 'missing', 'always' or 'never', got {trust_reported!r}")
        self._trust_reported: TrustReported = trust_reported
        self._snapshot = snapshot
        self._on_conflict: OnConflict = on_conflict
        self.overrides, self._origin = _overrides.read(overrides)
        """The prices that the service states itself, as they were given."""
        self._given = _overrides.parse(self.overrides)
        self._origins = {_overrides.key_of(model): origin for model, origin in (origins or {}).items()}
        self._unknown: Unknown = unknown
        self._cards: dict[tuple[str | None, str], RateCard | None] = {}
        self._by_call: dict[tuple[str | None, str | None, str | None, str | None], RateCard | None] = {}
        for key in self._given:
            self._check_whole(key)
        self._charge_as = self._parse_unknown(unknown)

    @classmethod
    def snapshot(
        cls,
        *,
        overrides: Mapping[str, object] | str | Path | None = None,
        unknown: Unknown = "deny",
        on_conflict: OnConflict = "genai",
        trust_reported: TrustReported = "missing",
    ) -> PriceBook:
        """The prices that ship with this release.

        `overrides`: prices by `provider/model`, `provider/*` or bare model, or the path of a TOML file with
        them: `input`, `output`, `cache_read`, `cache_write`, `cache_write_1h`, `audio_input`, `audio_output`,
        `audio_cache_read`, `image_input`, `image_output`, `image_cache_read` and `reasoning` in $ per million
        tokens; `cost_per_1k_input` and `cost_per_1k_output` in $ per thousand; `per_call`, `per_image`,
        `per_audio_minute`, `per_million_characters`, `per_web_search` and `per_search_unit` in $. They win over
        the snapshot. For a model that the snapshot knows, rates that are not given change in proportion, and
        prices of other units stay; any other needs `input` and `output`, or the price of a unit.
        A price of 0 is free; a missing one is not; with both
        `input` and `output`, the list's fee for each call falls away.

        `unknown`: what a model without a price costs. `"deny"`: unknown, so budgets refuse it.
        `"allow"`: 0, marked as unpriced. `{"charge_as": "openai/gpt-…"}`: what that model costs.

        `on_conflict`: where the snapshot's two sources differ, `"genai"` takes the first, `"max"` the dearer.

        `trust_reported`: when to charge what the provider itself reports that a call cost: `"missing"`: where
        these prices have no answer; `"always"`: wherever it reports one; `"never"`.

        Raises:
            ConfigurationError: one of them is malformed; names the model, the key and the value.
        """
        return cls(None, overrides=overrides, unknown=unknown, on_conflict=on_conflict, trust_reported=trust_reported)

    def with_overrides(self, overrides: Mapping[str, object] | str | Path | None) -> PriceBook:
        """The same book with these overrides in place of its own. Takes effect with the first call that uses it.

        Raises:
            ConfigurationError: as `snapshot`.
        """
        return type(self)(
            self._snapshot,
            overrides=overrides,
            unknown=self._unknown,
            on_conflict=self._on_conflict,
            trust_reported=self._trust_reported,
        )

    def laid_over(self, prices: Mapping[str, object], *, origin: str) -> PriceBook:
        """The same book with these prices in place of its own overrides of the same models.

        `origin`: where they come from, for people to read: it is in the source of every cost.

        Raises:
            ConfigurationError: as `snapshot`.
        """
        if not prices:
            return self
        laid = {_overrides.key_of(model) for model in prices}
        own = {model: given for model, given in self.overrides.items() if _overrides.key_of(model) not in laid}
        origins = {**dict.fromkeys(own, self._origin), **self._origins, **dict.fromkeys(prices, origin)}
        return type(self)(
            self._snapshot,
            overrides={**own, **prices},
            unknown=self._unknown,
            on_conflict=self._on_conflict,
            trust_reported=self._trust_reported,
            origins=origins,
        )

    @property
    def date(self) -> str:
        """The day that the list prices are from, `YYYY-MM-DD`."""
        return self._known.date

    # ------------------------------------------------------------------------------ look-up

    def resolve(self, provider: str | None, model: str) -> RateCard | None:
        """The rate card of a model; `None`: no price is known for it. What `unknown` says plays no part here."""
        key = (provider, model)
        try:
            return self._cards[key]
        except KeyError:
            pass
        if len(model) > MAX_NAME:
            return None
        if len(self._cards) >= _MAX_CACHED:
            self._cards.clear()
        card = self._cards[key] = self._look_up(provider, model)
        return card

    def quote(self, call: Call, at_ms: int, *, service_tier: str | None = None) -> Call:
        """The call with the most that it can cost, if it is admitted at `at_ms` and served within a day.

        All input at the dearest rate that the input's bound can reach (long contexts included, and cache
        writes and audio where the call may have them), all output at the dearest output rate, and what is
        billed besides tokens; rounded up once. The standard service tier, and `service_tier` if that is dearer.
        """
        card = self.resolve(call.provider, call.priced_as or call.model)
        billed = None
        if card is None:
            if self._charge_as is None:
                return _without_price(call, allowed=self._unknown == "allow")
            card = self._charge_as
            billed = card.model
        fees = card.fees_of(call)
        if fees is None:
            return _without_price(call, allowed=self._unknown == "allow")
        bounds = card.steady_ceiling
        if bounds is None:
            bounds = card.ceiling(at_ms, tier_name(service_tier))
        input_tokens = call.input_tokens
        _, input_rates, output_rate = bounds[0]
        if len(bounds) > 1:
            for above, raised_inputs, raised_output in bounds:
                if input_tokens > above:
                    input_rates, output_rate = raised_inputs, raised_output
        input_rate = input_rates[input_kind(call.cache_writes, audio=call.may_have_audio)]
        input_pico = input_tokens * input_rate + card.per_call + fees
        cost = -(-(input_pico + call.output_tokens * output_rate) // 1000)
        input_nano = -(-input_pico // 1000)
        return msgspec.structs.replace(
            call,
            cost_nanousd=min(cost, MAX_AMOUNT),
            input_nanousd=min(input_nano, MAX_AMOUNT),
            output_picousd=output_rate * call.choices,
            price_source=card.source,
            billed_model=billed,
        )

    def cost(
        self, provider: str | None, model: str | None, usage: Usage, at_ms: int, *, call: Call | None = None
    ) -> Cost:
        """What a usage costs at `at_ms`, exactly, rounded up once; with what other models did for it.

        The price is that of the model which the response names (`usage.model`, then `model`), if it has
        one, else of the one that was asked for (`call.model`). A price that the service states for the
        model asked for holds for the response too, unless that is of another model.

        Unknown, never 0, if input or output is unknown (and not free), if something was used that has no
        price, or the figures contradict each other. Never raises.
        """
        reported = usage.reported_nanousd
        if reported is not None and (
            self._trust_reported == "never" or type(reported) is not int or not 0 <= reported <= MAX_AMOUNT
        ):
            reported = None
        asked = (call.priced_as or call.model) if call is not None else None
        named = usage.model if isinstance(usage.model, str) else None
        card = self._card_of(provider, named, model, asked)
        if reported is not None and self._trust_reported == "always":
            return Cost(reported, REPORTED, card.model if card is not None else None)
        if card is None:
            if reported is not None:
                return Cost(reported, REPORTED, named)
            if self._charge_as is None:
                return _ALLOWED if self._unknown == "allow" else _UNKNOWN
            card = self._charge_as
        pico = picousd(card, usage, at_ms)
        if usage.extra:
            beside = [self._beside(provider, other, card, at_ms) for other in usage.extra]
            pico = None if pico is None or None in beside else pico + sum(part for part in beside if part is not None)
        if pico is None or pico > MAX_AMOUNT * 1000:
            return Cost(None, card.source, card.model) if reported is None else Cost(reported, REPORTED, card.model)
        return Cost(-(-pico // 1000), card.source, card.model)

    # ------------------------------------------------------------------------------ inside

    def _beside(self, provider: str | None, usage: Usage, card: RateCard, at_ms: int) -> int | None:
        """What another model did for an answer, in pico-USD. One that is not named is the answer's own."""
        if isinstance(usage.model, str):
            found = self._card_of(provider, usage.model, None, None) or self._charge_as
            if found is None:
                return 0 if self._unknown == "allow" else None
            card = found
        return picousd(card, usage, at_ms)

    @property
    def _known(self) -> Snapshot:
        return bundled() if self._snapshot is None else self._snapshot

    def _look_up(self, provider: str | None, model: str) -> RateCard | None:
        known = self._known
        key, names = candidates(provider_id(provider), model, known)
        if not names:
            return None
        stated = self._override(key, names)
        found = known.find(key, names)
        if stated is not None:
            if found is None and not _overrides.is_whole(stated[1]):
                # The rest of a bare model's price is that of whoever sells it.
                found = known.find(None, names)
                if found is None:
                    return None
        elif found is None:
            return None
        if found is None:
            owner, name, entry, source = key, names[0], _BLANK, ""
        else:
            owner, name = found
            entry = known.entry(owner, name)
            source = known.source(entry.source)
            if self._on_conflict == "max" and entry.alt is not None:
                source = f"dearer of {source} and {known.source('litellm')}"
            elif entry.filled:
                source = f"{source} with {known.source('litellm')}"
            source = f"{source}, {known.date}"
        return RateCard(
            provider=owner,
            model=name,
            entry=entry,
            source=source if stated is None else f"{self._origins.get(stated[0], self._origin)} of {stated[0]}",
            given=None if stated is None else stated[1],
            dearest=self._on_conflict == "max",
        )

    def _override(self, provider: str | None, names: tuple[str, ...]) -> tuple[str, Mapping[str, int]] | None:
        if not self._given:
            return None
        for name in names:
            for key in (f"{provider}/{name}", name):
                if key in self._given:
                    return key, self._given[key]
        key = f"{provider}/*"
        return (key, self._given[key]) if key in self._given else None

    def _card_of(
        self, provider: str | None, named: str | None, model: str | None, asked: str | None
    ) -> RateCard | None:
        key = (provider, named, model, asked)
        try:
            return self._by_call[key]
        except KeyError:
            pass
        names = [name for name in (named, model, asked) if name]
        card = self._choose(provider, names)
        if max(map(len, names), default=0) <= MAX_NAME:
            if len(self._by_call) >= _MAX_CACHED:
                self._by_call.clear()
            self._by_call[key] = card
        return card

    def _choose(self, provider: str | None, names: list[str]) -> RateCard | None:
        """The card of the first name that has one; an override of a later name for the same model wins over it."""
        cards = [card for name in names if (card := self.resolve(provider, name)) is not None]
        if not cards:
            return None
        first = cards[0]
        if not self._given or first.stated:
            return first
        for card in cards[1:]:
            # A deployment's name is in no snapshot, so its override is about whatever answers to it.
            same = (card.provider, card.model) == (first.provider, first.model)
            if card.stated and (same or self._known.find(card.provider, (card.model,)) is None):
                return card
        return first

    def _check_whole(self, key: str) -> None:
        """An override of a model that the snapshot lacks has to be complete."""
        given = self._given[key]
        if _overrides.is_whole(given):
            return
        provider, names = candidates(None, key, self._known)
        if self._known.find(provider, names) is None:
            missing = " and ".join(name for name in ("input", "output") if name not in given)
            raise ConfigurationError(
                f"prices of {key!r}: {missing} missing, and no list price is known for the model; "
                "a price of 0 is free, a missing one is not"
            )

    def _parse_unknown(self, unknown: Unknown) -> RateCard | None:
        if unknown in ("deny", "allow"):
            return None
        if (
            not isinstance(unknown, Mapping)
            or set(unknown) != {"charge_as"}
            or not isinstance(unknown["charge_as"], str)
        ):
            raise ConfigurationError(
                f"unknown: expected 'deny', 'allow' or {{'charge_as': 'provider/model'}}, got {unknown!r}"
            )
        card = self.resolve(None, unknown["charge_as"])
        if card is None:
            raise ConfigurationError(f"unknown: no price is known for the model to charge as, {unknown['charge_as']!r}")
        return card


def _without_price(call: Call, *, allowed: bool) -> Call:
    return msgspec.structs.replace(
        call,
        cost_nanousd=0 if allowed else None,
        input_nanousd=0,
        output_picousd=0,
        price_source=UNPRICED if allowed else None,
        billed_model=None,
    )
