"""A refusal inside the application that a client library has made an error of its own of: the client gets the refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.middleware.asgi import Exchange, request

from asgi_llm_guard import Budget, Guard, GuardMiddleware, Route
from asgi_llm_guard.admission import current_admission
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.guard import new_call
from asgi_llm_guard.outcomes import REFUSAL_HEADER, REFUSED, Refusals

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
SMALL = Budget("$0.0001/1d")
MODEL = "openai/gpt-4o-mini"


class Answered:
    """As client libraries keep an answer: by shape httpx's."""

    def __init__(self, extensions: dict[str, object]) -> None:
        self.status_code = 402
        self.extensions = extensions


class KeepsResponse(Exception):  # noqa: N818 - the shape is what the test is about
    """By shape OpenAI's and Anthropic's errors."""

    def __init__(self, denied: Denied | None, _: str) -> None:
        super().__init__("Error code: 402")
        self.status_code = 402
        self.body: dict[str, object] = {}
        self.response = Answered({} if denied is None else {REFUSED: denied})


class KeepsHeaders(Exception):  # noqa: N818 - as above
    """By shape Cohere's error: of the answer only the headers are left."""

    def __init__(self, denied: Denied | None, token: str) -> None:
        super().__init__("status_code: 402")
        self.status_code = 402
        self.body: dict[str, object] = {}
        self.headers = {REFUSAL_HEADER: token}


async def refused() -> tuple[Denied, str]:
    """A call that is refused, and what the answer of a hook says of it."""
    admission = current_admission()
    with pytest.raises(LimitExceeded) as caught:
        await new_call(admission.engine, admission.engine.describer.describe(MODEL, input_tokens=10**6), ()).claim()
    denied = caught.value.denied
    return denied, admission.refusal_token(denied)


async def answer(app: Any, path: str = PATH) -> tuple[Exchange, Guard]:
    guard = Guard([SMALL], hold_wait_s=0)
    exchange = request(path, body=json.dumps({"model": "gpt-4o-mini", "messages": [], "max_tokens": 1}).encode())
    await exchange.run(GuardMiddleware(app, guard, routes=[Route(PATH)]))
    assert await guard.storage.open_holds() == 0
    return exchange, guard


@pytest.mark.parametrize("path", [PATH, "/unguarded"])
@pytest.mark.parametrize("error", [KeepsResponse, KeepsHeaders])
async def test_refusal_behind_a_librarys_error_is_answered(error: Any, path: str) -> None:
    """An SDK's error that was caused by this admission's own refusal is answered as the refusal, in the route's dialect."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        denied, token = await refused()
        try:
            raise error(denied, token)  # noqa: TRY301 - as the library inside it does
        except Exception as caught:
            raise RuntimeError("the application's own") from caught

    exchange, guard = await answer(app, path)
    assert exchange.status == 402
    assert exchange.headers["x-should-retry"] == "false"
    assert b"request_exceeds_budget" in exchange.body
    assert await guard.storage.records() == []


@pytest.mark.parametrize("error", [KeepsResponse, KeepsHeaders])
async def test_what_a_provider_says_is_no_refusal_of_ours(error: Any) -> None:
    """A response of a provider, with whatever headers, is not taken for a refusal: the error stays an error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await refused()
        raise error(None, "0" * 32)

    with pytest.raises(error):
        await answer(app)


async def test_token_of_another_request_is_no_refusal() -> None:
    """What was refused in another request is nothing to this one, though it says so."""
    elsewhere = Guard([SMALL]).new_admission(Context())
    token = elsewhere.refusal_token(Denied(policy="p", code="budget_exhausted", status=402, message="m", retry=False))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeepsHeaders(None, token)

    with pytest.raises(KeepsHeaders):
        await answer(app)


async def test_refusals_behind_errors_cost_nothing() -> None:
    """Inside a call, the library's error of a refused one says that nothing was sent: nothing is charged."""
    guard = Guard([SMALL], hold_wait_s=0)
    for error in (KeepsResponse, KeepsHeaders):
        with pytest.raises(error):
            async with guard.open(Context()), guard.call(model=MODEL, input_tokens=10, max_output_tokens=1):
                raise error(*await refused())
    assert await guard.storage.records() == []


def test_tokens_are_bounded() -> None:
    """However many refusals one admission has, the last hundred are remembered."""
    refusals = Refusals()
    denied = Denied(policy="p", code="budget_exhausted", status=402, message="m", retry=False)
    tokens = [refusals.token(denied) for _ in range(150)]
    found = [refusals.find({REFUSAL_HEADER: token}) for token in tokens]
    assert found == [None] * 50 + [denied] * 100
    assert len(set(tokens)) == 150
