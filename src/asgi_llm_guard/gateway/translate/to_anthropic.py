"""Requests in OpenAI's chat format as requests for Anthropic Messages.

Source: https://platform.claude.com/docs/en/api/messages, and the types of anthropic 2.11 and openai 3.52 for
Python (2026-11). Marks for the cache on parts are those that OpenRouter and LiteLLM take as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from asgi_llm_guard.gateway.translate.effort import Thinking, takes_budget, thinking_for
from asgi_llm_guard.gateway.translate.fields import Fields, arguments_of, short_id
from asgi_llm_guard.gateway.translate.tools import cache_of, tools_for_anthropic
from asgi_llm_guard.wire.shape import items, pick

__all__ = ["request_to_anthropic"]

_HINTS: Final = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "seed",
    "verbosity",
)
_IMAGES: Final = ("image/gif", "image/jpeg", "image/png", "image/webp")
_DATA: Final = re.compile(r"data:([a-z0-9.+/-]+);base64,(.*)", re.DOTALL | re.IGNORECASE)

_Block = dict[str, object]


def request_to_anthropic(
    body: Mapping[str, object], *, most_tokens: int | None = None, thinking: Thinking | None = None
) -> dict[str, object]:
    """The same request for Anthropic Messages.

    `most_tokens`: the limit of output tokens where the request sets none, which Anthropic needs; `None`: there is
    no such limit. `thinking`: how the model is told to think; `None`: by its name.

    Raises:
        BodyError: something in the request is malformed, or Anthropic has nothing for it; names it.
    """
    request = Fields(body)
    written: dict[str, object] = {"model": request.needed("model")}
    limit = _limit(request, most_tokens)
    written["max_tokens"] = limit
    system, messages = _conversation(request)
    if system:
        written["system"] = system
    written["messages"] = messages
    written |= tools_for_anthropic(request) | _sampling(request)
    effort = request.text("reasoning_effort")
    if effort is not None:
        style: Thinking = thinking or ("budget" if takes_budget(str(written["model"])) else "adaptive")
        told = thinking_for(effort, limit, style, request.at("reasoning_effort"))
        # A model that is told a budget does not go on without the thinking that its last step began with.
        if style == "adaptive" or effort == "none" or not _continues_unthinking(messages):
            written |= told
    shape = _format(request)
    if shape:
        written["output_config"] = {**_dict(written.get("output_config")), "format": shape}
    user = request.text("user")
    user = request.text("safety_identifier") or user
    if user:
        written["metadata"] = {"user_id": user}
    tier = _tier(request)
    if tier:
        written["service_tier"] = tier
    if request.flag("stream"):
        written["stream"] = True
    request.hints("stream_options", *_HINTS)
    _refuse_the_rest(request)
    return written


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _limit(request: Fields, most_tokens: int | None) -> int:
    """The larger of the two limits that a request may have, as it is reserved."""
    limits = [limit for name in ("max_completion_tokens", "max_tokens") if (limit := request.whole(name))]
    if limits:
        return max(limits)
    if most_tokens is None:
        raise request.wrong("max_completion_tokens", "required for this model's API, got none")
    return most_tokens


def _sampling(request: Fields) -> dict[str, object]:
    written: dict[str, object] = {}
    temperature = request.number("temperature")
    if temperature is not None:
        if not 0 <= temperature <= 1:
            raise request.wrong("temperature", "this model's API takes 0 to 1")
        written["temperature"] = temperature
    top_p = request.number("top_p")
    if top_p is not None:
        written["top_p"] = top_p
    stop = request.take("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(each, str) for each in stops):
            raise request.wrong("stop", "expected a text or a list of texts")
        if not all(each.strip() for each in stops):
            raise request.wrong("stop", "this model's API takes no sequence of white space only")
        if stops:
            written["stop_sequences"] = list(stops)
    return written


def _format(request: Fields) -> dict[str, object]:
    shape = request.inner("response_format")
    if shape is None:
        return {}
    kind = shape.take("type")
    if kind == "text":
        return {}
    if kind != "json_schema":
        raise shape.wrong("type", "this model's API takes text or json_schema")
    inner = shape.inner("json_schema")
    schema = None if inner is None else inner.take("schema")
    if not isinstance(schema, Mapping):
        raise shape.wrong("json_schema", "expected an object with a schema")
    return {"type": "json_schema", "schema": dict(schema)}


def _tier(request: Fields) -> str | None:
    tier = request.text("service_tier")
    known = {None: None, "auto": "auto", "default": "standard_only"}
    if tier not in known:
        raise request.wrong("service_tier", "this model's API takes auto or default")
    return known[tier]


def _refuse_the_rest(request: Fields) -> None:
    """What changes an answer, and has no equal, must not have been asked for."""
    request.without("n", 1)
    for name in ("frequency_penalty", "presence_penalty"):
        request.without(name, 0, 0.0)
    for name in ("logprobs", "store"):
        request.without(name, False)
    request.without("top_logprobs", 0)
    request.without("logit_bias", {})
    request.without("modalities", ["text"])
    request.done()


# ------------------------------------------------------------------------------- messages


def _conversation(request: Fields) -> tuple[list[_Block], list[_Block]]:
    """The system prompt, and the turns. Instructions that come after the first turn keep their place."""
    system: list[_Block] = []
    turns: list[_Block] = []
    results: list[_Block] | None = None
    for message in request.objects("messages"):
        role = message.take("role")
        message.hints("name")
        before, results = results, None
        if role in ("system", "developer"):
            blocks = _mark(_texts(message), message)
            if not turns:
                system += blocks
            elif blocks:
                turns.append({"role": "system", "content": blocks})
        elif role == "user":
            content = _said(message)
            if before is not None:  # results of tools and what is said to them are one turn
                before += content
            else:
                turns.append({"role": "user", "content": content})
        elif role == "assistant":
            if content := _answered(message):
                turns.append({"role": "assistant", "content": content})
        elif role == "tool":
            results = before
            if results is None:
                results = []
                turns.append({"role": "user", "content": results})
            results.append(_result(message))
        else:
            raise message.wrong("role", "expected assistant, developer, system, tool or user")
        message.done()
    if not turns:
        raise request.wrong("messages", "expected at least one turn of the user")
    return system, turns


def _mark(blocks: list[_Block], message: Fields) -> list[_Block]:
    """A mark on a message is one on its last block."""
    mark = cache_of(message)
    if mark and blocks:
        blocks[-1] |= mark
    return blocks


def _texts(message: Fields) -> list[_Block]:
    """Content that is text only; empty texts, which Anthropic does not take, are left out."""
    content = message.take("content")
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks = []
    for part in message.objects_of(content, "content"):
        if part.take("type") != "text":
            raise part.wrong("type", "expected text")
        blocks += _text(part)
    return blocks


def _text(part: Fields, member: str = "text") -> list[_Block]:
    text, mark = part.needed(member), cache_of(part)
    part.done()
    return [{"type": "text", "text": text} | mark] if text else []


def _said(message: Fields) -> list[_Block]:
    content = message.take("content")
    if content is None:
        raise message.wrong("content", "required, got none")
    blocks: list[_Block] = []
    if isinstance(content, str):
        blocks.append({"type": "text", "text": content})
    else:
        for part in message.objects_of(content, "content"):
            blocks += _part(part)
        if not blocks:
            raise message.wrong("content", "expected a text or an image")
    return _mark(blocks, message)


def _part(part: Fields) -> list[_Block]:
    kind = part.take("type")
    if kind == "text":
        return _text(part)
    if kind == "image_url":
        block = {"type": "image", "source": _image(part)} | cache_of(part)
    elif kind == "file":
        block = _document(part) | cache_of(part)
    else:
        raise part.wrong("type", "expected file, image_url or text")
    part.done()
    return [block]


def _image(part: Fields) -> _Block:
    image = part.inner("image_url")
    if image is None:
        raise part.wrong("image_url", "required, got none")
    url = image.needed("url")
    image.hints("detail")
    image.done()
    if url[:5].lower() != "data:":
        return {"type": "url", "url": url}
    found = _DATA.fullmatch(url)
    if found is None or found[1].lower() not in _IMAGES:
        raise image.wrong("url", f"expected base64 data of {', '.join(_IMAGES)}")
    return {"type": "base64", "media_type": found[1].lower(), "data": found[2]}


def _document(part: Fields) -> _Block:
    file = part.inner("file")
    if file is None:
        raise part.wrong("file", "required, got none")
    data, title = file.text("file_data"), file.text("filename")
    file.done()  # an id of a file means nothing to another provider
    found = None if data is None else _DATA.fullmatch(data)
    if found is None or found[1].lower() != "application/pdf":
        raise file.wrong("file_data", "expected base64 data of application/pdf, as a data URI")
    block: _Block = {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": found[2]},
    }
    return block | ({"title": title} if title else {})


def _answered(message: Fields) -> list[_Block]:
    """What the model said before. Its thinking comes with its signature, or not at all."""
    blocks: list[_Block] = []
    for thought in message.objects("thinking_blocks"):
        blocks += _thought(thought)
    content = message.take("content")
    if isinstance(content, str):
        if content:
            blocks.append({"type": "text", "text": content})
    else:
        for part in message.objects_of(content, "content"):
            kind = part.take("type")
            if kind not in ("refusal", "text"):
                raise part.wrong("type", "expected refusal or text")
            blocks += _text(part, str(kind))
    if refusal := message.text("refusal"):
        blocks.append({"type": "text", "text": refusal})
    for call in message.objects("tool_calls"):
        blocks.append(_call(call))
    message.hints("annotations", "reasoning", "reasoning_content", "reasoning_details")
    return _mark(blocks, message)


def _thought(block: Fields) -> list[_Block]:
    kind = block.take("type")
    block.hints("index")
    if kind == "redacted_thinking":
        data = block.needed("data")
        block.done()
        return [{"type": kind, "data": data}]
    text, signature = block.text("thinking") or "", block.text("signature")
    block.done()
    return [{"type": "thinking", "thinking": text, "signature": signature}] if signature else []


def _call(call: Fields) -> _Block:
    if call.take("type") not in (None, "function"):
        raise call.wrong("type", "only functions can be expressed for this model's API")
    function = call.inner("function")
    if function is None:
        raise call.wrong("function", "required, got none")
    name, arguments = function.needed("name"), arguments_of(function.take("arguments"))
    if arguments is None:
        raise function.wrong("arguments", "expected the text of a JSON object")
    block: _Block = {"type": "tool_use", "id": short_id(call.needed("id")), "name": name, "input": arguments}
    block |= cache_of(call)
    call.hints("index")
    function.done()
    call.done()
    return block


def _result(message: Fields) -> _Block:
    block: _Block = {"type": "tool_result", "tool_use_id": short_id(message.needed("tool_call_id"))}
    content = message.take("content")
    if isinstance(content, str):
        block["content"] = content
    else:
        parts = [block for part in message.objects_of(content, "content") for block in _part(part)]
        block["content"] = parts
    if message.flag("is_error"):
        block["is_error"] = True
    return block | cache_of(message)


def _continues_unthinking(turns: list[_Block]) -> bool:
    """Whether the model is to go on after calls of tools whose thinking did not come back."""
    last = _kinds(turns[-1])
    before = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), None)
    if before is None or "tool_result" not in last:
        return False
    return _kinds(before)[0] not in ("redacted_thinking", "thinking")


def _kinds(turn: _Block) -> list[object]:
    return [pick(block, "type") for block in items(turn["content"])]
