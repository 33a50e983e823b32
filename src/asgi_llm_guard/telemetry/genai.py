"""Metrics of calls by the names of the GenAI conventions, in the version that was chosen."""

from __future__ import annotations

from typing import Final

from opentelemetry.context import Context
from opentelemetry.metrics import Counter, Histogram, Meter

from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.points import SECONDS, TOKENS, billed, by_modality
from asgi_llm_guard.usage import Usage

__all__ = ["GenAiMetrics"]

_Attributes = dict[str, str | int | float | bool]

_OLD: Final = "gen_ai.client.operation"
_NEW: Final = "gen_ai.client.inference"
_OF_IT: Final = (
    ("cache_read.input_tokens", "cache_read_tokens"),
    ("cache_write.input_tokens", "cache_write_tokens"),
    ("reasoning.output_tokens", "reasoning_tokens"),
)
"""Parts of the input and the output that are told by themselves, too."""


class GenAiMetrics:
    """What is counted of each call. Tokens are those that are billed, where that is another number."""

    def __init__(self, meter: Meter, conventions: names.Conventions) -> None:
        self._latest = conventions.latest
        self._duration = _seconds(meter, f"{_OLD}.duration", "How long a call took.")
        if conventions.latest:
            self._inference = _seconds(meter, f"{_NEW}.duration", "How long an inference took.")
            self._first = _seconds(meter, f"{_NEW}.time_to_first_chunk", "From the request to the first of its answer.")
            self._sizes = {
                kind: _tokens(meter, f"{_NEW}.operation.{kind}_tokens", f"Tokens of {kind} of one inference.")
                for kind in ("input", "output")
            }
            kinds = ("input_tokens", "output_tokens", *(kind for kind, _ in _OF_IT))
            self._counters = {kind: _counted(meter, f"{_NEW}.usage.{kind}") for kind in kinds}
        else:
            self._first = _seconds(meter, f"{_OLD}.time_to_first_chunk", "From the request to the first of its answer.")
            self._usage = _tokens(meter, "gen_ai.client.token.usage", "Tokens that a call used.")

    def record(
        self, labels: _Attributes, usage: Usage | None, seconds: float, first_s: float | None, context: Context
    ) -> None:
        """One call. `labels` are of bounded sets; `usage`: `None`: not known, which is not told as 0."""
        inference = self._latest and labels[names.OPERATION] in names.INFERENCES
        (self._inference if inference else self._duration).record(seconds, labels, context)
        if first_s is not None:
            self._first.record(first_s, labels, context)
        if usage is None:
            return
        for kind, tokens in billed(usage):
            if not self._latest:
                self._usage.record(tokens, {**labels, names.TOKEN_TYPE: kind}, context)
                continue
            self._sizes[kind].record(tokens, labels, context)
            audio, images = (
                (usage.input_audio_tokens, usage.input_image_tokens)
                if kind == "input"
                else (usage.output_audio_tokens, usage.output_image_tokens)
            )
            for modality, part in by_modality(tokens, audio, images):
                self._counters[f"{kind}_tokens"].add(part, {**labels, names.MODALITY: modality}, context)
        if self._latest:
            for kind, field in _OF_IT:
                part = getattr(usage, field)
                if part is not None:
                    self._counters[kind].add(part, {**labels, names.MODALITY: "text"}, context)


def _seconds(meter: Meter, name: str, what: str) -> Histogram:
    return meter.create_histogram(name, unit="s", description=what, explicit_bucket_boundaries_advisory=SECONDS)


def _tokens(meter: Meter, name: str, what: str) -> Histogram:
    return meter.create_histogram(name, unit="{token}", description=what, explicit_bucket_boundaries_advisory=TOKENS)


def _counted(meter: Meter, name: str) -> Counter:
    return meter.create_counter(name, unit="{token}", description="Tokens that calls were billed for.")
