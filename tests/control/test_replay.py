"""Any changes: the audit says all of them, and the state comes back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.control.kit import ANNA, CLOCK_MS, SECRET
from tests.control.strategies import values

from asgi_llm_guard.control import AuditQuery, Change, Control
from asgi_llm_guard.control.data import kind_of, shown
from asgi_llm_guard.control.state import decode, encode
from asgi_llm_guard.control.values import KINDS, Value, name_of
from asgi_llm_guard.errors import GuardError
from asgi_llm_guard.testing import FrozenClock

changes = st.lists(
    st.one_of(
        values(),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("wrong"), st.sampled_from(KINDS)),
        st.lists(values(), min_size=1, max_size=3),
    ),
    max_size=8,
)


async def play(some: list[Any]) -> None:
    control = Control("sqlite://:memory:", secret=SECRET, clock=FrozenClock(CLOCK_MS))
    for change in some:
        try:
            await _make(control, change)
        except GuardError:
            continue
    state = await control.state()
    rows = list(reversed(await control.audit(AuditQuery(limit=10_000))))
    replayed: dict[str, Any] = {}
    for row in rows:
        if row.refused is not None:
            continue
        assert replayed.get(row.target) == (None if row.old is None else json.loads(row.old))
        if row.new is None:
            del replayed[row.target]
        else:
            replayed[row.target] = json.loads(row.new)
    assert replayed == {f"{kind}:{name}": json.loads(json.dumps(shown(entry.value))) for kind, name, entry in state}
    assert decode(encode(state)) == state
    verified = await control.verify_audit(since=state.head)
    assert (verified.sound, verified.rows) == (True, len(rows))
    await control.aclose()


async def _make(control: Control, change: Value | list[Value] | tuple[str, Any]) -> None:
    if isinstance(change, list):
        several = [Change(kind=kind_of(value), name=name_of(value), value=value) for value in change]
        await control.put_all(several, actor=ANNA)
    elif not isinstance(change, tuple):
        await control.put(kind_of(change), name_of(change), change, actor=ANNA)
    elif change[0] == "wrong":
        await control.put(change[1], "x", {"nothing": None}, actor=ANNA)
    else:
        there = [(kind, name) for kind, name, _ in await control.state()]
        if there:
            kind, name = there[change[1] % len(there)]
            await control.remove(kind, name, actor=ANNA)


@settings(max_examples=60)
@given(changes)
def test_the_audit_says_everything(some: list[Any]) -> None:
    """S6: after any changes, refused ones among them, what the audit says happened makes exactly what is there."""
    asyncio.run(play(some))
