"""The price snapshot that ships with the package, as `scripts/compile_prices.py` writes it.

The file is read when the first model is looked up; each entry is decoded when it is first asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Final

import msgspec

__all__ = ["MAX_NAME", "PROVIDERS", "Entry", "Price", "Snapshot", "bundled", "candidates", "provider_id"]

MAX_NAME: Final = 256
"""Longer names are nobody's model."""

PROVIDERS: Final = {
    "alibaba_qwen": "dashscope",
    "amazon_bedrock": "aws",
    "aws_bedrock": "aws",
    "azure_ai": "azure",
    "azure_openai": "azure",
    "bedrock": "aws",
    "bedrock_converse": "aws",
    "cohere_chat": "cohere",
    "fireworks_ai": "fireworks",
    "gemini": "google",
    "github_copilot": "github-copilot",
    "google_ai": "google",
    "google_genai": "google",
    "google_vertex": "google",
    "grok": "x-ai",
    "mistral_ai": "mistral",
    "mistralai": "mistral",
    "moonshot": "moonshotai",
    "moonshot_ai": "moonshotai",
    "together_ai": "together",
    "vertex": "google",
    "vertex_ai": "google",
    "voyage": "voyageai",
    "voyage_ai": "voyageai",
    "x_ai": "x-ai",
    "xai": "x-ai",
    "zhipu": "zhipuai",
}
"""Other names of providers, with `_` for `-` and `.`, as the snapshot's."""

#: Who is asked, in this order, when nobody says whose model it is: those who sell their own.
_OWN: Final = (
    "openai",
    "anthropic",
    "google",
    "mistral",
    "cohere",
    "deepseek",
    "x-ai",
    "perplexity",
    "voyageai",
    "ai21",
)

#: A model's date or revision: the same model at the same price unless it has an entry of its own.
_DATED: Final = re.compile(r"(?:[-@]20\d\d-\d\d-\d\d|[-@]20\d{6})$", re.ASCII)
_REVISION: Final = re.compile(r"(?:-v\d+)?:\d+$|-v\d+$", re.ASCII)
#: Bedrock's cross-region profiles. The entry without a region is the dearer, regional price.
_REGION: Final = re.compile(r"^(?:us-gov|us|eu|apac|au|jp|ca|sa|in|me|af|il|global)\.", re.ASCII)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in pico-USD for one token, and when they hold. `None`: not priced apart from the rate it falls back on."""

    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    cache_write_1h: int | None = None
    audio_input: int | None = None
    audio_output: int | None = None
    audio_cache_read: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    image_cache_read: int | None = None
    reasoning: int | None = None
    video_input: int | None = None
    """Usage does not tell video apart from text."""
    video_output: int | None = None
    per_call: int | None = None
    """Pico-USD for each call, on top."""
    above: tuple[tuple[int, Price], ...] = ()
    """Rates that hold for the whole call once its input is larger than so many tokens; ascending."""
    since: int = 0
    """The instant from which on they hold, in ms; always a UTC midnight."""
    hours: tuple[int, int] | None = None
    """The minutes of the UTC day, from and up to, in which they hold."""


class Entry(Price, frozen=True, kw_only=True):
    """Everything the snapshot knows of one model."""

    source: str
    per_image: int | None = None
    """Pico-USD, like the next four: for each image that is generated."""
    per_audio_ms: int | None = None
    per_character: int | None = None
    per_web_search: int | None = None
    per_search_unit: int | None = None
    context: int | None = None
    max_output: int | None = None
    filled: tuple[str, ...] = ()
    """The rates that only the second source has."""
    also: tuple[str, ...] = ()
    """What the provider bills in units that no figure here has, by the name of the unit."""
    dated: tuple[Price, ...] = ()
    """Later ones win over earlier ones, and over the entry itself."""
    tiers: dict[str, tuple[Price, ...]] = {}
    """By service tier, what differs from the standard price; earlier ones win."""
    alt: Price | None = None
    """The second source's price, where the two differ."""


class _Provider(msgspec.Struct, frozen=True):
    fallback: tuple[str, ...]
    aliases: dict[str, str]
    models: dict[str, msgspec.Raw]


_NOBODY: Final = _Provider((), {}, {})


class _File(msgspec.Struct, frozen=True):
    schema: int
    date: str
    sources: dict[str, dict[str, str]]
    providers: dict[str, _Provider]


class Snapshot:
    """Entries by provider and name."""

    __slots__ = ("_file",)

    def __init__(self, content: bytes) -> None:
        self._file = msgspec.json.decode(content, type=_File)

    def __len__(self) -> int:
        """How many models it has, over all providers."""
        return sum(len(provider.models) for provider in self._file.providers.values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Provider and name of every model."""
        for provider_name, provider in self._file.providers.items():
            for name in provider.models:
                yield provider_name, name

    @property
    def date(self) -> str:
        """The day it was compiled, `YYYY-MM-DD`."""
        return self._file.date

    def source(self, key: str) -> str:
        """A source's name and version."""
        source = self._file.sources[key]
        return f"{source['name']} {source['version']}"

    def knows(self, provider: str) -> bool:
        """Whether it has models of a provider."""
        return provider in self._file.providers

    def entry(self, provider: str, name: str) -> Entry:
        """One entry, by the key that `find` gave."""
        return msgspec.json.decode(self._file.providers[provider].models[name], type=Entry)

    def find(self, provider: str | None, names: tuple[str, ...]) -> tuple[str, str] | None:
        """The key of the first of `names` that has an entry with `provider`, or one that it resells.

        Without a provider: with one that sells its own models, else with the only one that has it.
        """
        if provider is not None:
            listed = self._file.providers.get(provider)
            return self._among((provider, *listed.fallback), names) if listed else None
        found = self._among(_OWN, names)
        if found:
            return found
        for name in names:
            sellers = [
                key for key, seller in self._file.providers.items() if name in seller.models or name in seller.aliases
            ]
            if len(sellers) == 1:
                return self._among(sellers, (name,))
        return None

    def _among(self, providers: tuple[str, ...] | list[str], names: tuple[str, ...]) -> tuple[str, str] | None:
        for key in providers:
            listed = self._file.providers.get(key, _NOBODY)
            for name in names:
                if name in listed.models:
                    return key, name
                if name in listed.aliases:
                    return key, listed.aliases[name]
        return None


@functools.cache
def bundled() -> Snapshot:
    """The snapshot of this release."""
    from importlib import resources

    return Snapshot((resources.files("asgi_llm_guard") / "data" / "prices.json").read_bytes())


def provider_id(name: str | None) -> str | None:
    """A provider as the snapshot calls it; unknown ones in lower case."""
    if name is None:
        return None
    name = name.strip().lower()
    return PROVIDERS.get(name.replace("-", "_").replace(".", "_"), name) or None


def candidates(provider: str | None, model: str, known: Snapshot) -> tuple[str | None, tuple[str, ...]]:
    """The provider, and the names to look for, the most literal first.

    A name's case, its provider's prefix, resource paths, a full date, `:free` and Bedrock's regions and
    revisions make no other model, unless it has an entry of its own. Anything else does.
    """
    name = model.strip().lower()
    if not name or len(name) > MAX_NAME:
        return provider, ()
    names = [name]
    if name.startswith("arn:"):
        names.append(name.rpartition("/")[2])
    elif name.startswith(("models/", "publishers/", "projects/")):
        names.append(name.rpartition("models/")[2])
    elif name.startswith("ft:"):
        names = [":".join(name.split(":")[:2])]
    prefix, slash, rest = name.partition("/")
    if slash and rest:
        owner = provider_id(prefix)
        if provider is None and owner is not None and known.knows(owner):
            provider = owner
        if owner == provider:
            names.append(rest)
    if provider == "aws":
        names += [bare for n in names if (bare := _REGION.sub("", n)) != n]
        names += [bare for n in names if (bare := _REVISION.sub("", n)) != n]
    names += [n.removesuffix(":free") for n in names if n.endswith(":free")]
    names += [bare for n in names if (bare := _DATED.sub("", n)) != n]
    return provider, tuple(dict.fromkeys(names))
