"""What an engine has granted: values."""

from __future__ import annotations

import msgspec

from asgi_llm_guard.claims import Claim, Granted, Receipt
from asgi_llm_guard.context import Call
from asgi_llm_guard.policies.base import CacheDirective
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Asking", "Hold", "Reserved"]


class Hold(msgspec.Struct, frozen=True):
    """One granted bundle."""

    call_id: str
    claims: tuple[Claim, ...]
    receipts: tuple[Receipt, ...]
    draft: UsageRecord | None = None
    degraded: bool = False
    """This process decided by itself, because the storage did not answer."""
    uncertain: bool = False
    """It may have been changed to other claims: the storage did not say."""


class Reserved(msgspec.Struct, frozen=True):
    """What was granted to a request or a call."""

    request: Hold | None
    call: Hold | None
    described: Call | None
    """The call as it was held for, after clamping."""
    granted: Granted
    shared: bool
    """The session counts together with others: its caller has too many."""
    cache: CacheDirective | None = None
    degraded: bool = False
    """This process decided by itself, because the storage did not answer."""
    candidate: int = 0
    """Which one of the candidates it is."""


class Asking:
    """Whether a question to the storage is without an answer."""

    __slots__ = ("unknown",)

    def __init__(self) -> None:
        self.unknown = False
