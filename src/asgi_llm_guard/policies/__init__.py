"""Policies: pure rules from a context and a call to claims, refusals and cache directives."""

from asgi_llm_guard.policies.base import CacheDirective, Policy, Verdict
from asgi_llm_guard.policies.budget import Budget, Candidates, Eligibility, ProviderBudget
from asgi_llm_guard.policies.cache import CacheScope
from asgi_llm_guard.policies.concurrency import Concurrency
from asgi_llm_guard.policies.grammar import Limit
from asgi_llm_guard.policies.iterations import Iterations, max_iterations
from asgi_llm_guard.policies.models import ModelAllow, ModelList
from asgi_llm_guard.policies.providers import provider_of
from asgi_llm_guard.policies.quota import DepartmentQuota, Quota, QuotaBook
from asgi_llm_guard.policies.rate import RateLimit

__all__ = [
    "Budget",
    "CacheDirective",
    "CacheScope",
    "Candidates",
    "Concurrency",
    "DepartmentQuota",
    "Eligibility",
    "Iterations",
    "Limit",
    "ModelAllow",
    "ModelList",
    "Policy",
    "ProviderBudget",
    "Quota",
    "QuotaBook",
    "RateLimit",
    "Verdict",
    "max_iterations",
    "provider_of",
]
