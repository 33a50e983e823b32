"""New keys, and which key may be rotated. Pure, but for chance."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from asgi_llm_guard.control.changes import NotThere
from asgi_llm_guard.control.numbers import check_sizes
from asgi_llm_guard.control.state import ControlState, Entry
from asgi_llm_guard.control.values import Key, check_instant
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.keys import ApiKeys
from asgi_llm_guard.windows import duration_ms

__all__ = ["ended", "issue", "rotatable"]


def issue(caller: str, *, secret: str, now_ms: int, **fields: Any) -> tuple[str, Key]:
    """A new random key of 256 bits, to be shown once, and what is kept of it.

    Raises:
        ConfigurationError: a field is malformed.
    """
    name = f"k{secrets.token_hex(4)}"
    prefix = f"lg-{name}"
    shown_once = f"{prefix}-{secrets.token_urlsafe(32)}"
    ends = fields.get("expires_at_ms")
    if ends is not None and check_instant("key: expires_at_ms", ends) <= now_ms:
        raise ConfigurationError(f"key: expires_at_ms: {ends} has passed")
    digest = ApiKeys.hash(shown_once, secret)
    return shown_once, Key(id=name, prefix=prefix, digest=digest, caller=caller, created_ms=now_ms, **fields)


def rotatable(state: ControlState, key_id: str, overlap: str, now_ms: int) -> tuple[Entry[Key], int]:
    """The key that another one is to take the place of, and for how many milliseconds both hold.

    Raises:
        NotThere: there is no such key.
        ConfigurationError: it is over, was rotated already, or the key before it is still active; or `overlap` is no
            duration.
    """
    check_sizes(overlap, "overlap")
    overlap_ms = 0 if overlap == "0s" else duration_ms(overlap, name="overlap")
    old = state.keys.get(key_id)
    if old is None:
        raise NotThere("key", key_id)
    if not old.value.is_active(now_ms):
        raise ConfigurationError(f"key {key_id!r}: it is over, and cannot be rotated; make a new one")
    for other in state.keys.values():
        if other.value.replaces == key_id and other.value.is_active(now_ms):
            raise ConfigurationError(f"key {key_id!r}: was rotated already; rotate {other.value.id!r} instead")
    if overlap_ms and (earlier := _active_before(state, old.value, now_ms)) is not None:
        raise ConfigurationError(
            f"key {key_id!r}: the key before it, {earlier.id!r}, is still active, and two are at most; "
            "revoke that one first, or rotate without an overlap ('0s')"
        )
    return old, overlap_ms


def ended(key: Key, at_ms: int) -> Key:
    """The key with its end at that instant, unless it ends before."""
    ends = key.ends_ms()
    return msgspec.structs.replace(key, expires_at_ms=at_ms if ends is None else min(ends, at_ms))


def _active_before(state: ControlState, key: Key, now_ms: int) -> Key | None:
    """The key that it takes the place of, or the one before that, and so on: the first that is still active."""
    seen = {key.id}
    while key.replaces is not None and key.replaces not in seen and (entry := state.keys.get(key.replaces)) is not None:
        key = entry.value
        seen.add(key.id)
        if key.is_active(now_ms):
            return key
    return None
