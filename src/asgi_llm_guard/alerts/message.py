"""What a webhook is sent: a JSON body, and headers that say when and by whom it was signed. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

import msgspec

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import GuardError
from asgi_llm_guard.events import Alert
from asgi_llm_guard.secret import Secret

__all__ = [
    "ID_HEADER",
    "SIGNATURE_HEADER",
    "TIMESTAMP_HEADER",
    "VERSION",
    "SignatureError",
    "body_of",
    "headers_of",
    "verify",
]

VERSION: Final = 1
"""Of the body: counts up when a field changes its meaning or goes. New fields may come at any time."""

ID_HEADER: Final = "x-guard-id"
TIMESTAMP_HEADER: Final = "x-guard-timestamp"
SIGNATURE_HEADER: Final = "x-guard-signature"

_SCHEME: Final = "v1="
_TOLERANCE_S: Final = 300
_NANO: Final = Decimal(1_000_000_000)


class SignatureError(GuardError):
    """A message was not signed with a secret that is known, or too long ago."""


def body_of(alert: Alert) -> bytes:
    """The body of an alert. The same alert has the same body, whoever sends it again."""
    fields: dict[str, object] = {
        "version": VERSION,
        "id": alert.id,
        "type": alert.kind,
        "policy": alert.policy,
        "scope": alert.scope,
        "subject": alert.subject,
        "unit": "usd" if alert.unit is Unit.NANOUSD else alert.unit.value,
        "threshold": alert.threshold,
        "at": _instant(alert.at_ms),
        "limit": _amount(alert.limit, alert.unit),
        "used": _amount(alert.used, alert.unit),
        "held": _amount(alert.held, alert.unit),
        "resets_at": None if alert.resets_at_ms is None else _instant(alert.resets_at_ms),
        "shadow": alert.shadow,
    }
    if alert.spent is not None:
        fields["spent"] = _amount(alert.spent, alert.unit)
        fields["window_s"] = (alert.window_ms or 0) // 1000
    return msgspec.json.encode(fields)


def headers_of(alert_id: str, body: bytes, secrets: Sequence[Secret], timestamp_s: int) -> dict[str, str]:
    """The headers of one attempt: signed with every secret that is active."""
    return {
        "content-type": "application/json",
        "user-agent": "asgi-llm-guard",
        ID_HEADER: alert_id,
        TIMESTAMP_HEADER: str(timestamp_s),
        SIGNATURE_HEADER: ",".join(_SCHEME + _signature(secret, str(timestamp_s), body) for secret in secrets),
    }


def verify(
    body: bytes, headers: Mapping[str, str], secrets: Sequence[str], *, now_s: float, tolerance_s: float = _TOLERANCE_S
) -> None:
    """For receivers: see that a message was signed with one of these secrets, not more than `tolerance_s` seconds ago
    or ahead. Header names are taken in any case.

    Raises:
        SignatureError: it was not.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    timestamp = lower.get(TIMESTAMP_HEADER, "")
    if not (timestamp.isascii() and timestamp.isdigit()) or abs(now_s - int(timestamp)) > tolerance_s:
        raise SignatureError(f"{TIMESTAMP_HEADER} is missing, or further than {tolerance_s:g} s from now")
    wanted = [(_SCHEME + _signature(Secret(secret), timestamp, body)).encode() for secret in secrets]
    given = [part.strip().encode() for part in lower.get(SIGNATURE_HEADER, "").split(",")]
    if not any(hmac.compare_digest(one, other) for one in given for other in wanted):
        raise SignatureError(f"{SIGNATURE_HEADER} was made with none of the {len(secrets)} secrets")


def _signature(secret: Secret, timestamp: str, body: bytes) -> str:
    return hmac.new(secret.reveal().encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _instant(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _amount(amount: int, unit: Unit) -> int | str:
    """Dollars as text, to the last nano: a JSON number would be rounded by many readers."""
    return f"{Decimal(amount) / _NANO:f}" if unit is Unit.NANOUSD else amount
