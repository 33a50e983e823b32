"""OpenAI Chat Completions, as OpenAI, Azure and the many compatible servers speak it.

Source: https://platform.openai.com/docs/api-reference/chat, and the types of openai 3.52 for Python
(2026-11); deviations of other servers stand where they are handled.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.meters import Streamed, Whole
from asgi_llm_guard.wire.overflow import says_overflow
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import (
    LONGEST_NAME,
    MOST_CHOICES,
    MOST_TOKENS,
    count_of,
    decode,
    first_count,
    items,
    name_of,
    path_parts,
    pick,
    text_length,
    within,
)
from asgi_llm_guard.wire.sse import Block, Blocks

__all__ = ["OpenAIChat"]

_LIMITS: Final = ("max_completion_tokens", "max_tokens")


class OpenAIChat:
    """The dialect `openai`: requests to `…/chat/completions`."""

    __slots__ = ()

    name: Final = "openai"
    provider: Final = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        """Whether `path` ends in `/chat/completions`; doubled and trailing slashes make no difference."""
        return path_parts(path)[-2:] == ["chat", "completions"]

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for.

        Of `max_tokens` and `max_completion_tokens` the larger counts. Servers disagree on a limit of 0
        (an error, or none at all), so it counts as none. In an Azure deployment's path the deployment is
        the model, whatever the body says.

        Raises:
            BodyError: `model` is missing, or one of the values read here is malformed.
        """
        model = _deployment(path) or view.text("model", longest=LONGEST_NAME)
        if model is None:
            raise BodyError("invalid_request", 400, "model: required, got none", "model")
        limits = [limit for name in _LIMITS if (limit := view.whole(name, least=0, most=MOST_TOKENS)) is not None]
        stream = view.flag("stream")
        options = view.inside("stream_options")
        wants_usage = options is not None and options.flag("include_usage")
        return Ask(
            model=model,
            max_output_tokens=max(limits) if limits and min(limits) > 0 else None,
            choices=view.whole("n", least=1, most=MOST_CHOICES) or 1,
            stream=stream,
            wants_usage=stream and wants_usage,
            service_tier=_text(view, "service_tier"),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:
        """The body to send.

        Usage is asked for in streams only, since `stream_options` is an error elsewhere. Where the request
        has no limit, `max_completion_tokens` is set: some models refuse the older `max_tokens`.

        Raises:
            BodyError: as `read_request`.
        """
        changes: dict[str, object] = {}
        if include_usage and view.flag("stream"):
            options = view.inside("stream_options")
            if options is None:
                changes["stream_options"] = {"include_usage": True}
            elif not options.flag("include_usage"):
                changes["stream_options"] = msgspec.Raw(options.replace({"include_usage": True}))
        if max_output_tokens is not None:
            present = {
                name: limit for name in _LIMITS if (limit := view.whole(name, least=0, most=MOST_TOKENS)) is not None
            }
            for name, limit in (present or {_LIMITS[0]: 0}).items():
                if limit == 0 or limit > max_output_tokens:
                    changes[name] = max_output_tokens
        return view.replace(changes) if changes else view.body

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says. An error object counts as an error even with status 200."""
        if status == 200:
            try:
                completion = _PLAIN.decode(body)
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # anything but a plain completion
            else:
                if completion.object != "error":
                    return _of_plain(completion)
        value = decode(body)
        if not 200 <= status < 300:
            return Answer(kind="error", error=_classify(status, value), usage=_usage(pick(value, "usage")))
        tally = _Tally()
        tally.add(value)
        return tally.answer(whole=True)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:
        """A meter for the body of a response: server-sent events, or one JSON value."""
        if head.header(b"content-type").lower().startswith(b"text/event-stream"):
            return Streamed(Blocks(), _Tally(), strip=strip_usage)
        return Whole(lambda body: self.read_response(head.status, body))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a chat completion as a model or a dict, an HTTP response, or an SDK's status error."""
        status = pick(obj, "status_code")
        if isinstance(status, int) and isinstance(obj, BaseException):
            return Answer(kind="error", error=_classify(status, pick(obj, "body")))
        if isinstance(status, int):
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
        """A meter for chunk objects, dicts, events that carry a `chunk`, and pieces of a raw stream."""
        return _Items()


# ------------------------------------------------------------------------- plain completions

# Nearly every response is one, and to decode only what is read of it takes a third of the time. What does not
# fit these types is read by shape, as all the rest is, and gives the same answer.

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    # What follows is generated text as well, and not plain.
    reasoning: None = None
    reasoning_content: None = None
    audio: None = None
    function_call: None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    delta: None = None


class _OfInput(msgspec.Struct):
    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _OfOutput(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _Report(msgspec.Struct):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _OfInput | None = None
    completion_tokens_details: _OfOutput | None = None
    num_cached_tokens: None = None


class _Plain(msgspec.Struct):
    """A completion that reports its usage."""

    choices: list[_Choice]
    usage: _Report
    model: str | None = None
    service_tier: str | None = None
    object: str | None = None
    error: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


def _of_plain(completion: _Plain) -> Answer:
    report = completion.usage
    of_input = report.prompt_tokens_details or _NOTHING_OF_INPUT
    of_output = report.completion_tokens_details or _NOTHING_OF_OUTPUT
    usage = _usage_of(
        report.prompt_tokens,
        report.completion_tokens,
        total=report.total_tokens,
        cached=of_input.cached_tokens,
        stored=of_input.cache_write_tokens,
        reasoning=of_output.reasoning_tokens,
        audio=(of_input.audio_tokens, of_output.audio_tokens),
        names=(name_of(completion.model), name_of(completion.service_tier)),
    )
    size = 0
    for choice in completion.choices:
        message = choice.message
        if message is not None:
            size += _length(message.content) + _length(message.refusal)
            for call in message.tool_calls or ():
                if call.function is not None:
                    size += _length(call.function.name) + _length(call.function.arguments)
    return Answer(kind="success", usage=usage, model=usage.model, text_bytes=size, finished=True)


_NOTHING_OF_INPUT: Final = _OfInput()
_NOTHING_OF_OUTPUT: Final = _OfOutput()


# ---------------------------------------------------------------------------------- answers


class _Tally:
    """What an answer says, from its chunks or as one piece. The last report of usage wins; none are summed."""

    __slots__ = ("_done", "_error", "_model", "_open", "_tier", "_undecoded", "_usage", "text_bytes")

    def __init__(self) -> None:
        self._model: str | None = None
        self._tier: str | None = None
        self._usage: Usage | None = None
        self._error: ErrorKind | None = None
        self.text_bytes = 0
        self._undecoded = 0
        self._open: dict[int, bool] = {}
        self._done = False

    def add(self, value: object) -> bool:
        """Count a completion, a chunk or an error; `False`: it is none of them."""
        choices = pick(value, "choices")
        if _error_of(value) is not None:
            self._error = _classify(None, value)
        elif not isinstance(choices, (list, tuple)):
            return False
        if (model := pick(value, "model")) != self._model:
            self._model = name_of(model) or self._model
        if (tier := pick(value, "service_tier")) != self._tier:
            self._tier = name_of(tier) or self._tier
        # Groq reports in its own place as well, and there even when nobody asked.
        usage = _usage(pick(value, "usage")) or _usage(pick(pick(value, "x_groq"), "usage"))
        if usage is not None and (usage.total_tokens is not None or self._usage is None):
            self._usage = usage
        for choice in items(choices):
            self.text_bytes += _text_bytes(pick(choice, "delta") or pick(choice, "message"))
            index = pick(choice, "index")
            if not isinstance(index, int) or not 0 <= index < MOST_CHOICES:
                index = 0
            # Sticky: OpenRouter reports usage beside a choice that has ended before.
            self._open[index] = self._open.get(index, True) and pick(choice, "finish_reason") is None
        return True

    def event(self, block: Block) -> bool:
        """Count the block. Whether it is the chunk that only reports usage, which not every client can take."""
        data = block.data
        if data is None:
            return False
        if data.strip() == b"[DONE]":
            self._done = True
            return False
        value = decode(data)
        self.add(value)
        if block.error:
            self._error = self._error or "other"
        elif value is None:
            self._undecoded += 1
        alone = pick(value, "choices") == [] and _error_of(value) is None
        return alone and isinstance(pick(value, "usage"), dict)

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        usage = self._usage
        if usage is not None and (self._model is not None or self._tier is not None):
            usage = msgspec.structs.replace(usage, model=self._model, service_tier=self._tier)
        ended = whole or self._done or (bool(self._open) and not any(self._open.values()))
        return Answer(
            kind="success" if self._error is None else "error",
            usage=usage,
            model=self._model,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=ended and self._error is None,
            unread=unread + self._undecoded,
        )


class _Items:
    """The meter of the items that one function streams."""

    __slots__ = ("_known", "_raw", "_tally")

    def __init__(self) -> None:
        self._tally = _Tally()
        self._raw = Streamed(Blocks(), _Tally())
        self._known = False

    def add(self, item: object) -> None:
        if isinstance(item, str):
            item = item.encode("utf-8", "surrogatepass")
        if isinstance(item, bytes):
            self._raw.feed(item)
            return
        for shape in (item, pick(item, "chunk")):  # the SDK's own events wrap the chunk
            if _is_ours(shape):
                self._known = True
                self._tally.add(shape)

    def answer(self) -> Answer | None:
        if self._known:
            return self._tally.answer()
        raw = self._raw.answer()
        return raw if raw.text_bytes or raw.usage or raw.error or raw.model else None


def _text(view: BodyView, member: str) -> str | None:
    value = view.get(member) if member in view else None
    return value if isinstance(value, str) else None


def _deployment(path: str) -> str | None:
    """The model in `/openai/deployments/{model}/chat/completions`."""
    if "deployments" not in path:
        return None
    parts = path_parts(path)[-4:]
    return parts[1] if len(parts) == 4 and parts[0] == "deployments" and name_of(parts[1]) else None


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a completion, a chunk or an error.

    A function's own `{"error": "…"}` has not: it says nothing of the calls that were made.
    """
    if isinstance(pick(value, "choices"), (list, tuple)):
        return True
    error = pick(value, "error")
    return (
        pick(value, "type") != "error"  # Anthropic's envelope
        and pick(value, "object") in (None, "error")
        and isinstance(error, dict)
        and isinstance(error.get("message"), str)
        and ("type" in error or "code" in error)
    )


def _text_bytes(message: object) -> int:
    """UTF-8 bytes of what the model wrote in a message or delta."""
    if message is None:
        return 0
    # vLLM sends its reasoning under both names.
    reasoning = pick(message, "reasoning_content") or pick(message, "reasoning")
    size = _length(pick(message, "content")) + _length(pick(message, "refusal")) + _length(reasoning)
    size += _length(pick(pick(message, "audio"), "transcript"))
    for call in items(pick(message, "tool_calls")):
        size += _function_bytes(pick(call, "function"))
    return size + _function_bytes(pick(message, "function_call"))


def _function_bytes(function: object) -> int:
    return 0 if function is None else _length(pick(function, "name")) + _length(pick(function, "arguments"))


def _length(text: object) -> int:
    if text is None or isinstance(text, str):
        return text_length(text)
    # Mistral's content may be a list of parts, with thinking as parts inside a part.
    parts = [part for item in items(text) for part in (item, *items(pick(item, "thinking")))]
    return sum(_length(piece) for part in parts if isinstance(piece := pick(part, "text"), str))


# ------------------------------------------------------------------------------------ usage


def _usage(report: object) -> Usage | None:
    """The token counts of a `usage` object; `None` when it tells neither input nor output.

    Parts that are larger than what they are part of are taken for unknown.
    """
    if report is None:
        return None
    entered, written = count_of(pick(report, "prompt_tokens")), count_of(pick(report, "completion_tokens"))
    if entered is None and written is None:
        return None
    of_input, of_output = pick(report, "prompt_tokens_details"), pick(report, "completion_tokens_details")
    return _usage_of(
        entered,
        written,
        total=count_of(pick(report, "total_tokens")),
        cached=first_count(pick(of_input, "cached_tokens"), pick(report, "num_cached_tokens")),  # the latter: Mistral
        stored=count_of(pick(of_input, "cache_write_tokens")),
        reasoning=count_of(pick(of_output, "reasoning_tokens")),
        audio=(count_of(pick(of_input, "audio_tokens")), count_of(pick(of_output, "audio_tokens"))),
    )


def _usage_of(
    entered: int | None,
    written: int | None,
    *,
    total: int | None,
    cached: int | None,
    stored: int | None,
    reasoning: int | None,
    audio: tuple[int | None, int | None],
    names: tuple[str | None, str | None] = (None, None),
) -> Usage:
    """The usage of a report with these counts; `audio`: of input and output, `names`: model and tier."""
    if total is not None and entered is not None and written is not None and total > entered + written:
        # Gemini's compatible endpoint bills thinking that it counts in the total only.
        reasoning = reasoning or total - entered - written
        written = total - entered
    if entered is None or (cached or 0) + (stored or 0) > entered:
        cached = stored = None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=cached,
        cache_write_tokens=stored,
        reasoning_tokens=within(reasoning, written),
        input_audio_tokens=within(audio[0], entered),
        output_audio_tokens=within(audio[1], written),
        model=names[0],
        service_tier=names[1],
    )


# ----------------------------------------------------------------------------------- errors

_KINDS: Final[dict[object, ErrorKind]] = {
    # codes and types of OpenAI
    "context_length_exceeded": "context_overflow",
    "rate_limit_exceeded": "rate_limit",
    "slow_down": "rate_limit",
    "insufficient_quota": "quota",
    "credit_balance_exhausted": "quota",
    "organization_spend_limit_exceeded": "quota",
    "organization_usage_limit_exceeded": "quota",
    "project_spend_limit_exceeded": "quota",
    "server_is_overloaded": "overload",
    "invalid_api_key": "auth",
    # types of compatible servers
    "authentication_error": "auth",
    "permission_error": "auth",
    "rate_limit_error": "rate_limit",
    "overloaded_error": "overload",
    "RESOURCE_EXHAUSTED": "rate_limit",
    "UNAVAILABLE": "overload",
}
_STATUSES: Final[dict[int | None, ErrorKind]] = {
    401: "auth",
    402: "quota",
    403: "auth",
    407: "auth",
    408: "other",
    429: "rate_limit",
    502: "overload",
    503: "overload",
    529: "overload",
}


def _error_of(value: object) -> object:
    """The error in an answer, under `error` or without an envelope, alone in a list or not; `None`: there is none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if pick(value, "object") == "error":
        return pick(value, "error") or value
    return pick(value, "error") or None


def _classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is; `status` is `None` in the middle of a stream."""
    error = _error_of(value) or value
    code, kind = pick(error, "code"), pick(error, "type") or pick(error, "status")
    message = error if isinstance(error, str) else pick(error, "message")
    text = message[:4096].lower() if isinstance(message, str) else ""
    if status is None and type(code) is int:  # OpenRouter and vLLM put the status there
        status = code
    if code == "string_above_max_length" or "string too long" in text:
        return "invalid"  # a text that is too long for its field; reads much like an overflow
    if status in (None, 400, 413, 422) and (code == "context_length_exceeded" or says_overflow(message)):
        return "context_overflow"
    for word in (code, kind):
        if isinstance(word, str) and word in _KINDS:
            return _KINDS[word]
    if status == 402 and pick(pick(error, "metadata"), "limit_source") == "openrouter_in_flight_budget":
        return "rate_limit"
    if status in _STATUSES:
        return _STATUSES[status]
    return "invalid" if kind == "invalid_request_error" or status in range(400, 500) else "other"
