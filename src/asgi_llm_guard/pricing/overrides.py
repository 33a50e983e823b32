"""Prices that a service states itself: checked once, when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from pathlib import Path
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.pricing.snapshot import provider_id

__all__ = ["Given", "is_whole", "key_of", "parse", "read"]

Given = Mapping[str, int]
"""Pico-USD per token by rate, pico-USD per unit by unit, and limits in tokens."""

_PER_MILLION: Final = (
    "input",
    "output",
    "cache_read",
    "cache_write",
    "cache_write_1h",
    "audio_input",
    "audio_output",
    "audio_cache_read",
    "image_input",
    "image_output",
    "image_cache_read",
    "reasoning",
)
_PER_1K: Final = {"cost_per_1k_input": "input", "cost_per_1k_output": "output"}
_UNITS: Final = {
    "per_call": ("per_call", 1),
    "per_image": ("per_image", 1),
    "per_audio_minute": ("per_audio_ms", 60_000),
    "per_million_characters": ("per_character", 1_000_000),
    "per_web_search": ("per_web_search", 1),
    "per_search_unit": ("per_search_unit", 1),
}
"""By the key that a price is given by: the unit, and how many of it the price is for."""
_TOKENS: Final = ("context_window", "max_output_tokens")
_ALLOWED: Final = (
    f"{', '.join(_PER_MILLION)} ($ per million tokens); {', '.join(_PER_1K)} ($ per thousand tokens); "
    f"{', '.join(_UNITS)} ($); {', '.join(_TOKENS)} (tokens)"
)
_MAX_USD: Final = 1
"""For one token: above that, somebody has mixed up the units."""
_MAX_UNIT_USD: Final = 1_000
"""For one call, one image, one search, a minute, a million characters: likewise."""


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
        key = key_of(model)
        if key in parsed:
            raise ConfigurationError(
                f"prices of {model!r}: given twice, as names that differ only in case or provider alias"
            )
        given = _rates(model, prices)
        if key.endswith("/*") and not is_whole(given):
            raise ConfigurationError(
                f"prices of {model!r}: input and output are needed; a price of 0 is free, a missing one is not"
            )
        parsed[key] = given
    return parsed


def is_whole(given: Given) -> bool:
    """Whether it is a price without any list price beside it: of input and output, or of another unit."""
    return {"input", "output"} <= given.keys() or any(
        unit in given for unit, _ in _UNITS.values() if unit not in ("per_call", "per_web_search")
    )


def key_of(model: str) -> str:
    """The name that all spellings of a model have in common."""
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
        elif key in _UNITS:
            name, per = _UNITS[str(key)]
            amount = _pico(where, value, per, unit=True)
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


def _pico(where: str, value: object, per: int, *, unit: bool = False) -> int:
    """Dollars per so many tokens (or other units) as whole pico-dollars, rounded up."""
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
    if unit and (usd.adjusted() > 6 or usd > _MAX_UNIT_USD):
        raise ConfigurationError(f"{where}: more than ${_MAX_UNIT_USD:,}, got {value!r}; is it in $, and for so many?")
    if not unit and (usd.adjusted() > 6 or usd > _MAX_USD * per):
        raise ConfigurationError(
            f"{where}: more than $1 for one token, got {value!r}; is it $ per {'million' if per > 1000 else 'thousand'}?"
        )
    if usd and usd.adjusted() < -12:
        raise ConfigurationError(
            f"{where}: below one pico-dollar ($0.000000000001) for one token, got {value!r}; 0 is free"
        )
    return int((usd * 10**12 / per).to_integral_value(ROUND_CEILING))
