"""What a process knows of one namespace in Redis, and what it says with every call because of it.

The server's clock, which shapes of claims the store has been told, and which data it had when it was last asked. No I/O.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import msgspec

from asgi_llm_guard.claims import Settled, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.errors import DataLost
from asgi_llm_guard.storage.redis_codec import Codec, Shape, pack_text
from asgi_llm_guard.storage.redis_lane import Group
from asgi_llm_guard.storage.releasing import overages_of, paired

__all__ = ["Namespace"]

SCHEMA: Final = 1
"""The version of the keys. Part of their prefix: another version does not see them."""

_STATUS: Final = {1: "settled", 2: "late", 3: "lost", 4: "duplicate", 5: "cancelled"}


class Namespace:
    """One namespace, as its process sees it. `clock`: for tests; `None`: the server's decides."""

    def __init__(self, name: str, *, clock: Clock | None, lapse_ms: int, tombstone_ms: int, max_records: int) -> None:
        self.name = name
        self.prefix = f"llmguard{SCHEMA}:{{{name}}}:"
        self.key = f"{self.prefix}e".encode()
        """A key of the namespace: in a cluster, it says which node has them all."""
        self.lapse_ms = lapse_ms
        self.codec = Codec()
        self.constant = (str(lapse_ms).encode(), str(tombstone_ms).encode(), str(max_records).encode())
        """What scripts are told each time: the lapse, how long an ended call id is known, how many records are kept."""
        self.clock = clock
        self._skew_ms = 0
        self._sent_shapes: set[str] = set()
        self._unsent: dict[str, Shape] = {}
        self.epoch = b""
        """Names the data that this process goes by, with a space at its end; empty before the first call."""
        self.lost: str | None = None
        """How the data was lost, until that is accepted."""
        self._seen_beat = 0

    # --------------------------------------------------------------------------------- clock

    def now_ms(self) -> int:
        """The server's clock, as far as it is known: calendar windows are worked out here."""
        if self.clock is not None:
            return self.clock.now_ms()
        return time.time_ns() // 1_000_000 + self._skew_ms

    def heard(self, now_ms: int) -> None:
        """Note what the server's clock has said just now."""
        if self.clock is None:
            self._skew_ms = now_ms - time.time_ns() // 1_000_000

    def head(self) -> tuple[bytes]:
        """The clock: the server's, or the injected one."""
        return (b"0" if self.clock is None else str(self.clock.now_ms()).encode(),)

    # -------------------------------------------------------------------------------- shapes

    def will_send(self, shapes: Iterable[Shape]) -> None:
        """Send those of them that the store has not been told, with the next call."""
        sent = self._sent_shapes
        for shape in shapes:
            if shape.digest not in sent:
                self._unsent[shape.digest] = shape

    def will_send_all(self) -> None:
        """The store does not know a shape. It may be that of a hold, so those of this call would not be enough."""
        self._sent_shapes.clear()
        self.will_send(self.codec.all_shapes())

    def new_shapes(self) -> bytes:
        """What is to be sent, as an argument; from here on it counts as sent."""
        if not self._unsent:
            return b""
        flat: list[Any] = []
        with contextlib.suppress(KeyError):  # another thread has taken the last one
            while self._unsent:
                digest, shape = self._unsent.popitem()
                flat += (digest, pack_text(shape.script), f"m{digest}", pack_text(shape.common))
                self._sent_shapes.add(digest)
        return msgspec.msgpack.encode(flat) if flat else b""

    # ----------------------------------------------------------------------------- arguments

    def epoch_arguments(self) -> tuple[bytes, bytes]:
        """By what a script knows that the store has lost its data."""
        # What a replica had not received yet when it took over is less than a lapse.
        return self.epoch, str(max(0, self._seen_beat - self.lapse_ms)).encode()

    def reserve_arguments(self, arguments: list[bytes]) -> list[bytes]:
        """All arguments of a call of the reserve or the amend script."""
        return [*self.head(), *self.epoch_arguments(), self.constant[0], self.new_shapes(), *arguments]

    def settle_arguments(self, arguments: list[bytes]) -> list[bytes]:
        """All arguments of a call of the settle script."""
        return [*self.head(), *self.constant[1:], self.new_shapes(), *arguments]

    # -------------------------------------------------------------------------- settlements

    def group(self, settlements: Sequence[Settlement]) -> Group:
        """Settlements with their arguments, to be handed over together."""
        shapes: list[Shape] = []
        now_ms = self.now_ms()
        group = Group(settlements, [self.codec.settlement(one, now_ms, shapes) for one in settlements])
        self.will_send(shapes)
        return group

    def settled(self, group: Group, replies: Sequence[Any], now_ms: int) -> bool:
        """Take the answers to what is left of `group`; whether all is answered. Else its arguments are made anew."""
        self.heard(now_ms)
        left: list[tuple[int, bytes]] = []
        shapes: list[Shape] = []
        for (place, _), reply in zip(group.left, replies, strict=True):
            settlement = group.settlements[place]
            status = reply[0]
            if status <= 5:
                overages = tuple(reply[2:]) or (0,) * reply[1]
                if status == 4 and group.sent and settlement.record is not None:
                    # The try before this one was executed, and its answer lost: this is not somebody else's.
                    status = 1
                    overages = overages_of(settlement.receipts, paired(settlement.receipts, settlement.actuals))
                group.replies[place] = Settled(settlement.call_id, cast("Any", _STATUS[status]), overages)
                continue
            if status == 8:
                self.will_send_all()
            left.append((place, self.codec.settlement(settlement, self.now_ms(), shapes, with_receipts=True)))
        self.will_send(shapes)
        group.left = left
        return not left

    # -------------------------------------------------------------------------------- epoch

    def adopt(self, epoch: bytes) -> None:
        """Go by the data that is in this epoch."""
        id_, beat, _before = epoch.split(b" ")
        self.epoch, self._seen_beat = id_ + b" ", int(beat)
        self._sent_shapes.clear()

    def data_lost(self, epoch: bytes) -> None:
        """The store is in another epoch.

        Raises:
            DataLost: it is not one that another process has accepted.
        """
        if epoch:
            id_, beat, before = epoch.split(b" ")
            if before and before + b" " == self.epoch:
                self.adopt(epoch)
                return
            if id_ + b" " == self.epoch and int(beat) >= self._seen_beat - self.lapse_ms:
                return  # accepted meanwhile
        what = "was restored from an older copy" if epoch else "was flushed"
        self.lost = f"redis: the store {what}: what was used and held is not known any more"
        raise DataLost(self.lost)

    def saw_beat(self, epoch: bytes) -> None:
        """Note the epoch that a heartbeat has told, and what has become of the data since the last one."""
        if epoch.startswith(self.epoch):
            beat = int(epoch.split(b" ")[1])
            if beat < self._seen_beat - self.lapse_ms and self.lost is None:
                with contextlib.suppress(DataLost):
                    self.data_lost(epoch)
            self._seen_beat = max(self._seen_beat, beat)
        elif epoch and epoch.split(b" ")[2] + b" " == self.epoch:  # another process has accepted the loss
            self.adopt(epoch)
            self.lost = None
