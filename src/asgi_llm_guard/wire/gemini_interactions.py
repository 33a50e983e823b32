"""Gemini's Interactions: models and agents, with usage names of its own.

Source: the types of google-genai 3.4 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.faults import is_overflow, kind_of_status, status_error
from asgi_llm_guard.wire.gemini import limit_output, read_limits, spelled
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.meters import Streamed, Whole, told_early
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import (
    LONGEST_NAME,
    count_of,
    decode,
    items,
    name_of,
    path_parts,
    pick,
    pick_path,
    text_length,
    within,
)
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["GeminiInteractions"]


class GeminiInteractions:
    """The dialect `gemini_interactions`: POST to `…/interactions`. One that runs in the background tells no usage."""

    __slots__ = ()

    name: Final = "gemini_interactions"
    provider: Final = "gemini"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in `/interactions`, below a version."""
        parts = path_parts(path.casefold())
        return len(parts) > 1 and parts[-1] == "interactions" and parts[-2] in _VERSIONS

    def read_request(self, view: BodyView, path: str = "") -> Ask:  # noqa: ARG002 - the body names everything
        """What the request asks for; an agent counts as a model.

        Raises:
            BodyError: neither `model` nor `agent` is there, or a value read here is malformed or there in two spellings.
        """
        model = view.text("model", longest=LONGEST_NAME) or view.text("agent", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        limit, _ = read_limits(view, "generationConfig", "maxOutputTokens")
        tier = spelled(view, "serviceTier")
        return Ask(
            model=model.removeprefix("models/"),
            max_output_tokens=limit,
            stream=view.flag("stream"),
            wants_usage=True,
            service_tier=None if tier is None else name_of(view.get(tier)),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage comes unasked; what an agent generates has no limit to set.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None or view.text("model", longest=LONGEST_NAME) is None:
            return view.body
        config, limit = "generation_config", "max_output_tokens"
        if spelled(view, "generationConfig") == "generationConfig":
            config, limit = "generationConfig", "maxOutputTokens"
        return limit_output(view, config, limit, max_output_tokens)

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says. One that failed is an error, though it may tell its usage."""
        value = decode(body)
        if not 200 <= status < 300:
            return Answer(kind="error", error=_classify(status, value))
        tally = _Tally()
        tally.add(value)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: server-sent events, or one JSON value."""
        if head.streams(b"text/event-stream"):
            return Streamed(Blocks(), _Tally())
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: an interaction or one of its events as a model or dict, an HTTP response, or the
        SDK's error."""
        failed = status_error(obj)
        if failed is not None:
            body = pick(obj, "body")
            error = pick(body, "error")
            if not isinstance(pick(error, "code"), str) or pick(error, "type") is not None:  # with a type: OpenAI's
                return None
            return Answer(kind="error", error=_classify(failed, body))
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            if not isinstance(content, bytes) or not _is_ours(decode(content)):
                return None
            return self.read_response(status, content)
        if not _is_ours(obj):
            return None
        tally = _Tally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for event objects, dicts, and pieces of server-sent events."""
        return Items(_Tally, Blocks())


_VERSIONS: Final = frozenset({"v1", "v1beta", "v1alpha", "v1beta1", "v1beta2"})
_EVENTS: Final = ("interaction.", "step.")
_ENDED: Final = ("completed", "incomplete", "requires_action", "budget_exceeded", "cancelled")


# ------------------------------------------------------------------------------ plain events


class _Text(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class _Plain(msgspec.Struct, tag_field="event_type", tag="step.delta"):
    """Nearly every event is one: a piece of text."""

    delta: _Text
    metadata: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


# ---------------------------------------------------------------------------------- answers


class _Tally:
    """What an interaction says, from its events or as one piece. The last report of usage wins; none are summed."""

    __slots__ = ("_error", "_finished", "_model", "_report", "_tier", "_told_at", "_undecoded", "seen", "text_bytes")

    def __init__(self) -> None:
        self._model: str | None = None
        self._tier: str | None = None
        self._report: object = None
        self._error: ErrorKind | None = None
        self._finished = False
        self._undecoded = 0
        self.seen = False
        self.text_bytes = 0
        self._told_at = 0
        """How much text had come when the usage was reported."""

    def event(self, block: Block) -> bool:
        data = block.data
        if data is None:
            return False
        try:
            plain = _PLAIN.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            pass  # any other event
        else:
            self.seen = True
            self.text_bytes += text_length(plain.delta.text)
            return False
        value = decode(data)
        if value is None:
            self._undecoded += data.strip() != b"[DONE]"
        self.add(value)
        return False  # usage comes beside other things

    def add(self, value: object) -> None:
        """Count an interaction, or one of its events."""
        kind = pick(value, "event_type")
        if kind == "error":
            if _is_ours(value):
                self.seen = True
                self._error = _classify(None, value)
            return
        if not isinstance(kind, str):
            if _is_ours(value):
                self.seen = True
                self._add_interaction(value, with_text=True)
            return
        if not kind.startswith(_EVENTS):
            return
        self.seen = True
        if kind == "step.delta":
            self.text_bytes += _delta_bytes(pick(value, "delta"))
            self._note(pick_path(value, "metadata", "total_usage"))
        elif kind == "step.start":
            self.text_bytes += _step_bytes(pick(value, "step"))
        elif kind == "step.stop":
            self._note(pick(value, "usage"))
        elif kind == "interaction.status_update":
            self._note(pick(value, "usage"))
            self._end(pick(value, "status"))
        else:
            self._add_interaction(pick(value, "interaction"), with_text=False)

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        usage = _usage(self._report, self._model, self._tier)
        if usage is not None and self.text_bytes > self._told_at:
            usage = told_early(usage)
        return Answer(
            kind="success" if self._error is None else "error",
            usage=usage,
            model=self._model,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=(whole or self._finished) and self._error is None,
            unread=unread + self._undecoded,
        )

    def _add_interaction(self, value: object, *, with_text: bool) -> None:
        self._model = (name_of(pick(value, "model")) or "").removeprefix("models/") or self._model
        self._tier = name_of(pick(value, "service_tier")) or self._tier
        if with_text:  # a stream has told it before
            self.text_bytes += sum(_step_bytes(step) for step in items(pick(value, "steps")))
        self._note(pick(value, "usage"))
        self._end(pick(value, "status"))

    def _end(self, status: object) -> None:
        if status == "failed":
            self._error = self._error or "other"
        elif status in _ENDED:
            self._finished = True

    def _note(self, report: object) -> None:
        if _usage(report, None, None) is not None:
            self._report = report
            self._told_at = self.text_bytes


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything is an interaction, or an event of one."""
    kind = pick(value, "event_type")
    if isinstance(kind, str):
        if kind == "error":
            return isinstance(pick_path(value, "error", "message"), str)
        return kind.startswith(_EVENTS)
    if pick(value, "object") == "interaction":
        return True
    if not isinstance(pick(value, "status"), str):
        return False
    return isinstance(pick(value, "steps"), (list, tuple)) and isinstance(pick(value, "id"), str)


def _step_bytes(step: object) -> int:
    """UTF-8 bytes of what the model wrote in one step: text, summaries of its thoughts, a call's name."""
    if pick(step, "type") not in ("model_output", "thought", "function_call"):
        return 0
    size = text_length(pick(step, "name"))
    for content in (*items(pick(step, "content")), *items(pick(step, "summary"))):
        size += text_length(pick(content, "text"))
    arguments = pick(step, "arguments")
    return size + (len(str(arguments)) if isinstance(arguments, dict) and arguments else 0)


def _delta_bytes(delta: object) -> int:
    return (
        text_length(pick(delta, "text"))
        + text_length(pick_path(delta, "content", "text"))
        + text_length(pick(delta, "arguments"))
    )


# ------------------------------------------------------------------------------------ usage


def _usage(report: object, model: str | None, tier: str | None) -> Usage | None:
    """The counts of a `usage` object; `None` when it tells neither input nor output."""
    if report is None:
        return None
    prompt, told = count_of(pick(report, "total_input_tokens")), count_of(pick(report, "total_output_tokens"))
    thoughts = count_of(pick(report, "total_thought_tokens"))
    total = count_of(pick(report, "total_tokens"))
    if prompt is None and told is None:
        return None
    entered = None if prompt is None else count_of(prompt + (count_of(pick(report, "total_tool_use_tokens")) or 0))
    written = None if told is None and thoughts is None else count_of((told or 0) + (thoughts or 0))
    if total is not None and entered is not None and total >= entered + (written or 0):
        written = total - entered  # what nobody names is billed all the same
    input_audio, input_image = _modalities(pick(report, "input_tokens_by_modality"), entered)
    generated = None if written is None else written - (thoughts or 0)
    output_audio, output_image = _modalities(pick(report, "output_tokens_by_modality"), generated)
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=within(count_of(pick(report, "total_cached_tokens")), prompt),
        reasoning_tokens=within(thoughts, written),
        input_audio_tokens=input_audio,
        output_audio_tokens=output_audio,
        input_image_tokens=input_image,
        output_image_tokens=output_image,
        web_searches=_searches(pick(report, "grounding_tool_count")),
        service_tier=tier,
        model=model,
    )


def _modalities(entries: object, whole: int | None) -> tuple[int | None, int | None]:
    """Tokens of audio and of images; unknown where they are not counted apart, or do not add up."""
    if not isinstance(entries, (list, tuple)) or whole is None:
        return None, None
    sums = {"audio": 0, "image": 0}
    for entry in entries:
        modality = pick(entry, "modality")
        if isinstance(modality, str) and modality in sums:
            sums[modality] += count_of(pick(entry, "tokens")) or 0
    return (sums["audio"], sums["image"]) if sum(sums.values()) <= whole else (None, None)


def _searches(counts: object) -> int | None:
    made = [count_of(pick(entry, "count")) or 0 for entry in items(counts) if pick(entry, "type") == "google_search"]
    return count_of(sum(made)) if made else None


# ----------------------------------------------------------------------------------- errors

_KINDS: Final[dict[str, ErrorKind]] = {
    "rate_limit_exceeded": "rate_limit",
    "resource_exhausted": "rate_limit",
    "quota_exceeded": "quota",
    "overloaded": "overload",
    "unavailable": "overload",
    "service_unavailable": "overload",
    "unauthenticated": "auth",
    "permission_denied": "auth",
    "invalid_argument": "invalid",
    "invalid_request": "invalid",
    "not_found": "invalid",
}


def _classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is; `status` is `None` in the middle of a stream."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    error = pick(value, "error")
    if is_overflow(status, pick(error, "message")):
        return "context_overflow"
    for word in (pick(error, "code"), pick(error, "status")):
        if isinstance(word, str) and word.lower() in _KINDS:
            return _KINDS[word.lower()]
    return kind_of_status(status)
