"""A FastAPI service that asks a model: an answer, a streamed answer, and an agent that uses tools.

Nothing in the handlers counts, prices or settles anything; `@guarded` and the middleware do.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
    current_admission,
    guarded,
)
from asgi_llm_guard.identity import ApiKeys

HERE = Path(__file__).parent
MODEL = "gpt-4o-mini"
MOST_TOKENS = 400
STEPS = 4

router = APIRouter()


# ------------------------------------------------------------------------------------ who, and what with


def language_model(request: Request) -> AsyncOpenAI:
    client: AsyncOpenAI = request.app.state.llm
    return client


async def who_asks() -> Context:
    """The caller as the guard has verified it."""
    return current_admission().context


LLM = Annotated[AsyncOpenAI, Depends(language_model)]
Caller = Annotated[Context, Depends(who_asks)]


class Question(BaseModel):
    text: str = Field(max_length=20_000)

    @property
    def messages(self) -> list[Any]:
        return [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": self.text}]


@router.get("/me")
async def me(caller: Caller) -> dict[str, object]:
    return {"caller": caller.caller, "departments": caller.departments}


# ------------------------------------------------------------------------------------ answers


# `input` bounds the tokens of what will be sent. The usage is read from what the handler returns.
@router.post("/answers", response_model_exclude_none=True)
@guarded(model=f"openai/{MODEL}", max_output_tokens=MOST_TOKENS, input=lambda question, **_: question.messages)
async def answer(question: Question, llm: LLM) -> ChatCompletion:
    return await llm.chat.completions.create(model=MODEL, max_completion_tokens=MOST_TOKENS, messages=question.messages)


# Admitted before the response starts, so that a refusal is a whole response; metered while it is sent.
@router.post("/answers/stream")
@guarded(model=f"openai/{MODEL}", max_output_tokens=MOST_TOKENS, input=lambda question, **_: question.messages)
async def stream_answer(question: Question, llm: LLM) -> StreamingResponse:
    chunks = await llm.chat.completions.create(
        model=MODEL,
        max_completion_tokens=MOST_TOKENS,
        messages=question.messages,
        stream=True,
        stream_options={"include_usage": True},
    )

    async def events() -> AsyncIterator[str]:
        async with chunks:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


# ------------------------------------------------------------------------------------ agent

NOTES = {"llama": "Llamas hum.", "alpaca": "Alpacas spit less than llamas."}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "A note about an animal.",
            "parameters": {"type": "object", "properties": {"animal": {"type": "string"}}, "required": ["animal"]},
        },
    }
]


class Report(BaseModel):
    answer: str | None
    steps: int
    notes: list[str]
    stopped: str | None = None
    """Why there is no answer."""


@guarded(
    model=f"openai/{MODEL}",
    max_output_tokens=MOST_TOKENS,
    input=lambda llm, messages: {"messages": messages, "tools": TOOLS},  # noqa: ARG005 - takes what `step` takes
)
async def step(llm: AsyncOpenAI, messages: list[Any]) -> ChatCompletion:
    """One call of the loop. The first one is what the request was admitted for; each further one is a call more."""
    return await llm.chat.completions.create(
        model=MODEL, max_completion_tokens=MOST_TOKENS, messages=messages, tools=TOOLS
    )


@router.post("/research")
async def research(question: Question, llm: LLM) -> Report:
    """Let the model look things up until it answers, or until its session may make no more calls."""
    messages, notes, steps = question.messages, list[str](), 0
    while True:
        try:
            completion = await step(llm, messages)
        except LimitExceeded as error:
            if not steps:
                raise  # nothing to report: the middleware answers the refusal
            stopped = f"Stopped after {steps} steps without an answer. {error.denied.message}"
            return Report(answer=None, steps=steps, notes=notes, stopped=stopped)
        steps += 1
        message = completion.choices[0].message
        if not message.tool_calls:
            return Report(answer=message.content, steps=steps, notes=notes)
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            note = look_up(call.function.arguments) if call.type == "function" else "There is no such tool."
            notes.append(note)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": note})


def look_up(arguments: str) -> str:
    try:
        animal = json.loads(arguments)["animal"]
    except (ValueError, KeyError, TypeError):
        return "Give the name of an animal."
    return NOTES.get(str(animal), "Nothing is known about it.")


# ------------------------------------------------------------------------------------ the service


def create_app(guard: Guard, llm: AsyncOpenAI) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001 - FastAPI passes it
        async with guard, llm:
            yield

    app = FastAPI(title="Answers", lifespan=lifespan)
    app.state.llm = llm
    app.include_router(router)
    app.mount("/usage", guard.usage_app())  # what is left for whoever asks; in the application itself, not in a router
    steps = Iterations(STEPS, missing="reject", name="research")  # a session id is asked for: loops are counted by it
    routes = [Route("/answers"), Route("/answers/stream"), Route("/research", extra=[steps])]
    app.add_middleware(GuardMiddleware, guard=guard, routes=routes, unlisted="deny")
    return app


def create_guard(*, secret: str, storage: str) -> Guard:
    """Everybody: $2 a day, 30 requests a minute, 2 at once. Departments: as agreed with them."""
    departments = QuotaBook(
        {
            "research": {"models": ["openai/gpt-4o*"], "monthly_cost": 200},
            "support": {"models": ["openai/gpt-4o-mini"], "daily_tokens": 20_000},
        }
    )
    return Guard(
        [
            ProviderBudget({"openai": "$50/1d"}),
            Budget("$2/daily", per="user"),
            Quota(departments),
            RateLimit("30/minute", per="user"),
            Concurrency(2, per="user"),
        ],
        storage=storage,
        identity=ApiKeys.from_file(HERE / "keys.toml", secret=secret),
    )


def from_environment() -> FastAPI:
    """For `uvicorn --factory`; the OpenAI client reads `OPENAI_API_KEY` and `OPENAI_BASE_URL`."""
    guard = create_guard(secret=os.environ["KEYS_SECRET"], storage=os.environ.get("STORAGE", "sqlite:///guard.db"))
    return create_app(guard, AsyncOpenAI())
