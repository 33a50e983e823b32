"""From a request or a few words to a `Call`: whose model it is, and at most how many tokens it may take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import replace

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import CacheWrites, Call, Target
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.estimate import Counter, Needs, message_needs, needs, output_tokens
from asgi_llm_guard.learning import LearnedOutput
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.policies.providers import models_of, provider_of
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.cards import RateCard
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Ask
from asgi_llm_guard.wire.peek import BodyView

__all__ = ["Describer", "as_used", "check_description"]

_LARGEST_WINDOW: Final = 2_000_000
"""No model of today takes more, in tokens: for those whose window is not known."""

_log = logging.getLogger("asgi_llm_guard")

_LIFETIMES: Final[tuple[CacheWrites, ...]] = ("none", "5m", "1h")

OLD_DAYS: Final = 60
"""List prices that are older are told of, once: in two months some provider has changed one."""


def check_description(
    model: object,
    *,
    input_tokens: object = None,
    max_output_tokens: object = None,
    choices: object = 1,
    assumed_output_tokens: object = None,
    images: object = 0,
    audio_ms: object = 0,
    characters: object = 0,
    web_searches: object = 0,
    search_units: object = 0,
    cache_writes: object = None,
) -> None:
    """Check what a call is described with.

    Raises:
        ConfigurationError: not a model's name, or a number that is not whole and large enough.
    """
    if not isinstance(model, str) or not model:
        raise ConfigurationError(f"model: expected a model's name such as 'openai/gpt-5.6-mini', got {model!r}")
    for name, value, least in (
        ("input_tokens", input_tokens, 0),
        ("max_output_tokens", max_output_tokens, 0),
        ("choices", choices, 1),
        ("assumed_output_tokens", assumed_output_tokens, 1),
        ("images", images, 0),
        ("audio_ms", audio_ms, 0),
        ("characters", characters, 0),
        ("web_searches", web_searches, 0),
        ("search_units", search_units, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigurationError(f"{name}: expected a whole number from {least}, got {value!r}")
    if cache_writes not in (None, "none", "5m", "1h"):
        raise ConfigurationError(f"cache_writes: expected 'none', '5m' or '1h', got {cache_writes!r}")


class Describer:
    """Bounds calls: input by bytes, output by the request's limit, cost by the dearest rate that may apply."""

    def __init__(
        self,
        *,
        prices: PriceBook,
        clock: Clock,
        counter: Counter | None,
        assumed_input_tokens: int,
        assumed_output_tokens: int | None,
        learned: LearnedOutput | None = None,
    ) -> None:
        self.prices = prices
        """May be replaced at any time; calls that are open keep their bound."""
        self.assumed_input_tokens = assumed_input_tokens
        self._clock = clock
        self._counter = counter
        self._assumed_output_tokens = assumed_output_tokens
        self._learned = learned
        self._seen: PriceBook | None = None
        self.known_models: Callable[[str], Sequence[Target]] | None = None
        """The models that answer to a name which is none of a provider's; nothing: no such name. `None`: there are none."""

    def describe(
        self,
        model: str,
        *,
        provider: str | None = None,
        input: object = None,  # noqa: A002 - the providers' own word
        input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        choices: int = 1,
        stream: bool = False,
        assumed_output_tokens: int | None = None,
        images: int = 0,
        audio_ms: int = 0,
        characters: int = 0,
        web_searches: int = 0,
        search_units: int = 0,
        cache_writes: CacheWrites | None = None,
    ) -> Call:
        """A call with its upper bounds.

        Args:
            model: as the provider names it, with or without its prefix (`openai/gpt-5.6-mini`).
            provider: where the name does not tell.
            input: text, messages or anything JSON-like; its tokens are bounded by its bytes.
            input_tokens: where the bound is known. With neither, `assumed_input_tokens` is taken,
                which is an estimate and not a bound.
            max_output_tokens: the call's own limit for one choice.
            choices: how many answers it asks for.
            stream: whether it is streamed.
            assumed_output_tokens: in place of a limit; `None`: the guard's, else the model's maximum.
            images: how many are generated, where each has its price.
            audio_ms: how much audio is sent along, where it is billed by its length.
            characters: how many are spoken, where speech is billed by them.
            web_searches: how many the provider may make.
            search_units: what a ranking is billed by.
            cache_writes: what of the input may be written to the provider's cache. `None`: as the input
                tells, if it is the keyword arguments of a call; else all of it, at the dearest price.

        Raises:
            ConfigurationError: not a model's name, or a number that is not whole and positive.
        """
        check_description(
            model,
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            choices=choices,
            assumed_output_tokens=assumed_output_tokens,
            images=images,
            audio_ms=audio_ms,
            characters=characters,
            web_searches=web_searches,
            search_units=search_units,
            cache_writes=cache_writes,
        )
        found, bare = provider_of(model)
        provider = provider or found
        if input_tokens is not None:
            needed = Needs(input_tokens=input_tokens)
        elif input is not None:
            needed = message_needs(input, provider=provider, model=bare, counter=self._counter)
        else:
            needed = Needs(input_tokens=self.assumed_input_tokens)
        call = Call(
            provider=provider,
            model=bare,
            requested=model,
            input_tokens=min(needed.input_tokens, MAX_AMOUNT),
            max_output_tokens=max_output_tokens,
            choices=choices,
            stream=stream,
            cache_writes=cache_writes or needed.cache_writes,
            may_have_audio=needed.may_have_audio,
            images=images,
            audio_ms=max(audio_ms, needed.audio_ms),
            characters=characters,
            web_searches=max(web_searches, needed.web_searches),
            search_units=max(search_units, needed.search_units),
            assumed=(input_tokens is None and input is None)
            or (max_output_tokens is None and bool(assumed_output_tokens or self._assumed_output_tokens)),
        )
        return self._bounded(call, assumed_output_tokens)

    def describe_body(
        self,
        ask: Ask,
        view: BodyView,
        *,
        provider: str | None,
        dialect: str,
        assumed_output_tokens: int | None,
        host: str | None = None,
    ) -> Call:
        """The call that a request's body describes. `host`: where it is sent, which is who sends the bill."""
        found, bare = provider_of(ask.model, host=host)
        if host is None and self.known_models and (targets := self.known_models(ask.model)):
            return self._one_of(
                [self.describe_target(ask, view, target, dialect=dialect, assumed_output_tokens=assumed_output_tokens)
                 for target in targets]
            )  # fmt: skip
        return self.describe_target(
            ask, view, Target(found or provider, bare), dialect=dialect, assumed_output_tokens=assumed_output_tokens
        )

    def describe_target(
        self, ask: Ask, view: BodyView, target: Target, *, dialect: str, assumed_output_tokens: int | None = None
    ) -> Call:
        """The call that a request's body is, where it is sent to `target`, whatever model the body names."""
        provider, model = target.provider, target.model
        named = target.priced_as or model
        card = self.prices.resolve(provider, named)
        window = card.context_window if card is not None else None
        if ask.input_tokens is None:
            needed = needs(view, provider=provider, model=named, window=window, counter=self._counter)
        else:
            needed = Needs(input_tokens=ask.input_tokens)
        call = Call(
            provider=provider,
            deployment=target.deployment,
            model=model,
            priced_as=target.priced_as,
            requested=ask.model,
            alternatives=ask.alternatives,
            dialect=dialect,
            input_tokens=min(needed.input_tokens, MAX_AMOUNT),
            output_tokens=self._output_tokens(ask.max_output_tokens, assumed_output_tokens, card, ask.choices),
            max_output_tokens=ask.max_output_tokens,
            choices=ask.choices,
            stream=ask.stream,
            service_tier=ask.service_tier,
            cache_writes=needed.cache_writes,
            may_have_audio=needed.may_have_audio,
            images=ask.images,
            audio_ms=max(ask.audio_ms, needed.audio_ms),
            characters=ask.characters,
            web_searches=needed.web_searches,
            search_units=needed.search_units,
            assumed=ask.max_output_tokens is None and bool(assumed_output_tokens or self._assumed_output_tokens),
        )
        if not ask.alternatives:
            return self._quoted(call)
        return self._bounded(self._needing(call, view), assumed_output_tokens)

    def _one_of(self, calls: list[Call]) -> Call:
        """The dearest of several calls, with all of them. One without a price is dearer than any."""
        ordered = sorted(calls, key=lambda call: (call.cost_nanousd is not None, -_cost(call)))
        return ordered[0] if len(ordered) == 1 else replace(ordered[0], one_of=tuple(ordered))

    def _needing(self, call: Call, view: BodyView) -> Call:
        """The call with what the neediest of the models that may answer takes of the same body."""
        for provider, bare in list(models_of(call))[1:]:
            card = self.prices.resolve(provider, bare)
            window = card.context_window if card is not None else None
            needed = needs(view, provider=provider, model=bare, window=window, counter=self._counter)
            call = replace(
                call,
                input_tokens=min(max(call.input_tokens, needed.input_tokens), MAX_AMOUNT),
                cache_writes=max(call.cache_writes, needed.cache_writes, key=_LIFETIMES.index),
            )
        return call

    def window(self, provider: str | None, model: str) -> int | None:
        """The context window of a model, in tokens; `None`: not known."""
        card = self.prices.resolve(provider, model)
        return card.context_window if card is not None else None

    @property
    def counts(self) -> bool:
        """Whether input tokens are counted, and not only bounded by bytes."""
        return self._counter is not None

    def clamped(self, call: Call, max_output_tokens: int) -> Call:
        """`call` with this output limit in place of its own."""
        return self._bounded(replace(call, max_output_tokens=max_output_tokens), None)

    def instead(self, call: Call, model: str) -> Call:
        """The same call of another model, under the name that a list has for it."""
        provider, bare = provider_of(model)
        other = replace(
            call, provider=provider or call.provider, model=bare, requested=model, priced_as=None, alternatives=()
        )
        return self._bounded(other, None)

    def longer(self, call: Call, output_tokens: int, *, capped: bool = True) -> Call:
        """`call` with this many output tokens in place of those that were expected; `capped`: at most as many as can be."""
        most = self.longest(call) if capped else None
        return self._quoted(replace(call, output_tokens=output_tokens if most is None else min(output_tokens, most)))

    def longest(self, call: Call) -> int | None:
        """The most output tokens that the request allows, else that the model gives, over all choices; `None`: not known."""
        if call.max_output_tokens is not None:
            return call.max_output_tokens * call.choices
        card = self.prices.resolve(call.provider, call.priced_as or call.model)
        if card is None or card.max_output_tokens is None:
            return None
        return int(card.max_output_tokens) * call.choices

    def most(self, call: Call, times: int) -> Call:
        """`call` with the most that is believed of a report of its usage: so many `times` what was expected; where
        that was an assumption, at least what its model can take and give."""
        if call.learned:
            call = self._bounded(call, None)
        most = replace(
            call,
            input_tokens=min(times * call.input_tokens, MAX_AMOUNT),
            output_tokens=min(times * call.output_tokens, MAX_AMOUNT),
            cost_nanousd=None if call.cost_nanousd is None else min(times * call.cost_nanousd, MAX_AMOUNT),
        )
        if not call.assumed:
            return most
        card = self.prices.resolve(call.provider, call.priced_as or call.model)
        window = (card.context_window if card is not None else None) or _LARGEST_WINDOW
        longest = (card.max_output_tokens if card is not None else None) or _LARGEST_WINDOW
        able = self._quoted(replace(call, input_tokens=window, output_tokens=longest * call.choices))
        return replace(
            most,
            input_tokens=max(most.input_tokens, able.input_tokens),
            output_tokens=max(most.output_tokens, able.output_tokens),
            cost_nanousd=None if most.cost_nanousd is None else max(most.cost_nanousd, able.cost_nanousd or 0),
        )

    def held(self, route: str | None, call: Call) -> Call:
        """`call` as it is held for: with the output that most answers on `route` were not longer than, where that
        is known and less than its bound."""
        if self._learned is None or call.learned:
            return call
        tokens = self._learned.output_tokens(route, call, self._clock.now_ms())
        if tokens is None or tokens >= call.output_tokens:
            return call
        return self._quoted(replace(call, output_tokens=tokens, learned=True))

    def learn(self, route: str | None, call: Call, usage: Usage) -> None:
        """Take what an answer to `call` was measured to use."""
        if self._learned is not None:
            self._learned.observe(route, call, usage, self._clock.now_ms())

    def _bounded(self, call: Call, assumed_output_tokens: int | None) -> Call:
        bound = max(
            self._output_tokens(
                each.max_output_tokens,
                assumed_output_tokens,
                self.prices.resolve(each.provider, each.priced_as or each.model),
                each.choices,
            )
            for each in _each_model(call)
        )
        return self._quoted(replace(call, output_tokens=bound, learned=False))

    def _quoted(self, call: Call) -> Call:
        prices, now_ms = self.prices, self._clock.now_ms()
        if prices is not self._seen:
            self._seen = prices
            _tell_of_age(prices, now_ms)
        if not call.alternatives:
            return prices.quote(call, now_ms, service_tier=call.service_tier)
        quotes = [prices.quote(each, now_ms, service_tier=each.service_tier) for each in _each_model(call)]
        unknown = next((quote for quote in quotes if quote.cost_nanousd is None), None)
        dearest = unknown or max(quotes, key=_cost)
        dearest_token = max(quote.output_picousd for quote in quotes)
        return replace(dearest, provider=call.provider, model=call.model, output_picousd=dearest_token)

    def _output_tokens(self, limit: int | None, assumed: int | None, card: RateCard | None, choices: int) -> int:
        model_max = card.max_output_tokens if card is not None else None
        return output_tokens(limit, assumed or self._assumed_output_tokens, model_max, choices)


def as_used(usage: Usage, cost_nanousd: int | None) -> Call:
    """A call as it turned out to be, for policies that are asked after it."""
    provider, model = provider_of(usage.model)
    return Call(
        provider=provider,
        model=model or "unknown",
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cost_nanousd=cost_nanousd,
    )


def _each_model(call: Call) -> list[Call]:
    """The call as each of the models that may answer would take it."""
    first, *others = models_of(call)
    mine = replace(call, provider=first[0], model=first[1])
    return [mine, *(replace(call, provider=provider, model=model, priced_as=None) for provider, model in others)]


def _cost(call: Call) -> int:
    return call.cost_nanousd or 0


def _tell_of_age(prices: PriceBook, now_ms: int) -> None:
    compiled = datetime.fromisoformat(prices.date).replace(tzinfo=UTC)
    days = (now_ms - int(compiled.timestamp()) * 1000) // 86_400_000
    if days > OLD_DAYS:
        _log.warning(
            "the price list is %d days old (%s): take a newer release of asgi-llm-guard, or state the prices that "
            "have changed as overrides",
            days,
            prices.date,
        )
