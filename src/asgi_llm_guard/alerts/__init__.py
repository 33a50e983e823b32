"""Alerts: who is told when a limit is used up, how fast, and never twice. See `docs/alerts.md`."""

from __future__ import annotations

from asgi_llm_guard.alerts.alerts import Alerts
from asgi_llm_guard.alerts.message import SignatureError, verify
from asgi_llm_guard.alerts.rules import AlertRule, BurnRate, Threshold
from asgi_llm_guard.alerts.webhook import DeliveryError, Webhook

__all__ = ["AlertRule", "Alerts", "BurnRate", "DeliveryError", "SignatureError", "Threshold", "Webhook", "verify"]
