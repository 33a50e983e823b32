"""What the gateway raises, and how it tells a client. Pure.

    GatewayError              `.status`, `.code`; `.answer(dialect)` is the response to a client
    ├── FieldNotAllowed       400  a request says where it is to be sent, or with whose key
    ├── CannotExpress         400  a request asks for something that no deployment of its model can do
    ├── UnknownModel          404  a model that nobody serves, or that several do
    ├── ContextOverflow       400  the input is larger than every window that was tried
    ├── NoDeployment          503  those who serve the model rest, or have spent what they may; `.denied` if we refuse
    ├── ProviderFailed        502  every target failed; `.failures` tells of each
    │   └── RequestRejected   400  a provider says that the request itself is wrong
    └── NotInitialised        503  used before there are deployments

A limit of ours that refuses is a `LimitExceeded`, and none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import GuardError
from asgi_llm_guard.wire.base import ErrorKind
from asgi_llm_guard.wire.refusals import Rendered, render

__all__ = [
    "CannotExpress",
    "ContextOverflow",
    "Failure",
    "FieldNotAllowed",
    "GatewayError",
    "NoDeployment",
    "NotInitialised",
    "ProviderFailed",
    "RequestRejected",
    "UnknownModel",
]

_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One target that was tried in vain."""

    deployment: str
    model: str
    kind: ErrorKind | str
    """What the provider's error means, or why no answer came (`providers.base.FailureKind`)."""
    status: int | None = None
    """`None`: no answer came."""
    sent: bool = True
    """Whether the provider may have got the request."""
    message: str = ""
    """In the provider's words, without keys."""
    retry_after_s: float | None = None

    def __str__(self) -> str:
        what = self.kind if self.status is None else f"{self.kind}, status {self.status}"
        return f"{self.deployment}: {what}"


class GatewayError(GuardError):
    """The base of what the gateway raises."""

    status: int = 500
    code: str = "gateway_error"
    """For programs to read."""
    param: str | None = None
    """The field of the request that it is about."""
    denied: Denied | None = None
    """The refusal that it tells of, if that is what it is."""
    retry_after_s: int | None = None

    def answer(self, dialect: str | None = None) -> Rendered:
        """The response that tells of it, as the API of that dialect tells of errors."""
        if self.denied is not None:
            return render(self.denied, dialect=dialect)
        body = msgspec.json.encode(self._body(dialect))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.status < 500:
            headers.append((b"x-should-retry", b"false"))
        return Rendered(self.status, headers, body)

    def _body(self, dialect: str | None) -> dict[str, object]:
        message = str(self)
        if dialect == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": message, "details": {"error_code": self.code}}}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class FieldNotAllowed(GatewayError):  # noqa: N818 - what happened, as the others
    """A request says where it is to be sent, or with whose key. The field is named, its value is not shown."""

    status = 400
    code = "field_not_allowed"

    def __init__(self, field: str) -> None:
        super().__init__(f"{field}: requests do not say where they are sent, or with which credentials; leave it out")
        self.param = field


class CannotExpress(GatewayError):  # noqa: N818
    """A request asks for something that cannot be said to the provider, and that must not be dropped silently."""

    status = 400
    code = "unsupported_parameter"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.param = field


class UnknownModel(GatewayError):  # noqa: N818
    """Nobody serves the model, or several providers do and the name does not say which."""

    status = 404
    code = "model_not_found"
    param = "model"


class ContextOverflow(GatewayError):  # noqa: N818
    """The input is larger than the window of every deployment that was, or could have been, tried."""

    status = 400
    code = "context_length_exceeded"
    param = "messages"

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class NoDeployment(GatewayError):  # noqa: N818
    """The model is served, and nobody who serves it may be asked at the moment."""

    status = 503
    code = "no_deployment_available"

    def __init__(self, message: str, *, denied: Denied | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.denied = denied
        self.retry_after_s = retry_after_s
        if denied is not None:
            self.status = denied.status


class ProviderFailed(GatewayError):  # noqa: N818
    """Every target failed."""

    status = 502
    code = "provider_failed"

    def __init__(self, failures: Sequence[Failure], *, retry_after_s: int | None = None) -> None:
        super().__init__(f"every target failed ({'; '.join(map(str, failures))})")
        self.failures = tuple(failures)
        self.retry_after_s = retry_after_s


class RequestRejected(ProviderFailed):
    """A provider says that the request itself is wrong, or that it will not answer it: others were not asked."""

    code = "invalid_request"

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__(failures)
        last = failures[-1]
        self.args = (last.message or f"the provider refuses the request ({last.kind})",)
        self.status = last.status if last.status is not None and 400 <= last.status < 500 else 400
        if last.kind == "content_policy":
            self.code = "content_policy_violation"


class NotInitialised(GatewayError):  # noqa: N818
    """There are no deployments yet."""

    status = 503
    code = "not_initialised"

    def __init__(self) -> None:
        super().__init__("the gateway has no deployments yet: give it some, or call initialise() first")
