"""Gemini's `generateContent`, its streams, embeddings and images, of the Gemini API and of Vertex AI.

Source: https://ai.google.dev/api/generate-content, and the types of google-genai 3.4 for Python (2026-11).
Members are in camel case on the wire; protobuf's JSON takes them in snake case as well, and so do SDK objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.array import ArrayMeter
from asgi_llm_guard.wire.base import Answer, Ask, ErrorKind, Head, ItemMeter, Meter
from asgi_llm_guard.wire.faults import is_overflow, kind_of_status
from asgi_llm_guard.wire.items import Items
from asgi_llm_guard.wire.meters import Streamed, Whole, told_early
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import (
    MOST_CHOICES,
    MOST_TOKENS,
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

__all__ = ["Gemini", "limit_output", "read_limits", "spelled"]

_WRITES: Final = frozenset({"generatecontent", "streamgeneratecontent"})
_EMBEDS: Final = frozenset({"embedcontent", "batchembedcontents"})
_PLACES: Final = frozenset({"models", "tunedmodels", "endpoints"})
_TIER_HEADER: Final = b"x-gemini-service-tier"
_MOST_IMAGES: Final = 4
"""What `predict` makes of one prompt at the most, and in the Gemini API unless told otherwise."""


class Gemini:
    """The dialect `gemini`: POST to `…/models/{model}:generateContent` and its like. `:countTokens` is free."""

    __slots__ = ()

    name: Final = "gemini"
    provider: Final = "gemini"

    def recognises(self, path: str, host: str = "") -> bool:  # noqa: ARG002 - gateways speak it too
        """Whether `path` ends in a model and one of the methods that are billed, in any letter case."""
        model, method, publisher = _target(path)
        if model is None or publisher not in (None, "google"):
            return False
        if method == "predict":  # of a model of one's own at an endpoint it may be anything
            return path_parts(path)[-2].casefold() == "models"
        return method in _WRITES or method in _EMBEDS

    def read_request(self, view: BodyView, path: str = "") -> Ask:
        """What the request asks for. The model is the path's; on Vertex AI it is `vertex_ai/{model}`.

        `maxOutputTokens` includes thinking. A limit of 0 counts as none.

        Raises:
            BodyError: the path names no model, or a value read here is malformed or there in both spellings.
        """
        model, method, publisher = _target(path)
        if model is None:
            raise BodyError("invalid_request", 400, "model: expected the path to name it, got none", "model")
        if publisher is not None or "projects" in path_parts(path.casefold()):
            model = f"vertex_ai/{model}"
        if method == "predict":
            return Ask(model=model, max_output_tokens=0, limits_output=False, images=_images_asked(view, model))
        if method in _EMBEDS:
            return Ask(model=model, max_output_tokens=0, limits_output=False)
        limit, choices = read_limits(view, "generationConfig", "maxOutputTokens")
        tier = spelled(view, "serviceTier")
        return Ask(
            model=model,
            max_output_tokens=limit,
            choices=choices,
            stream=method == "streamgeneratecontent",
            wants_usage=True,
            service_tier=None if tier is None else name_of(view.get(tier)),
        )

    def rewrite(self, view: BodyView, *, include_usage: bool, max_output_tokens: int | None) -> bytes:  # noqa: ARG002
        """The body to send. Usage comes unasked. Only what generates text has a limit.

        Raises:
            BodyError: as `read_request`.
        """
        if max_output_tokens is None or "contents" not in view:
            return view.body
        return limit_output(view, "generationConfig", "maxOutputTokens", max_output_tokens)

    def read_response(self, status: int, body: bytes) -> Answer:
        """What a whole response says: one object, or the array of a stream."""
        return _read(status, body, None)

    def meter(self, head: Head, *, strip_usage: bool = False) -> Meter:  # noqa: ARG002 - usage is never asked for
        """A meter for the body: server-sent events, one array as it passes, or one JSON value."""
        tier = _tier(head.header(_TIER_HEADER).decode("latin-1"))
        if head.streams(b"text/event-stream"):
            return Streamed(Blocks(), _Tally(tier))
        if head.status == 200 and _target(head.path)[1] == "streamgeneratecontent":
            return ArrayMeter(_Tally(tier))
        return Whole(lambda body: _read(head.status, body, tier))

    def read_object(self, obj: object) -> Answer | None:
        """What an object says: a response or chunk as a model or dict, an HTTP response, or the SDK's error."""
        if isinstance(obj, BaseException):
            code, details = pick(obj, "code"), pick(obj, "details")
            if type(code) is not int or not isinstance(details, (dict, list)):
                return None
            return Answer(kind="error", error=_classify(code, details))
        status = pick(obj, "status_code")
        if type(status) is int:
            content = pick(obj, "content")
            value = decode(content) if isinstance(content, bytes) else None
            if isinstance(value, list) and value:
                value = value[0]  # of a stream that was read as a whole
            if not _is_ours(value) and _error_of(value) is None:
                return None
            return self.read_response(status, content if isinstance(content, bytes) else b"")
        if not _is_ours(obj) and _error_of(obj) is None:
            return None
        tally = _Tally()
        tally.add(obj)
        return tally.answer(whole=True)

    def item_meter(self) -> ItemMeter:
        """A meter for chunk objects, dicts, and pieces of server-sent events."""
        return Items(_Tally, Blocks())


# --------------------------------------------------------------------------------- requests


def _target(path: str) -> tuple[str | None, str, str | None]:
    """The model, the method in lower case, and on Vertex AI the publisher that a path names."""
    parts = path_parts(path)
    if len(parts) < 2 or parts[-2].casefold() not in _PLACES:
        return None, "", None
    model, _, method = parts[-1].rpartition(":")
    publisher = None
    if len(parts) > 3 and parts[-4].casefold() == "publishers":
        publisher = parts[-3].casefold()
    return name_of(model), method.casefold(), publisher


def spelled(view: BodyView, name: str) -> str | None:
    """How a body spells a member, in camel or in snake case; `None`: it has no such member.

    Raises:
        BodyError: it is there in both, of which the provider would read one.
    """
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    if snake != name and snake in view:
        if name in view:
            raise BodyError("invalid_request", 400, f"{name}: there as {snake} as well; send it once", name)
        return snake
    return name if name in view else None


def read_limits(view: BodyView, config: str, limit: str) -> tuple[int | None, int]:
    """The output limit and the number of candidates that a body's configuration sets.

    Raises:
        BodyError: one of them is malformed, or there in both spellings.
    """
    member = spelled(view, config)
    inner = None if member is None else view.inside(member)
    if inner is None:
        return None, 1
    most, count = spelled(inner, limit), spelled(inner, "candidateCount")
    tokens = None if most is None else inner.whole(most, least=0, most=MOST_TOKENS)
    choices = None if count is None else inner.whole(count, least=0, most=MOST_CHOICES)
    return tokens or None, choices or 1


def limit_output(view: BodyView, config: str, limit: str, max_output_tokens: int) -> bytes:
    """The body with this output limit, unless it sets a lower one itself."""
    tokens, _ = read_limits(view, config, limit)
    if tokens is not None and tokens <= max_output_tokens:
        return view.body
    member = spelled(view, config) or config
    inner = view.inside(member)
    if inner is None:
        return view.replace({member: {limit: max_output_tokens}})
    return view.replace({member: msgspec.Raw(inner.replace({spelled(inner, limit) or limit: max_output_tokens}))})


def _images_asked(view: BodyView, model: str) -> int:
    """How many images a `predict` may make; 0 for models that make none."""
    if "imagen" not in model.casefold():
        return 0
    parameters = view.inside("parameters")
    member = None if parameters is None else spelled(parameters, "sampleCount")
    if parameters is None or member is None:
        return _MOST_IMAGES
    return parameters.whole(member, least=0, most=MOST_CHOICES) or _MOST_IMAGES


# ------------------------------------------------------------------------------ plain chunks

# Nearly every event of a stream is one: text and counts. What does not fit these types is read by shape.

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _OfModality(msgspec.Struct, rename="camel"):
    modality: str | None = None
    token_count: _Tokens | None = None


class _Report(msgspec.Struct, rename="camel"):
    prompt_token_count: _Tokens
    candidates_token_count: _Tokens | None = None
    thoughts_token_count: _Tokens | None = None
    tool_use_prompt_token_count: _Tokens | None = None
    cached_content_token_count: _Tokens | None = None
    total_token_count: _Tokens | None = None
    prompt_tokens_details: list[_OfModality] | None = None
    tool_use_prompt_tokens_details: list[_OfModality] | None = None
    candidates_tokens_details: list[_OfModality] | None = None
    traffic_type: str | None = None
    service_tier: str | None = None


class _Part(msgspec.Struct, rename="camel"):
    text: str | None = None
    # What follows is generated as well, and not plain.
    function_call: None = None
    executable_code: None = None
    code_execution_result: None = None


class _Content(msgspec.Struct):
    parts: list[_Part] | None = None


class _Candidate(msgspec.Struct, rename="camel"):
    content: _Content | None = None
    finish_reason: str | None = None
    index: int | None = None
    grounding_metadata: None = None


class _Plain(msgspec.Struct, rename="camel"):
    candidates: list[_Candidate]
    usage_metadata: _Report | None = None
    model_version: str | None = None
    error: None = None
    prompt_feedback: None = None
    embedding: None = None
    embeddings: None = None
    predictions: None = None


_PLAIN: Final = msgspec.json.Decoder(_Plain)


# ---------------------------------------------------------------------------------- answers


class _Tally:
    """What an answer says, from its chunks or as one piece. The last report of usage wins; none are summed."""

    __slots__ = (
        "_blocked", "_embedded", "_error", "_images", "_model", "_open", "_report", "_searches", "_tier", "_told_at",
        "_undecoded", "seen", "text_bytes",
    )  # fmt: skip

    def __init__(self, tier: str | None = None) -> None:
        self._tier = tier
        self._model: object = None
        self._report: object = None
        self._error: ErrorKind | None = None
        self._blocked = False
        self._embedded: int | None = None  # tokens of embeddings
        self._images: int | None = None
        self._searches: dict[int, int] = {}
        self._open: dict[int, bool] = {}
        self._undecoded = 0
        self._told_at = 0  # how much text had come when the report did
        self.seen = False
        self.text_bytes = 0

    def event(self, block: Block) -> bool:
        data = block.data
        if data is None:
            return False
        try:
            plain = _PLAIN.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._add_loose(data)
        else:
            self.add_plain(plain)
        return False  # usage comes beside text

    def add(self, value: object) -> None:
        """Count a response, a chunk or an error, of whatever type it is."""
        if _error_of(value) is not None:
            self.seen = True
            self._error = _classify(None, value)
            return
        if not _is_ours(value):
            return
        self.seen = True
        self._model = _either(value, "modelVersion", "model_version") or self._model
        report = _either(value, "usageMetadata", "usage_metadata")
        if (usage := _usage(report)) is not None and (usage.total_tokens is not None or self._report is None):
            self._report = report
        feedback = _either(value, "promptFeedback", "prompt_feedback")
        self._blocked = self._blocked or name_of(_either(feedback, "blockReason", "block_reason")) is not None
        self._add_vectors(value)
        for candidate in items(pick(value, "candidates")):
            for part in items(pick_path(candidate, "content", "parts")):
                self.text_bytes += _part_bytes(part)
            ended = _either(candidate, "finishReason", "finish_reason") is not None
            index = self._note(pick(candidate, "index"), ended=ended)
            grounding = _either(candidate, "groundingMetadata", "grounding_metadata")
            queries = _either(grounding, "webSearchQueries", "web_search_queries")
            if isinstance(queries, (list, tuple)) and queries:
                self._searches[index] = len(queries)
        if report is not None and self._report is report:
            self._told_at = self.text_bytes

    def answer(self, *, whole: bool = False, unread: int = 0) -> Answer:
        """The sum of it. `whole`: there is no more to come."""
        model = name_of(self._model)
        ended = whole or self._blocked or (bool(self._open) and not any(self._open.values()))
        return Answer(
            kind="success" if self._error is None else "error",
            usage=self._used(model),
            model=model,
            error=self._error,
            text_bytes=self.text_bytes,
            finished=ended and self._error is None,
            unread=unread + self._undecoded,
        )

    def _used(self, model: str | None) -> Usage | None:
        usage = _usage(self._report)
        if usage is not None and self.text_bytes > self._told_at:
            usage = told_early(usage)
        if self._embedded is not None or self._images is not None:
            entered = self._embedded if usage is None else usage.input_tokens
            written = 0 if self._embedded is not None else None if usage is None else usage.output_tokens
            if entered is None and not self._images:
                return None
            return Usage(input_tokens=entered, output_tokens=written, images=self._images, model=model)
        if usage is None:
            return None
        return msgspec.structs.replace(
            usage,
            model=model,
            service_tier=usage.service_tier or self._tier,
            web_searches=sum(self._searches.values()) or None,
        )

    def add_plain(self, plain: _Plain) -> None:
        """Count a chunk or response that is text and counts, and nothing else."""
        self.seen = True
        self._model = plain.model_version or self._model
        for candidate in plain.candidates:
            if candidate.content is not None:
                for part in candidate.content.parts or ():
                    if part.text:
                        self.text_bytes += text_length(part.text)
            self._note(candidate.index, ended=candidate.finish_reason is not None)
        report = plain.usage_metadata
        if report is not None and (
            self._report is None or report.total_token_count is not None or report.candidates_token_count is not None
        ):
            self._report = report
            self._told_at = self.text_bytes

    def _add_loose(self, data: bytes) -> None:
        value = decode(data)
        if value is None:
            self._undecoded += data.strip() != b"[DONE]"
        self.add(value)

    def _add_vectors(self, value: object) -> None:
        """Embeddings, and what `predict` gives: their tokens, or images."""
        vectors = [*items(pick(value, "embeddings")), pick(value, "embedding")]
        images = 0
        for made in items(pick(value, "predictions")):
            vectors.append(pick(made, "embeddings"))
            images += isinstance(pick(made, "bytesBase64Encoded"), str)
        for made in items(pick(value, "generated_images")):
            images += pick(made, "image") is not None
        if images:
            self._images = images
        found = [vector for vector in vectors if isinstance(pick(vector, "values"), (list, tuple))]
        if found:
            counts = [_statistics(vector) for vector in found]
            known = [count for count in counts if count is not None]
            report = _either(value, "usageMetadata", "usage_metadata")
            told = count_of(_either(report, "promptTokenCount", "prompt_token_count"))
            self._embedded = count_of(sum(known)) if told is None and len(known) == len(counts) else told
            self._report = None if told is None else report

    def _note(self, index: object, *, ended: bool) -> int:
        """Whether the candidate has ended, which it stays."""
        place = index if isinstance(index, int) and 0 <= index < MOST_CHOICES else 0
        self._open[place] = self._open.get(place, True) and not ended
        return place


def _read(status: int, body: bytes, tier: str | None) -> Answer:
    if not 200 <= status < 300:
        return Answer(kind="error", error=_classify(status, decode(body)))
    tally = _Tally(tier)
    try:
        tally.add_plain(_PLAIN.decode(body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        value = decode(body)
        for each in value if isinstance(value, list) else (value,):
            tally.add(each)
    return tally.answer(whole=True)


def _either(value: object, camel: str, snake: str) -> object:
    """A member, as JSON or as an SDK's object spells it."""
    found = pick(value, camel)
    return pick(value, snake) if found is None else found


def _is_ours(value: object) -> bool:
    """Whether an object that may be anything has the shape of a response or of a chunk."""
    if isinstance(pick(value, "candidates"), (list, tuple)):
        return True
    report = _either(value, "usageMetadata", "usage_metadata")
    if count_of(_either(report, "promptTokenCount", "prompt_token_count")) is not None:
        return True
    feedback = _either(value, "promptFeedback", "prompt_feedback")
    if isinstance(_either(feedback, "blockReason", "block_reason"), str):
        return True
    vectors = [*items(pick(value, "embeddings")), pick(value, "embedding")]
    if any(isinstance(pick(vector, "values"), (list, tuple)) for vector in vectors):
        return True
    made = [*items(pick(value, "predictions")), *items(pick(value, "generated_images"))]
    return any(
        isinstance(pick(each, "bytesBase64Encoded"), str)
        or pick(pick(each, "embeddings"), "values") is not None
        or pick_path(each, "image", "image_bytes") is not None
        for each in made
    )


def _part_bytes(part: object) -> int:
    """UTF-8 bytes of what the model wrote in one part: text, thoughts, a call's arguments, code and its output."""
    size = text_length(pick(part, "text"))
    call = _either(part, "functionCall", "function_call")
    if call is not None:
        size += text_length(pick(call, "name")) + _json_length(pick(call, "args"))
    size += text_length(pick(_either(part, "executableCode", "executable_code"), "code"))
    return size + text_length(pick(_either(part, "codeExecutionResult", "code_execution_result"), "output"))


def _json_length(value: object) -> int:
    if not isinstance(value, dict):
        return 0
    try:
        return len(msgspec.json.encode(value))
    except (TypeError, ValueError, RecursionError):  # arguments that an SDK has made objects of
        return 0


# ------------------------------------------------------------------------------------ usage


def _usage(report: object) -> Usage | None:
    """The counts of a `usageMetadata`; `None` when it tells neither input nor output.

    Zeros are left out on the wire. Thinking is not part of the candidates' count, tool results not of the
    prompt's. Parts that are larger than what they are part of are taken for unknown.
    """
    if report is None:
        return None
    prompt = count_of(_either(report, "promptTokenCount", "prompt_token_count"))
    told = count_of(_either(report, "candidatesTokenCount", "candidates_token_count"))
    thoughts = count_of(_either(report, "thoughtsTokenCount", "thoughts_token_count"))
    results = count_of(_either(report, "toolUsePromptTokenCount", "tool_use_prompt_token_count"))
    total = count_of(_either(report, "totalTokenCount", "total_token_count"))
    if prompt is None and told is None:
        return None
    entered = None if prompt is None else count_of(prompt + (results or 0))
    written = None if told is None and thoughts is None else count_of((told or 0) + (thoughts or 0))
    if total is not None and entered is not None and total >= entered + (written or 0):
        written = total - entered  # what nobody names is billed all the same
    cached = within(count_of(_either(report, "cachedContentTokenCount", "cached_content_token_count")), prompt)
    prompted = _either(report, "promptTokensDetails", "prompt_tokens_details")
    fetched = _either(report, "toolUsePromptTokensDetails", "tool_use_prompt_tokens_details")
    generated = _either(report, "candidatesTokensDetails", "candidates_tokens_details")
    input_audio, input_image = _modalities((prompted, fetched), entered)
    output_audio, output_image = _modalities((generated,), None if written is None else written - (thoughts or 0))
    tier = _either(report, "serviceTier", "service_tier") or _either(report, "trafficType", "traffic_type")
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=cached,
        reasoning_tokens=within(thoughts, written),
        input_audio_tokens=input_audio,
        output_audio_tokens=output_audio,
        input_image_tokens=input_image,
        output_image_tokens=output_image,
        service_tier=_tier(tier),
    )


def _modalities(details: Iterable[object], whole: int | None) -> tuple[int | None, int | None]:
    """Tokens of audio and of images in what is counted by modality; unknown where it is not, or does not add up."""
    lists = [each for each in details if isinstance(each, (list, tuple))]
    if not lists or whole is None:
        return None, None
    sums = {"AUDIO": 0, "IMAGE": 0}
    for entry in (entry for each in lists for entry in each):
        modality = pick(entry, "modality")
        if isinstance(modality, str) and modality in sums:
            sums[modality] += count_of(_either(entry, "tokenCount", "token_count")) or 0
    return (sums["AUDIO"], sums["IMAGE"]) if sum(sums.values()) <= whole else (None, None)


def _tier(name: object) -> str | None:
    """`ON_DEMAND_PRIORITY` of Vertex AI, like `priority` of the Gemini API, is `priority`; `ON_DEMAND` is standard."""
    if not isinstance(name, str) or not name:
        return None
    tier = str.lower(name).removeprefix("service_tier_").removeprefix("on_demand_")
    if tier.endswith("unspecified"):
        return None
    return name_of("standard" if tier == "on_demand" else tier)


def _statistics(vector: object) -> int | None:
    """The tokens of one embedding, which Vertex AI counts as a number with a fraction."""
    count = _either(pick(vector, "statistics"), "tokenCount", "token_count")
    if isinstance(count, float) and count.is_integer() and abs(count) <= MOST_TOKENS:
        return count_of(int(count))
    return count_of(count)


# ----------------------------------------------------------------------------------- errors

_KINDS: Final[dict[str, ErrorKind]] = {
    "RESOURCE_EXHAUSTED": "rate_limit",
    "UNAVAILABLE": "overload",
    "INVALID_ARGUMENT": "invalid",
    "FAILED_PRECONDITION": "invalid",
    "OUT_OF_RANGE": "invalid",
    "NOT_FOUND": "invalid",
    "UNAUTHENTICATED": "auth",
    "PERMISSION_DENIED": "auth",
    "INTERNAL": "other",
    "DEADLINE_EXCEEDED": "other",
    "ABORTED": "other",
    "CANCELLED": "other",
    "UNKNOWN": "other",
}


def _error_of(value: object) -> object:
    """Google's error object in an answer, alone in a list or not; `None`: there is none.

    Told from OpenAI's by its `status`, which is a word.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    error = pick(value, "error")
    return error if isinstance(error, dict) and isinstance(error.get("status"), str) and "type" not in error else None


def _classify(status: int | None, value: object) -> ErrorKind:
    """What kind of error an answer is; `status` is `None` in the middle of a stream."""
    error = _error_of(value) or pick(value, "error") or value
    code, word, message = pick(error, "code"), pick(error, "status"), pick(error, "message")
    if status is None and type(code) is int:
        status = code
    if is_overflow(status, message):
        return "context_overflow"
    if status == 402:
        return "quota"
    if status == 429 or word == "RESOURCE_EXHAUSTED":
        return "quota" if _is_spent(error, message) else "rate_limit"
    if any(pick(detail, "reason") == "API_KEY_INVALID" for detail in items(pick(error, "details"))):
        return "auth"
    return _KINDS.get(word) or kind_of_status(status) if isinstance(word, str) else kind_of_status(status)


def _is_spent(error: object, message: object) -> bool:
    """Whether waiting a minute does not help: a limit for each day, or one of nothing at all."""
    for detail in items(pick(error, "details")):
        for violation in items(pick(detail, "violations")):
            quota = pick(violation, "quotaId")
            if (isinstance(quota, str) and "perday" in quota.casefold()) or pick(violation, "quotaValue") == "0":
                return True
    if not isinstance(message, str):
        return False
    text = f"{message[:4096].lower()}\n"
    return any(mark in text for mark in ("limit: 0\n", "limit: 0,", "limit: 0.\n", "per day", "prepayment"))
