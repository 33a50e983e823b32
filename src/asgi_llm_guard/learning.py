"""How long answers turn out to be, by route and model: what is held for the next ones, below their hard bound.

A request's own limit, or its model's maximum, bounds an answer and says little of its length: most answers
are a small part of it, and what is held and not used refuses others. A quantile of the answers so far is
near to the truth, and no bound: what a longer answer costs beyond it is charged when it ends.

Rule 1: never more is held than the hard bound, and nothing is learned to be held before enough was seen.
Rule 2: an answer that ended at its request's limit tells how long it was at least, so it counts as longer
than any other.
Rule 3: what was seen is forgotten after one to two weeks, and beyond so many keys, the one not seen longest first.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from fractions import Fraction
from typing import Final

from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.usage import Usage

__all__ = ["LearnedOutput"]

_PERIOD_MS: Final = 7 * 86_400_000
_STEPS: Final = 8
"""Buckets for each doubling, so that none is wider than an eighth of its lower end."""
_LARGEST: Final = 2**24 - 1
"""More tokens than any answer has; longer ones count as cut off."""
_CUT: Final = _STEPS * 22
"""The bucket of answers whose length is not known: they ended at their limit."""
_REFRESH: Final = 64
"""A quantile is worked out again when a 64th more was seen."""


class LearnedOutput:
    """Quantiles of the output of single choices. Safe for threads; one observation is a few steps, whatever was seen.

    `quantile`: `p50` to `p99.9`: how many of the answers are to be no longer than what is held. `keys`: how many
    pairs of route and model are kept, about 2 KB each.

    Raises:
        ConfigurationError: not such a quantile.
    """

    def __init__(self, quantile: str, *, keys: int = 1_000) -> None:
        found = re.fullmatch(r"p(\d\d(?:\.\d)?)", quantile) if isinstance(quantile, str) else None
        share = Fraction(found[1]) / 100 if found else Fraction(0)
        if share < Fraction(1, 2):
            raise ConfigurationError(f"learn_output: expected a quantile from 'p50' to 'p99.9', got {quantile!r}")
        self._share = share
        self.least = -int(-2 // (1 - share))
        """So many answers have to be seen first: of fewer, too few are expected to be longer to tell."""
        self._keys = keys
        self._seen: OrderedDict[tuple[str | None, str | None, str], _Lengths] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many pairs of route and model are kept."""
        return len(self._seen)

    def observe(self, route: str | None, call: Call, usage: Usage, now_ms: int) -> None:
        """Take what an answer to `call` used. One without a count of its output tells nothing."""
        tokens = usage.output_tokens
        if type(tokens) is not int or tokens < 0:
            return
        each = -(-tokens // max(1, call.choices))
        limit = call.max_output_tokens
        bucket = _CUT if each > _LARGEST or (limit is not None and each >= limit) else _bucket(each)
        key = (route, call.provider, call.model)
        with self._lock:
            lengths = self._seen.get(key)
            if lengths is None:
                if len(self._seen) >= self._keys:
                    self._seen.popitem(last=False)
                lengths = self._seen[key] = _Lengths(now_ms)
            else:
                self._seen.move_to_end(key)
            lengths.add(bucket, now_ms)

    def output_tokens(self, route: str | None, call: Call, now_ms: int) -> int | None:
        """What to hold for the output of `call`, over all choices; `None`: not known, hold its bound."""
        with self._lock:
            lengths = self._seen.get((route, call.provider, call.model))
            each = None if lengths is None else lengths.quantile(self._share, self.least, now_ms)
        return None if each is None else each * max(1, call.choices)


class _Lengths:
    """Two histograms: of this period, and of the one before."""

    __slots__ = ("_before", "_counts", "_due", "_known", "_period", "_total", "_total_before")

    def __init__(self, now_ms: int) -> None:
        self._period = now_ms // _PERIOD_MS
        self._counts, self._before = _no_counts(), _no_counts()
        self._total = self._total_before = 0
        self._due = 0
        """What is known holds until so many were seen."""
        self._known: int | None = None

    def add(self, bucket: int, now_ms: int) -> None:
        self._turn(now_ms)
        self._counts[bucket] += 1
        self._total += 1

    def quantile(self, share: Fraction, least: int, now_ms: int) -> int | None:
        self._turn(now_ms)
        total = self._total + self._total_before
        if total < least:
            return None
        if total >= self._due:
            self._known = self._work_out(total - -int(-share * total // 1))
            self._due = total + 1 + total // _REFRESH
        return self._known

    def _work_out(self, may_be_longer: int) -> int | None:
        """The longest of the lengths but for so many, which are fewer than all."""
        bucket = _CUT + 1
        while may_be_longer >= 0:
            bucket -= 1
            may_be_longer -= self._counts[bucket] + self._before[bucket]
        return None if bucket == _CUT else _longest(bucket)

    def _turn(self, now_ms: int) -> None:
        period = now_ms // _PERIOD_MS
        if period <= self._period:
            return
        one_later = period == self._period + 1
        self._before = self._counts if one_later else _no_counts()
        self._total_before = self._total if one_later else 0
        self._counts, self._total = _no_counts(), 0
        self._period, self._due = period, 0


def _no_counts() -> array[int]:
    return array("Q", bytes(8 * (_CUT + 1)))


def _bucket(tokens: int) -> int:
    """Exact up to `_STEPS`, then by the leading bits."""
    shift = max(0, tokens.bit_length() - 4)
    return shift * _STEPS + (tokens >> shift)


def _longest(bucket: int) -> int:
    """The largest number of tokens in a bucket."""
    if bucket < 2 * _STEPS:
        return bucket
    shift = bucket // _STEPS - 1
    return ((bucket - shift * _STEPS + 1) << shift) - 1
