"""Owners in Redis: their heartbeats, their end, and the expiry of what lapsed ones hold. The script is `lua/owners.lua`."""

from __future__ import annotations

from functools import partial
from typing import Any

from asgi_llm_guard.claims import Heartbeat
from asgi_llm_guard.storage.redis_hello import Greeting
from asgi_llm_guard.storage.redis_loops import Connected, Lanes
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_replies import texts
from asgi_llm_guard.storage.redis_scripts import OWNERS

__all__ = ["Owners"]


class Owners:
    """`RedisStorage.heartbeat` and `retire`."""

    def __init__(self, namespace: Namespace, lanes: Lanes, greeting: Greeting) -> None:
        self._namespace = namespace
        self._lanes = lanes
        self._greeting = greeting
        self._beats: dict[str, int] = {}
        self._unsure: set[str] = set()
        """Owners a heartbeat of which has not been answered."""

    async def heartbeat(self, owner: str) -> Heartbeat:
        lane = self._lanes.lane()
        self._lanes.adopt_abandoned(lane)
        if not self._namespace.epoch:
            await self._greeting.hello(lane)
        # A beat whose answer was lost may have been the one that was told of a lapse.
        unsure = owner in self._unsure
        self._unsure.add(owner)
        reply = await self.ask(lane, b"beat", owner)
        self._unsure.discard(owner)
        missed = unsure and reply[0] - self._beats.get(owner, reply[0]) >= self._namespace.lapse_ms
        self._beats[owner] = reply[0]
        epoch = reply[1]
        self._namespace.saw_beat(epoch)
        return Heartbeat(reply[2] == 1 or missed, texts(reply[4:]), reply[0], reply[3])

    async def retire(self, owner: str) -> None:
        lane = self._lanes.lane()
        await self._lanes.all_settled()
        await self.ask(lane, b"retire", owner)
        self._beats.pop(owner, None)
        self._unsure.discard(owner)

    async def ask(self, lane: Connected, action: bytes, owner: str) -> Any:
        """What the script of owners replies to `beat`, `retire` or `sweep`, with all call ids that it has expired."""
        lane.lane.flush()
        arguments = [action, owner.encode(), *self._namespace.constant, self._namespace.epoch.strip()]
        ask = lane.submit if action == b"beat" else partial(self._lanes.twice, lane)
        reply = await ask(OWNERS, [*self._namespace.head(), *arguments])
        if reply[2] == b"shapes":
            self._namespace.will_send_all()
            reply = await ask(OWNERS, [*self._namespace.head(), *arguments, self._namespace.new_shapes()])
        expired: list[bytes] = []
        while reply[2] == b"more":
            expired += reply[3:]
            reply = await ask(OWNERS, [*self._namespace.head(), *arguments])
        self._namespace.heard(reply[0])
        return [*reply, *expired] if expired else reply
