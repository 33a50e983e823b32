"""What answers and errors say about the call that they came from, by their shape."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

import msgspec

from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.usage import Outcome, Usage
from asgi_llm_guard.wire.base import Answer

__all__ = [
    "REFUSAL_HEADER",
    "REFUSED",
    "Refusals",
    "error_status",
    "outcome_of",
    "refusal_of",
    "says_nothing",
    "together",
]

REFUSED: Final = "asgi_llm_guard"
"""Where a response that a client hook made says so: in its extensions, which no provider can reach."""
REFUSAL_HEADER: Final = "x-llm-guard-refusal"
"""The header of the same answer, for client libraries that drop everything else."""

_MOST_TOLD: Final = 100


def together(before: Answer | None, answer: Answer) -> Answer:
    """What two answers of one call say: an attempt that failed takes nothing away, two that were billed add up."""
    if before is None or before.usage is None:
        return answer
    if answer.usage is None:
        return before
    one, other = before.usage, answer.usage
    summed: dict[str, object] = {}
    for name in _COUNTS:
        first, second = getattr(one, name), getattr(other, name)
        if first is None and second is None:
            continue
        # Where one of the two is not known, the sum is not; a part that only one of them has is the sum.
        known = name not in _TOTALS or (first is not None and second is not None)
        summed[name] = (first or 0) + (second or 0) if known else None
    return msgspec.structs.replace(
        answer, usage=msgspec.structs.replace(other, extra=(*one.extra, *other.extra), **summed)
    )


_TOTALS: Final = frozenset(
    {"input_tokens", "output_tokens", "billed_input_tokens", "billed_output_tokens", "reported_nanousd"}
)
_COUNTS: Final = tuple(name for name in Usage.__struct_fields__ if name not in {"service_tier", "model", "extra"})


def says_nothing(answer: Answer) -> bool:
    """An error that the application answers is its own word: a call may have been made and billed before it."""
    return answer.kind == "error" and answer.usage is None and not answer.text_bytes


_NEVER_SENT: Final = frozenset(
    {
        *("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"),  # of httpx
        *("ConnectTimeoutError", "EndpointConnectionError", "ProxyConnectionError"),  # of botocore
    }
)


class Refusals:
    """The last refusals that client hooks have answered in one admission, by the tokens that stand in the answers.

    Some client libraries keep of an answer only its headers. A token cannot be guessed, and is good for one admission.
    """

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: dict[str, Denied] = {}

    def token(self, denied: Denied) -> str:
        """What the header `REFUSAL_HEADER` of the answer to a refusal says."""
        token = secrets.token_hex(16)
        self._told[token] = denied
        while len(self._told) > _MOST_TOLD:
            self._told.pop(next(iter(self._told)), None)
        return token

    def find(self, headers: object) -> Denied | None:
        """The refusal that headers which an error has kept tell of."""
        if not self._told or not isinstance(headers, Mapping):
            return None
        for name in (REFUSAL_HEADER, REFUSAL_HEADER.title()):
            token = headers.get(name)
            if isinstance(token, str) and token in self._told:
                return self._told[token]
        return None


def outcome_of(error: BaseException, *, of_client: bool, refused: Outcome, refusals: Refusals | None = None) -> Outcome:
    """What an exception says about the call that raised it, by its shape; `unknown` unless it says so.

    A status of 400 or above is the provider's answer. A connection that was never made means that
    nothing was sent. `of_client`: only what a provider's client library raises counts; an error of
    another service proves nothing. `refused`: what a refusal of a call inside says.
    """
    seen: BaseException | None = error
    for _ in range(8):  # causes may form a ring
        if seen is None:
            break
        if refusal_of(seen, refusals) is not None:
            return refused
        if type(seen).__name__ in _NEVER_SENT and (not of_client or seen is not error):
            return "not_dispatched"  # client libraries raise their own error from it
        if error_status(seen) and hasattr(seen, "response") and hasattr(seen, "body"):
            return "provider_error"
        if not of_client and error_status(seen) and (hasattr(seen, "response") or hasattr(seen, "body")):
            return "provider_error"
        if not of_client and error_status(getattr(seen, "response", None)):  # of `raise_for_status`
            return "provider_error"
        seen = seen.__cause__
    return "unknown"


def refusal_of(error: BaseException, refusals: Refusals | None = None) -> Denied | None:
    """The refusal of ours that an exception tells of: one of ours, or a client library's for an answer of a hook.

    `refusals`: those of the admission in which it was raised.
    """
    if isinstance(error, LimitExceeded):
        return error.denied
    told = _refusal_in(error)
    if told is None and refusals is not None:
        told = refusals.find(getattr(error, "headers", None))
    if told is None and error.__suppress_context__ and error_status(error) and error.__context__ is not None:
        told = _refusal_in(error.__context__)  # raised `from None` out of the error that has the response
    return told


def _refusal_in(error: BaseException) -> Denied | None:
    for name in ("response", "raw_response"):
        response = getattr(error, name, None)
        # A dict is what botocore's errors carry.
        extensions = response if isinstance(response, dict) else getattr(response, "extensions", None)
        if isinstance(extensions, dict) and isinstance(denied := extensions.get(REFUSED), Denied):
            return denied
    return None


def error_status(value: object) -> bool:
    status = getattr(value, "status_code", None)
    return isinstance(status, int) and status >= 400
