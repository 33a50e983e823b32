"""Metrics of calls by the names of the GenAI conventions, in the version that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.metrics import Histogram, Meter

from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.instruments import Instruments
from asgi_llm_guard.telemetry.points import SECONDS, TOKENS, Attributes, billed, by_modality
from asgi_llm_guard.usage import Usage

__all__ = ["CallLabels", "GenAiMetrics"]

_OLD: Final = "gen_ai.client.operation"
_NEW: Final = "gen_ai.client.inference"
_OF_IT: Final = (
    ("cache_read.input_tokens", "cache_read_tokens"),
    ("cache_write.input_tokens", "cache_write_tokens"),
    ("reasoning.output_tokens", "reasoning_tokens"),
)
"""Parts of the input and the output that are told by themselves, too."""

_NOWHERE: Final = Context()
"""Where no span is: what is recorded in it is no example of its bucket, which costs as much again."""


class CallLabels:
    """What calls have in common that have the same labels, made once for all of them.

    Args:
        error: the class of the failure; `None`: it went well. A label of durations only.
    """

    __slots__ = ("common", "inference", "key", "plain", "timed", "typed")

    def __init__(
        self, conventions: names.Conventions, operation: str, provider: str, model: str, error: str | None
    ) -> None:
        self.common: Attributes = {
            names.OPERATION: operation,
            conventions.provider_key: conventions.provider(provider),
        }
        self.plain: Attributes = {**self.common, names.REQUEST_MODEL: model}
        if error is not None:
            self.common[names.ERROR_TYPE] = error
        self.timed: Attributes = {**self.common, names.REQUEST_MODEL: model}
        self.typed: dict[str, Attributes] = {
            kind: {**self.plain, names.TOKEN_TYPE: kind} for kind in ("input", "output")
        }
        self.key = (operation, conventions.provider(provider), model)
        self.inference = operation in names.INFERENCES


class GenAiMetrics:
    """What is counted of each call. Tokens are those that are billed, where that is another number.

    Examples that lead from a bucket to a trace are durations' and first parts'.
    """

    def __init__(self, instruments: Instruments, conventions: names.Conventions) -> None:
        meter = instruments.meter
        self._latest = conventions.latest
        streams = _NEW if conventions.latest else _OLD
        self._duration = _seconds(meter, f"{_OLD}.duration", "How long a call took.")
        self._first = _seconds(meter, f"{streams}.time_to_first_chunk", "From the request to the first of its answer.")
        self._chunks = _seconds(meter, f"{streams}.time_per_output_chunk", "From one part of an answer to the next.")
        if conventions.latest:
            self._inference = _seconds(meter, f"{_NEW}.duration", "How long an inference took.")
            self._sizes = {
                kind: _tokens(meter, f"{_NEW}.operation.{kind}_tokens", f"Tokens of {kind} of one inference.")
                for kind in ("input", "output")
            }
            labels = (names.OPERATION, conventions.provider_key, names.REQUEST_MODEL, names.MODALITY)
            self._counters = {
                kind: instruments.counter(
                    f"{_NEW}.usage.{kind}", labels, unit="{token}", description="Tokens that calls were billed for."
                )
                for kind in ("input_tokens", "output_tokens", *(kind for kind, _ in _OF_IT))
            }
        else:
            self._usage = _tokens(meter, "gen_ai.client.token.usage", "Tokens that a call used.")

    def record(self, labels: CallLabels, usage: Usage | None, seconds: float, context: Context) -> None:
        """One call. `usage`: `None`: not known, which is not told as 0."""
        (self._inference if self._latest and labels.inference else self._duration).record(
            seconds, labels.timed, context
        )
        if usage is None:
            return
        if self._latest:
            self._count(labels, usage)
            return
        for kind, tokens in billed(usage):
            self._usage.record(tokens, labels.typed[kind], _NOWHERE)

    def record_stream(
        self, labels: CallLabels, first_s: float | None, gaps_s: Sequence[float], context: Context
    ) -> None:
        """What is told of streamed answers only: when the first part came, and how long each further one took."""
        if first_s is not None:
            self._first.record(first_s, labels.plain, context)
        record, plain = self._chunks.record, labels.plain
        for gap_s in gaps_s:
            record(gap_s, plain, _NOWHERE)

    def _count(self, labels: CallLabels, usage: Usage) -> None:
        for kind, tokens in billed(usage):
            self._sizes[kind].record(tokens, labels.plain, _NOWHERE)
            audio, images = (
                (usage.input_audio_tokens, usage.input_image_tokens)
                if kind == "input"
                else (usage.output_audio_tokens, usage.output_image_tokens)
            )
            for modality, part in by_modality(tokens, audio, images):
                self._counters[f"{kind}_tokens"].add(part, *labels.key, modality)
        for kind, field in _OF_IT:
            part = getattr(usage, field)
            if part is not None:
                self._counters[kind].add(part, *labels.key, "text")


def _seconds(meter: Meter, name: str, what: str) -> Histogram:
    return meter.create_histogram(name, unit="s", description=what, explicit_bucket_boundaries_advisory=SECONDS)


def _tokens(meter: Meter, name: str, what: str) -> Histogram:
    return meter.create_histogram(name, unit="{token}", description=what, explicit_bucket_boundaries_advisory=TOKENS)
