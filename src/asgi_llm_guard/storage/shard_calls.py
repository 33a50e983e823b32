"""What one process knows of the calls that it has asked shards for: which shard has them, or which groups hold what.

Groups are known here and nowhere else (rule 8 of `sharded.py`), so a call is remembered from before it is asked for
until its end is confirmed, and for a while after that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from asgi_llm_guard.claims import Claim, Receipt, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.pending import Handed, tell

__all__ = ["Calls", "Group", "Held"]

_REMEMBERED: Final = 16_384
"""So many calls that have ended are known to this process, for what is settled twice."""


class Group:
    """What one shard holds of a call."""

    __slots__ = ("call_id", "claims")

    def __init__(self, call_id: str, claims: tuple[Claim, ...]) -> None:
        self.call_id = call_id
        self.claims = claims
        """As they were last sent there. Once there, a meter keeps its place."""


class Held:
    """One call of this process whose claims lie in several shards."""

    __slots__ = ("asked", "claims", "groups", "home", "owner", "plan", "receipts")

    def __init__(self, owner: str, home: int, claims: tuple[Claim, ...], groups: dict[int, Group], plan: int) -> None:
        self.owner = owner
        self.home = home
        self.claims = claims
        self.groups = groups
        """By shard, without home. One without an id is another process's."""
        self.plan = plan
        self.receipts: tuple[Receipt, ...] = ()
        """Empty until it is granted."""
        self.asked = False
        """Home was asked: it may know of the call."""


class Calls:
    """The calls of one process. A number in place of a `Held`: that shard is all that a call has."""

    def __init__(self) -> None:
        self.open: dict[str, int | Held] = {}
        """Open calls of this process, or such whose end is not confirmed."""
        self.ended: dict[str, int | Held] = {}
        """The latest that have ended, or of which it is not known what has become of them."""
        self._busy: dict[str, Handed[None]] = {}

    def known(self, call_id: str) -> int | Held | None:
        """What is remembered of a call, open or not."""
        known = self.open.get(call_id)
        return self.ended.get(call_id) if known is None else known

    def drop(self, calls: Iterable[str]) -> None:
        """They were refused: nothing of them is anywhere."""
        for call_id in calls:
            self.open.pop(call_id, None)

    def end(self, call_id: str, known: int | Held) -> None:
        """Remember where a call was that has ended, for a while."""
        ended = self.ended
        ended.pop(call_id, None)
        ended[call_id] = known
        if len(ended) > _REMEMBERED:
            with suppress(KeyError, RuntimeError):  # another thread has
                del ended[next(iter(ended))]

    def unsure(self, calls: Iterable[str], home: int, error: BaseException) -> None:
        """What home knows of these is not known, unless it was not asked."""
        for call_id in calls:
            known = self.open.pop(call_id, None)
            if known is None or (isinstance(error, StorageError) and not error.sent and call_id not in self.ended):
                continue
            if isinstance(known, Held) and known.groups:
                # Its groups are given back. Should it be settled all the same, its receipts charge the other shards.
                for shard, group in known.groups.items():
                    group.call_id = f"{call_id}~{shard}"
                self.end(call_id, known)
            else:
                self.end(call_id, home)

    def unconfirmed(self, settlements: Sequence[Settlement]) -> None:
        """They will be handed over again: what is held where must not be forgotten until then."""
        for settlement in settlements:
            known = self.ended.pop(settlement.call_id, None)
            if known is not None:
                self.open.setdefault(settlement.call_id, known)

    async def turn(self, call_id: str) -> Handed[None]:
        """Wait until nobody else of this process changes the call."""
        mine: Handed[None] = Handed()
        while (busy := self._busy.setdefault(call_id, mine)) is not mine:
            await busy
        return mine

    def turn_over(self, call_id: str, turn: Handed[None]) -> None:
        """Let the next one change it."""
        del self._busy[call_id]
        turn.decide(None, None)
        tell((turn,))
