"""What a stop matches, and what is no stop."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.stops import Stop, Stops

WHO = Context(caller="key-1", user="mia", session="s", agent="scout", departments=("sales", "ops"))
NOBODY = Context(session="s")


@pytest.mark.parametrize(
    "stop, context, matches",
    [
        (Stop(scope="all"), NOBODY, True),
        (Stop(scope="caller", subject="key-1"), WHO, True),
        (Stop(scope="caller", subject="key-2"), WHO, False),
        (Stop(scope="caller", subject="anonymous"), NOBODY, True),
        (Stop(scope="caller", subject="anonymous"), WHO, False),
        (Stop(scope="user", subject="mia"), WHO, True),
        (Stop(scope="user", subject="key-1"), WHO, False),
        (Stop(scope="session", subject="s"), WHO, True),
        (Stop(scope="session", subject="s"), NOBODY, True),
        (Stop(scope="session", subject="s", caller="key-1"), WHO, True),
        (Stop(scope="session", subject="s", caller="key-1"), NOBODY, False),
        (Stop(scope="session", subject="s", caller="anonymous"), NOBODY, True),
        (Stop(scope="session", subject="t"), WHO, False),
        (Stop(scope="agent", subject="scout"), WHO, True),
        (Stop(scope="agent", subject="scout"), NOBODY, False),
        (Stop(scope="department", subject="ops"), WHO, True),
        (Stop(scope="department", subject="hr"), WHO, False),
        (Stop(scope="model", subject="gpt-5"), WHO, False),
    ],
)
def test_who_is_stopped(stop: Stop, context: Context, matches: bool) -> None:
    """S8: a stop holds for exactly those that it names, by the scope that it names."""
    assert (Stops([Stop(scope="user", subject="other"), stop]).of_context(context, 0) is stop) is matches


@pytest.mark.parametrize(
    "subject, call, matches",
    [
        ("gpt-5", Call(provider="openai", model="gpt-5"), True),
        ("GPT-5", Call(provider="azure", model="gpt-5"), True),
        ("openai/gpt-5", Call(provider="openai", model="GPT-5"), True),
        ("openai/gpt-5", Call(provider="azure", model="gpt-5"), False),
        ("azure_openai/*", Call(provider="azure", model="anything"), True),
        ("gpt-5", Call(provider="openrouter", model="openai/gpt-5"), True),
        ("openrouter/*", Call(provider="openrouter", model="openai/gpt-5"), True),
        ("gpt-5", Call(provider="openai", model="gpt-5-mini"), False),
        ("gpt-5", Call(provider="openai", model="gpt-5-mini", alternatives=("gpt-5",)), True),
        ("gpt-5", Call(provider="azure", model="my-deployment", priced_as="gpt-5"), True),
        ("a", Call(model="auto", one_of=(Call(model="a"), Call(model="b"))), False),
        ("a", Call(model="auto", one_of=(Call(model="a"), Call(model="x", alternatives=("a",)))), True),
    ],
)
def test_which_models_are_stopped(subject: str, call: Call, matches: bool) -> None:
    """S8: models are compared in canonical spelling, with all that may answer in their place; of a call that is one of
    several, one that is not stopped is enough."""
    assert (Stops([Stop(scope="model", subject=subject)]).find(WHO, call, 0) is not None) is matches


def test_a_stop_ends() -> None:
    """S8: a stop holds before its end and not from it on."""
    stops = Stops([Stop(scope="all", until_ms=1_000)])
    assert [stops.find(WHO, None, now_ms) is not None for now_ms in (0, 999, 1_000)] == [True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": "tag", "subject": "x"},
        {"scope": "all", "subject": "x"},
        {"scope": "user"},
        {"scope": "user", "subject": " "},
        {"scope": "user", "subject": 5},
        {"scope": "user", "subject": "mia", "caller": "key-1"},
        {"scope": "session", "subject": "s", "caller": ""},
        {"scope": "model", "subject": "gpt-*"},
        {"scope": "model", "subject": "*/*"},
        {"scope": "all", "until_ms": "soon"},
        {"scope": "all", "until_ms": -1},
        {"scope": "all", "until_ms": True},
    ],
    ids=str,
)
def test_malformed_stops(wrong: dict[str, Any]) -> None:
    """Every field of a stop is checked when it is made; a list of something else is no list of stops."""
    with pytest.raises(ConfigurationError, match="stop"):
        Stop(**wrong)
    with pytest.raises(ConfigurationError, match="stops"):
        Stops([wrong])  # type: ignore[list-item]


def test_values_travel_as_json() -> None:
    """Stops and raises are what they were after a way through JSON; what is malformed there is refused."""
    stop = Stop(scope="session", subject="s", caller="key-1", until_ms=5, reason="r", id="i")
    raised = Raise(policy="b", unit="usd", amount="2.5", until_ms=5)  # type: ignore[arg-type]
    assert msgspec.json.decode(msgspec.json.encode(stop), type=Stop) == stop
    assert msgspec.json.decode(msgspec.json.encode(raised), type=Raise) == raised
    assert (raised.more, Raise(policy="b", unit="tokens", amount=7, until_ms=5).more) == (2_500_000_000, 7)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"scope": "nobody"}', type=Stop)


def test_refusals_name_nobody() -> None:
    """Callers are told that they are stopped, and not who or what else is, nor why."""
    for scope, subject in (("user", "mia"), ("model", "gpt-5"), ("all", "")):
        refusal = Stop(scope=scope, subject=subject, reason="secret").refusal  # type: ignore[arg-type]
        assert "secret" not in refusal.message
        assert (refusal.code, refusal.subject) == ("stopped", "")
        assert not subject or subject not in refusal.message
