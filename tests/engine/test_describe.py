"""The bounds of a call: from a body, from words, and by what the model is known for."""

from __future__ import annotations

import pytest

from asgi_llm_guard import Guard
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.estimate import FRAMING_TOKENS
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.peek import read_body

PRICES = PriceBook.snapshot(overrides={"openai/test-model": {"input": 1, "output": 2}})


def described(body: bytes, **options: object) -> object:
    guard = Guard(prices=options.pop("prices", PRICES), **options)  # type: ignore[arg-type]
    view = read_body(body)
    ask = dialect_named("openai").read_request(view)
    return guard.engine.describer.describe_body(ask, view, provider=None, dialect="openai", assumed_output_tokens=None)


def test_body_is_bounded_by_its_bytes() -> None:
    """Conformance 62: the input of a body counts at most its bytes, the output what it asks for times its choices."""
    body = b'{"model":"openai/test-model","messages":[{"role":"user","content":"hello"}],"max_tokens":50,"n":3}'
    call = described(body)
    assert len(body) <= call.input_tokens <= len(body) + 200  # type: ignore[attr-defined]
    assert (call.output_tokens, call.max_output_tokens, call.choices) == (150, 50, 3)  # type: ignore[attr-defined]


def test_service_tier_of_the_request_is_priced() -> None:
    """A request for a dearer service tier is held at its price."""
    body = b'{"model":"gpt-5","messages":[],"max_tokens":1000%s}'
    standard = described(body % b"", prices=PriceBook.snapshot())
    priority = described(body % b',"service_tier":"priority"', prices=PriceBook.snapshot())
    assert priority.cost_nanousd > standard.cost_nanousd  # type: ignore[attr-defined]


def test_clamped_call_keeps_its_service_tier() -> None:
    """A call that is clamped is priced again by the tier that it asks for."""
    guard = Guard(prices=PriceBook.snapshot())
    view = read_body(b'{"model":"gpt-5","messages":[],"max_tokens":1000,"service_tier":"priority"}')
    describer = guard.engine.describer
    call = describer.describe_body(
        dialect_named("openai").read_request(view), view, provider=None, dialect="openai", assumed_output_tokens=None
    )
    assert describer.clamped(call, 1000).cost_nanousd == call.cost_nanousd


def test_exact_counter_replaces_the_bound_by_bytes() -> None:
    """A counter of one's own is asked for the text, in bodies and in words."""

    class Words:
        def count(self, text: bytes, /) -> int:
            return len(text.split())

    guard = Guard(prices=PRICES, counter=Words())
    assert guard.describe("openai/test-model", input="one two three").input_tokens == FRAMING_TOKENS + 3


def test_call_without_its_text_is_assumed() -> None:
    """A call that is described without its text takes the guard's assumption, and says so by being one."""
    assert Guard(prices=PRICES, assumed_input_tokens=77).describe("openai/test-model").input_tokens == 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "model: expected a model's name"),
        ({"model": "m", "input_tokens": -1}, "input_tokens: expected a whole number from 0, got -1"),
        ({"model": "m", "max_output_tokens": True}, "max_output_tokens: expected a whole number from 0, got True"),
        ({"model": "m", "choices": 0}, "choices: expected a whole number from 1, got 0"),
    ],
)
def test_wrong_descriptions_are_refused(arguments: dict[str, object], message: str) -> None:
    """A description that cannot be is refused before anything is claimed."""
    with pytest.raises(ConfigurationError, match=message):
        Guard(prices=PRICES).describe(**arguments)  # type: ignore[arg-type]


def test_fallbacks_are_bounded_by_the_dearest() -> None:
    """Of the models that may answer, the dearest decides what is held, the longest what its output may be."""
    prices = PriceBook.snapshot(
        overrides={
            "openai/cheap": {"input": 1, "output": 2, "max_output_tokens": 100},
            "openai/dear": {"input": 50, "output": 90, "max_output_tokens": 700},
            "openai/also": {"input": 3, "output": 4, "max_output_tokens": 10},
        }
    )
    alone = described(b'{"model":"openai/dear","messages":[]}', prices=prices)
    listed = described(b'{"model":"openai/cheap","models":["openai/also","openai/dear"],"messages":[]}', prices=prices)
    assert (listed.model, listed.alternatives) == ("cheap", ("openai/also", "openai/dear"))  # type: ignore[attr-defined]
    assert listed.output_tokens == alone.output_tokens == 700  # type: ignore[attr-defined]
    assert listed.output_picousd == alone.output_picousd  # type: ignore[attr-defined]
    assert listed.cost_nanousd >= alone.cost_nanousd  # type: ignore[attr-defined]


def test_fallback_without_a_price_has_none() -> None:
    """One model of a list that no price is known for leaves the whole call without one."""
    body = b'{"model":"openai/test-model","models":["openai/never-heard-of"],"messages":[],"max_tokens":5}'
    assert described(body).cost_nanousd is None  # type: ignore[attr-defined]
    with_price = described(body.replace(b"openai/never-heard-of", b"openai/test-model"))
    assert with_price.cost_nanousd is not None  # type: ignore[attr-defined]
