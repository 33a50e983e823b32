"""Who carries the requests of which deployment."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_llm_guard.errors import ConfigurationError, NotInstalledError
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.providers.base import Provider

__all__ = ["Providers"]


class Providers:
    """Providers by name: `http` and `litellm`, which are made when the first deployment needs them, and your own.

    Args:
        own: by name; a deployment says `via="name"`. `http` or `litellm` in it take the place of those.
    """

    def __init__(self, own: Mapping[str, Provider] | None = None) -> None:
        self._made: dict[str, Provider] = {}
        for name, provider in (own or {}).items():
            self.register(name, provider)

    def register(self, name: str, provider: Provider) -> None:
        """Deployments that say `via=name` are carried by it from now on."""
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"providers: expected a name, got {name!r}")
        self._made[name] = provider

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are registered or have been made."""
        return tuple(self._made)

    def of(self, deployment: Deployment) -> Provider:
        """Who carries the requests of a deployment.

        Raises:
            ConfigurationError: nobody is registered under the name that it says.
            NotInstalledError: the library that is needed is missing.
        """
        provider = self._made.get(deployment.via)
        if provider is None:
            provider = self._made[deployment.via] = _make(deployment)
        return provider

    async def aclose(self) -> None:
        """Close what they keep open."""
        for provider in tuple(self._made.values()):
            await provider.aclose()


def _make(deployment: Deployment) -> Provider:
    if deployment.via == "http":
        try:
            from asgi_llm_guard.gateway.providers.http import HttpProvider
        except ImportError as error:
            raise NotInstalledError("the gateway", "httpx") from error
        return HttpProvider()
    if deployment.via == "litellm":
        try:
            from asgi_llm_guard.gateway.providers.litellm import LiteLLMProvider
        except ImportError as error:
            raise NotInstalledError(f"{deployment.provider} through LiteLLM", "litellm") from error
        return LiteLLMProvider()
    raise ConfigurationError(
        f"deployment {deployment.name!r}: via={deployment.via!r} is no provider; register it, or say http or litellm"
    )
