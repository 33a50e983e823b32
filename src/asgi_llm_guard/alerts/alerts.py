"""Alerts of one guard: from its events to what is told and sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from asgi_llm_guard.alerts.deliveries import Deliveries, Due
from asgi_llm_guard.alerts.rules import AlertRule, BurnRate, Threshold, is_fixed
from asgi_llm_guard.alerts.watch import Crossing, Watch
from asgi_llm_guard.alerts.webhook import Webhook
from asgi_llm_guard.claims import Meter
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Alert, Event, emit
from asgi_llm_guard.policies.base import Metered
from asgi_llm_guard.storage.shared import KeepsShared, Shared
from asgi_llm_guard.windows import duration_ms

if TYPE_CHECKING:
    from asgi_llm_guard.configuration import Configuration
    from asgi_llm_guard.guard import Guard

__all__ = ["CHORE", "LAST_CHORE", "Alerts"]

CHORE: Final = "alerts"
LAST_CHORE: Final = "alerts at the end"

_EVERY_S: Final = 1.0
_LAST_EVERY_S: Final = 30 * 86_400.0  # but for the end, there is nothing to wait for
_LAST_S: Final = 4.0
_BATCH: Final = 500

_encode = msgspec.msgpack.Encoder().encode


class Alerts:
    """`Guard(alerts=Alerts([Threshold(), BurnRate(times=10)], webhooks=[Webhook(url, secret="env:…")]))`.

    Args:
        rules: what is worth an alert; unless given, `Threshold()`: 50, 80, 95 and 100 % of every budget and quota.
        webhooks: who is told; none: only observers are, by `Alert` events.
        patience: how long one process tries to reach a webhook before another one may: from `10s` to `1h`.

    Raises:
        ConfigurationError: there is no rule, an argument is wrong, or two webhooks have the same name.
    """

    def __init__(
        self, rules: Sequence[AlertRule] = (Threshold(),), *, webhooks: Sequence[Webhook] = (), patience: str = "2m"
    ) -> None:
        self.rules = tuple(rules)
        self.webhooks = tuple(webhooks)
        if not self.rules:
            raise ConfigurationError(
                "Alerts: expected at least one rule such as Threshold(); without one nothing is told"
            )
        for rule in self.rules:
            if not isinstance(rule, Threshold | BurnRate):
                raise ConfigurationError(f"Alerts: expected rules such as Threshold() or BurnRate(), got {rule!r}")
        for webhook in self.webhooks:
            if not isinstance(webhook, Webhook):
                raise ConfigurationError(f"Alerts: expected webhooks such as Webhook(url, secret=…), got {webhook!r}")
        if len({webhook.id for webhook in self.webhooks}) < len(self.webhooks):
            raise ConfigurationError("Alerts: two webhooks have the same URL or name; give each a name of its own")
        self._patience_ms = duration_ms(patience, name="Alerts.patience")
        if not 10_000 <= self._patience_ms <= 3_600_000:
            raise ConfigurationError(f"Alerts.patience: expected a time from 10s to 1h, got {patience!r}")
        self._guard: Guard | None = None
        self._shared: Shared

    def bind(self, guard: Guard) -> None:
        """Watch this guard from now on.

        Raises:
            ConfigurationError: it watches another one, or the guard's storage cannot tell its processes apart.
        """
        if self._guard is not None:
            raise ConfigurationError("Alerts: these belong to another guard; make new ones")
        if not isinstance(guard.storage, KeepsShared):
            raise ConfigurationError(
                f"Alerts: a {type(guard.storage).__name__} cannot keep what was told already; use memory, SQLite, or Redis"
            )
        self._shared = guard.storage.shared()  # says by itself if what it is around cannot
        self._guard = guard
        self._begin_anew(guard)
        guard.observe(self._see)
        guard.chores.add(CHORE, _EVERY_S, self.turn)
        guard.chores.add(LAST_CHORE, _LAST_EVERY_S, self.flush, last=True)

    def _begin_anew(self, guard: Guard) -> None:
        self._pid = os.getpid()
        self._watch = Watch(self.rules)
        self._deliveries = Deliveries(self._shared, lambda: _now_ms(guard), patience_ms=self._patience_ms)
        self._generations: dict[str, tuple[int, str]] = {}
        self._turn: asyncio.Lock = asyncio.Lock()
        self._configuration = guard.configuration

    def _see(self, event: Event, /) -> None:
        self._here()
        self._watch(event)

    def _here(self) -> Guard:
        """The guard; in a forked child, with nothing of what its parent has seen."""
        guard = self._guard
        if guard is None:
            raise ConfigurationError("Alerts: give them to a guard first: Guard(alerts=…)")
        if self._pid != os.getpid():
            self._begin_anew(guard)
        return guard

    # ------------------------------------------------------------------- on the background loop

    async def turn(self) -> None:
        """Look at what has changed, and tell what was crossed.

        Raises:
            StorageError: the store does not answer; all of it is looked at again.
        """
        guard = self._here()
        async with self._turn:
            now_ms = _now_ms(guard)
            before, self._configuration = self._configuration, guard.configuration
            changed = before.policies is not self._configuration.policies
            due = self._watch.due(now_ms, _in_force(guard, before) if changed else None)
            for at in range(0, len(due), _BATCH):
                meters = due[at : at + _BATCH]
                readings = await guard.storage.read(meters)
                crossings = self._watch.look(meters, readings, now_ms)
                await self._note_resets()
                for crossing in crossings:
                    await self._tell(guard, crossing, now_ms)
            await self._deliveries.ask()

    async def flush(self) -> None:
        """Tell what is left, and wait up to 4 seconds for what is being sent."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_S / 2):
                    await self.turn()
        finally:
            await self._deliveries.flush(_LAST_S / 2)

    async def _note_resets(self) -> None:
        """Have what was told of an instance be told again where its counter was reset, by whoever notices first."""
        while self._watch.lowered:
            key = next(iter(self._watch.lowered))
            meter, instance = self._watch.lowered[key]
            while True:
                known = self._generations.get(key, (0, ""))[0]
                noted = await self._shared.publish(_generation_name(meter), known + 1, instance.encode())
                await self._learn(meter)
                if noted or self._generations.get(key, (0, ""))[1] == instance:
                    break  # by this process, or by another one
            del self._watch.lowered[key]

    async def _learn(self, meter: Meter) -> None:
        known = self._generations.get(meter.key, (0, ""))
        found = await self._shared.document(_generation_name(meter), known=known[0])
        if found is not None:
            self._generations[meter.key] = (found.version, found.data.decode())

    async def _tell(self, guard: Guard, crossing: Crossing, now_ms: int) -> None:
        if not self._deliveries.has_room(self.webhooks):
            return  # it is still crossed with the next turn
        if isinstance(crossing.rule, BurnRate) or not is_fixed(crossing.meter.window):
            found = await self._episode(crossing, now_ms)
        else:
            found = await self._instance(crossing)
        if found is None:
            return  # another process has just begun to tell it: with the next turn its id is known
        alert_id, first = found
        alert = _alert(alert_id, crossing, now_ms)
        if first:
            emit(guard.engine.observers, alert)
        self._watch.handled(crossing)
        for webhook in self.webhooks:
            self._deliveries.add(Due(alert, webhook, crossing.until_ms))

    async def _instance(self, crossing: Crossing) -> tuple[str, bool]:
        """The id of an alert about one instance of a window, and whether it is this process's to tell."""
        await self._learn(crossing.meter)
        version, instance = self._generations.get(crossing.meter.key, (0, ""))
        alert_id = _digest(crossing, version if instance == crossing.instance else 0)
        return alert_id, await self._shared.mark(f"alert:{alert_id}", until_ms=crossing.until_ms)

    async def _episode(self, crossing: Crossing, now_ms: int) -> tuple[str, bool] | None:
        """The same where there are no instances: it lasts as long as it is not to be told again, from when it was told."""
        name = "alert:" + _digest(crossing, 0)
        if await self._shared.mark(name, until_ms=crossing.until_ms):
            await self._shared.publish(name, now_ms, b"")
            return _digest(crossing, now_ms), True
        begun = await self._shared.document(name)
        if begun is None or begun.version + crossing.until_ms - now_ms <= now_ms:
            return None
        return _digest(crossing, begun.version), False


def _in_force(guard: Guard, before: Configuration) -> Callable[[Meter], Meter | None]:
    """What has become of meters since that configuration; nothing, of those that no policy limits any more."""
    replaced = {policy.name for policy in before.policies}
    policies = {policy.name: policy for policy in guard.policies}
    others = {name for _, name in tuple(guard.engine.bindings.seen)} - set(policies)

    def in_force(meter: Meter) -> Meter | None:
        policy = policies.get(meter.policy)
        if meter.policy not in replaced or (policy is None and meter.policy in others):
            return meter  # of a route, or a function
        if not isinstance(policy, Metered):
            return None if policy is None else meter
        if meter.scope == "session":
            return meter  # whose it is would have to be known
        found = [each for each in policy.meters_of(meter.scope, meter.subject) if each.key == meter.key]
        return guard.raised(found)[0] if found else None

    return in_force


def _digest(crossing: Crossing, generation: int) -> str:
    what = (crossing.meter.key, crossing.instance, generation, *crossing.what)
    return hashlib.blake2b(_encode(what), digest_size=16).hexdigest()


def _alert(alert_id: str, crossing: Crossing, now_ms: int) -> Alert:
    meter, rule = crossing.meter, crossing.rule
    return Alert(
        id=alert_id,
        kind="burn_rate" if isinstance(rule, BurnRate) else "threshold",
        policy=meter.policy,
        scope=meter.scope,
        subject=meter.subject,
        unit=meter.unit,
        threshold=crossing.at,
        at_ms=now_ms,
        limit=meter.limit or 0,
        used=crossing.reading.used,
        held=crossing.reading.held,
        resets_at_ms=crossing.reading.resets_at_ms,
        spent=crossing.spent,
        window_ms=rule.window_ms if isinstance(rule, BurnRate) else None,
        shadow=not meter.enforce,
    )


def _now_ms(guard: Guard) -> int:
    """The storage's clock, which decides when marks are over."""
    return guard.clock.now_ms() + guard.skew_ms


def _generation_name(meter: Meter) -> str:
    return "alert:" + hashlib.blake2b(meter.key.encode(), digest_size=16).hexdigest()
