"""Raises: limits that are higher for a while, laid over the claims of policies. Pure.

Rule 1: a raise adds to a limit and changes nothing else: what was used stays used, and when the raise ends the old
limit holds again, whatever was used meanwhile.

Rule 2: it is laid on after claims were merged, so two policies that meet on one meter are raised once.

Rule 3: a limit of 0 blocks everything, and a raise of it allows as much as it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Final, Literal, get_args

import msgspec

from asgi_llm_guard.claims import Claim, Meter, Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT, from_nano, to_nano
from asgi_llm_guard.plan import Asked
from asgi_llm_guard.policies.base import Metered, Policy
from asgi_llm_guard.policies.grammar import whole
from asgi_llm_guard.policies.subjects import has_parts, sessions_named
from asgi_llm_guard.windows import Bucket

__all__ = ["Raise", "RaiseUnit", "Raises"]

RaiseUnit = Literal["usd", "tokens", "calls", "slots"]

_UNITS: Final = {"usd": Unit.NANOUSD, "tokens": Unit.TOKENS, "calls": Unit.CALLS, "slots": Unit.SLOTS}
_KEPT: Final = 4096
_SOMEBODY: Final = "a:a"
"""Whoever it is: also one of two that are counted together."""


class Raise(msgspec.Struct, frozen=True, kw_only=True):
    """One raise.

    Raises:
        ConfigurationError: a field is malformed, or the amount is not above 0.
    """

    policy: str
    """The name of the policy whose limits are raised."""
    unit: RaiseUnit
    amount: Decimal | int
    """How much is added: dollars with the unit `usd`, else a whole number. Text is read, too."""
    until_ms: int
    """When it ends, in ms since the epoch."""
    scope: str | None = None
    """Of a policy that counts in several scopes, only this one."""
    subject: str | None = None
    """Only this one's limit, by the name that meters show (`team-a:mia` where two are counted together); `None`: all."""
    caller: str | None = None
    """For a session: whose it is. `None`: the sessions of that id of all callers."""
    reason: str = ""
    """For operators; not shown to callers."""
    id: str = ""
    """Its name in administration data."""

    def __post_init__(self) -> None:
        for name in "policy", "scope", "subject", "caller":
            value = getattr(self, name)
            if (value is None and name != "policy") or (isinstance(value, str) and value.strip()):
                continue
            raise ConfigurationError(f"raise: {name} must be a non-empty text, got {value!r}")
        if self.unit not in get_args(RaiseUnit):
            raise ConfigurationError(
                f"raise of {self.policy}: unit must be one of {', '.join(get_args(RaiseUnit))} (ids that are counted "
                f"cannot be raised), got {self.unit!r}"
            )
        if self.unit == "usd":
            amount: Decimal | int = from_nano(to_nano(self.amount, name=f"raise of {self.policy}: amount"))
        else:
            amount = whole(self.amount, name=f"raise of {self.policy}: amount")
        if amount <= 0:
            raise ConfigurationError(f"raise of {self.policy}: amount must be above 0, got {self.amount!r}")
        msgspec.structs.force_setattr(self, "amount", amount)
        if isinstance(self.until_ms, bool) or not isinstance(self.until_ms, int) or self.until_ms < 0:
            raise ConfigurationError(
                f"raise of {self.policy}: until_ms must be ms since the epoch, got {self.until_ms!r}"
            )

    @property
    def more(self) -> int:
        """How much is added, in the unit of meters."""
        return to_nano(self.amount) if self.unit == "usd" else int(self.amount)

    def holds_for(self, meter: Meter, now_ms: int) -> bool:
        """Whether it raises the limit of `meter` now."""
        return (
            now_ms < self.until_ms
            and meter.policy == self.policy
            and meter.unit is _UNITS[self.unit]
            and meter.limit is not None
            and not isinstance(meter.window, Bucket)
            and (self.scope is None or meter.scope == self.scope)
            and (self.subject is None or meter.subject == self.subject)
            and (self.caller is None or _is_of(meter, self.caller))
        )

    def check(self, policies: Iterable[Policy]) -> None:
        """See whether the policies of that name have a limit that can be raised; unknown names are accepted, since
        other processes may know them.

        Raises:
            ConfigurationError: they have none in this unit, or only buckets.
        """
        named = [policy for policy in policies if policy.name == self.policy and isinstance(policy, Metered)]
        scopes = tuple(dict.fromkeys([scope for policy in named for scope in policy.scopes()]))
        if not scopes:
            return
        if self.scope is not None and self.scope not in scopes:
            raise ConfigurationError(
                f"raise of {self.policy}: it counts per {', '.join(scopes)}, not per {self.scope!r}"
            )
        meters = [
            meter
            for policy in named
            for scope in policy.scopes()
            if self.scope in (None, scope)
            for meter in policy.meters_of(scope, self.subject or _SOMEBODY, caller=self.caller or _SOMEBODY)
        ]
        unit = [meter for meter in meters if meter.unit is _UNITS[self.unit]]
        if meters and not unit:
            units = ", ".join(sorted({_SAID[meter.unit] for meter in meters}))
            raise ConfigurationError(f"raise of {self.policy}: it has no limit in {self.unit}; it counts {units}")
        if unit and all(isinstance(meter.window, Bucket) for meter in unit):
            raise ConfigurationError(
                f"raise of {self.policy}: the limit of a bucket is the rate at which it drains and cannot be raised "
                "for a while; use algorithm='sliding', or change the policy"
            )


_SAID: Final = {**{unit: name for name, unit in _UNITS.items()}, Unit.IDS: "ids"}


class _Between:
    """What was worked out for meters between two ends of raises: the same at each instant. Emptied when it is full.

    Threads may be at different instants: one that is late keeps nothing for those that are past an end.
    """

    __slots__ = ("raised", "since_ms", "until_ms")

    def __init__(self, since_ms: int, until_ms: int) -> None:
        self.since_ms = since_ms
        self.until_ms = until_ms
        self.raised: dict[str, tuple[Meter, Meter]] = {}


class Raises:
    """Several raises, to be laid over what policies claim. Raises of one meter add up.

    Raises:
        ConfigurationError: something else is among them.
    """

    __slots__ = ("_between", "_by_policy", "raises")

    def __init__(self, raises: Iterable[Raise]) -> None:
        self.raises: Sequence[Raise] = tuple(raises)
        self._by_policy: dict[str, list[Raise]] = {}
        for each in self.raises:
            if not isinstance(each, Raise):
                raise ConfigurationError(
                    f"raises: expected Raise(policy=…, unit=…, amount=…, until_ms=…), got {each!r}"
                )
            self._by_policy.setdefault(each.policy, []).append(each)
        self._between = _Between(0, 0)

    def __bool__(self) -> bool:
        return bool(self.raises)

    def of(self, meter: Meter, now_ms: int) -> list[Raise]:
        """The raises that hold for a meter now."""
        return [each for each in self._by_policy.get(meter.policy, ()) if each.holds_for(meter, now_ms)]

    def meter(self, meter: Meter, now_ms: int) -> Meter:
        """The meter under its raised limit; the same one where nothing raises it."""
        if meter.policy not in self._by_policy:
            return meter
        between = self._between
        if not between.since_ms <= now_ms < between.until_ms:
            between = self._between = self._around(now_ms)
        known = between.raised.get(meter.key)
        if known is not None and known[0] is meter:
            return known[1]
        more = sum(each.more for each in self.of(meter, now_ms))
        raised = meter
        if more and meter.limit is not None:
            raised = msgspec.structs.replace(meter, limit=min(meter.limit + more, MAX_AMOUNT))
        if len(between.raised) >= _KEPT:
            between.raised.clear()
        between.raised[meter.key] = (meter, raised)
        return raised

    def _around(self, now_ms: int) -> _Between:
        ends = [each.until_ms for each in self.raises]
        return _Between(
            max([end for end in ends if end <= now_ms], default=0),
            min([end for end in ends if end > now_ms], default=2**62),
        )

    def meters(self, meters: Sequence[Meter], now_ms: int) -> tuple[Meter, ...]:
        """Each meter under its raised limit."""
        return tuple([self.meter(meter, now_ms) for meter in meters])

    def asked(self, asked: Asked, now_ms: int) -> Asked:
        """What policies ask for, under raised limits."""
        calls, requests = self._claims(asked.calls, now_ms), self._claims(asked.requests, now_ms)
        if calls is asked.calls and requests is asked.requests:
            return asked
        return msgspec.structs.replace(asked, calls=calls, requests=requests)

    def _claims(self, claims: tuple[Claim, ...], now_ms: int) -> tuple[Claim, ...]:
        if not any(claim.meter.policy in self._by_policy for claim in claims):
            return claims
        raised = []
        for claim in claims:
            meter = self.meter(claim.meter, now_ms)
            if meter is claim.meter:
                raised.append(claim)
                continue
            # A blocked meter claims 1 of what costs nothing, so that it refuses that, too.
            amount = 0 if claim.meter.limit == 0 and claim.amount == 1 and _is_measured(meter) else claim.amount
            raised.append(Claim(meter, amount, claim.member))
        return tuple(raised)


def _is_measured(meter: Meter) -> bool:
    return meter.unit is Unit.TOKENS or meter.unit is Unit.NANOUSD


def _is_of(meter: Meter, caller: str) -> bool:
    """Whether a session's meter is that caller's."""
    return meter.scope != "session" or any(
        has_parts(meter.key, subject) for subject in sessions_named(caller, meter.subject)
    )
