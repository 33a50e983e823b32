"""What the other rows are compared to: four counters checked and added in one EVALSHA, by redis-py as it comes.

About the least that a limiter over Redis can do with that client. Needs nothing of this project, so that the
same is measured in environments that cannot have it.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio

__all__ = ["NAME", "four_counters"]

NAME = "four counters in one EVALSHA, redis-py"

_SCRIPT = """
for i = 1, 4 do
  if tonumber(redis.call('GET', KEYS[i]) or 0) + 1 > tonumber(ARGV[1]) then return 0 end
end
for i = 1, 4 do
  if redis.call('INCRBY', KEYS[i], 1) == 1 then redis.call('PEXPIRE', KEYS[i], ARGV[2]) end
end
return 1
"""
_SUBJECTS = 100


async def four_counters(client: redis.asyncio.Redis) -> Callable[[], Awaitable[Any]]:
    """One admission: a session, a user, a team and all together."""
    sha = await client.script_load(_SCRIPT)
    numbers = itertools.count()

    async def operation() -> None:
        n = next(numbers) % _SUBJECTS
        keys = (f"floor:session-{n}", f"floor:user-{n}", f"floor:team-{n % 4}", "floor:all")
        admitted = await client.evalsha(sha, 4, *keys, 10**9, 60_000)
        assert admitted == 1

    return operation
