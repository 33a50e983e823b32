"""Which deployments are left alone for a while, because they keep failing.

Rule 1: a deployment cools down at once where time, or somebody, has to mend it: `rate_limit` and `quota`, unless it is
the only one of its group; `auth` and `not_found`; and a failure that counts and comes with `Retry-After`.

Rule 2: other failures that are not the request's doing count. More than `allowed_fails` of one class within a minute
cool it down, and so does a share of failures above `failure_rate`, of `minimum` calls or more in that minute.

Rule 3: a cooldown that ends later than the present one takes its place; one that ends sooner changes nothing.

Rule 4: cooldowns are shared through the storage, counts are not. What was read is gone by for at most `FRESH_MS`. Of
two instances that tell of one deployment at once the longer cooldown stays: whoever knows a longer one than is stored
stores it when it next looks. Good answers are counted in memory, and write nothing.

Rule 5: while the store does not answer each instance goes by what it knows. That is never an error.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Mapping
from typing import Final, TypeVar

import msgspec

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.gateway.failures import ERROR_CLASSES, ErrorClass
from asgi_llm_guard.storage.entries import MAX_TTL_MS, Bounds, Entries, KeepsEntries, Kept, Leading

__all__ = ["FRESH_MS", "Cooldown", "CooldownRules", "Cooldowns", "cooldown_entries", "masked"]

FRESH_MS: Final = 1_000
"""What was read of the store is gone by for so long."""

_MINUTE_MS: Final = 60_000
_SHOWN: Final = 50
_SPACE: Final = "cooldowns"
_CLAIM_MS: Final = 1_000
_SAME_MS: Final = 250
"""Two ends that are not further apart are one: what is between them is the way to the store."""
_MOST_CALLS: Final = 10_000
"""So many calls of a deployment are remembered, of the last minute."""

_AT_ONCE: Final[frozenset[str]] = frozenset({"auth", "not_found", "rate_limit", "quota"})
_SPARED: Final[frozenset[str]] = frozenset({"rate_limit", "quota"})
"""Not where the deployment is the only one of its group: nobody else would answer in the meantime."""
_INNOCENT: Final[frozenset[str]] = frozenset({"invalid", "context_overflow", "content_policy"})
"""The request's doing."""
_LOOKED_AT: Final = 400
_SECRET: Final = re.compile(r"\S{16,}|sk-\S*")
"""What a key looks like: a long word."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CooldownRules(msgspec.Struct, frozen=True, kw_only=True):
    """When a deployment is left alone, and for how long.

    Raises:
        ConfigurationError: a figure is out of its range, or an error class is unknown.
    """

    cooldown_s: float = 60.0
    """For so long, where the provider does not say; from 0 to a day. 0: nothing ever cools down."""
    allowed_fails: int | None = 3
    """So many failures of one class within a minute are tolerated; `None`: any number. Busy deployments fail now and
    then: for them the rate says more."""
    classes: Mapping[ErrorClass, int] = msgspec.field(default_factory=dict)
    """Another number by error class. What would cool down at once then counts like any other."""
    failure_rate: float | None = 0.5
    """A larger share of failures than this cools down, from 0 to below 1; `None`: none does."""
    minimum: int = 5
    """Of fewer calls within a minute no share is taken; from 1."""
    max_cooldown_s: float = 3_600.0
    """`Retry-After` is believed up to this; from 0 to a day."""
    never: Collection[str] = ()
    """Deployments that never cool down."""

    def __post_init__(self) -> None:
        for name in ("cooldown_s", "max_cooldown_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 86_400:
                raise ConfigurationError(f"{name}: expected seconds from 0 to 86400, got {value!r}")
        classes = [(f"classes[{name!r}]", value) for name, value in self.classes.items()]
        rate = self.failure_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1):
            raise ConfigurationError(f"failure_rate: expected a share from 0 to below 1, or None, got {rate!r}")
        for name, value in (("allowed_fails", self.allowed_fails), ("minimum", self.minimum), *classes):
            least = 1 if name == "minimum" else 0
            if name == "allowed_fails" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_CALLS:
                raise ConfigurationError(
                    f"{name}: expected a whole number from {least} to {_MOST_CALLS}, got {value!r}"
                )
        odd = [name for name in self.classes if name not in ERROR_CLASSES]
        if odd:
            raise ConfigurationError(f"classes: expected one of {', '.join(sorted(ERROR_CLASSES))}, got {odd[0]!r}")
        if isinstance(self.never, str):
            raise ConfigurationError(f"never: expected a list of deployments, got the text {self.never!r}")


class Cooldown(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment is left alone."""

    until_ms: int
    """By this instance's clock."""
    error: str
    """The class of what it failed with."""
    status: int | None = None
    message: str = ""
    """The beginning of what the provider said, without what looks like a key. Only where it was said: it may repeat
    what was asked, which is not to be in a storage. Empty: another instance has told of it."""

    def left_s(self, now_ms: int) -> float:
        """For so many seconds more; 0 once it is over."""
        return max(0, self.until_ms - now_ms) / 1000


class _Shared(msgspec.Struct, forbid_unknown_fields=False):
    """What is stored. A length and no instant: clocks of hosts differ."""

    for_ms: int
    error: str
    status: int | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Shared).decode


class _Health:
    """Of one deployment, in this process."""

    __slots__ = ("calls", "cooldown", "failed")

    def __init__(self) -> None:
        self.calls: deque[tuple[int, str | None]] = deque(maxlen=_MOST_CALLS)
        """When one ended, and what it failed with; of the last minute."""
        self.failed: dict[str, int] = {}
        self.cooldown: Cooldown | None = None

    def note(self, failure: str | None, now_ms: int) -> None:
        if len(self.calls) == _MOST_CALLS:
            self._drop()
        while self.calls and self.calls[0][0] <= now_ms - _MINUTE_MS:
            self._drop()
        self.calls.append((now_ms, failure))
        if failure is not None:
            self.failed[failure] = self.failed.get(failure, 0) + 1

    def _drop(self) -> None:
        _, failure = self.calls.popleft()
        if failure is not None:
            self.failed[failure] -= 1

    def restart(self) -> None:
        """Failures of before a cooldown are no reason for the next one."""
        self.calls.clear()
        self.failed.clear()


class Cooldowns:
    """The cooldowns of one gateway's deployments. In any event loop; see the rules at the top of this file.

    Args:
        entries: where cooldowns are shared (`cooldown_entries(storage)`); `None`: nowhere.
        clock: of this instance.
    """

    def __init__(
        self, rules: CooldownRules | None = None, *, entries: Entries | None = None, clock: Clock | None = None
    ) -> None:
        self.rules = rules or CooldownRules()
        self._entries = entries
        self._clock = clock or SystemClock()
        self._health: dict[str, _Health] = {}
        self._lock = threading.Lock()
        self._read_ms: int | None = None
        self._reading: asyncio.Future[None] | None = None
        self._away = False

    def watch(self, deployments: Iterable[str]) -> None:
        """These are the deployments from now on. What is known of others is forgotten, and they never cool down."""
        self._health = {name: self._health.get(name) or _Health() for name in deployments}
        self._read_ms = None

    async def cooling(self) -> dict[str, Cooldown]:
        """The deployments that are left alone now, by name. Asks the store at most once in `FRESH_MS`, and waits for it
        unless it did not answer the last time."""
        if self._entries is not None and self.rules.cooldown_s and self._stale():
            reading, loop = self._reading, asyncio.get_running_loop()
            if reading is None or reading.done() or reading.get_loop() is not loop:
                reading = self._reading = asyncio.ensure_future(self._read(self._entries))
            if not self._away:
                # Whoever is cancelled leaves the others their answer.
                await asyncio.shield(reading)
        return self.known()

    def known(self) -> dict[str, Cooldown]:
        """The same, without asking the store."""
        now_ms = self._clock.now_ms()
        return {
            name: health.cooldown
            for name, health in self._health.items()
            if health.cooldown is not None and health.cooldown.until_ms > now_ms
        }

    def succeeded(self, deployment: str) -> None:
        """An attempt went well. Counted in memory."""
        health = self._health.get(deployment)
        if health is not None:
            with self._lock:
                health.note(None, self._clock.now_ms())

    async def failed(
        self,
        deployment: str,
        failure: ErrorClass,
        *,
        alone: bool,
        status: int | None = None,
        message: str = "",
        retry_after_s: float | None = None,
    ) -> Cooldown | None:
        """An attempt failed. The cooldown that this began or made longer, which others will hear of; `None`: none.

        `alone`: it is the only deployment of its group. A refusal of ours is no failure, and not told here.
        """
        health = self._health.get(deployment)
        if health is None or failure in _INNOCENT or (alone and failure in _SPARED):
            return None
        asked_s = min(max(retry_after_s or 0.0, 0.0), self.rules.max_cooldown_s)
        now_ms = self._clock.now_ms()
        with self._lock:
            health.note(failure, now_ms)
            if not self._may_cool(deployment) or not self._reason(health, failure, told=asked_s > 0 and not alone):
                return None
            until_ms = now_ms + round((asked_s or self.rules.cooldown_s) * 1000)
            if until_ms <= max(now_ms, 0 if health.cooldown is None else health.cooldown.until_ms):
                return None
            cooldown = Cooldown(until_ms=until_ms, error=failure, status=status, message=masked(message))
            health.cooldown = cooldown
            health.restart()
        if self._entries is not None:
            await self._told(self._share(self._entries, deployment, cooldown))
        return cooldown

    def _may_cool(self, deployment: str) -> bool:
        return bool(self.rules.cooldown_s) and deployment not in self.rules.never

    def _reason(self, health: _Health, failure: ErrorClass, *, told: bool) -> bool:
        """Whether a failure that has been noted is one too many. `told`: the provider asks to be left alone."""
        rules = self.rules
        allowed = rules.classes.get(failure)
        if allowed is None:
            if told or failure in _AT_ONCE:
                return True
            allowed = rules.allowed_fails
        if allowed is not None and health.failed.get(failure, 0) > allowed:
            return True
        calls = len(health.calls)
        return (
            rules.failure_rate is not None
            and calls >= rules.minimum
            and sum(health.failed.values()) > rules.failure_rate * calls
        )

    # -------------------------------------------------------------------------------- sharing

    def _stale(self) -> bool:
        # A clock that steps back makes what was read stale.
        return self._read_ms is None or not 0 <= self._clock.now_ms() - self._read_ms < FRESH_MS

    async def _read(self, entries: Entries) -> None:
        watched, began_ms = self._health, self._clock.now_ms()
        names = tuple(filter(self._may_cool, watched))
        found = await self._told(asyncio.gather(*(entries.find(name) for name in names)))
        if self._health is watched:
            self._read_ms = began_ms
        longer = []
        for name, kept in zip(names, found or (), strict=False):
            health = watched[name]
            stored = None if kept is None else self._decode(kept)
            stored_ms = max(self._clock.now_ms(), 0 if stored is None else stored.until_ms)
            with self._lock:
                known = health.cooldown
                if stored is not None and stored.until_ms == stored_ms > (0 if known is None else known.until_ms):
                    health.cooldown = stored
            if known is not None and known.until_ms > stored_ms + _SAME_MS:
                longer.append(self._share(entries, name, known))
        if longer:
            await self._told(asyncio.gather(*longer))

    def _decode(self, kept: Kept) -> Cooldown | None:
        """A stored cooldown, by this instance's clock; `None`: it is not one, or of another release."""
        try:
            shared = _decode(kept.value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        until_ms = self._clock.now_ms() + shared.for_ms - kept.age_ms
        return Cooldown(until_ms=until_ms, error=shared.error, status=shared.status)

    async def _told(self, telling: Awaitable[T]) -> T | None:
        """What the store answers; `None`: it does not, which is logged once."""
        try:
            answer = await telling
        except StorageError as error:
            if not self._away:
                _log.warning("cooldowns are not shared: the store does not answer (%s)", error)
            self._away = True
            return None
        if self._away:
            _log.warning("cooldowns are shared again")
        self._away = False
        return answer

    async def _share(self, entries: Entries, name: str, cooldown: Cooldown) -> None:
        left_ms = min(cooldown.until_ms - self._clock.now_ms(), MAX_TTL_MS)
        if left_ms <= 0:
            return
        token = secrets.token_hex(8)
        found = await entries.begin(name, token, claim_ms=_CLAIM_MS)
        if isinstance(found, Kept):
            stored = self._decode(found)
            if stored is not None and stored.until_ms >= cooldown.until_ms - _SAME_MS:
                return
            found = await entries.begin(name, token, claim_ms=_CLAIM_MS, fresh=True)
        if not isinstance(found, Leading):
            return  # somebody else is telling of it: what is longer is told at the next look
        value = _Shared(for_ms=left_ms, error=cooldown.error, status=cooldown.status)
        await entries.store(name, token, _encode(value), ttl_ms=left_ms)


def cooldown_entries(storage: object) -> Entries | None:
    """Where a guard's storage shares cooldowns; `None`: it keeps no entries."""
    if not isinstance(storage, KeepsEntries):
        return None
    try:
        return storage.entries(_SPACE, Bounds(max_value_bytes=4_096, max_bytes=4 * 1024 * 1024, max_entries=10_000))
    except ConfigurationError:  # it cannot keep them after all
        return None


def masked(message: str) -> str:
    """The first 50 characters of an error, without what looks like a key: it is kept in memory, and shown to operators."""
    text = _SECRET.sub("***", " ".join(message[:_LOOKED_AT].split()))
    return text if len(text) <= _SHOWN and len(message) <= _LOOKED_AT else f"{text[:_SHOWN]}***"
