"""Which calls are open, from what each storage keeps of them; see `ListsCalls` in `shared.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asgi_llm_guard.claims import Claim
from asgi_llm_guard.storage.shard_parts import call_of
from asgi_llm_guard.storage.shared import OpenCall, OpenHold
from asgi_llm_guard.storage.state import Hold

__all__ = ["newest", "open_call", "open_holds_of", "whole_calls"]


def open_call(hold: Hold) -> OpenCall:
    """The call that a storage keeps this hold for."""
    taken = [receipt.claim for receipt in hold.receipts if receipt.taken]
    return OpenCall(
        call_id=hold.call_id, owner=hold.owner, at_ms=hold.at_ms, draft=hold.draft, held=open_holds_of(taken)
    )


def open_holds_of(claims: Iterable[Claim]) -> tuple[OpenHold, ...]:
    """What claims have taken."""
    return tuple(
        [
            OpenHold(meter.policy, meter.scope, meter.subject, meter.unit, claim.amount)
            for claim in claims
            for meter in (claim.meter,)
        ]
    )


def newest(calls: Iterable[OpenCall], limit: int) -> list[OpenCall]:
    """The newest calls first, at most `limit`; those of one instant by their ids."""
    return sorted(calls, key=lambda call: (-call.at_ms, call.call_id))[:limit]


def whole_calls(parts: Sequence[OpenCall], limit: int) -> list[OpenCall]:
    """Calls from what shards hold of them. What belongs to a call that has no home yet, or none any more, is left out."""
    homes = {part.call_id: part for part in parts if call_of(part.call_id) == part.call_id}
    held = {call_id: list(home.held) for call_id, home in homes.items()}
    for part in parts:
        call_id = call_of(part.call_id)
        if call_id in homes and part.call_id != call_id:
            held[call_id] += part.held
    whole = (
        OpenCall(call_id=call_id, owner=home.owner, at_ms=home.at_ms, draft=home.draft, held=tuple(held[call_id]))
        for call_id, home in homes.items()
    )
    return newest(whole, limit)
