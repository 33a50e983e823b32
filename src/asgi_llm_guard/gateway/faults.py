"""What clients of the mounted gateway are told of what went wrong, as the API that they call tells of errors. Pure.

Where a request went is the service's own matter: no address stands in an answer, and the name of a deployment only
where the application shows it (`expose`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.gateway.errors import GatewayError, NoDeployment, ProviderFailed, RequestRejected
from asgi_llm_guard.gateway.providers.base import FailureKind, TransportFailed
from asgi_llm_guard.wire.peek import BodyError
from asgi_llm_guard.wire.refusals import Rendered, render, stream_error

__all__ = ["Fault", "MethodNotAllowed", "NoSuchPath", "Unexpected", "last_event", "rendered"]

_NOT_REACHED: Final[dict[FailureKind, str]] = {
    "connect": "The provider cannot be reached.",
    "tls": "The provider cannot be reached.",
    "timeout": "The provider did not answer in time.",
    "cut": "The provider's answer broke off.",
    "malformed": "The provider's answer cannot be read.",
}


class NoSuchPath(GatewayError):  # noqa: N818 - what happened, as the other errors of the gateway
    """Nothing is at this path."""

    status = 404
    code = "not_found"

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(f"There is nothing at this path. There is: {', '.join(paths)}.")


class MethodNotAllowed(GatewayError):  # noqa: N818
    """The path takes another method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"This path takes {allowed}.")
        self.allowed = allowed


class Unexpected(GatewayError):  # noqa: N818
    """Something that nobody has foreseen; what it was stands in the log."""

    status = 500
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("The gateway has failed. What went wrong is in its log.")


Fault = LimitExceeded | GatewayError | BodyError
"""What is told to a client."""


def rendered(
    fault: Fault, dialect: str, *, accept: bytes | None = None, instance: str | None = None, expose: bool = False
) -> Rendered:
    """The whole answer. `accept`, `instance`: see `wire.refusals.render`; `expose`: deployments may be named."""
    if isinstance(fault, LimitExceeded):
        return render(fault.denied, dialect=dialect, accept=accept, instance=instance)
    answer = _public(fault, expose=expose).answer(dialect)
    if isinstance(fault, MethodNotAllowed):
        answer.headers.append((b"allow", fault.allowed.encode("ascii")))
    return answer


def last_event(fault: Fault, dialect: str, *, expose: bool = False) -> bytes:
    """The server-sent event that ends a stream which has begun, in a form that the SDKs of the dialect raise.

    OpenAI's raises for an event of Responses only if there is an `error` in it, and clients of the API as it is
    documented read the members beside it.
    """
    if isinstance(fault, LimitExceeded):
        return stream_error(fault.denied, dialect, "sse")
    public = _public(fault, expose=expose)
    body = public.answer(dialect).body
    if dialect == "anthropic":
        return b"event: error\ndata: " + body + b"\n\n"
    if dialect == "openai_responses":
        flat = {"type": "error", "code": public.code, "message": str(public), "param": public.param}
        whole = msgspec.json.encode({**flat, **msgspec.json.decode(body)})
        return b"event: error\ndata: " + whole + b"\n\n"
    return b"data: " + body + b"\n\n"


def _public(fault: GatewayError | BodyError, *, expose: bool) -> GatewayError:
    if isinstance(fault, BodyError):
        public = GatewayError(fault.message)
        public.status, public.code, public.param = fault.status, fault.code, fault.field
        return public
    if isinstance(fault, TransportFailed):
        message = _NOT_REACHED[fault.kind]
    elif isinstance(fault, NoDeployment) and fault.denied is None and not expose:
        message = "Nobody who serves this model may be asked at the moment."
    elif isinstance(fault, ProviderFailed) and not isinstance(fault, RequestRejected) and not expose:
        kinds = dict.fromkeys(str(failure.kind) for failure in fault.failures)
        message = f"No provider has answered: {', '.join(kinds) or 'nobody was asked'}."
    else:
        return fault
    public = GatewayError(message)
    public.status, public.code, public.retry_after_s = fault.status, fault.code, fault.retry_after_s
    return public
