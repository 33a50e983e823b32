"""Requests for Anthropic Messages as requests in OpenAI's chat format.

Source: https://platform.claude.com/docs/en/api/messages, and the types of anthropic 2.11 and openai 3.52 for
Python (2026-11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from asgi_llm_guard.gateway.translate.effort import effort_of_thinking
from asgi_llm_guard.gateway.translate.fields import Fields, short_id
from asgi_llm_guard.gateway.translate.tools import cache_of, tools_for_openai
from asgi_llm_guard.gateway.translate.writing import dump

__all__ = ["request_to_openai"]

_LONGEST_USER: Final = 64
_NO_NAME: Final = "answer"
"""Of the shape of an answer, which has no name at Anthropic."""

_Part = dict[str, object]


def request_to_openai(body: Mapping[str, object], *, cache_control: bool = False) -> dict[str, object]:
    """The same request in OpenAI's chat format. A stream is asked for its usage, which Anthropic's always has.

    `cache_control`: keep Anthropic's marks for the cache, which OpenRouter and LiteLLM understand and OpenAI refuses.

    Raises:
        BodyError: something in the request is malformed, or OpenAI has nothing for it; names it.
    """
    request = Fields(body)
    written: dict[str, object] = {"model": request.needed("model")}
    limit = request.whole("max_tokens")
    if limit is None:
        raise request.wrong("max_tokens", "required, got none")
    if limit == 0:
        raise request.wrong("max_tokens", "an answer of no tokens cannot be asked for at this model's API")
    written["max_completion_tokens"] = limit
    messages = _system(request, cache_control=cache_control)
    for message in request.objects("messages"):
        messages += _turn(message, cache_control=cache_control)
    if messages and messages[-1]["role"] == "assistant":
        raise request.wrong("messages", "this model's API does not continue an answer that has begun")
    written["messages"] = messages
    written |= tools_for_openai(request, cache_control=cache_control)
    for name in ("temperature", "top_p"):
        if (number := request.number(name)) is not None:
            written[name] = number
    stops = request.take("stop_sequences")
    if stops is not None and not (isinstance(stops, (list, tuple)) and all(isinstance(each, str) for each in stops)):
        raise request.wrong("stop_sequences", "expected a list of texts")
    if stops:
        written["stop"] = list(stops)
    written |= _output(request)
    user = request.inner("metadata")
    if user is not None:
        identifier = user.text("user_id")
        user.done()
        if identifier:
            short = len(identifier) <= _LONGEST_USER
            written["user"] = identifier if short else hashlib.sha256(_bytes(identifier)).hexdigest()
    tier = request.text("service_tier")
    if tier is not None:
        if tier not in ("auto", "standard_only"):
            raise request.wrong("service_tier", "expected auto or standard_only")
        written["service_tier"] = "default" if tier == "standard_only" else tier
    if request.flag("stream"):
        written |= {"stream": True, "stream_options": {"include_usage": True}}
    request.hints("cache_control")
    request.without("speed", "standard")
    request.done()
    return written


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _output(request: Fields) -> dict[str, object]:
    output = request.inner("output_config")
    effort, written = None, {}
    if output is not None:
        effort = output.text("effort")
        shape = output.inner("format")
        output.done()
        if shape is not None:
            shape.take("type")
            schema = shape.take("schema")
            if not isinstance(schema, Mapping):
                raise shape.wrong("schema", "expected an object")
            shape.done()
            named = {"name": _NO_NAME, "schema": dict(schema), "strict": True}
            written = {"response_format": {"type": "json_schema", "json_schema": named}}
    told = effort_of_thinking(request.inner("thinking"), effort)
    return written | ({} if told is None else {"reasoning_effort": told})


# ------------------------------------------------------------------------------- messages


def _system(request: Fields, *, cache_control: bool) -> list[_Part]:
    system = request.take("system")
    if system is None or isinstance(system, str):
        return [{"role": "system", "content": system}] if system else []
    parts = [_text(block, cache_control=cache_control) for block in request.objects_of(system, "system")]
    return [{"role": "system", "content": _content(parts)}] if parts else []


def _content(parts: list[_Part]) -> object:
    """One text that says no more is written as one, which every server takes."""
    if not parts:
        return ""
    only = parts[0]
    return only["text"] if len(parts) == 1 and only.keys() == {"type", "text"} else parts


def _text(block: Fields, *, cache_control: bool) -> _Part:
    if block.take("type") != "text":
        raise block.wrong("type", "expected text")
    return _plain(block, cache_control=cache_control)


def _plain(block: Fields, *, cache_control: bool) -> _Part:
    part: _Part = {"type": "text", "text": block.needed("text")}
    mark = cache_of(block)
    block.hints("citations")
    block.done()
    return part | mark if cache_control else part


def _turn(message: Fields, *, cache_control: bool) -> list[_Part]:
    role, content = message.take("role"), message.take("content")
    message.done()
    if role not in ("assistant", "system", "user"):
        raise message.wrong("role", "expected assistant, system or user")
    if content is None:
        raise message.wrong("content", "required, got none")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = list(message.objects_of(content, "content"))
    if role == "assistant":
        return [_answered(blocks, cache_control=cache_control)]
    if role == "system":
        return [{"role": role, "content": _content([_text(block, cache_control=cache_control) for block in blocks])}]
    return _said(blocks, cache_control=cache_control)


def _answered(blocks: list[Fields], *, cache_control: bool) -> _Part:
    """What the model said before. Its thinking stays behind: it is signed for the provider that it came from."""
    parts: list[_Part] = []
    calls: list[_Part] = []
    for block in blocks:
        kind = block.take("type")
        if kind == "text":
            parts.append(_plain(block, cache_control=cache_control))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind not in ("redacted_thinking", "thinking"):
            raise block.wrong("type", "cannot be expressed for this model's API")
    message: _Part = {"role": "assistant", "content": _content(parts) if parts or not calls else None}
    return message | ({"tool_calls": calls} if calls else {})


def _call(block: Fields) -> _Part:
    identifier, name, given = short_id(block.needed("id")), block.needed("name"), block.take("input")
    if not isinstance(given, Mapping):
        raise block.wrong("input", "expected an object")
    block.hints("cache_control", "caller")
    block.done()
    function = {"name": name, "arguments": dump(given).decode()}
    return {"id": identifier, "type": "function", "function": function}


def _said(blocks: list[Fields], *, cache_control: bool) -> list[_Part]:
    """Results of tools, a message each and first, and what the user said beside them."""
    results: list[_Part] = []
    parts: list[_Part] = []
    for block in blocks:
        kind = block.take("type")
        if kind == "tool_result":
            results.append(_result(block, cache_control=cache_control))
        else:
            parts.append(_part(block, kind, cache_control=cache_control))
    return results + ([{"role": "user", "content": _content(parts)}] if parts or not results else [])


def _part(block: Fields, kind: object, *, cache_control: bool) -> _Part:
    if kind == "text":
        return _plain(block, cache_control=cache_control)
    if kind not in ("document", "image"):
        raise block.wrong("type", "cannot be expressed for this model's API")
    source = block.inner("source")
    if source is None:
        raise block.wrong("source", "required, got none")
    part = _image(source) if kind == "image" else _document(block, source)
    mark = cache_of(block)
    source.done()
    block.done()
    return part | mark if cache_control else part


def _image(source: Fields) -> _Part:
    kind = source.take("type")
    if kind == "url":
        url = source.needed("url")
    elif kind == "base64":
        url = f"data:{source.needed('media_type')};base64,{source.needed('data')}"
    else:
        raise source.wrong("type", "expected base64 or url")
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: Fields, source: Fields) -> _Part:
    kind, media_type = source.take("type"), source.needed("media_type")
    if (kind, media_type) not in (("base64", "application/pdf"), ("text", "text/plain")):
        raise source.wrong("type", "expected base64 of application/pdf, or text")
    data, title = source.needed("data"), block.text("title")
    citations = block.inner("citations")
    if citations is not None and citations.flag("enabled"):
        raise block.wrong("citations", "cannot be expressed for this model's API; leave it out")
    context = block.text("context") or ""
    if kind == "text":
        return {"type": "text", "text": "\n\n".join(text for text in (title, context, data) if text)}
    if context:
        raise block.wrong("context", "cannot be expressed for this model's API; leave it out")
    file = {"filename": title or "document.pdf", "file_data": f"data:{media_type};base64,{data}"}
    return {"type": "file", "file": file}


def _result(block: Fields, *, cache_control: bool) -> _Part:
    """A result of a tool. OpenAI has no word for one that failed, so the text says it."""
    identifier, content, failed = short_id(block.needed("tool_use_id")), block.take("content"), block.flag("is_error")
    mark = cache_of(block)
    block.done()
    parts: list[_Part] = []
    if isinstance(content, str):
        parts.append({"type": "text", "text": content})
    else:
        parts += [_text(part, cache_control=cache_control) for part in block.objects_of(content, "content")]
    if failed:
        first = str(parts[0]["text"]) if parts else ""
        if first[:5].lower() != "error":
            parts[:1] = [{**(parts[0] if parts else {"type": "text"}), "text": f"Error: {first}"}]
    message: _Part = {"role": "tool", "tool_call_id": identifier, "content": _content(parts)}
    return message | mark if cache_control else message
