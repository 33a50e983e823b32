"""Prices and the cache, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr, model_validator

from asgi_llm_guard.cache import Cache
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.settings.parts import Number, Table
from asgi_llm_guard.storage import open_storage

__all__ = ["CacheSettings", "PriceSettings"]


class PriceSettings(Table):
    """`[prices]`: the arguments of `PriceBook.snapshot`."""

    file: Path | None = None
    """A TOML file with prices, relative to the settings file."""
    overrides: dict[str, dict[str, Any]] | None = None
    """Prices by model."""
    unknown: Any = "deny"
    on_conflict: Literal["genai", "max"] = "genai"
    trust_reported: Literal["missing", "always", "never"] = "missing"

    @model_validator(mode="after")
    def _check(self) -> PriceSettings:
        if self.file is not None and self.overrides is not None:
            raise ValueError("expected either file or overrides")
        return self

    def build(self, directory: Path) -> PriceBook:
        """The price book, with the file read."""
        return PriceBook.snapshot(
            overrides=self.overrides if self.file is None else directory / self.file,
            unknown=self.unknown,
            on_conflict=self.on_conflict,
            trust_reported=self.trust_reported,
        )


class CacheSettings(Table):
    """`[cache]`: the arguments of `Cache`. `None`: as its own default."""

    ttl: str | None = None
    streams: bool | None = None
    wait: str | None = None
    storage: SecretStr | None = None
    """A URL, for a storage that is the cache's alone; shown nowhere, because it may hold a password."""
    ignore: list[str] | None = None
    version: str | None = None
    max_value_bytes: Number | None = None
    max_bytes: Number | None = None
    max_entries: Number | None = None

    @model_validator(mode="after")
    def _check(self) -> CacheSettings:
        Cache(**self._arguments())
        return self

    def build(self) -> Cache:
        """The cache's settings, with its storage opened."""
        if self.storage is None:
            return Cache(**self._arguments())
        return Cache(storage=open_storage(self.storage.get_secret_value(), clock=SystemClock()), **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "storage"}
        return {name: value for name, value in given.items() if value is not None}
