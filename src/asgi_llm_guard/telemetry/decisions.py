"""What the guard decided and what became of it, as counters: names and codes of the configuration, and no ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from opentelemetry import trace

from asgi_llm_guard import events
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.calls import OpenCalls
from asgi_llm_guard.telemetry.instruments import Counter, Instruments
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.points import SECONDS
from asgi_llm_guard.telemetry.waking import Handlers

__all__ = ["DecisionObserver"]

_NANO: Final = 1_000_000_000

_COUNTED: Final = (
    (events.UsageAnomaly, "llm_guard.usage.anomalies", "{report}", "Reports of usage that cannot be."),
    (events.Expired, "llm_guard.holds.expired", "{hold}", "Holds of dead processes that were charged."),
    (events.RecordsLost, "llm_guard.ledger.lost", "{record}", "Records that the ledger will never have."),
    (events.ConfigurationRejected, "llm_guard.configuration.rejected", "{change}", "Changed settings that were refused."),
    (events.SlotOverrun, "llm_guard.slots.overrun", "{call}", "Live calls that lost their slot."),
    (events.StorageFailed, "llm_guard.storage.failures", "{outage}", "Times the storage stopped answering."),
    (events.DataLost, "llm_guard.storage.losses", "{loss}", "Times the storage had lost its data."),
    (events.BacklogFull, "llm_guard.settlements.dropped", "{outage}", "Outages in which cancellations were dropped."),
)  # fmt: skip
"""What is counted by itself, without labels."""


class DecisionObserver:
    """Counts decisions, look-ups of the cache, and everything that is out of the ordinary."""

    def __init__(self, instruments: Instruments, clock: Clock, labels: Labels, open_calls: OpenCalls) -> None:
        self._clock = clock
        self._labels = labels
        self._open = open_calls
        self._decisions = instruments.counter(
            "llm_guard.decisions",
            (names.DECISION, names.KIND, names.POLICY, names.CODE),
            unit="{decision}",
            description="Requests and calls that were admitted or refused, and what policies in shadow would have refused.",
        )
        self._lookups = instruments.counter(
            "llm_guard.cache.lookups",
            (names.CACHE_RESULT,),
            unit="{lookup}",
            description="Calls that were looked up in the cache.",
        )
        self._overage = instruments.counter(
            "llm_guard.overage",
            unit="{USD}",
            description="What calls cost beyond what was held for them.",
            scale=_NANO,
        )
        self._lag = instruments.meter.create_histogram(
            "llm_guard.settlement.lag",
            unit="s",
            description="From the end of a call until the storage has settled it.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._alerts = instruments.counter(
            "llm_guard.alerts",
            (names.KIND, names.POLICY),
            unit="{alert}",
            description="Limits that were nearly used up, or too fast.",
        )
        self._settlements = instruments.counter(
            "llm_guard.settlements",
            ("llm_guard.settlement.status",),
            unit="{settlement}",
            description="Settled calls, by what the storage found.",
        )
        self._counted: dict[type[events.Event], Counter] = {
            kind: instruments.counter(name, unit=unit, description=what) for kind, name, unit, what in _COUNTED
        }
        for counter in self._counted.values():
            counter.begin()  # so that its first point is a change, which is what people want to hear of

    @property
    def handlers(self) -> Handlers:
        """What takes events."""
        found: dict[type[events.Event], Callable[[Any], None]] = {
            kind: _one_more(counter) for kind, counter in self._counted.items()
        }
        found.update(
            {
                events.Admission: self._admitted,
                events.Refused: self._refused,
                events.ShadowMisfit: self._misfit,
                events.CacheHit: self._hit,
                events.CacheMiss: self._missed,
                events.SettledCall: self._settled,
                events.Alert: self._alerted,
                events.Expired: self._expired,
                events.RecordsLost: self._lost,
            }
        )
        return found

    def _admitted(self, event: events.Admission) -> None:
        call_id = event.call_id
        if call_id is not None and not self._open.begin(call_id, trace.get_current_span()):
            return  # it has the hold of one that was counted
        decision = "degraded" if event.degraded else "admitted"
        self._decisions.add(1, decision, "request" if call_id is None else "call", None, None)

    def _refused(self, event: events.Refused) -> None:
        denied = event.denied
        self._decisions.add(1, "refused", None, self._labels.name("policy", denied.policy), denied.code)

    def _misfit(self, event: events.ShadowMisfit) -> None:
        self._decisions.add(1, "shadow_refused", None, self._labels.name("policy", event.policy), None)

    def _hit(self, event: events.CacheHit) -> None:
        self._lookups.add(1, "waited" if event.waited else "hit")

    def _missed(self, event: events.CacheMiss) -> None:
        self._lookups.add(1, "not_kept" if event.reason else "miss")

    def _alerted(self, event: events.Alert) -> None:
        self._alerts.add(1, event.kind, self._labels.name("policy", event.policy))

    def _expired(self, event: events.Expired) -> None:
        self._counted[events.Expired].add(len(event.call_ids))

    def _lost(self, event: events.RecordsLost) -> None:
        self._counted[events.RecordsLost].add(event.records)

    def _settled(self, event: events.SettledCall) -> None:
        record = event.record
        self._settlements.add(1, event.settled.status)
        if record.ended_ms is not None:
            self._lag.record(max(0, self._clock.now_ms() - record.ended_ms) / 1000)
        if record.cost_nanousd is not None and record.estimate_nanousd is not None and record.outcome != "cached":
            over = record.cost_nanousd - record.estimate_nanousd
            if over > 0:
                self._overage.add(over)


def _one_more(counter: Counter) -> Callable[[events.Event], None]:
    def add(_event: events.Event) -> None:
        counter.add(1)

    return add
