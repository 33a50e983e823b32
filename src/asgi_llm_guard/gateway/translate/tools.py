"""Tools and the choice between them, in a request.

Source: the types of anthropic 2.11 and openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping

from asgi_llm_guard.gateway.translate.fields import Fields

__all__ = ["cache_of", "tools_for_anthropic", "tools_for_openai"]


def cache_of(*places: Fields) -> dict[str, object]:
    """The mark that ends a cached prefix, as Anthropic has it; empty where there is none.

    OpenAI's own mark counts as one. Anthropic's lifetimes are five minutes and an hour; longer ones become an hour.

    Raises:
        BodyError: a mark is no object.
    """
    found: dict[str, object] = {}
    for fields in places:
        mark, point = fields.inner("cache_control"), fields.inner("prompt_cache_breakpoint")
        if mark is not None:
            kind, ttl = mark.needed("type"), mark.text("ttl")
            mark.done()
            found = {"cache_control": {"type": kind} | ({} if ttl is None else {"ttl": ttl})}
        elif point is not None:
            longer = point.text("ttl") is not None
            found = {"cache_control": {"type": "ephemeral"} | ({"ttl": "1h"} if longer else {})}
    return found


def tools_for_anthropic(body: Fields) -> dict[str, object]:
    """`tools` and `tool_choice` for Anthropic; what a choice does not allow is not offered.

    Raises:
        BodyError: a tool is no function, or a value is malformed.
    """
    tools = [_function(tool) for tool in body.objects("tools")]
    choice, names = _choice_for_anthropic(body)
    parallel = body.flag("parallel_tool_calls")
    if not tools:
        return {}
    if names is not None:
        tools = [tool for tool in tools if tool["name"] in names]
        if not tools:
            raise body.wrong("tool_choice", "allows none of the tools")
    if parallel is False and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return {"tools": tools} | ({"tool_choice": choice} if choice else {})


def _function(tool: Fields) -> dict[str, object]:
    if tool.take("type") != "function":
        raise tool.wrong("type", "only functions can be expressed for this model's API")
    function = tool.inner("function")
    if function is None:
        raise tool.wrong("function", "required, got none")
    schema = function.take("parameters")
    if schema is not None and not isinstance(schema, Mapping):
        raise function.wrong("parameters", "expected an object")
    written: dict[str, object] = {"name": function.needed("name")}
    if (description := function.text("description")) is not None:
        written["description"] = description
    written["input_schema"] = dict(schema) if schema else {"type": "object", "properties": {}}
    if function.flag("strict"):
        written["strict"] = True
    written |= cache_of(tool, function)
    function.done()
    tool.done()
    return written


def _choice_for_anthropic(body: Fields) -> tuple[dict[str, object], frozenset[str] | None]:
    """The choice, and the names that it allows if not all."""
    value = body.take("tool_choice")
    if value is None:
        return {}, None
    if isinstance(value, str):
        word = {"auto": "auto", "none": "none", "required": "any"}.get(value)
        if word is None:
            raise body.wrong("tool_choice", "expected auto, none, required, or an object")
        return {"type": word}, None
    choice = Fields(value, body.at("tool_choice"))
    kind = choice.take("type")
    if kind == "function":
        name = _named(choice)
        choice.done()
        return {"type": "tool", "name": name}, None
    allowed = choice.inner("allowed_tools") if kind == "allowed_tools" else None
    if allowed is None:
        raise choice.wrong("type", "expected function, or allowed_tools with its member")
    mode = allowed.take("mode")
    if mode not in ("auto", "required"):
        raise allowed.wrong("mode", "expected auto or required")
    names = []
    for tool in allowed.objects("tools"):
        if tool.take("type") != "function":
            raise tool.wrong("type", "only functions can be expressed for this model's API")
        names.append(_named(tool))
    return {"type": "any" if mode == "required" else "auto"}, frozenset(names)


def _named(fields: Fields) -> str:
    function = fields.inner("function")
    if function is None:
        raise fields.wrong("function", "required, got none")
    return function.needed("name")


def tools_for_openai(body: Fields, *, cache_control: bool) -> dict[str, object]:
    """`tools`, `tool_choice` and `parallel_tool_calls` for OpenAI.

    Raises:
        BodyError: a tool runs at the provider, or a value is malformed.
    """
    tools = [_tool(tool, cache_control=cache_control) for tool in body.objects("tools")]
    choice = body.inner("tool_choice")
    written: dict[str, object] = {"tools": tools} if tools else {}
    if choice is None:
        return written
    kind = choice.take("type")
    known = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        written["tool_choice"] = {"type": "function", "function": {"name": choice.needed("name")}}
    elif isinstance(kind, str) and kind in known:
        written["tool_choice"] = known[kind]
    else:
        raise choice.wrong("type", "expected any, auto, none or tool")
    if choice.flag("disable_parallel_tool_use"):
        written["parallel_tool_calls"] = False
    choice.done()
    return written if tools else {}


def _tool(tool: Fields, *, cache_control: bool) -> dict[str, object]:
    if tool.take("type") not in (None, "custom"):
        raise tool.wrong("type", "tools that run at the provider cannot be expressed for this model's API")
    schema = tool.take("input_schema")
    if not isinstance(schema, Mapping):
        raise tool.wrong("input_schema", "expected an object")
    function: dict[str, object] = {"name": tool.needed("name")}
    if (description := tool.text("description")) is not None:
        function["description"] = description
    function["parameters"] = dict(schema)
    if tool.flag("strict"):
        function["strict"] = True
    mark = cache_of(tool)
    tool.hints("eager_input_streaming")
    tool.without("defer_loading", False)
    tool.without("allowed_callers", ["direct"])
    tool.done()
    return {"type": "function", "function": function} | (mark if cache_control else {})
