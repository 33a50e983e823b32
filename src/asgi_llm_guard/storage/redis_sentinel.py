"""Asks Sentinels which server is the master now."""

from __future__ import annotations

import dataclasses

from asgi_llm_guard.storage.redis_address import Address, Endpoint
from asgi_llm_guard.storage.redis_wire import LinkError, ask_once

__all__ = ["Sentinels"]


class Sentinels:
    """The Sentinels of an address. The one that answered last is asked first.

    Source: redis.io, "Guidelines for Redis clients with support for Redis Sentinel".
    """

    def __init__(self, address: Address) -> None:
        self._master = address.master
        self._endpoints = list(address.endpoints)
        self._address = dataclasses.replace(
            address, db=0, username=address.sentinel_username, password=address.sentinel_password
        )

    async def find(self) -> Endpoint:
        """Where the master is. That it is one indeed is for the caller to see: a Sentinel may be behind.

        Raises:
            LinkError: no Sentinel knows.
        """
        answers: list[str] = []
        for endpoint in list(self._endpoints):
            try:
                reply = await ask_once(self._address, endpoint, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._master)
            except LinkError as error:
                answers.append(str(error).removeprefix("redis: "))
                continue
            if isinstance(reply, list) and len(reply) == 2:
                self._endpoints.remove(endpoint)
                self._endpoints.insert(0, endpoint)
                return Endpoint(reply[0].decode(), int(reply[1]))
            answers.append(f"{endpoint} does not know it")
        raise LinkError(f"redis: no Sentinel has a master {self._master!r}: {'; '.join(answers)}", sent=False)
