"""Cookies as every one of them is set here: for this application alone, out of reach of scripts and other sites."""

from __future__ import annotations

from starlette.responses import Response

from asgi_llm_guard.admin.asked import Asked

__all__ = ["clear_cookie", "set_cookie"]


def set_cookie(asked: Asked, response: Response, name: str, value: str, length_ms: int) -> None:
    response.set_cookie(
        name,
        value,
        max_age=length_ms // 1000,
        path=asked.root or "/",
        secure=asked.request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def clear_cookie(asked: Asked, response: Response, name: str) -> None:
    set_cookie(asked, response, name, "", 0)
