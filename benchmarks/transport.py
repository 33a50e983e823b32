"""What a guarded client of httpx and httpx2 costs, beside the same client without a guard.

    python -m benchmarks.transport [rounds] [requests per round]

The provider is a server in a process of its own, on the loopback. Guarded and plain clients take turns; each
request is timed to the first byte of its answer's body and to its end. A guarded request claims six limits,
reads its body, is metered as it passes, and is settled and recorded.
"""

from __future__ import annotations

import gc
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import httpx
import httpx2
import uvloop
from benchmarks._harness import Result, duration, table

from asgi_llm_guard import Budget, Concurrency, Context, Guard, Iterations, ProviderBudget, RateLimit

EVENTS: Final = 200
USAGE: Final = {"prompt_tokens": 20, "completion_tokens": 200, "total_tokens": 220}
LARGE: Final = 2_000_000
MANY: Final = 10**9


def event(text: str, **more: object) -> bytes:
    """One event of about 200 bytes."""
    value = {
        "id": "chatcmpl-7f3a2b1c9d",
        "object": "chat.completion.chunk",
        "created": 1_795_000_000,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **more,
    }
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    value = {
        "id": "chatcmpl-7f3a",
        "object": "chat.completion",
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    return json.dumps(value).encode()


STREAM: Final = (*[event("word " * 8)] * EVENTS, event("", choices=[], usage=USAGE), b"data: [DONE]\n\n")
ANSWERS: Final = {"small": completion("A short answer. " * 20), "large": completion("x" * LARGE)}


async def provider(scope: Any, receive: Any, send: Any) -> None:
    """Answers by the name in the path: a JSON body, or a stream of one message for each event."""
    while (await receive()).get("more_body"):
        pass
    kind = scope["path"].split("/")[1]
    headers = [(b"content-type", b"text/event-stream" if kind == "stream" else b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in STREAM if kind == "stream" else (ANSWERS[kind],):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


SERVER: Final = (
    "import sys, uvicorn; from benchmarks.transport import provider; "
    "uvicorn.run(provider, fd=int(sys.argv[1]), log_level='critical', lifespan='off', loop='uvloop')"
)


@contextmanager
def served() -> Iterator[str]:
    """The provider, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have it too
        number = listener.fileno()
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(number)], pass_fds=[number])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


class Sample(NamedTuple):
    first_s: float
    """Until the first byte of the body."""
    total_s: float


async def ask(client: Any, url: str, kind: str) -> Sample:
    asked = {
        "model": "gpt-4o-mini",
        "max_tokens": 256,
        "messages": [{"role": "user", "content": "Which of these rivers is the longest? " * 25}],
        "stream": kind == "stream",
        "stream_options": {"include_usage": True},
    }
    begun = time.perf_counter()
    first = 0.0
    async with client.stream("POST", f"{url}/{kind}/v1/chat/completions", json=asked) as response:
        async for _ in response.aiter_raw():
            first = first or time.perf_counter()
    return Sample(first - begun, time.perf_counter() - begun)


async def measure(clients: dict[str, Any], url: str, kind: str, rounds: int, requests: int) -> None:
    """Both clients of each library in turns; prints a table for the first byte and one for the whole."""
    samples: dict[str, list[Sample]] = {name: [] for name in clients}
    rng = random.Random(1)
    for number in range(rounds + 1):
        for name in rng.sample(list(clients), len(clients)):
            gc.collect()
            gc.disable()
            seen = [await ask(clients[name], url, kind) for _ in range(requests)]
            gc.enable()
            if number:  # the first round warms up
                samples[name].append(Sample(*(statistics.fmean(part) for part in zip(*seen, strict=True))))
    for title, index in (("first byte", 0), ("in all", 1)):
        print(table(results(samples, index), title=f"{kind}: {title}"))
        print()
        for library in ("httpx2", "httpx"):
            plain = [sample[index] for sample in samples[f"{library}, plain"]]
            guarded = [sample[index] for sample in samples[f"{library}, guarded"]]
            added = statistics.median(own - base for own, base in zip(guarded, plain, strict=True))
            print(f"{library}: {duration(max(added, 0))} added at the median of rounds")
        print()


def results(samples: dict[str, list[Sample]], index: int) -> Sequence[Result]:
    made = []
    for name, seen in samples.items():
        base = samples[name.replace("guarded", "plain")]
        own = [sample[index] for sample in seen]
        ratios = [one / other[index] for one, other in zip(own, base, strict=True)]
        made.append(Result(name=name, samples_s=own, ratios=ratios))
    return made


async def main(rounds: int, requests: int) -> None:
    guard = Guard(
        [
            Iterations(MANY),
            ProviderBudget({"openai": "$9000000/1d"}),
            Budget(["$9000000/daily", "$9000000/monthly"]),
            RateLimit(f"{MANY}/minute", counts="calls"),
            Concurrency(MANY, counts="calls"),
        ]
    )
    with served() as url:
        clients: dict[str, Any] = {
            "httpx2, plain": httpx2.AsyncClient(trust_env=False, timeout=60),
            "httpx2, guarded": guard.httpx_client(trust_env=False),
            "httpx, plain": httpx.AsyncClient(trust_env=False, timeout=60),
            "httpx, guarded": guard.httpx_client(library="httpx", trust_env=False),
        }
        async with guard.open(Context(caller="bench", session="s")):
            for kind in ("small", "stream", "large"):
                await measure(clients, url, kind, rounds, max(1, requests // (1 if kind == "small" else 5)))
        for client in clients.values():
            await client.aclose()
        await guard.aclose()


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    uvloop.run(main(*(numbers or [40, 50])[:2]))
