"""What both ways to call Bedrock share: where the model stands, where limits hide, and how errors are told.

Source: https://docs.aws.amazon.com/bedrock/latest/APIReference/, and the service model of botocore 1.44 (2026-11).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

import msgspec

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.base import Answer, ErrorKind, Head
from asgi_llm_guard.wire.faults import kind_of_status
from asgi_llm_guard.wire.overflow import says_overflow
from asgi_llm_guard.wire.peek import BodyError, BodyView
from asgi_llm_guard.wire.shape import LONGEST_NAME, MOST_TOKENS, count_of, decode, name_of, path_parts, pick

__all__ = [
    "classify",
    "error_answer",
    "limits_of",
    "lowered",
    "model_in",
    "model_of",
    "read_client_error",
    "usage_of",
]

# ------------------------------------------------------------------------------------- paths


def model_in(path: str, operations: tuple[str, ...]) -> str | None:
    """The model in `/model/{model}/{operation}`, its escapes undone; `None`: no such path.

    Names with slashes in them (ARNs) are read in both forms, escaped and not.
    """
    parts = path_parts(path)
    if len(parts) < 3 or parts[-1] not in operations or "model" not in parts[:-2]:
        return None
    return unquote("/".join(parts[parts.index("model") + 1 : -1]))


def model_of(path: str, operations: tuple[str, ...], view: BodyView) -> str:
    """The model that a request names: in its path, or where that has none as `modelId` in its body.

    Raises:
        BodyError: there is none, or its name is too long or not printable.
    """
    found = model_in(path, operations)
    model = view.text("modelId", longest=LONGEST_NAME) if found is None else name_of(found)
    if model is None:
        message = f"model: expected a name of 1 to {LONGEST_NAME} printable characters in the path"
        raise BodyError("invalid_request", 400, message, "model")
    return model


# ------------------------------------------------------------------------------------ limits

_LIMITS: Final = (
    "max_tokens",  # Anthropic, Mistral, Cohere, AI21, DeepSeek, Qwen
    "maxTokens",  # Converse, Nova, AI21's Jurassic
    "max_completion_tokens",  # OpenAI's open models
    "max_gen_len",  # Llama
    "max_new_tokens",  # Nova
    "max_output_tokens",
    "max_tokens_to_sample",  # Anthropic's text completions
    "maxTokenCount",  # Titan
)
_NESTS: Final = ("inferenceConfig", "textGenerationConfig", "additionalModelRequestFields")
_LEAST_THINKING: Final = 1024


def limits_of(view: BodyView) -> list[int]:
    """Every limit of output tokens in a body, under whatever name a vendor has for it.

    Raises:
        BodyError: one of them is malformed.
    """
    own = [limit for name in _LIMITS if (limit := view.whole(name, least=0, most=MOST_TOKENS)) is not None]
    return [*own, *(limit for _, inner in _nested(view) for limit in limits_of(inner))]


def lowered(view: BodyView, most: int) -> dict[str, object]:
    """What has to be changed so that every limit in a body is at most `most`, and a thinking budget less.

    Raises:
        BodyError: as `limits_of`.
    """
    limits = limits_of(view)
    return _lowered(view, most, max(limits)) if limits and max(limits) > most else {}


def _lowered(view: BodyView, most: int, before: int) -> dict[str, object]:
    changes: dict[str, object] = {}
    for name in _LIMITS:
        limit = view.whole(name, least=0, most=MOST_TOKENS)
        if limit is not None and limit > most:
            changes[name] = most
    thinking = view.inside("thinking")
    if thinking is not None:
        budget = thinking.whole("budget_tokens", least=0, most=MOST_TOKENS)
        # Thinking between tools may take more than the limit, and keeps its budget.
        if budget is not None and _LEAST_THINKING < most <= budget < before:
            changes["thinking"] = msgspec.Raw(thinking.replace({"budget_tokens": most - 1}))
    for name, inner in _nested(view):
        change = _lowered(inner, most, before)
        if change:
            changes[name] = msgspec.Raw(inner.replace(change))
    return changes


def _nested(view: BodyView) -> Iterator[tuple[str, BodyView]]:
    for name in _NESTS:
        if name in view and (inner := view.inside(name)) is not None:
            yield name, inner


# ------------------------------------------------------------------------------------- usage


def usage_of(
    entered: int | None, written: int | None, *, found: int | None, stored: int | None, stored_1h: int | None = None
) -> Usage | None:
    """Counts in inclusive form: Bedrock's input leaves out what was read from the cache and written to it.

    `None` when they tell neither input nor output.
    """
    if entered is not None:
        entered = count_of(entered + (found or 0) + (stored or 0))
    if entered is None:
        found = stored = None
    if entered is None and written is None:
        return None
    return Usage(
        input_tokens=entered,
        output_tokens=written,
        cache_read_tokens=found,
        cache_write_tokens=stored,
        cache_write_1h_tokens=stored_1h if stored is not None and (stored_1h or 0) <= stored else None,
    )


# ------------------------------------------------------------------------------------ errors

_TYPES: Final[dict[str, ErrorKind]] = {
    "AccessDeniedException": "auth",
    "ExpiredTokenException": "auth",
    "IncompleteSignature": "auth",
    "InternalServerException": "other",
    "InvalidSignatureException": "auth",
    "MissingAuthenticationTokenException": "auth",
    "ModelNotReadyException": "rate_limit",
    "ModelTimeoutException": "other",
    "ResourceNotFoundException": "invalid",
    "ServiceQuotaExceededException": "quota",
    "ServiceUnavailableException": "overload",
    "ThrottlingException": "rate_limit",
    "TooManyRequestsException": "rate_limit",
    "UnrecognizedClientException": "auth",
    "ValidationException": "invalid",
}
_OF_MODEL: Final = frozenset({"ModelErrorException", "ModelStreamErrorException"})
_OVERFLOWING: Final = frozenset({"", "ValidationException", *_OF_MODEL})
_OPERATION_ERROR: Final = "Error"


def classify(status: int | None, kind: str | None, value: object) -> ErrorKind:
    """What kind of error an answer is. `status`: `None` in the middle of a stream; `kind`: the exception's name, as
    headers and frames have it; `value`: the body, which repeats it at times."""
    name = kind or name_of(pick(value, "__type")) or ""
    name = name.rpartition("#")[2].partition(":")[0]
    name = name[:1].upper() + name[1:]
    message = pick(value, "message") or pick(value, "Message")
    if status in (None, 400, 413, 422, 424) and name in _OVERFLOWING and says_overflow(message):
        return "context_overflow"
    if name in _OF_MODEL:  # what the model's own server answered
        original = count_of(pick(value, "originalStatusCode"))
        return kind_of_status(original)
    return _TYPES.get(name) or kind_of_status(status)


def error_answer(head: Head, body: bytes) -> Answer:
    """What the whole body of an error says, together with its headers."""
    kind = head.header(b"x-amzn-errortype").decode("latin-1") or None
    return Answer(kind="error", error=classify(head.status, kind, decode(body)))


def read_client_error(obj: object, operations: tuple[str, ...]) -> Answer | None:
    """What botocore's error of one of these operations says; `None`: it is none."""
    if not isinstance(obj, BaseException) or pick(obj, "operation_name") not in operations:
        return None
    response = pick(obj, "response")
    error = pick(response, _OPERATION_ERROR)
    if error is None:
        return None
    status = count_of(pick(pick(response, "ResponseMetadata"), "HTTPStatusCode"))
    code = name_of(pick(error, "Code"))
    details = {"message": pick(error, "Message"), "originalStatusCode": pick(response, "originalStatusCode")}
    return Answer(kind="error", error=classify(status, code, details))
