"""How a page is written: the templates, what every one of them is given, and the filters they use."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import RedirectResponse, Response

from asgi_llm_guard.admin import charts, shown
from asgi_llm_guard.admin.asked import Asked
from asgi_llm_guard.admin.budgets import window_told
from asgi_llm_guard.admin.periods import Period
from asgi_llm_guard.money import to_nano

__all__ = ["STATIC", "done", "page", "write"]

_HERE: Final = Path(__file__).parent

NAVIGATION: Final = (
    ("overview", "/", "Overview"),
    ("departments", "/departments", "Departments"),
    ("sessions", "/sessions", "Live sessions"),
    ("refusals", "/refusals", "Refusals"),
    ("raises", "/raises", "Raises & stops"),
    ("agents", "/agents", "Agents"),
    ("keys", "/keys", "Keys"),
    ("prices", "/prices", "Prices"),
    ("knowledge-bases", "/knowledge-bases", "Knowledge bases"),
    ("audit", "/audit", "Audit"),
    ("health", "/health", "Health"),
)

DONE: Final = {
    "saved": "Saved. Every process follows within seconds.",
    "removed": "Removed. Every process follows within seconds.",
    "stopped": "Stopped. Running calls end, new ones are refused.",
    "released": "Released. New calls are admitted again.",
    "raised": "Raised until the time you gave.",
    "lowered": "The raise is over.",
    "reset": "Reset. What was used counts as nothing from now on.",
    "revoked": "Revoked. The key is not known any more.",
    "left": "You are logged out.",
    "left_here": (
        "You are logged out of this browser and this process. This could be written nowhere, so other processes would go "
        "on to take a copy of the cookie until it is idle."
    ),
}
"""What a page says after a form was taken, by the word that its address then carries."""


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "money": _money,
        "calls": shown.calls,
        "count": shown.count,
        "compact": shown.compact,
        "quantity": _quantity,
        "short": _short,
        "told": _told,
        "id": _id,
        "lasting": shown.length,
        "cut": shown.cut,
        "plain": shown.plain,
    }
    made.globals |= {
        "window_told": window_told,
        "bars": _bars,
        "gauge": _gauge,
        "instant": shown.instant,
        "percent": shown.percent,
    }
    return made


@cache
def _static() -> dict[str, tuple[bytes, str, str]]:
    kinds = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    found = {}
    for file in sorted((_HERE / "static").iterdir()):
        raw = file.read_bytes()
        found[file.name] = (raw, kinds[file.suffix[1:]], hashlib.sha256(raw).hexdigest()[:12])
    return found


STATIC = _static
"""The files that pages link to: content, type, and a digest that their address carries."""


def write(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(static=_static(), **values)


def page(asked: Asked, template: str, *, active: str, status: int = 200, **values: Any) -> Response:
    """A page of the administration, with everything that all of them have."""
    session = asked.session
    text = write(
        template,
        asked=asked,
        url=asked.url,
        title=asked.desk.options.title,
        navigation=NAVIGATION,
        active=active,
        me=asked.credential,
        may=asked.may,
        form_token="" if session is None else asked.desk.sessions.form_token(session),
        done=DONE.get(asked.query.get("done", "")),
        now_ms=asked.now_ms,
        zone=period.tz if isinstance(period := values.get("period"), Period) else asked.desk.options.tz,
        **values,
    )
    return Response(text, status, media_type="text/html; charset=utf-8")


def done(asked: Asked, path: str, word: str, **query: object) -> Response:
    """Go on to a page that says what was done."""
    return RedirectResponse(asked.url(path, **query, done=word), 303)


# ------------------------------------------------------------------------------------- filters


def _money(nanousd: int) -> Markup:
    """With the exact amount beside it, where the page shows less."""
    text, exact = shown.money(nanousd), shown.exact_usd(nanousd)
    return escape(text) if text == exact else Markup('<span title="{}">{}</span>').format(exact, text)


def _quantity(amount: int, unit: str) -> Markup:
    return _money(amount) if unit == "nanousd" else escape(shown.quantity(amount, unit))


def _short(amount: int, unit: str) -> Markup:
    """As `_quantity`, and large numbers shortened, with the exact one beside it."""
    if unit == "nanousd" or abs(amount) < 10_000:
        return _quantity(amount, unit)
    exact, text = shown.quantity(amount, unit), f"{shown.compact(amount)} {unit}"
    return Markup('<span title="{}">{}</span>').format(exact, text)


def _told(amount: str, unit: str) -> Markup:
    """An amount of the callers' answer: US dollars, or a number of `unit`."""
    return _money(to_nano(amount)) if unit == "usd" else escape(shown.quantity(int(amount), unit))


def _id(text: str | None, most: int = 40) -> Markup:
    """Somebody else's text: made visible, cut, and kept from turning the text around it."""
    if text is None:
        return Markup('<span class="none">none</span>')
    whole, short = shown.plain(text), shown.cut(text, most)
    if whole == short:
        return Markup("<bdi>{}</bdi>").format(short)
    return Markup('<bdi title="{}">{}</bdi>').format(shown.cut(text, 400), short)


def _bars(*args: Any, **values: Any) -> Markup:
    return Markup(charts.bars(*args, **values))  # noqa: S704 - it escapes what it is given


def _gauge(*args: Any, **values: Any) -> Markup:
    return Markup(charts.gauge(*args, **values))  # noqa: S704 - as above
