"""Whose API a host name stands for."""

from __future__ import annotations

import re
from typing import Final, Literal

__all__ = ["Platform", "platform_of"]

Platform = Literal["openai", "mistral", "groq", "openrouter", "vllm"]
"""Those who share OpenAI's paths and speak differently there; every other path tells by itself whose it is."""

_HOSTS: Final[tuple[tuple[re.Pattern[str], Platform], ...]] = (
    (re.compile(r"(.+\.)?api\.openai\.com"), "openai"),
    (re.compile(r"(.+\.)?mistral\.ai"), "mistral"),
    (re.compile(r"api\.groq\.com"), "groq"),
    (re.compile(r"openrouter\.ai"), "openrouter"),
)


def platform_of(host: str, home: Platform) -> Platform:
    """The platform that a `Host` header names; `home` for all others, loopback among them."""
    name = host.rsplit(":", maxsplit=1)[0].lower()
    return next((platform for pattern, platform in _HOSTS if pattern.fullmatch(name)), home)
