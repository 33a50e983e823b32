"""OpenAI Chat Completions, as OpenAI, Azure and the many compatible servers speak it.

Source: https://platform.openai.com/docs/api-reference/chat, and the types of openai 3.52 for Python
(2026-11); deviations of other servers stand where they are handled.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from asgi_llm_guard.wire.base import Answer, Ask
from asgi_llm_guard.wire.openai_errors import classify, error_of, is_error
from asgi_llm_guard.wire.openai_family import Family, FamilyTally, asking_for_usage, deployment, text_in, wants_usage
from asgi_llm_guard.wire.openai_usage import completion_usage, milliseconds, usage_of
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import (
    LONGEST_NAME,
    MOST_CHOICES,
    MOST_TOKENS,
    decode,
    items,
    name_of,
    path_parts,
    pick,
    pick_path,
    text_length,
)
from asgi_llm_guard.wire.sse import Block

__all__ = ["OpenAIChat"]

_LIMITS: Final = ("max_completion_tokens", "max_tokens")
_MOST_MODELS: Final = 64


class OpenAIChat(Family):
    """The dialect `openai`: requests to `…/chat/completions`."""

    __slots__ = ()

    name: str = "openai"
    provider: str | None = None

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - many hosts speak it
        """Whether `path` ends in `/chat/completions`; doubled and trailing slashes make no difference."""
        return path_parts(path)[-2:] == ["chat", "completions"]

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for.

        Of `max_tokens` and `max_completion_tokens` the larger counts. Servers disagree on a limit of 0
        (an error, or none at all), so it counts as none. What a prediction has and the answer has not is
        billed beside the limit. In an Azure deployment's path the deployment is the model, whatever the
        body says. OpenRouter takes one of `models` where the model fails, or the first where there is none.

        Raises:
            BodyError: `model` is missing, or one of the values read here is malformed.
        """
        alternatives = _models(view)
        model = deployment(path) or view.text("model", longest=LONGEST_NAME)
        if model is None:
            if not alternatives:
                raise BodyError("invalid_request", 400, "model: required, got none", "model")
            model, *_ = alternatives
        limits = [limit for name in _LIMITS if (limit := view.whole(name, least=0, most=MOST_TOKENS)) is not None]
        limit = max(limits) if limits and min(limits) > 0 else None
        predicted = _predicted(view)
        return Ask(
            model=model,
            alternatives=tuple(other for other in alternatives if other != model),
            max_output_tokens=limit + predicted if limit is not None and predicted else limit,
            limits_output=not predicted,
            choices=view.whole("n", least=1, most=MOST_CHOICES) or 1,
            stream=view.flag("stream"),
            wants_usage=wants_usage(view),
            service_tier=text_in(view, "service_tier"),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:
        """The body to send.

        Where the request has no limit, `max_completion_tokens` is set: some models refuse the older `max_tokens`.

        Raises:
            BodyError: as `read_request`.
        """
        changes = asking_for_usage(view) if include_usage else {}
        if max_output_tokens is not None:
            changes |= self._lowered(view, max_output_tokens)
        return view.replace(changes) if changes else view.body

    def _lowered(self, view: BodyView, most: int) -> dict[str, object]:
        present = {
            name: limit for name in _LIMITS if (limit := view.whole(name, least=0, most=MOST_TOKENS)) is not None
        }
        return {name: most for name, limit in (present or {_LIMITS[0]: 0}).items() if limit == 0 or limit > most}

    def tally(self) -> FamilyTally:
        return _Tally()

    def is_ours(self, value: object) -> bool:
        """Whether it is a completion, a chunk or an error. Choices with a `text` are those of legacy completions."""
        choices = pick(value, "choices")
        if isinstance(choices, (list, tuple)):
            return pick(choices[0], "text") is None if choices else pick(value, "object") != "text_completion"
        return is_error(value)

    def read_plain(self, body: bytes) -> Answer | None:
        """What a plain completion says, decoding only what is read of it."""
        try:
            completion = _PLAIN.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
        if completion.object == "error" or not (completion.usage.prompt_tokens or completion.usage.completion_tokens):
            return None
        return _of_plain(completion)

    def read_object(self, obj: object) -> Answer | None:
        """As every dialect, and of the status errors of any SDK whose error has this shape or none."""
        if isinstance(obj, BaseException):
            status, body = pick(obj, "status_code"), pick(obj, "body")
            if not isinstance(status, int) or pick(body, "type") == "error":  # Anthropic's envelope
                return None
            return Answer(kind="error", error=classify(status, body))
        return super().read_object(obj)


def _models(view: BodyView) -> tuple[str, ...]:
    """The models that OpenRouter may fall back to."""
    raw = view.raw("models")
    if raw is None or raw == b"null":
        return ()
    models = decode(raw)
    if not isinstance(models, list) or len(models) > _MOST_MODELS or not all(map(name_of, models)):
        message = f"models: expected a list of up to {_MOST_MODELS} names of models"
        raise BodyError("invalid_request", 400, message, "models")
    return tuple(models)


def _predicted(view: BodyView) -> int:
    """The most tokens that a prediction has."""
    raw = view.raw("prediction")
    return 0 if raw is None or raw == b"null" else len(raw)


# ------------------------------------------------------------------------------ plain ones

# Nearly every completion and chunk is plain, and to decode only what is read of it takes a third of the time. What
# does not fit these types is read by shape, as all the rest is, and gives the same answer.

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
    text: None = None


class _OfInput(msgspec.Struct):
    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    cache_write_tokens_details: None = None
    audio_tokens: _Tokens | None = None
    image_tokens: _Tokens | None = None


class _OfOutput(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None
    image_tokens: _Tokens | None = None


class _Report(msgspec.Struct):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _OfInput | None = None
    completion_tokens_details: _OfOutput | None = None
    num_cached_tokens: _Tokens | None = None
    prompt_audio_seconds: float | None = None
    cost: None = None


class _Plain(msgspec.Struct):
    """A completion that reports its usage."""

    choices: list[_Choice]
    usage: _Report
    model: str | None = None
    service_tier: str | None = None
    object: str | None = None
    error: None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    # The rest is read by shape.
    refusal: None = None
    tool_calls: None = None
    reasoning: None = None
    audio: None = None
    function_call: None = None


class _ChunkChoice(msgspec.Struct, gc=False):
    delta: _Delta
    index: int = 0
    message: None = None
    finish_reason: None = None
    text: None = None


class _Chunk(msgspec.Struct, gc=False):
    """A chunk in the middle of a stream."""

    choices: tuple[_ChunkChoice]
    model: str | None = None
    service_tier: str | None = None
    object: str | None = None
    usage: None = None
    error: None = None
    x_groq: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)
_CHUNK: Final = msgspec.json.Decoder(_Chunk)


def _of_plain(completion: _Plain) -> Answer:
    report = completion.usage
    of_input = report.prompt_tokens_details or _NOTHING_OF_INPUT
    of_output = report.completion_tokens_details or _NOTHING_OF_OUTPUT
    usage = usage_of(
        report.prompt_tokens,
        report.completion_tokens,
        total=report.total_tokens,
        cached=report.num_cached_tokens if of_input.cached_tokens is None else of_input.cached_tokens,
        stored=of_input.cache_write_tokens,
        reasoning=of_output.reasoning_tokens,
        audio=(of_input.audio_tokens, of_output.audio_tokens),
        images=(of_input.image_tokens, of_output.image_tokens),
        audio_ms=None if report.prompt_audio_seconds is None else milliseconds(report.prompt_audio_seconds),
        model=name_of(completion.model),
        tier=name_of(completion.service_tier),
    )
    size = 0
    for choice in completion.choices:
        message = choice.message
        if message is not None:
            size += text_length(message.content) + text_length(message.refusal)
            for call in message.tool_calls or ():
                if call.function is not None:
                    size += text_length(call.function.name) + text_length(call.function.arguments)
    return Answer(kind="success", usage=usage, model=usage.model, text_bytes=size, finished=True)


_NOTHING_OF_INPUT: Final = _OfInput()
_NOTHING_OF_OUTPUT: Final = _OfOutput()


# ---------------------------------------------------------------------------------- answers


class _Tally(FamilyTally):
    __slots__ = ("_open",)

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[int, bool] = {}

    def add(self, value: object) -> bool:
        choices = pick(value, "choices")
        if not self.take_error(value) and not isinstance(choices, (list, tuple)):
            return False
        self.take_names(value)
        for choice in items(choices):
            self.text_bytes += _text_bytes(pick(choice, "delta") or pick(choice, "message"))
            index = pick(choice, "index")
            if not isinstance(index, int) or not 0 <= index < MOST_CHOICES:
                index = 0
            # Sticky: OpenRouter reports usage beside a choice that has ended before.
            self._open[index] = self._open.get(index, True) and pick(choice, "finish_reason") is None
        # Groq reports in its own place as well, and there even when nobody asked.
        self.take_usage(completion_usage(pick(value, "usage")) or completion_usage(pick_path(value, "x_groq", "usage")))
        if choices and len(self._open) > 1 and not self.ended:
            self.told_in_part()  # vLLM's reports all along are of the choice that they come with
        return True

    def event(self, block: Block) -> bool:
        """As every tally; plain chunks, which are nearly all, in a shorter way."""
        if block.data is not None and not block.error:
            try:
                chunk = _CHUNK.decode(block.data)
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # anything but a plain chunk
            else:
                if chunk.object != "error":
                    self._add_plain(chunk)
                    return False
        return super().event(block)

    def _add_plain(self, chunk: _Chunk) -> None:
        if chunk.model != self.model:
            self.model = name_of(chunk.model) or self.model
        if chunk.service_tier != self.tier:
            self.tier = name_of(chunk.service_tier) or self.tier
        choice = chunk.choices[0]
        text = choice.delta.content
        if text is not None:
            self.text_bytes += len(text) if text.isascii() else text_length(text)
        text = choice.delta.reasoning_content
        if text is not None:
            self.text_bytes += text_length(text)
        index = choice.index
        if index not in self._open:
            self._open[index if 0 <= index < MOST_CHOICES else 0] = True

    def only_reports(self, value: object) -> bool:
        """Whether it is the chunk that only reports usage, which not every client can take."""
        alone = pick(value, "choices") == [] and error_of(value) is None
        return alone and isinstance(pick(value, "usage"), dict)

    @property
    def ended(self) -> bool:
        return self.done or (bool(self._open) and not any(self._open.values()))


def _text_bytes(message: object) -> int:
    """UTF-8 bytes of what the model wrote in a message or delta."""
    if message is None:
        return 0
    # vLLM sends its reasoning under both names.
    reasoning = pick(message, "reasoning_content") or pick(message, "reasoning")
    size = _length(pick(message, "content")) + _length(pick(message, "refusal")) + _length(reasoning)
    size += _length(pick_path(message, "audio", "transcript"))
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
