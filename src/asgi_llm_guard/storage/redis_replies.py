"""What the scripts reply, as values. The replies are described at the head of each file in `lua/`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Granted, Plan, Receipt, Refused
from asgi_llm_guard.storage.redis_codec import read_record
from asgi_llm_guard.usage import UsageRecord

__all__ = ["amended", "granted", "record_of", "refused", "texts"]


def granted(plan: Plan, reply: Any, now_ms: int) -> Granted:
    receipts: list[Receipt] = []
    at = 2
    for bundle in plan:
        for claim in bundle.claims:
            fits, used, held, pin, resets = reply[at : at + 5]
            at += 5
            receipts.append(Receipt(claim, fits == 1, fits == 1, used, held, pin, None if resets < 0 else resets))
    return Granted(tuple(receipts), now_ms, reply[1])


def refused(plans: Sequence[Plan], reply: Any, now_ms: int) -> Refused:
    states: list[tuple[Receipt, ...]] = []
    at = 1
    for plan in plans:
        receipts: list[Receipt] = []
        for bundle in plan:
            for claim in bundle.claims:
                fits, used, held, pin, resets = reply[at : at + 5]
                at += 5
                receipts.append(Receipt(claim, False, fits == 1, used, held, pin, None if resets < 0 else resets))
        states.append(tuple(receipts))
    return Refused(tuple(states), now_ms)


def amended(bundle: Bundle, answer: Any, now_ms: int) -> Granted | Refused:
    granted = answer[0] == 1
    receipts: list[Receipt] = []
    for n, asked in enumerate(bundle.claims):
        old_limit, fits, used, held, pin, resets = answer[1 + 6 * n : 7 + 6 * n]
        claim = asked
        if old_limit != -2:
            limit = None if old_limit < 0 else old_limit
            if limit != asked.meter.limit:
                claim = Claim(msgspec.structs.replace(asked.meter, limit=limit), asked.amount, asked.member)
        taken = granted and fits == 1
        receipts.append(Receipt(claim, taken, fits == 1, used, held, pin, None if resets < 0 else resets))
    return Granted(tuple(receipts), now_ms) if granted else Refused((tuple(receipts),), now_ms)


def record_of(fields: Sequence[bytes]) -> UsageRecord:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    record = read_record(values[b"c"].decode(), values[b"r"])
    if b"x" in values:  # a draft, of a call whose owner died
        cost = record.cost_nanousd if record.estimate_nanousd is None else record.estimate_nanousd
        return msgspec.structs.replace(
            record, outcome="expired", cost_nanousd=cost, usage=None, ended_ms=int(values[b"x"])
        )
    return msgspec.structs.replace(record, late=True) if b"l" in values else record


def texts(values: Iterable[bytes]) -> tuple[str, ...]:
    return tuple([value.decode() for value in values])
