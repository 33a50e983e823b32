"""From a request or a few words to a `Call`: whose model it is, and at most how many tokens it may take."""

from __future__ import annotations

from msgspec.structs import replace

from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.estimate import Counter, message_tokens, output_tokens
from asgi_llm_guard.estimate import input_tokens as tokens_of_body
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.policies.providers import provider_of
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.cards import RateCard
from asgi_llm_guard.wire.base import Ask
from asgi_llm_guard.wire.peek import BodyView

__all__ = ["Describer", "check_description"]


def check_description(
    model: object,
    *,
    input_tokens: object = None,
    max_output_tokens: object = None,
    choices: object = 1,
    assumed_output_tokens: object = None,
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
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigurationError(f"{name}: expected a whole number from {least}, got {value!r}")


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
    ) -> None:
        self.prices = prices
        """May be replaced at any time; calls that are open keep their bound."""
        self.assumed_input_tokens = assumed_input_tokens
        self._clock = clock
        self._counter = counter
        self._assumed_output_tokens = assumed_output_tokens

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

        Raises:
            ConfigurationError: not a model's name, or a number that is not whole and positive.
        """
        check_description(
            model,
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            choices=choices,
            assumed_output_tokens=assumed_output_tokens,
        )
        if input_tokens is None:
            input_tokens = self.assumed_input_tokens
            if input is not None:
                input_tokens = message_tokens(input, model=model, counter=self._counter)
        found, bare = provider_of(model)
        call = Call(
            provider=provider or found,
            model=bare,
            requested=model,
            input_tokens=min(input_tokens, MAX_AMOUNT),
            max_output_tokens=max_output_tokens,
            choices=choices,
            stream=stream,
        )
        return self._bounded(call, assumed_output_tokens)

    def describe_body(
        self, ask: Ask, view: BodyView, *, provider: str | None, dialect: str, assumed_output_tokens: int | None
    ) -> Call:
        """The call that a request's body describes."""
        found, bare = provider_of(ask.model)
        provider = found or provider
        card = self.prices.resolve(provider, bare)
        window = card.context_window if card is not None else None
        call = Call(
            provider=provider,
            model=bare,
            requested=ask.model,
            dialect=dialect,
            input_tokens=min(tokens_of_body(view, model=bare, window=window, counter=self._counter), MAX_AMOUNT),
            output_tokens=self._output_tokens(ask.max_output_tokens, assumed_output_tokens, card, ask.choices),
            max_output_tokens=ask.max_output_tokens,
            choices=ask.choices,
            stream=ask.stream,
            service_tier=ask.service_tier,
        )
        return self.prices.quote(call, self._clock.now_ms(), service_tier=call.service_tier)

    def clamped(self, call: Call, max_output_tokens: int) -> Call:
        """`call` with this output limit in place of its own."""
        return self._bounded(replace(call, max_output_tokens=max_output_tokens), None)

    def _bounded(self, call: Call, assumed_output_tokens: int | None) -> Call:
        card = self.prices.resolve(call.provider, call.model)
        bound = self._output_tokens(call.max_output_tokens, assumed_output_tokens, card, call.choices)
        bounded = replace(call, output_tokens=bound)
        return self.prices.quote(bounded, self._clock.now_ms(), service_tier=call.service_tier)

    def _output_tokens(self, limit: int | None, assumed: int | None, card: RateCard | None, choices: int) -> int:
        model_max = card.max_output_tokens if card is not None else None
        return output_tokens(limit, assumed or self._assumed_output_tokens, model_max, choices)
