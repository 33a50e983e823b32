from __future__ import annotations

import json
import re
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.denials.values import CODES, NOW_MS, meter, refused, stuck

from asgi_llm_guard.claims import Rule
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.denials import deny, refuse
from asgi_llm_guard.money import NANO
from asgi_llm_guard.wire.refusals import render, stream_error, websocket_close

HOUR_MS = 3_600_000
DIALECTS = [
    "openai",
    "openai_responses",
    "anthropic",
    "gemini",
    "mistral",
    "cohere",
    "bedrock",
    "ollama",
    "azure",
    None,
]

LOOP = deny(refused(stuck(meter(Rule.ITERATIONS, 25, policy="loop"), used=25, wait_ms=HOUR_MS)), None)
SPENT = deny(
    refused(
        stuck(meter(Rule.BUDGET, 10 * NANO, policy="purse"), amount=NANO // 80, used=10 * NANO, wait_ms=HOUR_MS),
        stuck(meter(Rule.QUOTA, policy="dept", owned=False), wait_ms=HOUR_MS),
    ),
    None,
)
FITS = deny(
    refused(stuck(meter(Rule.QUOTA, 600, policy="dept", owned=False), amount=1100, used=0)),
    Call(model="m", input_tokens=100, output_tokens=1000),
)
BUSY = deny(refused(stuck(meter(Rule.RATE, policy="rpm"), wait_ms=7_000)), None)
DOWN = refuse(Refusal(policy="guard", code="guard_unavailable", message="guard: the store does not answer."))
SESSION = refuse(Refusal(policy="loop", code="session_required", message="loop: send x-session-id.", scope="session"))

# What a program reads of LOOP, of SPENT and of FITS, in whatever shape.
LOOP_MEMBERS: dict[str, object] = {
    "policy": "loop",
    "scope": "session",
    "unit": "calls",
    "requested": 1,
    "resets_at": "2026-11-21T11:00:00Z",
    "retry": False,
    "retry_after_s": 3600,
    "fits_max_tokens": None,
    "subject": "s1",
    "limit": 25,
    "used": 25,
    "held": 0,
    "period": "1h",
}
SPENT_MEMBERS: dict[str, object] = {
    "policy": "purse",
    "scope": "user",
    "unit": "usd",
    "requested": "0.0125",
    "resets_at": "2026-11-21T11:00:00Z",
    "retry": False,
    "retry_after_s": 3600,
    "fits_max_tokens": None,
    "subject": "s1",
    "limit": "10.00",
    "used": "10.00",
    "held": "0.00",
    "period": "1d",
    "details": ["dept: this department (requested 1), resets at 2026-11-21T11:00:00Z"],
}
FITS_MEMBERS: dict[str, object] = {
    "policy": "dept",
    "scope": "department",
    "unit": "tokens",
    "requested": 1100,
    "resets_at": None,
    "retry": False,
    "retry_after_s": None,
    "fits_max_tokens": 500,
    "period": "daily",
}


def body_of(denied: Denied, dialect: str | None, **options: Any) -> Any:
    return json.loads(render(denied, dialect=dialect, **options).body)


# --------------------------------------------------------------------------------------- bodies


def test_openai_body() -> None:
    """OpenAI's shape: message, type, param and a code that is text, and one object of ours beside them."""
    assert body_of(LOOP, "openai", instance="r1") == {
        "error": {
            "message": LOOP.message,
            "type": "insufficient_quota",
            "param": None,
            "code": "session_iterations_exhausted",
            "guard": {**LOOP_MEMBERS, "violated_policies": ["loop"]},
        }
    }


def test_anthropic_body() -> None:
    """Anthropic's shape: the code and our members in the details, the request id beside the error."""
    assert body_of(LOOP, "anthropic", instance="r1") == {
        "type": "error",
        "error": {
            "type": "rate_limit_error",
            "message": LOOP.message,
            "details": {
                "error_code": "session_iterations_exhausted",
                **LOOP_MEMBERS,
                "violated_policies": ["loop"],
            },
        },
        "request_id": "r1",
    }
    assert "request_id" not in body_of(LOOP, "anthropic")


def test_problem_body() -> None:
    """RFC 9457: a registered type, title, status, detail, instance, the violated policies, and our members."""
    assert body_of(LOOP, None, instance="urn:request:r 1\r\n") == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota exceeded",
        "status": 429,
        "detail": LOOP.message,
        "instance": "urn:request:r%201%0D%0A",
        "violated-policies": ["loop"],
        "code": "session_iterations_exhausted",
        **LOOP_MEMBERS,
    }
    assert "instance" not in body_of(LOOP, None)


def test_gemini_body() -> None:
    """Gemini's shape: the status as a number and by name, our members in a detail."""
    assert body_of(LOOP, "gemini") == {
        "error": {
            "code": 429,
            "message": LOOP.message,
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": "SESSION_ITERATIONS_EXHAUSTED",
                    "domain": "asgi-llm-guard",
                    "guard": {**LOOP_MEMBERS, "violated_policies": ["loop"]},
                }
            ],
        }
    }


def test_flat_bodies() -> None:
    """Mistral, Cohere, Bedrock and Ollama have the message at the top, where their clients look for it."""
    guard = {**LOOP_MEMBERS, "violated_policies": ["loop"]}
    ours: dict[str, object] = {"code": "session_iterations_exhausted", "guard": guard}
    assert body_of(LOOP, "mistral") == {
        "object": "error",
        "message": LOOP.message,
        "type": "insufficient_quota",
        "param": None,
        **ours,
    }
    assert body_of(LOOP, "cohere", instance="r1") == {"id": "r1", "message": LOOP.message, **ours}
    assert body_of(LOOP, "cohere") == {"message": LOOP.message, **ours}
    assert body_of(LOOP, "bedrock") == {"message": LOOP.message, **ours}
    assert body_of(LOOP, "ollama") == {"error": LOOP.message, **ours}


def test_bedrock_names_its_exception_in_a_header() -> None:
    """Bedrock's clients choose the exception by a header."""
    assert (b"x-amzn-errortype", b"ServiceQuotaExceededException") in render(LOOP, dialect="bedrock").headers
    assert (b"x-amzn-errortype", b"ThrottlingException") in render(BUSY, dialect="bedrock").headers


def test_money_is_decimal_text() -> None:
    """Amounts of money are dollars as decimal text, never a float and never nano-dollars."""
    assert body_of(SPENT, "openai")["error"]["guard"] == {**SPENT_MEMBERS, "violated_policies": ["purse", "dept"]}


def test_what_would_fit_and_nothing_undisclosed() -> None:
    """M13: what would fit is machine-readable; limit, used, held and name of a shared scope are not there."""
    problem = body_of(FITS, None)
    assert {name: problem[name] for name in FITS_MEMBERS} == FITS_MEMBERS
    assert set(problem) - set(FITS_MEMBERS) == {"type", "title", "status", "detail", "violated-policies", "code"}


PROBLEM_TYPES: list[tuple[Denied, str, str]] = [
    (BUSY, "https://iana.org/assignments/http-problem-types#quota-exceeded", "Quota exceeded"),
    (
        DOWN,
        "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
        "Temporarily reduced capacity",
    ),
    (SPENT, "about:blank", "Payment Required"),
    (SESSION, "about:blank", "Bad Request"),
    (
        refuse(Refusal(policy="p", code="invalid_request", message="m", status=499)),
        "about:blank",
        "Refused",
    ),
]


@pytest.mark.parametrize("denied, about, title", PROBLEM_TYPES)
def test_problem_types(denied: Denied, about: str, title: str) -> None:
    """Registered types stand where status and meaning are theirs; elsewhere the status speaks for itself."""
    problem = body_of(denied, None)
    assert (problem["type"], problem["title"], problem["status"]) == (about, title, denied.status)


TYPES: list[tuple[Code, str, str]] = [
    ("rate_limit_exceeded", "rate_limit_error", "rate_limit_error"),
    ("quota_exceeded", "insufficient_quota", "rate_limit_error"),
    ("budget_exhausted", "insufficient_quota", "billing_error"),
    ("model_not_allowed", "permission_error", "permission_error"),
    ("credentials_invalid", "permission_error", "permission_error"),
    ("session_required", "invalid_request_error", "invalid_request_error"),
    ("guard_unavailable", "server_error", "api_error"),
]


@pytest.mark.parametrize("code, openai_type, anthropic_type", TYPES)
def test_error_types(code: Code, openai_type: str, anthropic_type: str) -> None:
    """Each class of refusal has the type that the API itself would give it."""
    denied = refuse(Refusal(policy="p", code=code, message="m"))
    assert body_of(denied, "openai")["error"]["type"] == openai_type
    assert body_of(denied, "anthropic")["error"]["type"] == anthropic_type


def test_a_forbidden_model_names_the_parameter() -> None:
    """OpenAI's `param` says which part of the request is refused, where one is."""
    denied = refuse(Refusal(policy="p", code="model_not_allowed", message="m"))
    assert body_of(denied, "openai")["error"]["param"] == "model"


# -------------------------------------------------------------------------------------- headers


def test_headers_of_a_refusal_worth_a_retry() -> None:
    """A wait that is worth a retry is told in seconds and in milliseconds, and nothing forbids the retry."""
    rendered = render(BUSY, dialect="openai", fields=[(b"ratelimit", b'"rpm";r=0')])
    assert rendered.status == 429
    assert rendered.headers == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"cache-control", b"no-store"),
        (b"retry-after", b"7"),
        (b"retry-after-ms", b"7000"),
        (b"ratelimit", b'"rpm";r=0'),
    ]


def test_headers_of_a_final_refusal() -> None:
    """A quota's reset is told, but clients are told not to retry by themselves."""
    headers = dict(render(LOOP).headers)
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"retry-after"] == b"3600"
    assert headers[b"x-should-retry"] == b"false"
    assert b"retry-after-ms" not in headers


def test_headers_of_a_spent_budget() -> None:
    """A spent budget is no matter of waiting: its reset is in the body, and there is no Retry-After."""
    headers = dict(render(SPENT).headers)
    assert headers[b"x-should-retry"] == b"false"
    assert b"retry-after" not in headers


def test_headers_of_what_can_never_fit() -> None:
    """What can never fit has no Retry-After."""
    headers = dict(render(FITS).headers)
    assert headers[b"x-should-retry"] == b"false"
    assert b"retry-after" not in headers


# --------------------------------------------------------------------------------------- accept


@pytest.mark.parametrize(
    "accept, problem",
    [
        (None, False),
        (b"", False),
        (b"*/*", False),
        (b"application/json", False),
        (b"application/problem+json", True),
        (b"Application/Problem+JSON", True),
        (b"application/problem+json, application/json", True),
        (b"application/problem+json;q=0.9, application/json", False),
        (b"application/problem+json; q=0.9, application/json;q=0.5", True),
        (b"application/problem+json;q=0.5, */*", False),
        (b"application/problem+json, */*;q=0.1", True),
        (b"application/problem+json;q=0.5, application/json;q=0.1, */*", True),
        (b"application/problem+json;q=0", False),
        (b"application/problem+json;charset=utf-8", True),
        (b"application/problem+json;q=abc", False),
        (b"application/problem+json;q=7", False),
        (b"application/problem+json;q=nan", False),
        (b"text/x-problem+json", False),
        (b"application/problem+json\xff;;,,=;q", False),
    ],
)
def test_accept_chooses_the_shape(accept: bytes | None, problem: bool) -> None:
    """A problem document is sent to a client that names it and wants plain JSON no more; garbage is no wish."""
    rendered = render(LOOP, dialect="openai", accept=accept)
    kind = b"application/problem+json" if problem else b"application/json"
    assert dict(rendered.headers)[b"content-type"] == kind
    assert ("violated-policies" in json.loads(rendered.body)) == problem


def test_unknown_dialect_gets_a_problem() -> None:
    """Where the dialect is not known, a problem document is sent whatever the client accepts."""
    assert body_of(LOOP, "grpc", accept=b"application/json")["type"].endswith("#quota-exceeded")


# ------------------------------------------------------------------------------------- property

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, controls and all
AMOUNT = st.none() | st.integers(0, 2**53)
DENIED = st.builds(
    Denied,
    policy=TEXT,
    code=st.sampled_from(CODES),
    message=TEXT,
    status=st.sampled_from([400, 402, 403, 422, 429, 499, 503]),
    retry=st.booleans(),
    retry_after_s=st.none() | st.integers(1, 10**7),
    scope=TEXT,
    subject=TEXT,
    unit=st.none() | st.sampled_from(["calls", "tokens", "nanousd", "slots", "ids"]),
    requested=AMOUNT,
    limit=AMOUNT,
    used=AMOUNT,
    held=AMOUNT,
    resets_at_ms=st.none() | st.integers(0, 2 * NOW_MS),
    fits_max_tokens=st.none() | st.integers(1, 10**6),
    violated=st.lists(TEXT, max_size=2).map(tuple),
    details=st.lists(TEXT, max_size=2).map(tuple),
)
ALWAYS = {"policy", "scope", "unit", "requested", "resets_at", "retry", "retry_after_s", "fits_max_tokens"}


def members_of(body: Any, dialect: str | None) -> Any:
    match dialect:
        case None:
            return body
        case "anthropic":
            return body["error"]["details"]
        case "gemini":
            return body["error"]["details"][0]["guard"]
        case "mistral" | "cohere" | "bedrock" | "ollama":
            return body["guard"]
        case _:
            return body["error"]["guard"]


@given(
    denied=DENIED,
    dialect=st.sampled_from(DIALECTS),
    instance=st.none() | TEXT,
    accept=st.none() | st.binary() | st.just(b"application/problem+json"),
)
def test_every_refusal_can_be_read_by_a_program(
    denied: Denied, dialect: str | None, instance: str | None, accept: bytes | None
) -> None:
    """T16: whatever the texts, the body is JSON with all members, and no header holds anything but our own words."""
    rendered = render(denied, dialect=dialect, accept=accept, instance=instance)
    headers = dict(rendered.headers)
    problem = headers[b"content-type"] == b"application/problem+json"
    members = members_of(json.loads(rendered.body), None if problem else dialect)
    assert members.keys() >= ALWAYS
    assert {"limit", "used", "held", "subject"} & members.keys() == {
        name for name in ("limit", "used", "held") if getattr(denied, name) is not None
    } | ({"subject"} if denied.subject else set())
    assert headers[b"content-length"] == b"%d" % len(rendered.body)
    assert headers[b"cache-control"] == b"no-store"
    assert (b"x-should-retry" in headers) is not denied.retry
    for name, value in rendered.headers:
        assert re.fullmatch(rb"[a-z-]+", name)
        assert re.fullmatch(rb"[A-Za-z0-9/+-]+", value)


# -------------------------------------------------------------------------- streams and sockets


@given(
    denied=DENIED, dialect=st.sampled_from([dialect for dialect in DIALECTS if dialect not in ("bedrock", "ollama")])
)
def test_stream_error_is_one_event(denied: Denied, dialect: str | None) -> None:
    """M10: whatever the texts, a running stream ends in exactly one event whose data is JSON."""
    event = stream_error(denied, dialect)
    head, data, rest = re.fullmatch(rb"(event: [a-z-]+\n)?data: ([^\r\n]+)\n\n()", event).groups()  # type: ignore[union-attr]
    assert members_of(json.loads(data), dialect).keys() >= ALWAYS
    named = {"openai": None, "azure": None, "gemini": None, "cohere": b"event: message-end\n"}
    assert head == named.get(dialect or "", b"event: error\n")
    assert rest == b""


def test_stream_error_of_ollama_is_a_line() -> None:
    """Ollama's streams are lines of JSON; the last one carries the error."""
    event = stream_error(LOOP, "ollama")
    assert event.endswith(b"\n")
    assert json.loads(event)["error"] == LOOP.message


def test_stream_error_of_bedrock_is_a_frame() -> None:
    """Bedrock's streams are binary frames; the last one is an exception, with both checksums right."""
    frame = stream_error(BUSY, "bedrock")
    total, head, prelude_crc = struct.unpack_from(">III", frame)
    assert total == len(frame)
    assert prelude_crc == zlib.crc32(frame[:8])
    assert struct.unpack(">I", frame[-4:])[0] == zlib.crc32(frame[:-4])
    headers, rest = {}, frame[12 : 12 + head]
    while rest:
        name = rest[1 : 1 + rest[0]]
        kind, size = struct.unpack_from(">BH", rest, 1 + rest[0])
        assert kind == 7
        headers[name] = rest[4 + rest[0] : 4 + rest[0] + size]
        rest = rest[4 + rest[0] + size :]
    assert headers == {
        b":exception-type": b"throttlingException",
        b":content-type": b"application/json",
        b":message-type": b"exception",
        b":error-code": b"ThrottlingException",
        b":error-message": BUSY.message.encode(),
    }
    assert json.loads(frame[12 + head : -4])["message"] == BUSY.message


def test_websocket_close_codes() -> None:
    """A socket is closed with 1013 where trying again helps, with 1008 where policy forbids; the reason says which."""
    assert websocket_close(BUSY)[0] == 1013
    code, reason = websocket_close(LOOP)
    assert code == 1008
    assert reason.startswith("session_iterations_exhausted: loop: session 's1' has used up its calls")


def test_websocket_reason_is_cut_between_letters() -> None:
    """A reason that is too long is cut at 123 bytes, and never inside of a letter."""
    _, reason = websocket_close(refuse(Refusal(policy="p", code="invalid_request", message="a" + "€" * 60)))
    assert reason == "invalid_request: a" + "€" * 35


def test_lone_surrogates_do_not_break_a_refusal() -> None:
    """T16: half of a pair, as JSON bodies may bring in, goes out as a question mark."""
    denied = refuse(Refusal(policy="p", code="invalid_request", message="a\ud800b"))
    assert body_of(denied, None, instance="\udfff")["detail"] == "a?b"
    assert websocket_close(denied)[1] == "invalid_request: a b"


@given(denied=DENIED)
def test_websocket_reasons_fit(denied: Denied) -> None:
    """A reason fits a control frame, is UTF-8, and holds no control characters."""
    _, reason = websocket_close(denied)
    assert len(reason.encode("utf-8")) <= 123
    assert reason.isprintable()
