"""`Idempotency-Key`: what a key is, what it is bound to, and what is kept of an answer. Pure.

Source: draft-ietf-httpapi-idempotency-key-header-07; keys that are not quoted are taken as well, since most
clients send them so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.entries import MAX_TTL_MS
from asgi_llm_guard.windows import duration_ms

__all__ = [
    "LONGEST_KEY",
    "MAX_ANSWER_BYTES",
    "KeptResponse",
    "entry_key",
    "fingerprint",
    "kept_headers",
    "read_key",
    "ttl_ms",
]

LONGEST_KEY: Final = 255
MAX_ANSWER_BYTES: Final = 1024 * 1024
"""A longer answer is not kept."""

_HEADER: Final = b"idempotency-key"
_BARE: Final = re.compile(rb"[A-Za-z0-9._:~/+=@-]+")
_QUOTED: Final = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\])+)"')
_ESCAPE: Final = re.compile(rb'\\(["\\])')
_DEFAULT_TTL: Final = "24h"

_KEPT: Final = frozenset(
    {
        b"cache-control", b"content-disposition", b"content-encoding", b"content-language", b"content-location",
        b"content-type", b"etag", b"last-modified", b"link", b"location", b"request-id", b"vary", b"x-request-id",
    }
)  # fmt: skip
"""What is given again besides the body. Not cookies, and not what was true of one moment, such as rate limits."""


class KeptResponse(msgspec.Struct, frozen=True, array_like=True):
    """An answer, as it is given again."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def ttl_ms(setting: bool | str, *, name: str) -> int | None:
    """How long answers are kept, in milliseconds: `True` is a day; `None`: not at all.

    Raises:
        ConfigurationError: not a duration, or longer than 30 days.
    """
    if setting is False:
        return None
    if not isinstance(setting, (bool, str)):
        raise ConfigurationError(f"{name}: idempotency must be True, False or a time such as '24h', got {setting!r}")
    kept_ms = duration_ms(_DEFAULT_TTL if setting is True else setting, name=f"{name}: idempotency")
    if kept_ms > MAX_TTL_MS:
        raise ConfigurationError(f"{name}: idempotency: at most 30 days, got {setting!r}")
    return kept_ms


def read_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | Refusal | None:
    """The key that a request sends, quoted or not; `None`: none. A refusal if it is there twice, or is none."""
    sent = [value.strip(b" \t") for name, value in headers if name.lower() == _HEADER]
    if not sent:
        return None
    if len(sent) > 1:
        return _refusal("the header is there more than once; send one key")
    if _BARE.fullmatch(sent[0]):
        key = sent[0]
    elif quoted := _QUOTED.fullmatch(sent[0]):
        key = _ESCAPE.sub(rb"\1", quoted[1])
    else:
        return _refusal("expected a quoted text, or letters, digits and ._:~/+=@-")
    if len(key) > LONGEST_KEY:
        return _refusal(f"expected at most {LONGEST_KEY} characters, got {len(key)}")
    return key


def entry_key(context: Context, method: str, key: bytes) -> str:
    """Under what an answer is kept: who asks, on which route, with which key. Nothing of it can be read from it."""
    return _digest(*(_bytes(part or "") for part in (context.caller, context.user, context.route, method)), key)


def fingerprint(path: str, query: bytes, body: bytes) -> str:
    """What a key stands for: the rest of the request."""
    return _digest(_bytes(path), query, body)


def kept_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Those headers of an answer that are given again."""
    return [(name.lower(), value) for name, value in headers if name.lower() in _KEPT]


def _bytes(text: str) -> bytes:
    # Ids may come from JSON, which can spell halves of characters.
    return text.encode("utf-8", "surrogatepass")


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=24)
    for part in parts:  # each with its length, so that no two lists look the same
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _refusal(message: str) -> Refusal:
    return Refusal(policy="idempotency", code="invalid_request", message=f"idempotency-key: {message}", status=400)
