"""What the guard decided and what became of it, as counters: names and codes of the configuration, and no ids."""

from __future__ import annotations

from typing import Final

from opentelemetry import trace
from opentelemetry.metrics import Counter, Meter

from asgi_llm_guard import events
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.telemetry import names
from asgi_llm_guard.telemetry.calls import OpenCalls
from asgi_llm_guard.telemetry.labels import Labels
from asgi_llm_guard.telemetry.points import SECONDS

__all__ = ["DecisionObserver"]

_NANO: Final = 1_000_000_000


class DecisionObserver:
    """Counts decisions, look-ups of the cache, and everything that is out of the ordinary."""

    def __init__(self, meter: Meter, clock: Clock, labels: Labels, open_calls: OpenCalls) -> None:
        self._clock = clock
        self._labels = labels
        self._open = open_calls
        self._decisions = meter.create_counter(
            "llm_guard.decisions",
            unit="{decision}",
            description="Requests and calls that were admitted or refused, and what policies in shadow would have refused.",
        )
        self._lookups = meter.create_counter(
            "llm_guard.cache.lookups", unit="{lookup}", description="Calls that were looked up in the cache."
        )
        self._overage = meter.create_counter(
            "llm_guard.overage", unit="{USD}", description="What calls cost beyond what was held for them."
        )
        self._lag = meter.create_histogram(
            "llm_guard.settlement.lag",
            unit="s",
            description="From the end of a call until the storage has settled it.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._alerts = meter.create_counter(
            "llm_guard.alerts", unit="{alert}", description="Limits that were nearly used up, or too fast."
        )
        self._settlements = meter.create_counter(
            "llm_guard.settlements", unit="{settlement}", description="Settled calls, by what the storage found."
        )
        self._counted: dict[type[events.Event], Counter] = {
            kind: meter.create_counter(name, unit=unit, description=what)
            for kind, name, unit, what in (
                (events.UsageAnomaly, "llm_guard.usage.anomalies", "{report}", "Reports of usage that cannot be."),
                (events.Expired, "llm_guard.holds.expired", "{hold}", "Holds of dead processes that were charged."),
                (events.RecordsLost, "llm_guard.ledger.lost", "{record}", "Records that the ledger will never have."),
                (events.ConfigurationRejected, "llm_guard.configuration.rejected", "{change}", "Changed settings that were refused."),
                (events.SlotOverrun, "llm_guard.slots.overrun", "{call}", "Live calls that lost their slot."),
                (events.StorageFailed, "llm_guard.storage.failures", "{outage}", "Times the storage stopped answering."),
                (events.DataLost, "llm_guard.storage.losses", "{loss}", "Times the storage had lost its data."),
                (events.BacklogFull, "llm_guard.settlements.dropped", "{outage}", "Outages in which cancellations were dropped."),
            )
        }  # fmt: skip

        for counter in self._counted.values():
            counter.add(0)  # so that its first point is a change, which is what people want to hear of

    def __call__(self, event: events.Event, /) -> None:
        """Count an event."""
        match event:
            case events.Admission():
                self._admitted(event)
            case events.Refused(denied=denied):
                self._decide("refused", denied.policy, denied.code)
            case events.ShadowMisfit(policy=policy):
                self._decide("shadow_refused", policy, None)
            case events.CacheHit(waited=waited):
                self._lookups.add(1, {names.CACHE_RESULT: "waited" if waited else "hit"})
            case events.CacheMiss(reason=reason):
                self._lookups.add(1, {names.CACHE_RESULT: "not_kept" if reason else "miss"})
            case events.SettledCall():
                self._settled(event)
            case events.Alert(kind=kind, policy=policy):
                self._alerts.add(1, {names.KIND: kind, names.POLICY: self._labels.name("policy", policy)})
            case events.Expired(call_ids=call_ids):
                self._counted[events.Expired].add(len(call_ids))
            case events.RecordsLost(records=records):
                self._counted[events.RecordsLost].add(records)
            case _:
                counter = self._counted.get(type(event))
                if counter is not None:
                    counter.add(1)

    def _admitted(self, event: events.Admission) -> None:
        call_id = event.call_id
        if call_id is not None and not self._open.begin(call_id, trace.get_current_span()):
            return  # it has the hold of one that was counted
        decision = "degraded" if event.degraded else "admitted"
        self._decisions.add(1, {names.DECISION: decision, names.KIND: "request" if call_id is None else "call"})

    def _decide(self, decision: str, policy: str, code: str | None) -> None:
        labels = {names.DECISION: decision, names.POLICY: self._labels.name("policy", policy)}
        if code is not None:
            labels[names.CODE] = code
        self._decisions.add(1, labels)

    def _settled(self, event: events.SettledCall) -> None:
        record = event.record
        self._settlements.add(1, {"llm_guard.settlement.status": event.settled.status})
        if record.ended_ms is not None:
            self._lag.record(max(0, self._clock.now_ms() - record.ended_ms) / 1000)
        if record.cost_nanousd is not None and record.estimate_nanousd is not None and record.outcome != "cached":
            over = record.cost_nanousd - record.estimate_nanousd
            if over > 0:
                self._overage.add(over / _NANO)
