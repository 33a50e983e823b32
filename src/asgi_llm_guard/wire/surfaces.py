"""What a request to a provider is: metered, free, billed in a way that no answer tells, or unknown.

A table over the operations of the providers' APIs. It errs towards `unmeterable`: what may start billed work
that ends later, elsewhere, or over another protocol.

Source: the operations in openai 3.52, anthropic 2.11, google-genai 3.4, mistralai 3.7, cohere 7.3 and botocore 1.44
for Python, and the providers' pricing pages (2026-11).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from asgi_llm_guard.policies.providers import provider_of
from asgi_llm_guard.wire import dialect_for
from asgi_llm_guard.wire.base import Dialect
from asgi_llm_guard.wire.openai_family import operation

__all__ = ["Kind", "Surface", "surface_of"]

Kind = Literal[
    "metered",  # a dialect reads what it asks for and what it used
    "free",  # nothing is billed, or what is billed was counted when it was made
    "unmeterable",  # billed, and no answer to it says what it cost
    "unknown",  # of neither a known provider nor a known operation
]


class Surface(msgspec.Struct, frozen=True):
    """What one request is."""

    kind: Kind
    dialect: Dialect | None = None
    """For `metered` only."""
    provider: str | None = None
    """Whose host it goes to; `None`: nobody's that is known."""
    name: str = ""
    """The operation for people to read: the pattern that it matched."""


_READS: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_LIVE: Final = frozenset({"realtime", "live", "ws", "BidiGenerateContent"})
"""Where a GET opens a connection over which work is done and billed."""
_ENDS: Final = frozenset({"cancel", "archive", "pause", "unpause", "hangup", "reject", "stop"})
"""What ends work starts none."""

_DEEPEST: Final = 32
"""Segments of a path; no operation has as many."""

_OPENAI: Final = ("openai", "azure", "azure_ai")

# One `*` stands for a segment, `**` for the rest of them, `*:verb` for a segment with that verb; the first that
# fits counts. With names behind it a row holds for these providers only.
_TABLE: Final[tuple[tuple[Kind, str, tuple[str, ...]], ...]] = (
    # free
    ("free", "responses/input_tokens", ()),
    ("free", "messages/count_tokens", ()),
    ("free", "**/*:countTokens", ()),
    ("free", "**/*:computeTokens", ()),
    ("free", "**/*:fetchPredictOperation", ()),
    ("free", "**/*:cancel", ()),
    ("free", "model/*/count-tokens", ()),
    ("free", "tokenize", ()),
    ("free", "detokenize", ()),
    ("free", "check-api-key", ()),
    ("free", "moderations", _OPENAI),
    ("free", "chat/completions/*", ()),
    ("free", "models", ()),
    ("free", "files/**", ()),
    ("free", "files:register", ()),
    ("free", "upload/**", ("gemini",)),
    ("free", "uploads/**", ()),
    ("free", "conversations/**", _OPENAI),
    ("free", "assistants/**", _OPENAI),
    ("unmeterable", "threads/runs", ()),
    ("free", "threads", _OPENAI),
    ("free", "threads/*", _OPENAI),
    ("free", "threads/*/messages/**", _OPENAI),
    ("free", "organization/**", ()),
    ("free", "organizations/**", ()),
    ("free", "projects/**", ("openai",)),
    ("free", "skills/**", ()),
    ("free", "vaults/**", ()),
    ("free", "webhook_endpoints/**", ()),
    ("free", "memory_stores/**", ()),
    ("free", "user_profiles/**", ()),
    ("free", "tunnels/**", ()),
    # billed, and told elsewhere or later
    ("unmeterable", "batches/**", ()),
    ("unmeterable", "messages/batches/**", ()),
    ("unmeterable", "batch/**", ()),
    ("unmeterable", "embed-jobs/**", ()),
    ("unmeterable", "**/batchPredictionJobs/**", ()),
    ("unmeterable", "model-invocation-job/**", ()),
    ("unmeterable", "async-invoke/**", ()),
    ("unmeterable", "videos/**", ()),
    ("unmeterable", "realtime/**", ()),
    ("unmeterable", "live/**", ()),
    ("unmeterable", "auth_tokens/**", ()),  # for live connections
    ("unmeterable", "ws/**", ()),
    ("unmeterable", "agents/**", ()),
    ("unmeterable", "sessions/**", ()),
    ("unmeterable", "deployments/**", ()),
    ("unmeterable", "environments/**", ()),
    ("unmeterable", "dreams/**", ()),
    ("unmeterable", "chatkit/**", ()),
    ("unmeterable", "threads/**", ()),
    ("unmeterable", "conversations/**", ()),
    ("unmeterable", "workflows/**", ()),
    ("unmeterable", "client/**", ()),
    ("unmeterable", "fine_tuning/**", ()),
    ("unmeterable", "finetuning/**", ()),
    ("unmeterable", "**/tuningJobs/**", ()),
    ("unmeterable", "tunedModels/**", ()),
    ("unmeterable", "evals/**", ()),
    ("unmeterable", "observability/**", ()),
    ("unmeterable", "containers/**", ()),
    ("unmeterable", "vector_stores/**", ()),
    ("unmeterable", "fileSearchStores/**", ()),
    ("unmeterable", "**/cachedContents/**", ()),
    ("unmeterable", "libraries/**", ()),
    ("unmeterable", "rag/**", ()),
    ("unmeterable", "context/**", ()),
    ("unmeterable", "connectors/**", ()),
    ("unmeterable", "datasets/**", ()),
    ("unmeterable", "knowledgebases/**", ()),
    ("unmeterable", "retrieveAndGenerate", ()),
    ("unmeterable", "retrieveAndGenerateStream", ()),
    ("unmeterable", "flows/**", ()),
    ("unmeterable", "guardrail/**", ()),
    ("unmeterable", "model/**", ()),
    ("unmeterable", "audio/**", ()),
    ("unmeterable", "images/**", ()),
    ("unmeterable", "ocr", ()),
    ("unmeterable", "parse", ()),
    ("unmeterable", "moderations", ()),
    ("unmeterable", "chat/moderations", ()),
    ("unmeterable", "classifications", ()),
    ("unmeterable", "chat/classifications", ()),
    ("unmeterable", "classify", ()),
    ("unmeterable", "summarize", ()),
    ("unmeterable", "generate", ("cohere",)),
    ("unmeterable", "decisions", ()),
    ("unmeterable", "content_provenance_checks", ()),
    ("unmeterable", "**/*:*", ()),  # other verbs of Google's models
)


def surface_of(method: str, host: str, path: str) -> Surface:
    """What a request is, by its method, host and path (without its query).

    `host`: where it goes; a host of no known provider has metered and unknown requests only, since what runs there
    may be anything. Empty for requests that come in: then the table holds whoever is meant. The method `WEBSOCKET`
    stands for a handshake.
    """
    host = host.lower()
    provider = provider_of("", host=host)[0] if host else None
    what = operation(path)
    if method in _READS:
        live = provider is not None and not _LIVE.isdisjoint(what[:1])
        return Surface("unmeterable" if live else "free", None, provider, "/".join(what[:1]))
    if method == "WEBSOCKET":
        return Surface("unmeterable" if provider is not None else "unknown", None, provider, "a live connection")
    if method == "POST" and (dialect := dialect_for(path, host)) is not None:
        return Surface("metered", dialect, provider, "/".join(what))
    if (host and provider is None) or len(what) > _DEEPEST:
        return Surface("unknown", None, provider)
    if what[-1:] and what[-1] in _ENDS:
        return Surface("free", None, provider, what[-1])
    for kind, pattern, only in _ROWS:
        if (not only or provider in only) and _fits(what, pattern):
            return Surface(kind, None, provider, "/".join(pattern))
    return Surface("unknown", None, provider)


_ROWS: Final = tuple((kind, tuple(pattern.split("/")), only) for kind, pattern, only in _TABLE)


def _fits(what: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not what
    if pattern[0] == "**":
        return any(_fits(what[at:], pattern[1:]) for at in range(len(what) + 1))
    if not what:
        return False
    if pattern[0].startswith("*:"):
        verb = what[0].rpartition(":")[2] if ":" in what[0] else None
        same = verb is not None and pattern[0] in ("*:*", f"*:{verb}")
    else:
        same = pattern[0] in ("*", what[0])
    return same and _fits(what[1:], pattern[1:])
