"""Logs: which trace, request and call a line belongs to, lines that nobody can forge, and one for each refusal.

handler = logging.StreamHandler()
handler.addFilter(LogCorrelation(guard))
handler.setFormatter(JsonLines())
logging.getLogger("asgi_llm_guard").addHandler(handler)
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec
from opentelemetry import trace

from asgi_llm_guard.events import Event, Refused

__all__ = ["JsonLines", "LogCorrelation", "LogRefusals"]

_log = logging.getLogger("asgi_llm_guard")

_FIELDS: Final = ("trace_id", "span_id", "request_id", "call_id")
_REFUSAL: Final = ("policy", "code", "status", "route", "model")
# What changes the direction of writing, separates lines, or is a control character: none of it in a log.
_DECEIVING: Final = re.compile(r"[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class Correlating(Protocol):
    """What knows where code runs: a `Guard`."""

    def current_ids(self) -> tuple[str | None, str | None]:
        """The ids of the request and the call that this code runs in."""
        ...


class LogCorrelation(logging.Filter):
    """Adds `trace_id`, `span_id`, `request_id` and `call_id` to each record that passes; all pass.

    Empty where there is none. For a handler of any logger. The ids are for logs: metrics and spans have none of them.
    """

    def __init__(self, guard: Correlating) -> None:
        super().__init__()
        self._guard = guard

    def filter(self, record: logging.LogRecord) -> bool:
        """Mark the record."""
        span = trace.get_current_span().get_span_context()
        request_id, call_id = self._guard.current_ids()
        record.trace_id = trace.format_trace_id(span.trace_id) if span.is_valid else ""
        record.span_id = trace.format_span_id(span.span_id) if span.is_valid else ""
        record.request_id = request_id or ""
        record.call_id = call_id or ""
        return True


class JsonLines(logging.Formatter):
    """One JSON object in one line for each record, tracebacks included.

    What ids or messages have in them cannot end a line, begin another, or change what a terminal shows: control
    characters and those that turn the direction of writing are escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(
            (field, value)
            for field in (*_FIELDS, *_REFUSAL)
            if (value := getattr(record, field, None)) not in (None, "")
        )
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        text = msgspec.json.encode(_sound(line)).decode()
        return _DECEIVING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class LogRefusals:
    """An observer: one line at DEBUG for each refusal, with its policy, code, status, route and model, and no ids."""

    def __call__(self, event: Event, /) -> None:
        """Log a refusal; other events are passed over."""
        if isinstance(event, Refused) and _log.isEnabledFor(logging.DEBUG):
            denied = event.denied
            told = {
                "policy": denied.policy,
                "code": denied.code,
                "status": denied.status,
                "route": event.context.route,
                "model": None if event.call is None else event.call.model,
            }
            _log.debug("refused by %s: %s", denied.policy, denied.code, extra=told)


def _sound(line: dict[str, object]) -> dict[str, object]:
    """The line, with halves of characters, which UTF-8 has no form of, written out."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in line.items()
    }
