"""Prices that a service states itself: checked once, when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from pathlib import Path
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing.snapshot import provider_id

__all__ = ["Given", "parse", "read"]

Given = Mapping[str, int]
"""Pico-USD per token by rate, `per_call` in pico-USD, and limits in tokens."""

_PER_MILLION: Final = (
    "input",
    "output",
    "cache_read",
    "cache_write",
    "cache_write_1h",
    "audio_input",
    "audio_output",
    "audio_cache_read",
    "reasoning",
)
_PER_1K: Final = {"cost_per_1k_input": "input", "cost_per_1k_output": "output"}
_TOKENS: Final = ("context_window", "max_output_tokens")
_ALLOWED: Final = (
    f"{', '.join(_PER_MILLION)} ($ per million tokens); {', '.join(_PER_1K)} ($ per thousand tokens); "
    f"per_call ($); {', '.join(_TOKENS)} (tokens)"
)
_MAX_PICO: Final = 10**12
"""One dollar for one token: above that, somebody has mixed up the units."""


def read(overrides: Mapping[str, object] | str | Path | None) -> tuple[Mapping[str, object], str]:
    """The models that overrides name, and where they come from, for people to read.

    A path is a TOML file with one table for each model: `["openai/gpt-4o"]`, `input = 2.5`.

    Raises:
        ConfigurationError: the file cannot be read or is not TOML.
    """
    if overrides is None:
        return {}, "override"
    if isinstance(overrides, Mapping):
        return overrides, "override"
    import tomllib

    path = Path(overrides)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal), f"override ({path.name})"
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"overrides: cannot read prices from {str(path)!r}: {error}") from error


def parse(models: Mapping[str, object]) -> dict[str, Given]:
    """Checked rates by the key that a model is looked up by: `provider/model`, `provider/*` or a bare name.

    Raises:
        ConfigurationError: an unknown key, a value that is no price, or two ways of saying the same rate.
    """
    parsed: dict[str, Given] = {}
    for model, prices in models.items():
        if not isinstance(model, str) or not model.strip() or model.startswith("*"):
            raise ConfigurationError(f"prices: expected a model such as 'openai/gpt-4o', got {model!r}")
        if not isinstance(prices, Mapping):
            raise ConfigurationError(f"prices of {model!r}: expected a table of {_ALLOWED}; got {prices!r}")
        key = _key(model)
        if key in parsed:
            raise ConfigurationError(
                f"prices of {model!r}: given twice, as names that differ only in case or provider alias"
            )
        given = _rates(model, prices)
        if key.endswith("/*") and not {"input", "output"} <= given.keys():
            raise ConfigurationError(
                f"prices of {model!r}: input and output are needed; a price of 0 is free, a missing one is not"
            )
        parsed[key] = given
    return parsed


def _key(model: str) -> str:
    prefix, slash, rest = model.strip().lower().partition("/")
    return f"{provider_id(prefix)}/{rest}" if slash else prefix


def _rates(model: str, prices: Mapping[object, object]) -> dict[str, int]:
    given: dict[str, int] = {}
    for key, value in prices.items():
        where = f"prices of {model!r}: {key}"
        if key in _PER_MILLION:
            name, amount = str(key), _pico(where, value, 1_000_000)
        elif key in _PER_1K:
            name, amount = _PER_1K[str(key)], _pico(where, value, 1_000)
        elif key == "per_call":
            name, amount = "per_call", _pico(where, value, 1)
        elif key in _TOKENS:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_AMOUNT:
                raise ConfigurationError(f"{where}: expected a whole number of tokens from 1, got {value!r}")
            name, amount = str(key), value
        else:
            raise ConfigurationError(f"{where}: not a price (value {value!r}); allowed are {_ALLOWED}")
        if name in given:
            raise ConfigurationError(
                f"{where}: the {name} price is given twice, by the million and by the thousand; keep one"
            )
        given[name] = amount
    if not given:
        raise ConfigurationError(f"prices of {model!r}: no price given; allowed are {_ALLOWED}")
    return given


def _pico(where: str, value: object, per: int) -> int:
    """Dollars per so many tokens as whole pico-dollars, rounded up."""
    wrong = ConfigurationError(
        f"{where}: expected a price in $ such as 2.5 (0 is free), got {value!r}; allowed are {_ALLOWED}"
    )
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise wrong
    try:
        usd = Decimal(value.strip().removeprefix("$") if isinstance(value, str) else str(value))
    except InvalidOperation:
        raise wrong from None
    if not usd.is_finite() or usd < 0:
        raise wrong
    if usd.adjusted() > 6 or usd * 10**12 > _MAX_PICO * per:
        raise ConfigurationError(
            f"{where}: more than $1 for one token, got {value!r}; is it $ per {'million' if per > 1000 else 'thousand'}?"
        )
    if usd and usd.adjusted() < -12:
        raise ConfigurationError(
            f"{where}: below one pico-dollar ($0.000000000001) for one token, got {value!r}; 0 is free"
        )
    return int((usd * 10**12 / per).to_integral_value(ROUND_CEILING))
