"""OpenAI Responses: `/responses`, and its compaction.

Usage stands in the response object of the last event only, and in no other place; there is no `[DONE]`.

Source: https://platform.openai.com/docs/api-reference/responses, and the types of openai 3.52 for Python (2026-11).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind
from asgi_llm_guard.wire.openai_errors import classify
from asgi_llm_guard.wire.openai_family import Family, FamilyTally, model_of, operation, text_in
from asgi_llm_guard.wire.openai_usage import tokens_used
from asgi_llm_guard.wire.peek import BodyView
from asgi_llm_guard.wire.shape import MOST_TOKENS, count_of, decode, items, name_of, pick, pick_path, text_length
from asgi_llm_guard.wire.sse import Block

__all__ = ["OpenAIResponses"]

_LIMIT: Final = "max_output_tokens"
_LAST: Final = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
_OBJECTS: Final = ("response", "response.compaction")
_WRITTEN: Final = frozenset(
    f"response.{part}.delta"
    for part in (
        "audio.transcript",
        "code_interpreter_call_code",
        "custom_tool_call_input",
        "function_call_arguments",
        "mcp_call_arguments",
        "output_text",
        "reasoning_summary_text",
        "reasoning_text",
        "refusal",
        "shell_call_command",
    )
)
"""Deltas of what the model wrote. Others carry audio, images or what a tool said."""
_IMAGE_MODEL: Final = "gpt-image-1"
"""Draws where the tool names no model. Source: the tool's description in openai 3.52."""


class OpenAIResponses(Family):
    """The dialect `openai_responses`."""

    __slots__ = ()

    name: Final = "openai_responses"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        """Whether it makes or compacts a response. To count input tokens is free, and so is reading one again."""
        return operation(path) in (("responses",), ("responses", "compact"))

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. The limit holds for all turns that hosted tools cause, reasoning included.

        Raises:
            BodyError: `model` is missing (also where a stored prompt names it), or a value is malformed.
        """
        return Ask(
            model=model_of(view, path),
            max_output_tokens=view.whole(_LIMIT, least=0, most=MOST_TOKENS) or None,
            limits_output=operation(path) != ("responses", "compact"),
            stream=view.flag("stream"),
            wants_usage=view.flag("stream"),  # it comes unasked, in an event that every client needs
            service_tier=text_in(view, "service_tier"),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send, with the limit set or lowered.

        Raises:
            BodyError: as `read_request`.
        """
        limit = view.whole(_LIMIT, least=0, most=MOST_TOKENS)
        if max_output_tokens is None or (limit and limit <= max_output_tokens):
            return view.body
        return view.replace({_LIMIT: max_output_tokens})

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a response, or an event of its stream."""
        kind = pick(value, "type")
        if isinstance(kind, str):
            if kind.startswith("response."):
                return True
            if kind == "error":  # also Anthropic's, which is numbered by nobody
                return pick(value, "sequence_number") is not None
        return pick(value, "object") in _OBJECTS and isinstance(pick(value, "output"), (list, tuple))

    def read_plain(self, body: bytes) -> Answer | None:
        try:
            response = _PLAIN.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        if response.object not in _OBJECTS:
            return None
        tally = _Tally()
        tally.take_response(response)
        return tally.answer(whole=True)


# ----------------------------------------------------------------------------- plain events


class _Delta(msgspec.Struct, gc=False):
    type: str
    delta: str


class _Part(msgspec.Struct):
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    """What is read of an item of the output."""

    type: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    code: str | None = None
    content: list[_Part] | None = None
    summary: list[_Part] | None = None
    action: msgspec.Raw = msgspec.Raw(b"null")


class _Plain(msgspec.Struct):
    """A response without an error. Only what is read of it is decoded."""

    output: list[_Item]
    object: str
    model: str | None = None
    service_tier: str | None = None
    status: str | None = None
    usage: dict[str, Any] | None = None
    tool_usage: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    error: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)
_DELTA: Final = msgspec.json.Decoder(_Delta)


# ---------------------------------------------------------------------------------- answers


class _Tally(FamilyTally):
    __slots__ = ()

    def add(self, value: object) -> bool:
        kind = pick(value, "type")
        if not isinstance(kind, str):
            if pick(value, "object") in _OBJECTS:
                self.take_response(value)
                return True
            return self.take_error(value)
        if kind in _WRITTEN:
            self.text_bytes += text_length(pick(value, "delta"))
        elif kind == "error":
            self.error = _kind_of(pick(value, "error") or value)
        elif kind.startswith("response."):
            if kind == "response.output_item.added":
                self.text_bytes += text_length(pick_path(value, "item", "name"))
            response = pick(value, "response")
            if response is not None:
                self.take_response(response)
                self.done = self.done or kind in _LAST
        else:
            return self.take_error(value)
        return True

    def event(self, block: Block) -> bool:
        """As every tally; deltas, which are nearly all, in a shorter way."""
        if block.data is not None and not block.error:
            try:
                event = _DELTA.decode(block.data)
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # anything but a delta
            else:
                if event.type in _WRITTEN:
                    text = event.delta
                    self.text_bytes += len(text) if text.isascii() else text_length(text)
                    return False
        return super().event(block)

    def take_response(self, response: object) -> None:
        """What a response object says, whole or not yet."""
        self.take_names(response)
        error = pick(response, "error")
        if error is not None:
            self.error = _kind_of(error)
        output = list(items(pick(response, "output")))
        # Servers that send no deltas tell the text at the end.
        self.text_bytes = max(self.text_bytes, sum(map(_item_bytes, output)))
        usage = tokens_used(pick(response, "usage"))
        if usage is not None:
            tool_usage = pick(response, "tool_usage")
            searches = count_of(pick_path(tool_usage, "web_search", "num_requests"))
            drawn = _drawn(response, tool_usage, output)
            self.take_usage(
                msgspec.structs.replace(
                    usage,
                    web_searches=_searches(output) if searches is None else searches,
                    extra=() if drawn is None else (drawn,),
                )
            )


def _kind_of(error: object) -> ErrorKind:
    return classify(None, {"error": error})


def _item_bytes(item: object) -> int:
    """UTF-8 bytes of what the model wrote in an item of the output."""
    size = text_length(pick(item, "name"))
    for member in ("arguments", "input", "code"):
        size += text_length(pick(item, member))
    for member in ("content", "summary"):
        for part in items(pick(item, member)):
            size += text_length(pick(part, "text")) + text_length(pick(part, "refusal"))
    return size


def _searches(output: list[object]) -> int | None:
    """Calls of the search tool, where no count is told; opening a page is none."""
    calls = [item for item in output if pick(item, "type") == "web_search_call"]
    return sum(_is_search(pick(item, "action")) for item in calls) if calls else None


def _is_search(action: object) -> bool:
    if isinstance(action, msgspec.Raw):
        action = decode(bytes(action))  # of what is not read, nobody has checked that it is JSON
    return pick(action, "type") in (None, "search")


def _drawn(response: object, tool_usage: object, output: list[object]) -> Usage | None:
    """What the tool that draws images used, at the price of its own model; `None`: nothing."""
    tokens = tokens_used(pick(tool_usage, "image_gen"))
    images = sum(pick(item, "type") == "image_generation_call" for item in output)
    if not images and (tokens is None or not tokens.total_tokens):
        return None
    tool = next((tool for tool in items(pick(response, "tools")) if pick(tool, "type") == "image_generation"), None)
    return msgspec.structs.replace(
        tokens or Usage(), images=images or None, model=name_of(pick(tool, "model")) or _IMAGE_MODEL
    )
