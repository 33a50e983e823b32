"""`GuardMiddleware`: guards the requests of an ASGI application. One request is in `request.py`, the rest in `app.py`."""

from asgi_llm_guard.middleware.app import GuardMiddleware
from asgi_llm_guard.middleware.request import STATE_KEY

__all__ = ["STATE_KEY", "GuardMiddleware"]
