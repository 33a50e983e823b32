"""LiteLLM's hooks on Redis, called as its proxy calls them. Run by `redis_peers.py --litellm`, with another Python.

    PYTHON -m benchmarks._litellm port rounds operations

- max iterations: one counter of a session, before the call.
- provider budgets: the filter of deployments before the call and the cost after it, which goes to Redis in
  batches, once a second.
- v3 limiter: requests (and tokens) per minute of a key, a user and a team, before the call.

Every operation has a body of half a kilobyte. None of them settles what was reserved.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it is fetched while the module is imported

import redis.asyncio
import uvloop
from benchmarks._evalsha import NAME, four_counters
from benchmarks._harness import compare_async, table
from litellm.caching import DualCache, RedisCache
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.hooks.max_iterations_limiter import _PROXY_MaxIterationsHandler
from litellm.proxy.hooks.parallel_request_limiter_v3 import _PROXY_MaxParallelRequestsHandler_v3
from litellm.proxy.utils import InternalUsageCache
from litellm.router_strategy.budget_limiter import RouterBudgetLimiting

MOST = 10**9
SUBJECTS = 100
Operation = Callable[[], Awaitable[Any]]


def _data(n: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How tall is the highest mountain of Europe? " * 10}]
    return {"model": "gpt-4o-mini", "messages": messages, "metadata": {"session_id": f"session-{n}"}, "max_tokens": 100}


def hook(handler: Any, cache: DualCache, *, requests: int | None = None, tokens: int | None = None) -> Operation:
    """One call of a pre-call hook."""
    keys = [
        UserAPIKeyAuth(
            api_key=f"key-{n}",
            user_id=f"user-{n}",
            team_id=f"team-{n % 4}",
            metadata={"max_iterations": MOST},
            rpm_limit=requests,
            user_rpm_limit=requests,
            team_rpm_limit=requests,
            tpm_limit=tokens,
            user_tpm_limit=tokens,
            team_tpm_limit=tokens,
        )
        for n in range(SUBJECTS)
    ]
    numbers = itertools.count()

    async def operation() -> None:
        n = next(numbers) % SUBJECTS
        await handler.async_pre_call_hook(keys[n], cache, _data(n), "acompletion")

    return operation


def budget(router: Any) -> Operation:
    """The filter of two deployments, and the cost of the call afterwards."""
    deployments = [
        {"litellm_params": {"model": model}, "model_info": {"id": model}}
        for model in ("openai/gpt-4o-mini", "anthropic/claude-3-5-haiku-20241022")
    ]
    logged = {"response_cost": 0.001, "model_id": deployments[0]["model_info"]["id"], "custom_llm_provider": "openai"}

    async def operation() -> None:
        assert len(await router.async_filter_deployments("chat", deployments, [], {})) == 2
        await router.async_log_success_event({"standard_logging_object": logged}, None, None, None)

    return operation


async def measure(port: int, rounds: int, operations: int) -> None:
    client = redis.asyncio.Redis(host="127.0.0.1", port=port, protocol=2, max_connections=100)
    cache = DualCache(redis_cache=RedisCache(host="127.0.0.1", port=port))
    usage = InternalUsageCache(dual_cache=cache)
    limiter = _PROXY_MaxParallelRequestsHandler_v3(usage)
    each = {"budget_limit": 1e9, "time_period": "1d"}
    rows: dict[str, Operation] = {
        NAME: await four_counters(client),
        "LiteLLM max iterations": hook(_PROXY_MaxIterationsHandler(usage), cache),
        "LiteLLM provider budgets": budget(RouterBudgetLimiting(cache, {"openai": each, "anthropic": each})),
        "LiteLLM v3 limiter, requests of 3 scopes": hook(limiter, cache, requests=MOST),
        "LiteLLM v3 limiter, requests and tokens of 3 scopes": hook(limiter, cache, requests=MOST, tokens=MOST),
    }
    for operation in rows.values():
        for _ in range(20):
            await operation()
    for tasks in (1, 64):
        results = await compare_async(rows, operations=operations, tasks=tasks, rounds=rounds)
        print(table(results, title=f"LiteLLM, {tasks} at a time: wall-clock time each") + "\n", flush=True)
    os._exit(0)  # a task of LiteLLM's goes on for ever, and ignores that it is cancelled


def main() -> None:
    logging.disable(logging.WARNING)
    port, rounds, operations = map(int, sys.argv[1:])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(port, rounds, operations))


if __name__ == "__main__":
    main()
