"""Requests in OpenAI's chat format for Anthropic, and Anthropic's for OpenAI."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.harness import fixture

from asgi_llm_guard.gateway.translate import TRANSLATED, request_to_anthropic, request_to_openai, translate
from asgi_llm_guard.gateway.translate.effort import BUDGETS, effort_of, takes_budget
from asgi_llm_guard.gateway.translate.fields import short_id
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.peek import BodyError, read_body

PNG = "data:image/png;base64," + base64.b64encode(b"png").decode()
PDF = "data:application/pdf;base64," + base64.b64encode(b"pdf").decode()
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
USER = {"role": "user", "content": "Where?"}


def to_anthropic(**members: Any) -> dict[str, Any]:
    return request_to_anthropic({"model": "claude-opus-5", "messages": [USER], "max_tokens": 99, **members})


def to_openai(**members: Any) -> dict[str, Any]:
    return request_to_openai({"model": "gpt", "messages": [USER], "max_tokens": 99, **members})


def function(name: str = "weather", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **members}}


def call(identifier: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": "weather", "arguments": arguments}}


# ---------------------------------------------------------------------------- to Anthropic


def test_a_conversation_for_anthropic() -> None:
    """D7: system, developer, human, AI with calls and tool messages, in their order, with every kind of part."""
    written = to_anthropic(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {
                "role": "user",
                "name": "ann",
                "content": [
                    {"type": "text", "text": "Look:"},
                    {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                    {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
                ],
            },
            {"role": "assistant", "content": "", "tool_calls": [call("one", '{"city":"Ulm"}'), call("two", "")]},
            {"role": "tool", "tool_call_id": "one", "content": "dry"},
            {"role": "tool", "tool_call_id": "two", "content": [{"type": "text", "text": "no"}], "is_error": True},
            {"role": "user", "content": "And now?"},
            {"role": "system", "content": "Hurry."},
            {"role": "user", "content": "Well?"},
        ]
    )

    assert written["system"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    assert written["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look:"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG[22:]}},
                {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": PDF[28:]},
                    "title": "a.pdf",
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "one", "name": "weather", "input": {"city": "Ulm"}},
                {"type": "tool_use", "id": "two", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "one", "content": "dry"},
                {
                    "type": "tool_result",
                    "tool_use_id": "two",
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                },
                {"type": "text", "text": "And now?"},
            ],
        },
        {"role": "system", "content": [{"type": "text", "text": "Hurry."}]},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]


def test_settings_for_anthropic() -> None:
    """D7: limits, sampling, stops, the user, the tier and streaming have their equals."""
    written = to_anthropic(
        max_completion_tokens=120,
        temperature=0.3,
        top_p=0.9,
        stop=["END", "###"],
        user="ann",
        safety_identifier="hash",
        service_tier="default",
        stream=True,
        n=1,
        seed=7,
        presence_penalty=0,
        logprobs=False,
        metadata={"team": "a"},
        response_format={"type": "text"},
    )

    del written["messages"]
    assert written == {
        "model": "claude-opus-5",
        "max_tokens": 120,
        "temperature": 0.3,
        "top_p": 0.9,
        "stop_sequences": ["END", "###"],
        "metadata": {"user_id": "hash"},
        "service_tier": "standard_only",
        "stream": True,
    }


@pytest.mark.parametrize(
    "choice, written",
    [
        ({}, None),
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, {"type": "tool", "name": "weather"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
        ({"parallel_tool_calls": True}, None),
    ],
)
def test_tool_choices_for_anthropic(choice: dict[str, Any], written: object) -> None:
    """D7: each choice between tools has its equal, and so has a ban of calls beside each other."""
    assert to_anthropic(tools=[function()], **choice).get("tool_choice") == written


def test_allowed_tools_are_those_that_are_offered() -> None:
    """A choice that allows some tools offers no others."""
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "b"}}]}
    written = to_anthropic(
        tools=[function("a"), function("b", description="B", strict=True)],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )

    assert written["tools"] == [{"name": "b", "description": "B", "input_schema": SCHEMA, "strict": True}]
    assert written["tool_choice"] == {"type": "any"}


def test_a_tool_without_parameters_takes_none() -> None:
    """A function that names no parameters is one that takes an empty object."""
    tools = [{"type": "function", "function": {"name": "now"}}]

    assert to_anthropic(tools=tools)["tools"] == [{"name": "now", "input_schema": {"type": "object", "properties": {}}}]


def test_the_limit_that_anthropic_needs() -> None:
    """Without a limit the caller's maximum is asked for, and without one the request is refused by name."""
    body = {"model": "claude-opus-5", "messages": [USER]}

    assert request_to_anthropic(body, most_tokens=8_000)["max_tokens"] == 8_000
    with pytest.raises(BodyError) as raised:
        request_to_anthropic(body)
    assert (raised.value.status, raised.value.field) == (400, "max_completion_tokens")


@pytest.mark.parametrize("effort, budget", BUDGETS.items())
def test_efforts_are_budgets(effort: str, budget: int) -> None:
    """Every effort is a budget of thinking, within the limit, and that budget is that effort again."""
    body = {"model": "claude-sonnet-4-5", "messages": [USER], "reasoning_effort": effort}

    thinking = request_to_anthropic(body, most_tokens=200_000)["thinking"]
    assert thinking == {"type": "enabled", "budget_tokens": budget}
    assert to_openai(thinking=thinking)["reasoning_effort"] == effort == effort_of(budget)
    lowered = request_to_anthropic({**body, "max_tokens": 1_500})["thinking"]
    assert lowered == {"type": "enabled", "budget_tokens": min(budget, 1_499)}


def test_efforts_of_models_that_adapt() -> None:
    """Newer models are told the effort itself; none at all turns thinking off."""
    told = to_anthropic(reasoning_effort="xhigh")

    assert (told["thinking"], told["output_config"]) == ({"type": "adaptive"}, {"effort": "xhigh"})
    assert to_anthropic(reasoning_effort="minimal")["output_config"] == {"effort": "low"}
    assert to_anthropic(reasoning_effort="none")["thinking"] == {"type": "disabled"}
    assert to_openai(thinking={"type": "adaptive"}, output_config={"effort": "max"})["reasoning_effort"] == "max"
    assert to_openai(thinking={"type": "disabled"})["reasoning_effort"] == "none"
    assert "reasoning_effort" not in to_openai(thinking={"type": "adaptive"})


@pytest.mark.parametrize(
    "model, by_budget",
    [
        ("claude-3-7-sonnet-20250219", True),
        ("claude-sonnet-4-20250514", True),
        ("claude-opus-4-0", True),
        ("claude-opus-4-1-20250805", True),
        ("claude-haiku-4-5", True),
        ("claude-sonnet-4-5@20250929", True),
        ("anthropic.claude-sonnet-4-5-20250929-v1:0", True),
        ("claude-opus-4-6", False),
        ("claude-sonnet-5-5", False),
        ("claude-opus-5", False),
        ("my-deployment", False),
    ],
)
def test_models_that_take_a_budget(model: str, *, by_budget: bool) -> None:
    """Models before 4.6 are told a number of tokens, by any platform's name; later and unknown ones adapt."""
    assert takes_budget(model) is by_budget


def test_thinking_goes_on_only_with_its_beginning() -> None:
    """After a tool's result a model with a budget thinks on if its thinking came back with its signature, else not."""
    thought = {"type": "thinking", "thinking": "hm", "signature": "sig"}
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("one")]},
        {"role": "tool", "tool_call_id": "one", "content": "dry"},
    ]
    body = {"model": "claude-opus-4-1", "messages": messages, "reasoning_effort": "low", "max_tokens": 9_000}

    assert "thinking" not in request_to_anthropic(body)
    assert "thinking" in request_to_anthropic(body, thinking="adaptive")
    messages[1]["thinking_blocks"] = [thought]
    written: Any = request_to_anthropic(body)
    assert written["thinking"] == {"type": "enabled", "budget_tokens": 2_048}
    assert written["messages"][1]["content"][0] == thought


def test_marks_for_the_cache_stay() -> None:
    """Marks on parts, messages, results and tools reach Anthropic; OpenAI's own marks become its marks."""
    mark = {"type": "ephemeral", "ttl": "1h"}
    point = {"mode": "explicit"}
    written = to_anthropic(
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": mark}]},
            {"role": "user", "content": [{"type": "text", "text": "u", "prompt_cache_breakpoint": point}]},
            {"role": "assistant", "tool_calls": [call("one")]},
            {"role": "tool", "tool_call_id": "one", "content": "r", "cache_control": mark},
            {"role": "user", "content": "u", "cache_control": mark},
        ],
        tools=[{**function(), "cache_control": mark}],
    )

    assert written["system"][0]["cache_control"] == mark
    assert written["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral"}
    assert [block["cache_control"] for block in written["messages"][2]["content"]] == [mark, mark]
    assert written["tools"][0]["cache_control"] == mark


@pytest.mark.parametrize(
    "members, field",
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"store": True}, "store"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"made_up": 1}, "made_up"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"stop": ["\n"]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        ({"tools": [function()], "tool_choice": "always"}, "tool_choice"),
        ({"model": None}, "model"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
            "messages[0].content[0].file.file_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [call("a", "[1]")]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [USER, {"role": "assistant", "audio": {"id": "a"}}]}, "messages[1].audio"),
        ({"messages": [{"role": "system", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].file"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": PNG}}]}]},
            "messages[0].content[0].file.file_data",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]},
            "messages[1].content[0].type",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
            "messages[1].tool_calls[0].type",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[1].tool_calls[0].function",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [call("a", 5)]}]},  # type: ignore[arg-type]
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": 5}]}, "messages[0].content"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [function()], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [function()], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": [function()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x"}}},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {
                "tools": [function()],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}},
            },
            "tool_choice.allowed_tools.tools[0].type",
        ),
        (
            {
                "tools": [function()],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice",
        ),
    ],
)
def test_what_anthropic_has_no_word_for_is_refused(members: dict[str, Any], field: str) -> None:
    """Nothing is dropped unseen: a request that asks for it gets a 400 that names it."""
    with pytest.raises(BodyError) as raised:
        to_anthropic(**members)

    assert (raised.value.status, raised.value.code, raised.value.field) == (400, "invalid_request", field)
    assert field in raised.value.message


def test_odd_names_are_not_repeated() -> None:
    """A member whose name is no name is refused without its text."""
    with pytest.raises(BodyError) as raised:
        to_anthropic(**{"<script>": 1})

    assert "script" not in raised.value.message


def test_a_budget_needs_room() -> None:
    """Thinking does not fit into a limit that is smaller than its least budget."""
    with pytest.raises(BodyError, match="reasoning_effort") as raised:
        request_to_anthropic(
            {"model": "claude-opus-4-1", "messages": [USER], "max_tokens": 1_024, "reasoning_effort": "low"}
        )

    assert raised.value.field == "reasoning_effort"


# ------------------------------------------------------------------------------- to OpenAI


def test_a_conversation_for_openai() -> None:
    """D7: system, user, assistant with calls and results of tools, in their order, with every kind of block."""
    mark = {"cache_control": {"type": "ephemeral"}}
    image = {"type": "base64", "media_type": "image/png", "data": PNG[22:]}
    pdf = {"type": "base64", "media_type": "application/pdf", "data": PDF[28:]}
    plain = {"type": "text", "media_type": "text/plain", "data": "body"}
    body: dict[str, Any] = {
        "system": [{"type": "text", "text": "Be brief.", **mark}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Look:"},
                    {"type": "image", "source": image, **mark},
                    {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
                    {"type": "document", "source": pdf, "title": "a.pdf"},
                    {"type": "document", "source": plain, "title": "Notes"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "So."},
                    {"type": "tool_use", "id": "one", "name": "weather", "input": {"city": "Ulm"}, **mark},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "one", "content": [{"type": "text", "text": "dry"}], **mark},
                    {"type": "tool_result", "tool_use_id": "two", "content": "gone", "is_error": True},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    }

    assert to_openai(**body)["messages"] == [
        {
            "role": "system",
            "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look:"},
                {"type": "image_url", "image_url": {"url": PNG}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
                {"type": "text", "text": "Notes\n\nbody"},
            ],
        },
        {
            "role": "assistant",
            "content": "So.",
            "tool_calls": [call("one", '{"city":"Ulm"}')],
        },
        {"role": "tool", "tool_call_id": "one", "content": "dry"},
        {"role": "tool", "tool_call_id": "two", "content": "Error: gone"},
        {"role": "user", "content": "And now?"},
    ]
    kept = request_to_openai({"model": "gpt", "max_tokens": 9, **body}, cache_control=True)["messages"]
    assert json.dumps(kept).count("cache_control") == 3


def test_settings_for_openai() -> None:
    """D7: limits, sampling, stops, the user, the tier, output formats and streaming have their equals."""
    written = to_openai(
        temperature=0.3,
        top_p=0.9,
        stop_sequences=["END"],
        metadata={"user_id": "ann"},
        service_tier="standard_only",
        stream=True,
        cache_control={"type": "ephemeral"},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )

    del written["messages"]
    assert written == {
        "model": "gpt",
        "max_completion_tokens": 99,
        "temperature": 0.3,
        "top_p": 0.9,
        "stop": ["END"],
        "user": "ann",
        "service_tier": "default",
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
    }


@pytest.mark.parametrize(
    "choice, written",
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": False},
        ),
    ],
)
def test_tool_choices_for_openai(choice: dict[str, Any], written: dict[str, Any]) -> None:
    """D7: each choice between tools has its equal, and so has a ban of calls beside each other."""
    tools = [{"name": "weather", "description": "W", "input_schema": SCHEMA}]

    assert (
        to_openai(tools=tools, tool_choice=choice).items()
        >= {
            **written,
            "tools": [{"type": "function", "function": {"name": "weather", "description": "W", "parameters": SCHEMA}}],
        }.items()
    )


def test_long_names_of_users_become_short_ones() -> None:
    """OpenAI takes 64 characters, and the same user is always the same one."""
    long = to_openai(metadata={"user_id": "u" * 65})["user"]

    assert len(long) == 64
    assert (
        long == to_openai(metadata={"user_id": "u" * 65})["user"] != to_openai(metadata={"user_id": "u" * 66})["user"]
    )


@pytest.mark.parametrize(
    "members, field",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_k": 5}, "top_k"),
        ({"speed": "fast"}, "speed"),
        ({"container": {}}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a", "input_schema": {}}], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "server_tool_use"}]}, USER]},
            "messages[1].content[0].type",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": "x"}]},
                    USER,
                ]
            },
            "messages[1].content[0].input",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "document", "source": {"type": "url", "media_type": "x", "url": "u"}}],
                    }
                ]
            },
            "messages[0].content[0].source.type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "a", "input_schema": {}, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "a",
                                "content": [{"type": "image", "source": {"type": "url", "url": "u"}}],
                            }
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0].type",
        ),
    ],
)
def test_what_openai_has_no_word_for_is_refused(members: dict[str, Any], field: str) -> None:
    """Nothing is dropped unseen: a request that asks for it gets a 400 that names it."""
    with pytest.raises(BodyError) as raised:
        to_openai(**members)

    assert (raised.value.status, raised.value.field) == (400, field)


# ---------------------------------------------------------------------------- both ways

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ids = st.text("abcXYZ019_-:. é", min_size=1, max_size=50)
names = st.sampled_from(["weather", "clock"])
schemas = st.just(SCHEMA) | st.just({"type": "object", "properties": {}, "additionalProperties": False})
marks: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.just({"cache_control": {"type": "ephemeral", "ttl": "1h"}})


@st.composite
def text_parts(draw: st.DrawFn) -> dict[str, Any]:
    return {"type": "text", "text": draw(texts), **draw(marks)}


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": draw(st.sampled_from([PNG, "https://example.org/a.png"]))},
        **draw(marks),
    }


said = texts | st.lists(text_parts() | images(), min_size=1, max_size=3)
told = texts | st.lists(text_parts(), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": text} for text in draw(st.lists(told, max_size=2))]
    messages.append({"role": "user", "content": draw(said)})
    for step in draw(st.lists(st.sampled_from(["user", "assistant", "tools", "system"]), max_size=5)):
        if step == "tools":
            calls = [
                {
                    "id": identifier,
                    "type": "function",
                    "function": {"name": draw(names), "arguments": json.dumps({"city": draw(texts)})},
                }
                for identifier in draw(st.lists(ids, min_size=1, max_size=3, unique=True))
            ]
            content = {"content": draw(told)} if draw(st.booleans()) else {"content": None}
            messages.append({"role": "assistant", **content, "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": each["id"], "content": draw(told)} for each in calls]
        else:
            messages.append({"role": step, "content": draw(said if step == "user" else told)})
    messages.append({"role": "user", "content": draw(said)})
    return messages


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "claude-opus-5", "messages": draw(conversations())}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0, 0.5, 1]),
        "top_p": st.sampled_from([0.1, 1.0]),
        "stop": st.lists(texts.filter(str.strip), min_size=1, max_size=4),
        "user": texts,
        "service_tier": st.sampled_from(["auto", "default"]),
        "stream": st.just(True),
        "reasoning_effort": st.sampled_from(["none", "low", "medium", "high", "xhigh", "max"]),
        "max_completion_tokens": st.integers(1, 100_000),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            body[name] = draw(values)
    if draw(st.booleans()):
        schema = {"name": "answer", "schema": draw(schemas), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if draw(st.booleans()):
        tools = []
        for name in draw(st.lists(names, min_size=1, max_size=2, unique=True)):
            described = {"name": name, "parameters": draw(schemas)}
            if draw(st.booleans()):
                described["description"] = draw(texts)
            tools.append({"type": "function", "function": described, **draw(marks)})
        body["tools"] = tools
        named = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
        body["tool_choice"] = draw(st.sampled_from(["auto", "required", "none", named]))
        if body["tool_choice"] != "none" and draw(st.booleans()):
            body["parallel_tool_calls"] = False
    return body


def meaning(body: dict[str, Any]) -> dict[str, Any]:
    """A request without the freedom that the format leaves: texts as parts, system texts as one, arguments as values."""
    told = {name: value for name, value in body.items() if name not in ("messages", "stream_options")}
    told.setdefault("max_completion_tokens", 4_096)
    turns: list[Any] = []
    for message in body["messages"]:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        calls = [
            (short_id(each["id"]), each["function"]["name"], json.loads(each["function"]["arguments"]))
            for each in message.get("tool_calls", ())
        ]
        answers = message.get("tool_call_id")
        if message["role"] == "system" and turns and all(turn[0] == "system" for turn in turns):
            turns[-1][1].extend(parts)
        else:
            turns.append((message["role"], parts, calls, None if answers is None else short_id(answers)))
    return {**told, "turns": turns}


@given(body=requests())
def test_a_request_keeps_its_meaning_there_and_back(body: dict[str, Any]) -> None:
    """D7: whatever can be expressed for Anthropic says the same when it is expressed for OpenAI again."""
    before = json.dumps(body)
    written = request_to_anthropic(body, most_tokens=4_096)
    back = request_to_openai(json.loads(json.dumps(written)), cache_control=True)

    assert meaning(back) == meaning(body)
    assert json.dumps(body) == before


@given(body=requests())
def test_both_sides_are_bounded_alike(body: dict[str, Any]) -> None:
    """The translated request asks for no more output, choices or models than the one that was checked."""
    body.setdefault("max_completion_tokens", 50)
    asked = dialect_named("openai").read_request(read_body(json.dumps(body).encode()))
    written = json.dumps(request_to_anthropic(body)).encode()
    sent = dialect_named("anthropic").read_request(read_body(written))

    assert (sent.model, sent.max_output_tokens, sent.stream) == (asked.model, asked.max_output_tokens, asked.stream)


@pytest.mark.parametrize("identifier", ["call.one", "functions.x:0", "a" * 41, "é", "\ud800", ""])
def test_ids_that_one_side_does_not_take(identifier: str) -> None:
    """An id that an API would refuse becomes one that all take, the same in the call and its result."""
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call(identifier)]},
        {"role": "tool", "tool_call_id": identifier, "content": "dry"},
    ]
    written = to_anthropic(messages=messages)["messages"]

    assert written[1]["content"][0]["id"] == written[2]["content"][0]["tool_use_id"] == short_id(identifier)
    assert short_id(short_id(identifier)) == short_id(identifier)
    assert re.fullmatch("[a-zA-Z0-9_-]{1,40}", short_id(identifier))


def test_dialects_that_are_not_translated() -> None:
    """There is no way between dialects that the table does not have."""
    assert ("openai", "gemini") not in TRANSLATED
    with pytest.raises(KeyError, match="gemini"):
        translate("openai", "gemini", {})


@pytest.mark.parametrize(
    "dialect, other, field, member",
    [("openai", "anthropic", "n", "n"), ("anthropic", "openai", "tools[0].type", "tools")],
)
def test_requests_as_clients_send_them(dialect: str, other: str, field: str, member: str) -> None:
    """A request with everything in it is refused for the one thing that has no equal, and passes without it."""
    body = json.loads(fixture(dialect, "request.json").data)
    with pytest.raises(BodyError) as raised:
        translate(dialect, other, body)
    assert raised.value.field == field

    del body[member]
    written = translate(dialect, other, body).body
    assert written["stream"] is True
    assert written["service_tier"] == "auto"
    assert len(written["messages"]) == (1 if other == "anthropic" else 2)
