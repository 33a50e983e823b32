"""Budgets, quotas, loops and cache scope for LLM calls inside ASGI services."""

from asgi_llm_guard.admission import current_admission
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.decorator import guarded
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.middleware import GuardMiddleware
from asgi_llm_guard.policies import (
    Budget,
    CacheScope,
    Concurrency,
    DepartmentQuota,
    Iterations,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
)
from asgi_llm_guard.routes import Route
from asgi_llm_guard.usage import Usage

__all__ = [
    "Budget",
    "CacheScope",
    "Concurrency",
    "Context",
    "Denied",
    "DepartmentQuota",
    "Guard",
    "GuardMiddleware",
    "Iterations",
    "LimitExceeded",
    "ModelAllow",
    "ProviderBudget",
    "Quota",
    "QuotaBook",
    "RateLimit",
    "Route",
    "Usage",
    "current_admission",
    "guarded",
]

__version__ = "0.1.0"
