"""A guard from a TOML file, the environment and secret files. `docs/settings.md` shows every key.

For each key the environment wins over secret files, and secret files over the file. What is said
here is handed to the constructors that code would call, so that both know the same options, check
them alike and complain in the same words; this module adds where the wrong value stands.
"""

from __future__ import annotations

from asgi_llm_guard.settings.build import (
    build_admin_options,
    build_gateway_arguments,
    build_guard_arguments,
    build_middleware_arguments,
)
from asgi_llm_guard.settings.load import GuardSettings, load_settings
from asgi_llm_guard.settings.policies import RouteSettings
from asgi_llm_guard.settings.problems import ENV_PREFIX
from asgi_llm_guard.settings.reload import Reload, watch

__all__ = [
    "ENV_PREFIX",
    "GuardSettings",
    "Reload",
    "RouteSettings",
    "build_admin_options",
    "build_gateway_arguments",
    "build_guard_arguments",
    "build_middleware_arguments",
    "load_settings",
    "watch",
]
