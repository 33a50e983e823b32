"""What the SDKs make of refusals: the real clients, over a transport that answers in memory."""

from __future__ import annotations

import anthropic
import httpx2
import openai
import pytest
from tests.denials.values import meter, refused, stuck
from tests.denials.virtual import run

from asgi_llm_guard.claims import Rule
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.denials import deny, refuse
from asgi_llm_guard.wire.refusals import render, stream_error

BUSY = deny(refused(stuck(meter(Rule.RATE, policy="rpm"), wait_ms=7_000)), None)
SLOW = deny(refused(stuck(meter(Rule.RATE, policy="rpm"), wait_ms=61_000)), None)
LOOP = deny(refused(stuck(meter(Rule.ITERATIONS, policy="loop"), wait_ms=3_600_000)), None)
SPENT = deny(refused(stuck(meter(Rule.BUDGET, policy="purse"), wait_ms=3_600_000)), None)
NEVER = deny(refused(stuck(meter(Rule.QUOTA), amount=11, used=0)), None)
DOWN = refuse(Refusal(policy="guard", code="guard_unavailable", message="guard: the store does not answer."))
MODEL = refuse(Refusal(policy="models", code="model_not_allowed", message="models: m is not on the list of user 'u'."))

CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
}
MESSAGE = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


class Service:
    """Refuses the first request, answers every later one, and counts them."""

    def __init__(self, denied: Denied, dialect: str, answer: object) -> None:
        self.requests = 0
        self._denied, self._dialect, self._answer = denied, dialect, answer

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests += 1
        if self.requests > 1:
            return httpx2.Response(200, json=self._answer)
        accept = request.headers["accept"].encode("ascii")
        rendered = render(self._denied, dialect=self._dialect, accept=accept, instance="req-1")
        return httpx2.Response(rendered.status, headers=rendered.headers, content=rendered.body)

    def http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.MockTransport(self))


async def ask_openai(service: Service) -> openai.APIStatusError | None:
    async with openai.AsyncOpenAI(api_key="k", max_retries=1, http_client=service.http()) as client:
        try:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        except openai.APIStatusError as error:
            return error
    return None


async def ask_anthropic(service: Service) -> anthropic.APIStatusError | None:
    async with anthropic.AsyncAnthropic(api_key="k", max_retries=1, http_client=service.http()) as client:
        try:
            await client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
        except anthropic.APIStatusError as error:
            return error
    return None


FINAL: list[tuple[Denied, int, Code]] = [
    (SLOW, 429, "rate_limit_exceeded"),
    (LOOP, 429, "session_iterations_exhausted"),
    (NEVER, 429, "request_exceeds_budget"),
    (SPENT, 402, "budget_exhausted"),
    (MODEL, 403, "model_not_allowed"),
]


@pytest.mark.parametrize("denied, status, code", FINAL)
def test_openai_sends_a_final_refusal_once(denied: Denied, status: int, code: Code) -> None:
    """A refusal that waiting does not help is one HTTP request, and the exception says why."""
    service = Service(denied, "openai", CHAT)
    error, slept_s = run(ask_openai(service))
    assert (service.requests, slept_s) == (1, 0)
    assert error is not None
    assert (error.status_code, error.code) == (status, code)
    assert str(error) == f"Error code: {status} - {denied.message}"


@pytest.mark.parametrize("denied, status, code", FINAL)
def test_anthropic_sends_a_final_refusal_once(denied: Denied, status: int, code: Code) -> None:
    """The same for Anthropic's client, which reads the code from the details."""
    service = Service(denied, "anthropic", MESSAGE)
    error, slept_s = run(ask_anthropic(service))
    assert (service.requests, slept_s) == (1, 0)
    assert error is not None
    assert (error.status_code, error.error_code, error.api_message) == (status, code, denied.message)
    assert denied.message in error.body["error"]["message"]  # type: ignore[index]


@pytest.mark.parametrize("denied, wait_s", [(BUSY, 7), (DOWN, 1)])
def test_openai_retries_what_may_pass(denied: Denied, wait_s: int) -> None:
    """A refusal that may pass is retried after exactly our wait."""
    service = Service(denied, "openai", CHAT)
    error, slept_s = run(ask_openai(service))
    assert (error, service.requests, slept_s) == (None, 2, wait_s)


@pytest.mark.parametrize("denied, wait_s", [(BUSY, 7), (DOWN, 1)])
def test_anthropic_retries_what_may_pass(denied: Denied, wait_s: int) -> None:
    """The same for Anthropic's client."""
    service = Service(denied, "anthropic", MESSAGE)
    error, slept_s = run(ask_anthropic(service))
    assert (error, service.requests, slept_s) == (None, 2, wait_s)


def test_exception_classes() -> None:
    """A spent budget, a forbidden model and a full rate raise the classes that applications already catch."""
    errors = [run(ask_openai(Service(denied, "openai", CHAT)))[0] for denied in (LOOP, MODEL)]
    assert [type(error) for error in errors] == [openai.RateLimitError, openai.PermissionDeniedError]
    error, _ = run(ask_anthropic(Service(SPENT, "anthropic", MESSAGE)))
    assert type(error) is anthropic.PaymentRequiredError
    assert error.type == "billing_error"


def streaming(body: bytes) -> httpx2.AsyncClient:
    headers = {"content-type": "text/event-stream"}
    return httpx2.AsyncClient(
        transport=httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, content=body))
    )


async def stream_chat() -> openai.APIError:
    http = streaming(stream_error(LOOP, "openai"))
    async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        with pytest.raises(openai.APIError) as caught:
            [chunk async for chunk in stream]
        return caught.value


async def stream_responses() -> openai.APIError:
    http = streaming(stream_error(LOOP, "openai_responses"))
    async with openai.AsyncOpenAI(api_key="k", http_client=http) as client:
        stream = await client.responses.create(model="m", input="hi", stream=True)
        with pytest.raises(openai.APIError) as caught:
            [event async for event in stream]
        return caught.value


async def stream_messages() -> anthropic.APIStatusError:
    http = streaming(stream_error(LOOP, "anthropic"))
    async with anthropic.AsyncAnthropic(api_key="k", http_client=http) as client:
        stream = await client.messages.create(model="m", max_tokens=5, messages=[], stream=True)
        with pytest.raises(anthropic.APIStatusError) as caught:
            [event async for event in stream]
        return caught.value


def test_stream_that_is_cut_raises_in_openai() -> None:
    """M10: the event that ends a stream raises in OpenAI's client, with message and code, on both of its APIs."""
    for main in (stream_chat, stream_responses):
        error, _ = run(main())
        assert (error.message, error.code) == (LOOP.message, "session_iterations_exhausted")


def test_stream_that_is_cut_raises_in_anthropic() -> None:
    """M10: the same in Anthropic's client."""
    error, _ = run(stream_messages())
    assert (error.api_message, error.error_code) == (LOOP.message, "session_iterations_exhausted")
