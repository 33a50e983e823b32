"""The administration page: pages, forms and an API over a guard. `docs/admin.md` shows it.

    app.mount("/admin", guard.admin_app(AdminOptions(credentials=[…], secret=…)))
    app.mount("/usage", guard.usage_app())

It opens only for credentials of its own; what callers send opens nothing here. `table.py` is the list of everything
that can be asked of it, and of who may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_llm_guard.admin.options import AdminCredential, AdminOptions, Role
from asgi_llm_guard.errors import NotInstalledError

if TYPE_CHECKING:
    from asgi_llm_guard.admin.app import AdminApp
    from asgi_llm_guard.admin.usage import UsageApp
    from asgi_llm_guard.guard import Guard

__all__ = ["AdminCredential", "AdminOptions", "Role", "make_admin_app", "make_usage_app"]


def make_admin_app(guard: Guard, options: AdminOptions) -> AdminApp:
    """Raises `NotInstalledError` if jinja2 is missing."""
    try:
        from asgi_llm_guard.admin.app import AdminApp
    except ImportError as error:
        raise _missing(error) from error
    return AdminApp(guard, options)


def make_usage_app(guard: Guard, *, tz: str) -> UsageApp:
    """Raises `NotInstalledError` if jinja2 is missing."""
    try:
        from asgi_llm_guard.admin.usage import UsageApp
    except ImportError as error:
        raise _missing(error) from error
    return UsageApp(guard, tz=tz)


def _missing(error: ImportError) -> ImportError:
    return NotInstalledError("the administration page", "admin") if error.name in {"jinja2", "markupsafe"} else error
