"""Settings that change while they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from asgi_llm_guard.control.state import Entry
from asgi_llm_guard.control.values import KnowledgeBase

__all__ = ["LiveSettings", "settings_of"]

_NOTHING: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType({})


class LiveSettings(Mapping[str, Mapping[str, object]]):
    """The settings of knowledge bases as they are followed. What code says for others goes behind it:
    `CacheScope(settings=ChainMap(control.knowledge_bases, {"handbook": {...}}))`.
    """

    __slots__ = ("_settings",)

    def __init__(self) -> None:
        self._settings = _NOTHING

    def use(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Give these from now on, all at once."""
        self._settings = settings

    def __getitem__(self, name: str) -> Mapping[str, object]:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


def settings_of(entries: Mapping[str, Entry[KnowledgeBase]]) -> Mapping[str, Mapping[str, object]]:
    """The settings that `CacheScope` reads.

    The version of the entry is part of the version of the documents: whatever is changed about a knowledge base,
    nothing of before is found, not even when it is changed back.
    """
    return MappingProxyType(
        {
            name: MappingProxyType(
                {"cache": base.cache, "acl": base.acl, "version": f"{changed}:{base.version or ''}"}
                if base.acl is not None
                else {"cache": base.cache}
            )
            for name, (base, changed) in entries.items()
        }
    )
