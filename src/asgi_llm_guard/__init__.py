"""Budgets, quotas, loops and cache scope for LLM calls inside ASGI services."""
