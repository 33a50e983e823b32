"""What the gateway raises, and how clients are told."""

from __future__ import annotations

import json

import pytest

from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import GuardError
from asgi_llm_guard.gateway.errors import (
    CannotExpress,
    ContextOverflow,
    Failure,
    FieldNotAllowed,
    GatewayError,
    NoDeployment,
    NotInitialised,
    ProviderFailed,
    UnknownModel,
)
from asgi_llm_guard.gateway.providers.base import TransportFailed
from asgi_llm_guard.wire import dialect_named

FAILURE = Failure(deployment="d1", model="m", kind="overload", status=503, message="busy")
ERRORS: list[tuple[GatewayError, int, str]] = [
    (FieldNotAllowed("api_base"), 400, "field_not_allowed"),
    (CannotExpress("n", "is not known there"), 400, "unsupported_parameter"),
    (UnknownModel("no such model"), 404, "model_not_found"),
    (ContextOverflow("too long", [FAILURE]), 400, "context_length_exceeded"),
    (NoDeployment("all rest", retry_after_s=7), 503, "no_deployment_available"),
    (ProviderFailed([FAILURE], retry_after_s=3), 502, "provider_failed"),
    (NotInitialised(), 503, "not_initialised"),
    (TransportFailed("connect", "no connection", sent=False), 502, "provider_unreachable"),
    (TransportFailed("timeout", "too late", sent=True), 504, "provider_unreachable"),
]


@pytest.mark.parametrize(
    ("error", "status", "code"), ERRORS, ids=[f"{type(error).__name__}-{status}" for error, status, _ in ERRORS]
)
@pytest.mark.parametrize("dialect", ["openai", "openai_responses", "anthropic"])
def test_errors_have_the_shape_of_the_api(error: GatewayError, status: int, code: str, dialect: str) -> None:
    """Each error has its own status and code, in the shape that the SDKs of the API read."""
    told = error.answer(dialect)

    body = json.loads(told.body)["error"]
    assert isinstance(error, GuardError)
    assert (told.status, body["message"]) == (status, str(error))
    assert (body["details"]["error_code"] if dialect == "anthropic" else body["code"]) == code
    assert dict(told.headers).get(b"x-should-retry") == (b"false" if status < 500 else None)
    assert (b"content-length", b"%d" % len(told.body)) in told.headers


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_errors_are_read_as_what_they_are(dialect: str) -> None:
    """D5: clients that read a provider's errors read the gateway's alike; an overflow is an overflow to them."""
    overflow = ContextOverflow("prompt is too long: 9000 tokens > 8192 maximum").answer(dialect)

    assert dialect_named(dialect).read_response(overflow.status, overflow.body).error == "context_overflow"


def test_waits_are_told() -> None:
    """Where it is known when to come back, the answer says so."""
    for error, _, _ in ERRORS:
        told = dict(error.answer("openai").headers)
        assert told.get(b"retry-after") == (
            None if error.retry_after_s is None else str(error.retry_after_s).encode("ascii")
        )


def test_every_failure_is_listed() -> None:
    """Whoever reads the error sees each target that was tried."""
    never = Failure(deployment="d2", model="m", kind="connect", sent=False)
    error = ProviderFailed([FAILURE, never])

    assert error.failures == (FAILURE, never)
    assert str(error) == "every target failed (d1: overload, status 503; d2: connect)"


def test_refusals_of_ours_stay_refusals() -> None:
    """B3: where our own limits stand in the way, the answer is that of the refusal."""
    denied = Denied(policy="providers", code="budget_exhausted", message="spent", status=402, retry=False)
    error = NoDeployment("nobody is under budget", denied=denied)

    told = error.answer("openai")

    assert (error.status, told.status) == (402, 402)
    assert json.loads(told.body)["error"]["code"] == "budget_exhausted"
