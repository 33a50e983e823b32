"""Charts as SVG text. Pure functions; whatever text goes in is escaped.

Only shapes are drawn. Words stand beside them in HTML, where they keep their size on a small screen. Colours come
from the style sheet by class, so that no style is written into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Bar", "bars", "gauge", "top_of"]


class Bar(NamedTuple):
    """One bar of a chart."""

    label: str
    value: int
    told: str
    """The value in words."""
    open: bool = False
    """Its time is not over yet."""


def top_of(most: int) -> int:
    """The top of the axis: 1, 2, 5 or 10 times a power of ten, and never 0."""
    if most <= 0:
        return 1
    step: int = 10 ** (len(str(most)) - 1)
    return next(factor * step for factor in (1, 2, 5, 10) if factor * step >= most)


def bars(series: Sequence[Bar], *, identity: str, title: str, description: str) -> str:
    """Upright bars over the whole width, each with a title of its own."""
    top = top_of(max((bar.value for bar in series), default=0))
    width = max(1, len(series)) * 10
    shapes = [f'<line class="rule" x1="0" x2="{width}" y1="{y}" y2="{y}"/>' for y in (0, 25, 50, 75, 100)]
    for place, bar in enumerate(series):
        height = round(bar.value * 100 / top, 2)
        if bar.value > 0:
            height = max(height, 1.0)  # a little is not nothing
        mode = "bar bar-open" if bar.open else "bar"
        shapes.append(
            f'<g class="column"><rect class="reach" x="{place * 10}" y="0" width="10" height="100"/>'
            f'<rect class="{mode}" x="{place * 10 + 1.5}" y="{round(100 - height, 2)}" width="7" height="{height}"/>'
            f"<title>{escape(bar.label)}: {escape(bar.told)}</title></g>"
        )
    return (
        f'<svg class="chart" viewBox="0 0 {width} 100" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{escape(identity)}-title {escape(identity)}-desc">'
        f'<title id="{escape(identity)}-title">{escape(title)}</title>'
        f'<desc id="{escape(identity)}-desc">{escape(description)}</desc>{"".join(shapes)}</svg>'
    )


def gauge(used: int, held: int, limit: int | None, forecast: int | None, *, told: str) -> str:
    """A lying bar: what is used, what is held, and a mark where it will be at the end of the window."""
    scale = max(limit or 0, used + held, 1)
    spent = round(used * 100 / scale, 2)
    taken = round(held * 100 / scale, 2)
    share = 100 if limit == 0 else (used + held) * 100 // scale if limit else 0
    level = "over" if share >= 100 else "high" if share >= 80 else "calm"
    mark = ""
    if forecast is not None and limit:
        at = min(99.4, round(forecast * 100 / scale, 2))
        mark = f'<rect class="mark" x="{at}" y="0" width="0.8" height="10"/>'
    return (
        f'<svg class="gauge {level}" viewBox="0 0 100 10" preserveAspectRatio="none" role="img">'
        f"<title>{escape(told)}</title>"
        f'<rect class="track" x="0" y="2" width="100" height="6"/><rect class="used" x="0" y="2" width="{spent}" height="6"/>'
        f'<rect class="held" x="{spent}" y="2" width="{taken}" height="6"/>{mark}</svg>'
    )
