"""The labels of metrics: what the configuration and the price list know, and a bounded number of it. All else is `other`."""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.context import Call
from asgi_llm_guard.policies.providers import KNOWN_PROVIDERS
from asgi_llm_guard.pricing.book import UNPRICED
from asgi_llm_guard.telemetry.names import OTHER

__all__ = ["Labels"]

_PAIRS: Final = 200
_NAMES: Final = 100


class Labels:
    """One guard's.

    Clients choose models, paths and ids, so none of them becomes a label by being asked for: a model is named if it has
    a price of its own, a provider if it is one of those that we know or a deployment's, a policy or a subject if the
    configuration has it. Even of these there are at most 200 pairs of a model and where it went, and 100 of each other
    kind; further ones are `other`.
    """

    __slots__ = ("_names", "_pairs")

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}
        self._names: dict[str, set[str]] = {}

    def deployment(self, deployment: str, call: Call | None, model: str) -> tuple[str, str]:
        """A gateway's deployment, and the model that it was asked for."""
        return self._pair(deployment, model if _has_price(call) else OTHER)

    def model(self, call: Call | None) -> tuple[str, str]:
        """The provider and the model of a call."""
        if call is None:
            return OTHER, OTHER
        priced = _has_price(call)
        provider = call.provider or OTHER
        if provider not in KNOWN_PROVIDERS and not priced and call.deployment is None:
            provider = OTHER
        return self._pair(provider, call.model if priced else OTHER)

    def name(self, kind: str, name: str) -> str:
        """A name of the configuration: of a policy, for example."""
        seen = self._names.setdefault(kind, set())
        if name in seen:
            return name
        if len(seen) >= _NAMES:
            return OTHER
        seen.add(name)
        return name

    def _pair(self, one: str, other: str) -> tuple[str, str]:
        pair = (one, other)
        found = self._pairs.get(pair)
        if found is None:
            if len(self._pairs) >= _PAIRS:
                return OTHER, OTHER
            found = self._pairs.setdefault(pair, pair)
        return found


def _has_price(call: Call | None) -> bool:
    # A deployment may serve whatever its clients ask for. What has a price of its own is no invention of theirs.
    return call is not None and call.price_source not in (None, UNPRICED) and call.billed_model is None
