"""Who asks, and for what: the values that policies decide on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["CacheWrites", "Call", "Context", "Target"]

CacheWrites = Literal["none", "5m", "1h"]
"""What of its input a call can have written to the provider's cache: nothing, for the usual time, for a longer one
(which costs more)."""

_NO_PARAMS: Mapping[str, object] = {}


class Target(msgspec.Struct, frozen=True):
    """A model that a call may be sent to."""

    provider: str | None
    model: str
    """As the provider names it."""
    priced_as: str | None = None
    """The model whose price and window are its own; `None`: `model`."""
    deployment: str | None = None


class Context(msgspec.Struct, frozen=True, kw_only=True, dict=False):
    """Who asks: who was verified, and the ids that narrow it down.

    `caller`, `user`, `departments` and `agent` come from a verified source. `session` is free
    text from the client and lives under its caller: it can narrow a limit, never widen one.
    """

    caller: str | None = None
    """The verified principal. `None`: the shared anonymous caller."""
    user: str | None = None
    """The person behind the caller, where the two differ."""
    departments: tuple[str, ...] = ()
    """All of them are charged, in full."""
    agent: str | None = None
    session: str | None = None
    tags: tuple[str, ...] = ()
    request_id: str | None = None
    params: Mapping[str, object] = _NO_PARAMS
    """Limits that belong to the caller (an API key's `max_iterations`), checked where they are loaded."""
    route: str | None = None
    """The template of the guarded route that the request came in by."""

    def __post_init__(self) -> None:
        # The usual case first: one of these is made for every request.
        if type(self.departments) is tuple and type(self.tags) is tuple:
            for value in (self.caller, self.user, self.agent, self.session):
                if value is not None and (type(value) is not str or not value):
                    break
            else:
                return
        self._check()

    def _check(self) -> None:
        for name in ("caller", "user", "agent", "session"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigurationError(f"Context.{name}: expected a non-empty text or None, got {value!r}")
        for name in ("departments", "tags"):
            if isinstance(getattr(self, name), str):
                raise ConfigurationError(
                    f"Context.{name}: expected a list of texts, got the text {getattr(self, name)!r}"
                )
            if not isinstance(getattr(self, name), tuple):
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name)))


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One LLM call, as it is known before it is made. Token and cost figures are upper bounds, unless `learned`."""

    provider: str | None = None
    """Who is called: `openai`, `anthropic`, … `None`: not known."""
    deployment: str | None = None
    """The name of the gateway's deployment that it goes to; `None`: it goes to none."""
    model: str
    """The resolved model, without the provider's prefix."""
    priced_as: str | None = None
    """The model whose price and window are its own, where `model` is a name that somebody gave it."""
    requested: str | None = None
    """The model as the request names it."""
    alternatives: tuple[str, ...] = ()
    """Other models that may answer instead of it or beside it, as the request names them. The bounds cover each of
    them, and a list of allowed models must have them all."""
    dialect: str | None = None
    """The wire format of the request: `openai`, …"""
    input_tokens: int = 0
    """At most this many input tokens."""
    output_tokens: int = 0
    """At most this many output tokens, over all choices; fewer, if `learned`."""
    learned: bool = False
    """`output_tokens` is what most answers were not longer than, and no bound."""
    assumed: bool = False
    """Its input, or the length of its answer, was not told: the figures are assumptions in part, and no bounds."""
    max_output_tokens: int | None = None
    """The request's own limit for one choice; `None`: it has none."""
    choices: int = 1
    stream: bool = False
    service_tier: str | None = None
    """The tier that the request asks for, where prices differ by it."""
    cache_writes: CacheWrites = "1h"
    may_have_audio: bool = True
    """Its input may be audio in part."""
    images: int = 0
    """At most so many images are generated, over all choices, where each has its price."""
    audio_ms: int = 0
    """At most so much audio is sent along, in milliseconds, where it is billed by its length."""
    characters: int = 0
    """At most so many characters are spoken, where speech is billed by them."""
    web_searches: int = 0
    """At most so many searches are made by the provider."""
    search_units: int = 0
    """At most so many units of a ranking, where it is billed by them."""
    cost_nanousd: int | None = None
    """At most this cost (but for `learned`); `None`: no price is known for the model."""
    input_nanousd: int = 0
    """The part of `cost_nanousd` that the input alone makes up."""
    output_picousd: int = 0
    """The price of one more output token, in pico-USD (10^-12), all choices included."""
    price_source: str | None = None
    """Where the price comes from, and its date."""
    billed_model: str | None = None
    """The model whose price it is, if another one (`charge_as`)."""
    one_of: tuple[Call, ...] = ()
    """It is one of these, the dearest first, and which one is not known yet: it is asked for by a name that several
    models answer to. Its own figures are those of the dearest."""

    @property
    def total_tokens(self) -> int:
        """The upper bound of input and output together."""
        return self.input_tokens + self.output_tokens
