"""Which answers of providers may be kept: those that say themselves that they are complete.

Judged by their shape, whatever the dialect. An answer is kept if it says that it came to its own end (`stop`, `end_turn`,
`completed`, …) for each choice, has some text, and has no error and no tool call anywhere; or if it consists of
embeddings. Whatever says nothing of that is not kept: images and speech, lists of models, answers that were cut by a
length limit or a filter, refusals; nor what a search of the provider has found, which is another thing tomorrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from asgi_llm_guard.wire.sse import Blocks

__all__ = ["ProviderAnswer", "unfit", "unfit_value"]

_ENDINGS: Final = frozenset({"finish_reason", "finishreason", "stop_reason", "stopreason", "done_reason"})
_ENDED: Final = frozenset({"stop", "end_turn", "stop_sequence", "complete", "completed", "eos", "eos_token"})
_TOOLS: Final = frozenset(
    {"tool_calls", "function_call", "functioncall", "tooluse", "tool_call", "toolcall", "tool_use"}
)
_CHOICES: Final = {"choices": ("finish_reason",), "candidates": ("finishReason", "finish_reason")}
"""Where each of several answers in one stands, and what says that it has ended."""
_SEARCHES: Final = frozenset({"groundingmetadata", "grounding_metadata", "urlcontextmetadata", "url_context_metadata"})
_NAME: Final = re.compile(r"[A-Za-z0-9_./+-]{1,40}")
_TEXTS: Final = frozenset({"content", "text", "delta", "thinking", "output_text", "response"})


class ProviderAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of a provider over HTTP, complete and decoded: what is kept of it is what is given again."""

    status: int
    content_type: str
    body: bytes
    """Without a content-encoding."""

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers to give it with. Nothing in them tells that it was kept."""
        return [("content-type", self.content_type), ("content-length", str(len(self.body)))]


def unfit(answer: ProviderAnswer, *, stream: bool) -> str | None:
    """Why the answer must not be kept, for people to read; `None`: it may be."""
    if answer.status != 200:
        return f"it has the status {answer.status}"
    kind = answer.content_type.partition(";")[0].strip().lower()
    seen = _Seen()
    try:
        if kind == "text/event-stream":
            seen.add_stream(_events(answer.body))
        elif kind in {"application/x-ndjson", "application/jsonl", "application/stream+json"}:
            seen.add_stream(line for line in answer.body.splitlines() if line.strip())
        elif kind == "application/json" and stream and answer.body.lstrip()[:1] == b"[":
            for item in json.loads(answer.body):
                seen.add(item, partial=True)
        elif kind == "application/json":
            seen.add(json.loads(answer.body))
        else:
            return f"answers of the type {_named(kind)} cannot be judged"
    except RecursionError:
        return "it is nested too deeply"
    except ValueError:
        return "it is not JSON"
    return seen.unfit()


def unfit_value(value: object) -> str | None:
    """The same of a value that a function returned: one that is no provider's answer is the application's word."""
    if isinstance(value, Mapping) and _is_provider_shape(value):
        seen = _Seen()
        try:
            seen.add(value)
        except RecursionError:
            return "it is nested too deeply"
        return seen.unfit()
    return None


def _is_provider_shape(value: Mapping[str, Any]) -> bool:
    shapes = ("stop_reason", "stopReason", "finish_reason", "done_reason")
    if any(key in value for key in shapes) or value.get("object") in ("response", "chat.completion"):
        return True
    # Choices that are plain texts are those of a quiz.
    lists = [value[key] for key in _CHOICES if key in value]
    return any(not isinstance(each, list) or not each or isinstance(each[0], Mapping) for each in lists)


def _named(value: object) -> str:
    """A word of an answer, if it is one of an API and not of the model: reasons are counted and shown."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else "another one"


def _events(body: bytes) -> Iterator[bytes]:
    blocks = Blocks(longest=len(body) + 1)
    # What no blank line ends was cut.
    return (block.data for block in blocks.feed(body) if block.data is not None)


class _Seen:
    """What was seen of an answer, item by item."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._ended = False
        self._text = False
        self._vectors = False
        self._open: set[str] = set()
        """Choices that have begun, and not ended."""
        self._awaited: set[str] = set()
        """What a stream of this kind ends with, and has not come yet."""

    def add_stream(self, events: Iterator[bytes]) -> None:
        for event in events:
            if event == b"[DONE]":
                self._awaited.discard("[DONE]")
                continue
            self.add(json.loads(event), partial=True)

    def add(self, item: Any, *, partial: bool = False) -> None:
        if not isinstance(item, dict):
            self._refuse("it is not of a shape that can be judged")
            return
        self._add_choices(item, partial=partial)
        if partial:
            self._add_part(item)
        elif item.get("done") is False:
            self._refuse("it is not complete")
        if item.get("status") == "completed":
            self._ended = True
        elif isinstance(item.get("status"), str) and not partial:
            self._refuse(f"its status is {_named(item['status'])}")
        self._walk(item, partial=partial)

    def _add_choices(self, item: dict[str, Any], *, partial: bool) -> None:
        for name, endings in _CHOICES.items():
            choices = item.get(name)
            for place, choice in enumerate(choices if isinstance(choices, list) else ()):
                if isinstance(choice, dict):
                    index = str(choice.get("index", 0) if partial else place)
                    ended = any(choice.get(ending) for ending in endings)
                    (self._open.discard if ended else self._open.add)(index)

    def _add_part(self, item: dict[str, Any]) -> None:
        kind = item.get("type") if isinstance(item.get("type"), str) else ""
        if item.get("object") in ("chat.completion.chunk", "text_completion"):  # not a set: it may be a list
            self._awaited.add("[DONE]")
        if kind == "message_start":
            self._awaited.add("message_stop")
        elif kind == "message_stop":
            self._awaited.discard("message_stop")
        elif kind == "response.created":
            self._awaited.add("response.completed")
        elif kind == "response.completed":
            self._awaited.discard("response.completed")
            self._ended = True
        elif kind in {"error", "response.failed", "response.incomplete"}:
            self._refuse("it has an error")
        if "done" in item:  # Ollama
            (self._awaited.discard if item["done"] is True else self._awaited.add)("done")

    def _walk(self, value: Any, *, partial: bool) -> None:
        if isinstance(value, list):
            for item in value:
                self._walk(item, partial=partial)
            return
        if not isinstance(value, dict):
            return
        kind = value.get("type")
        if isinstance(kind, str) and (kind.endswith("_call") or "tool_use" in kind or "tool_call" in kind):
            self._refuse("it calls a tool")
        elif kind == "url_citation":
            self._refuse("it tells what a search has found")
        for key, inner in value.items():
            self._look(key.lower(), inner, partial=partial)
            self._walk(inner, partial=partial)

    def _look(self, key: str, inner: Any, *, partial: bool) -> None:
        if key in _ENDINGS:
            if isinstance(inner, str) and inner.lower() in _ENDED:
                self._ended = True
            elif inner is not None:
                self._refuse(f"it ended with {_named(inner)}")
            elif not partial:
                self._refuse("it is not complete")
        elif key in _TOOLS and inner:
            self._refuse("it calls a tool")
        elif key in _SEARCHES and inner:
            self._refuse("it tells what a search has found")
        elif key == "error" and inner:
            self._refuse("it has an error")
        elif key == "refusal" and inner:
            self._refuse("it is a refusal")
        elif key == "incomplete_details" and inner:
            self._refuse("it is not complete")
        elif key in {"embedding", "embeddings"} and inner:
            self._vectors = True
        elif key in _TEXTS and isinstance(inner, str) and inner:
            self._text = True

    def _refuse(self, reason: str) -> None:
        self._reason = self._reason or reason

    def unfit(self) -> str | None:
        if self._reason is not None:
            return self._reason
        if self._vectors:
            return None
        if not self._ended or self._open or self._awaited:
            return "it does not say that it is complete"
        return None if self._text else "it is empty"
