"""Keys of providers, as `secret.py` keeps them."""

from __future__ import annotations

from asgi_llm_guard.secret import Secret, read_secret

__all__ = ["Secret", "read_secret"]
