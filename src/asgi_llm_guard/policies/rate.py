"""Rates: how many requests, calls or tokens one subject may use in any stretch of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, NamedTuple, get_args

from asgi_llm_guard.claims import Durable, Meter, OnOutage, Rule, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies._scoped import NOTHING, Counts, Per, ScopedPolicy, Subject, amounts
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.grammar import check_lease, whole
from asgi_llm_guard.windows import Bucket, Sliding

__all__ = ["RATE_GRAMMAR", "RateLimit"]

Algorithm = Literal["sliding", "bucket"]

RATE_GRAMMAR: Final = (
    "'60/minute', '10 per 2 hours', '10/second;500/hour', '100000 tokens/minute'; "
    "periods are second, minute, hour, day, week, month (30 days) and year (360 days)"
)
_ABBREVIATED: Final = {
    "s": "second", "sec": "second", "secs": "second",
    "m": "minute", "min": "minute", "mins": "minute",
    "h": "hour", "hr": "hour", "hrs": "hour",
    "d": "day",
}  # fmt: skip
_WEEK_DAYS: Final = 7
_SEPARATOR: Final = re.compile(r"[,;|]")
_PART: Final = re.compile(
    r"(?P<amount>[0-9]{1,16}(?:\.[0-9]{1,4})?)\s*(?P<unit>tokens?|requests?|calls?)?"
    r"\s*(?:/|per\b)\s*(?P<multiple>[0-9]{1,9})?\s*(?P<period>[a-z]{1,10})",
    re.ASCII | re.IGNORECASE,
)
_MOST_SUB_BUCKETS: Final = 60
_MOST_STRETCH: Final = 10  # `1.5/second` becomes 3 in 2 seconds; `0.3333/second` would be 3333 at once


@dataclass(frozen=True, slots=True)
class _Rate:
    unit: Unit
    amount: int
    period_ms: int


class _Meters(NamedTuple):
    """The meters of all subjects of one context and call, by what they count."""

    ones: tuple[Meter, ...]
    tokens: tuple[Meter, ...]
    constant: Verdict
    """The verdict where nothing depends on the call."""


class RateLimit(ScopedPolicy[_Meters]):
    """At most so many requests, calls or tokens in any period: `60/minute`, `10/second;500/hour`, `100000 tokens/minute`.

    The grammar of the `limits` package, and also tokens, abbreviated periods, weeks, and amounts
    such as 1.5 (`1.5/second` is 3 in 2 seconds). All rates of one policy must fit.

    Args:
        per: whose requests are counted together. Where the scope is absent, nothing is claimed.
        burst: how many units fit at once into a bucket; unless set, as many as its rate's amount.
        algorithm: `sliding` never admits more than the amount in any period. `bucket` drains
            evenly and admits `burst` at once, so up to the amount and the burst in one period.
        counts: rates of requests count `requests` unless told otherwise, rates of tokens `calls`.
        on_outage: what becomes of requests while the store does not answer (`docs/outages.md`).
        lease: so many requests, or tokens, may a worker take at a time and admit without asking
            (`docs/leases.md`); for policies with one unit, and not per session.
        durable: what must have a claim before it counts as granted (`docs/storage.md`).

    Raises:
        ConfigurationError: a setting is malformed; requests and tokens are mixed without `counts="calls"`.
    """

    __slots__ = ("_burst", "_rates", "algorithm")

    def __init__(
        self,
        rates: str,
        *,
        per: Per = "user",
        burst: int | str | None = None,
        algorithm: Algorithm = "sliding",
        name: str | None = None,
        status: int | None = None,
        counts: Counts | None = None,
        expiry_charge: Literal["hold", "nothing"] = "hold",
        on_outage: OnOutage = "local",
        lease: int | str | None = None,
        durable: Durable | None = None,
    ) -> None:
        name = f"{per}_rate" if name is None else name
        self._rates = _parse(rates, name)
        tokens = [rate.unit is Unit.TOKENS for rate in self._rates]
        if any(tokens) and counts != "calls" and not (counts is None and all(tokens)):
            raise ConfigurationError(
                f"{name}: rates of tokens count calls; use counts='calls', or a RateLimit of their own, got {rates!r}"
            )
        super().__init__(
            per=per,
            name=name,
            counts=("calls" if any(tokens) else "requests") if counts is None else counts,
            status=status,
            expiry_charge=expiry_charge,
            on_outage=on_outage,
            leases=None if lease is None else _lease(lease, self._rates, name),
            durable=durable,
        )
        if algorithm not in get_args(Algorithm):
            raise ConfigurationError(f"{name}: algorithm must be 'sliding' or 'bucket', got {algorithm!r}")
        self.algorithm: Algorithm = algorithm
        if burst is not None and algorithm != "bucket":
            raise ConfigurationError(f"{name}: burst needs algorithm='bucket', got burst={burst!r} with {algorithm!r}")
        self._burst = None if burst is None else whole(burst, name=f"{name}.burst")
        if self._burst == 0:
            raise ConfigurationError(f"{name}.burst: at least 1; a rate of 0 blocks everything")
        keys = [meter.key for meter in self.samples()]  # also checks what meters demand
        if len(set(keys)) < len(keys):
            raise ConfigurationError(f"{name}: two rates over the same period; keep the lower one, got {rates!r}")

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """One of each rate of requests or calls, the upper bound of the call's tokens of each rate of tokens."""
        key = self._identify(context, call)
        meters = self._memo.get(key)
        if meters is None:
            subjects = self._subjects(context, call)
            meters = self._keep(key, self._build(subjects), subjects)
        if call is None or not meters.tokens:
            return meters.constant
        return Verdict(meters.constant.claims + amounts(meters.tokens, call.total_tokens))

    def samples(self) -> tuple[Meter, ...]:
        """One meter for each rate."""
        return tuple(self._rate_meter(Subject("", ()), rate) for rate in self._rates)

    def _meters_of(self, scope: str, subject: Subject) -> tuple[Meter, ...]:  # noqa: ARG002 - it counts in one
        return tuple(self._rate_meter(subject, rate) for rate in self._rates)

    def _build(self, subjects: tuple[Subject, ...]) -> _Meters:
        meters = [self._rate_meter(subject, rate) for subject in subjects for rate in self._rates]
        ones = tuple(meter for meter in meters if meter.unit is Unit.CALLS)
        return _Meters(
            ones=ones,
            tokens=tuple(meter for meter in meters if meter.unit is Unit.TOKENS),
            constant=Verdict(amounts(ones, 1)) if ones else NOTHING,
        )

    def _rate_meter(self, subject: Subject, rate: _Rate) -> Meter:
        window: Sliding | Bucket
        if self.algorithm == "bucket" and rate.amount:
            # Its backlog is counted in units of the rate, so another rate is another meter.
            window = Bucket(rate.period_ms, self._burst or rate.amount)
            key_suffix: tuple[str, ...] = (str(rate.amount),)
        else:
            window, key_suffix = Sliding(rate.period_ms, _sub_buckets(rate.period_ms)), ()
        if self.counts == "calls" and rate.unit is Unit.CALLS:
            key_suffix = (*key_suffix, "calls")  # what counts requests is another meter
        return self._meter(
            self.per,
            subject,
            unit=rate.unit,
            rule=Rule.RATE,
            limit=rate.amount,
            window=window,
            expiry_charge=self.expiry_charge,
            key_suffix=key_suffix,
        )


def _lease(lease: int | str, rates: tuple[_Rate, ...], name: str) -> dict[Unit, int]:
    units = {rate.unit for rate in rates}
    if len(units) > 1:
        raise ConfigurationError(
            f"{name}: lease={lease!r} is of tokens or of requests; give each a RateLimit of its own"
        )
    return {units.pop(): check_lease(lease, (rate.amount for rate in rates), name=f"{name}.lease")}


def _sub_buckets(period_ms: int) -> int:
    return next(n for n in range(_MOST_SUB_BUCKETS, 0, -1) if period_ms % n == 0)


def _parse(rates: object, name: str) -> tuple[_Rate, ...]:
    if not isinstance(rates, str):
        raise ConfigurationError(f"{name}: expected {RATE_GRAMMAR}, got {rates!r}")
    return tuple(_parse_one(part.strip(), rates, name) for part in _SEPARATOR.split(rates))


def _parse_one(part: str, rates: str, name: str) -> _Rate:
    from limits import parse_many  # takes 0.2 s to import; needed only where a rate is configured

    match = _PART.fullmatch(part)
    if match is None:
        raise ConfigurationError(f"{name}: expected {RATE_GRAMMAR}, got {rates!r}")
    exact = Fraction(match["amount"])
    if exact.denominator > _MOST_STRETCH:
        raise ConfigurationError(
            f"{name}: write {match['amount']} as whole amounts over a longer period, got {rates!r}"
        )
    multiple = int(match["multiple"] or 1) * exact.denominator
    period = match["period"].lower()
    period = _ABBREVIATED.get(period, period)
    if period in {"week", "weeks"}:
        period, multiple = "day", multiple * _WEEK_DAYS
    if not multiple:
        raise ConfigurationError(f"{name}: a period must not be empty, got {rates!r}")
    amount = whole(exact.numerator, name=name)
    try:
        (item,) = parse_many(f"{amount} per {multiple} {period}")
    except ValueError:
        raise ConfigurationError(f"{name}: expected {RATE_GRAMMAR}, got {rates!r}") from None
    unit = Unit.TOKENS if (match["unit"] or "").lower().startswith("token") else Unit.CALLS
    return _Rate(unit, amount, item.get_expiry() * 1000)
