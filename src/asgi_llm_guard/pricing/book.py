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
from asgi_llm_guard.pricing.cards import RateCard, Rates, tier_name
from asgi_llm_guard.pricing.snapshot import MAX_NAME, Entry, Snapshot, bundled, candidates, provider_id
from asgi_llm_guard.usage import Usage

__all__ = ["Cost", "OnConflict", "PriceBook", "Unknown"]

Unknown = Literal["deny", "allow"] | Mapping[str, str]
OnConflict = Literal["genai", "max"]

UNPRICED: Final = "unpriced (allowed)"
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
        "_snapshot",
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
    ) -> None:
        """`snapshot`: `None` takes the one of this release, when it is first needed. The rest as `PriceBook.snapshot`."""
        if on_conflict not in ("genai", "max"):
            raise ConfigurationError(f"on_conflict: expected 'genai' or 'max', got {on_conflict!r}")
        self._snapshot = snapshot
        self._on_conflict: OnConflict = on_conflict
        self.overrides, self._origin = _overrides.read(overrides)
        """The prices that the service states itself, as they were given."""
        self._given = _overrides.parse(self.overrides)
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
    ) -> PriceBook:
        """The prices that ship with this release.

        `overrides`: prices by `provider/model`, `provider/*` or bare model, or the path of a TOML file with
        them: `input`, `output`, `cache_read`, `cache_write`, `cache_write_1h`, `audio_input`, `audio_output`,
        `audio_cache_read` and `reasoning` in $ per million tokens, `per_call` in $; `cost_per_1k_input` and
        `cost_per_1k_output` in $ per thousand. They win over the snapshot. For a model that the snapshot
        knows, rates that are not given change in proportion; any other needs `input` and `output`.
        A price of 0 is free; a missing one is not; with both
        `input` and `output`, the list's fee for each call falls away.

        `unknown`: what a model without a price costs. `"deny"`: unknown, so budgets refuse it.
        `"allow"`: 0, marked as unpriced. `{"charge_as": "openai/gpt-…"}`: what that model costs.

        `on_conflict`: where the snapshot's two sources differ, `"genai"` takes the first, `"max"` the dearer.

        Raises:
            ConfigurationError: one of them is malformed; names the model, the key and the value.
        """
        return cls(None, overrides=overrides, unknown=unknown, on_conflict=on_conflict)

    def with_overrides(self, overrides: Mapping[str, object] | str | Path | None) -> PriceBook:
        """The same book with these overrides in place of its own. Takes effect with the first call that uses it.

        Raises:
            ConfigurationError: as `snapshot`.
        """
        return type(self)(self._snapshot, overrides=overrides, unknown=self._unknown, on_conflict=self._on_conflict)

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

        All input at the dearest rate that the input's bound can reach (cache writes, audio and long
        contexts included), all output at the dearest output rate, and what each call costs; rounded up
        once. The standard service tier, and `service_tier` if that is dearer.
        """
        card = self.resolve(call.provider, call.model)
        billed = None
        if card is None:
            if self._charge_as is None:
                allowed = self._unknown == "allow"
                return msgspec.structs.replace(
                    call,
                    cost_nanousd=0 if allowed else None,
                    input_nanousd=0,
                    output_picousd=0,
                    price_source=UNPRICED if allowed else None,
                    billed_model=None,
                )
            card = self._charge_as
            billed = card.model
        bounds = card.steady_ceiling
        if bounds is None:
            bounds = card.ceiling(at_ms, tier_name(service_tier))
        input_tokens = call.input_tokens
        _, input_rate, output_rate = bounds[0]
        if len(bounds) > 1:
            for above, raised_input, raised_output in bounds:
                if input_tokens > above:
                    input_rate, output_rate = raised_input, raised_output
        input_pico = input_tokens * input_rate + card.per_call
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
        """What a usage costs at `at_ms`, exactly, rounded up once.

        The price is that of the model which the response names (`usage.model`, then `model`), if it has
        one, else of the one that was asked for (`call.model`). A price that the service states for the
        model asked for holds for the response too, unless that is of another model.

        Unknown, never 0, if input or output is unknown (and not free), or the figures contradict each
        other. Never raises.
        """
        named = usage.model if isinstance(usage.model, str) else None
        card = self._card_of(provider, named, model, call.model if call is not None else None)
        if card is None:
            if self._charge_as is None:
                return _ALLOWED if self._unknown == "allow" else _UNKNOWN
            card = self._charge_as
        sheet = card.steady
        if sheet is None or usage.service_tier is not None:
            sheet = card.sheet(at_ms, tier_name(usage.service_tier))
        return Cost(_nanousd(sheet, usage), card.source, card.model)

    # ------------------------------------------------------------------------------ inside

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
            if found is None and not _whole(stated[1]):
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
            source=source if stated is None else f"{self._origin} of {stated[0]}",
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
        if _whole(given):
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


def _whole(given: Mapping[str, int]) -> bool:
    return "input" in given and "output" in given


def _nanousd(sheet: tuple[tuple[int, Rates], ...], usage: Usage) -> int | None:
    """Nano-USD for a usage, rounded up; `None` if it is unknown or contradicts itself."""
    total_input = usage.input_tokens
    total_output = usage.output_tokens
    rates = sheet[0][1]
    if type(total_input) is not int or type(total_output) is not int:
        return _nanousd_of_part(sheet, usage)
    if len(sheet) > 1:
        for above, raised in sheet:
            if total_input > above:
                rates = raised
    read = usage.cache_read_tokens or 0
    write = usage.cache_write_tokens or 0
    write_1h = usage.cache_write_1h_tokens or 0
    audio_input = usage.input_audio_tokens or 0
    audio_output = usage.output_audio_tokens or 0
    reasoning = usage.reasoning_tokens or 0
    pico = rates.per_call + total_input * rates.input + total_output * rates.output
    if read or write or write_1h or audio_input or audio_output or reasoning:
        parts = (read, write, write_1h, audio_input, audio_output, reasoning)
        if any(type(part) is not int or part < 0 for part in parts):
            return None
        plain = total_input - read - write
        if plain < 0 or write_1h > write or audio_input > total_input or audio_output + reasoning > total_output:
            return None
        # Audio that was neither read from nor written to a cache comes first; the rest was cached audio.
        fresh_audio = min(audio_input, plain)
        read_audio = min(audio_input - fresh_audio, read)
        pico += (
            read * (rates.cache_read - rates.input)
            + (write - write_1h) * (rates.cache_write - rates.input)
            + write_1h * (rates.cache_write_1h - rates.input)
            + fresh_audio * (rates.audio_input - rates.input)
            + read_audio * (rates.audio_cache_read - rates.cache_read)
            + audio_output * (rates.audio_output - rates.output)
            + reasoning * (rates.reasoning - rates.output)
        )
    if total_input < 0 or total_output < 0 or pico > MAX_AMOUNT * 1000:
        return None
    return -(-pico // 1000)


def _nanousd_of_part(sheet: tuple[tuple[int, Rates], ...], usage: Usage) -> int | None:
    """What a usage costs of which a part is unknown: known only if the unknown part is free at every size."""
    known_input, known_output = usage.input_tokens, usage.output_tokens
    everything = [rates for _, rates in sheet]
    if known_input is None:
        if any(_input_rates(rates) != {0} for rates in everything):
            return None
        known_input = 0
    if known_output is None:
        if any({rates.output, rates.audio_output, rates.reasoning} != {0} for rates in everything):
            return None
        known_output = 0
    if type(known_input) is not int or type(known_output) is not int:
        return None
    return _nanousd(sheet, msgspec.structs.replace(usage, input_tokens=known_input, output_tokens=known_output))


def _input_rates(rates: Rates) -> set[int]:
    return {
        rates.input,
        rates.cache_read,
        rates.cache_write,
        rates.cache_write_1h,
        rates.audio_input,
        rates.audio_cache_read,
    }
