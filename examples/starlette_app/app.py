"""A gateway for a company: three models of two providers behind one address, under budgets, as `guard.toml` says.

Callers use any SDK of OpenAI or Anthropic with a key of `keys.toml`; the providers' keys stay here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_llm_guard import Guard
from asgi_llm_guard.admin import AdminOptions
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.identity import Identity, IdentityError, Resolver
from asgi_llm_guard.settings import (
    build_admin_options,
    build_gateway_arguments,
    build_guard_arguments,
    load_settings,
    watch,
)

HERE = Path(__file__).parent


def key_required(keys: Resolver) -> Resolver:
    """Nobody is anonymous here: what callers spend is real money."""

    def resolve(scope: Mapping[str, Any]) -> Identity:
        identity = keys(scope)
        if identity is None:
            raise IdentityError("Send an API key of this service: Authorization: Bearer …", status=403)
        return identity

    return resolve


def create_app(guard: Guard, gateway: Gateway, admin: AdminOptions | None = None) -> Starlette:
    """The service. What is mounted last is guarded; routes of your own stand beside it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001 - Starlette passes it
        async with guard, gateway:
            yield

    pages = [Mount("/usage", guard.usage_app())]
    if admin is not None:
        pages.append(Mount("/admin", guard.admin_app(admin)))
    app = Starlette(routes=[*pages, Mount("/", gateway.app(expose=True))], lifespan=lifespan)
    app.state.guard = guard
    return app


def everywhere_at(url: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the gateway, with all deployments at one address: that of a fake provider, for example."""
    if url is None:
        return arguments
    return {**arguments, "deployments": [{**entry, "api_base": url} for entry in arguments["deployments"]]}


def from_environment() -> Starlette:
    """The service as `guard.toml` and the environment describe it: `uvicorn --factory app:from_environment`."""
    settings = load_settings(os.environ.get("GUARD_FILE") or HERE / "guard.toml")
    arguments = build_guard_arguments(settings)
    guard = Guard(**{**arguments, "identity": key_required(arguments["identity"])})
    gateway = Gateway(guard, **everywhere_at(os.environ.get("PROVIDER_URL"), build_gateway_arguments(settings)))
    watch(guard, settings)
    secret = settings.admin is not None and settings.admin.secret is not None
    return create_app(guard, gateway, build_admin_options(settings) if secret else None)
