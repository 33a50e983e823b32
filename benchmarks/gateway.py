"""What a call through the gateway costs, beside LiteLLM's Router and its proxy.

    python -m benchmarks.gateway [rounds] [requests per block]

Three deployments of one model, each a `FakeProvider` in a process of its own on the loopback. In process: a plain request
of httpx2, `gateway.chat`, and `Router.acompletion`. Over HTTP: the plain request, `gateway.app()` and LiteLLM's proxy,
each a server with one worker in a process of its own. Contenders take turns, in an order that changes from round to round;
1 and 64 calls at a time, whole answers and streams, the latter timed to their first byte or chunk.

The gateway holds and settles a session's calls, two budgets and the rates of each deployment. The Router has the same rates
and its default strategy, and its proxy checks one key; neither has a database, or holds money before a call.
LiteLLM is left out where it is not installed: run this with the Python of `.venv-litellm`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it is fetched while the module is imported

import httpx2
import uvloop

from asgi_llm_guard import Budget, Context, Guard, Iterations, ProviderBudget
from asgi_llm_guard.gateway import Deployment, Gateway

MODEL: Final = "gpt-4o-mini"
MANY: Final = 10**9
MESSAGES: Final[Any] = [{"role": "user", "content": "Which of these rivers is the longest? " * 25}]
ASKED: Final[dict[str, Any]] = {"model": "auto", "messages": MESSAGES, "max_tokens": 40}
KEY: Final = f"sk-{secrets.token_hex(16)}"
ROUTER: Final = find_spec("litellm") is not None

PROVIDER: Final = """
import sys
from asgi_llm_guard.testing import FakeProvider
with FakeProvider().serve() as url:
    print(url, flush=True)
    sys.stdin.read()
"""

Operation = Callable[[], Awaitable[float]]
"""One call; gives the seconds to its end, or to the first that came of a stream."""


class Block(NamedTuple):
    """Of one contender in one round."""

    median_s: float
    wall_s: float
    """Per call: the inverse of the calls per second."""


# ------------------------------------------------------------------------------------ contenders


def gateway_over(urls: Sequence[str]) -> Gateway:
    guard = Guard([Iterations(MANY), ProviderBudget({"openai": "$9000000/1d"}), Budget("$9000000/1d")])
    deployments = [
        Deployment(
            provider="openai", model=MODEL, name=f"d{number}", api_key=KEY, api_base=url, rpm=MANY, tpm=MANY,
            groups=("auto",),
        )
        for number, url in enumerate(urls)
    ]  # fmt: skip
    return Gateway(guard, deployments, context=Context(caller="bench", session="s"))


def model_list(urls: Sequence[str]) -> list[dict[str, Any]]:
    """The same deployments for LiteLLM."""
    return [
        {
            "model_name": "auto",
            "litellm_params": {
                "model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "rpm": MANY, "tpm": MANY
            },
        }
        for url in urls
    ]  # fmt: skip


def whole(client: httpx2.AsyncClient, urls: Sequence[str], body: Mapping[str, Any]) -> Operation:
    content, headers = json.dumps(body).encode(), {"content-type": "application/json", "authorization": f"Bearer {KEY}"}

    async def call() -> float:
        begun = time.perf_counter()
        response = await client.post(f"{random.choice(urls)}/chat/completions", content=content, headers=headers)
        assert response.status_code == 200, response.text
        return time.perf_counter() - begun

    return call


def streamed(client: httpx2.AsyncClient, urls: Sequence[str], body: Mapping[str, Any]) -> Operation:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    content, headers = (
        json.dumps(asked).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    )

    async def call() -> float:
        begun = time.perf_counter()
        first = 0.0
        url = f"{random.choice(urls)}/chat/completions"
        async with client.stream("POST", url, content=content, headers=headers) as response:
            assert response.status_code == 200
            async for _ in response.aiter_raw():
                first = first or time.perf_counter() - begun
        return first

    return call


def in_process(urls: Sequence[str], client: httpx2.AsyncClient, gateway: Gateway) -> tuple[dict[str, Operation], ...]:
    direct = {**ASKED, "model": MODEL}

    async def chat() -> float:
        begun = time.perf_counter()
        await gateway.chat("auto", MESSAGES, max_tokens=40)
        return time.perf_counter() - begun

    async def stream() -> float:
        begun = time.perf_counter()
        first = 0.0
        async for _ in gateway.stream("auto", MESSAGES, max_tokens=40):
            first = first or time.perf_counter() - begun
        return first

    wholes = {"httpx2, plain": whole(client, urls, direct), "**`gateway.chat`**": chat}
    streams = {"httpx2, plain": streamed(client, urls, direct), "**`gateway.stream`**": stream}
    if ROUTER:
        from litellm import Router

        router = Router(model_list=model_list(urls))

        async def complete() -> float:
            begun = time.perf_counter()
            await router.acompletion(model="auto", messages=MESSAGES, max_tokens=40)
            return time.perf_counter() - begun

        async def complete_streamed() -> float:
            begun = time.perf_counter()
            first = 0.0
            asked = {"include_usage": True}
            answer = await router.acompletion(
                model="auto", messages=MESSAGES, max_tokens=40, stream=True, stream_options=asked
            )
            async for _ in answer:
                first = first or time.perf_counter() - begun
            return first

        wholes["LiteLLM Router"] = complete
        streams["LiteLLM Router"] = complete_streamed
    return wholes, streams


# --------------------------------------------------------------------------------------- servers


@contextmanager
def process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(command, text=True, **options)
    try:
        yield started
    finally:
        started.terminate()
        started.wait()


def provider(stack: ExitStack) -> str:
    """A new one; where it is."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = stack.enter_context(process(sys.executable, "-c", PROVIDER, **pipes))
    assert started.stdout is not None
    return started.stdout.readline().strip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(port: int, path: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"no server on port {port}")


def serve_app(port: int, urls: Sequence[str]) -> None:
    """The mountable application, as a server."""
    import uvicorn

    app: Any = gateway_over(urls).app()
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", log_level="warning", access_log=False, lifespan="off")


def servers(stack: ExitStack, urls: Sequence[str]) -> dict[str, str]:
    """The base URL of each contender that is a server."""
    port = free_port()
    stack.enter_context(process(sys.executable, "-m", "benchmarks.gateway", "--serve", str(port), *urls))
    wait_for(port, "/healthz")
    found = {"**`gateway.app()`**": f"http://127.0.0.1:{port}/v1"}
    command = Path(sys.executable).with_name("litellm")
    if not ROUTER or not command.exists():
        return found
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = {
        "model_list": model_list(urls),
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML as well
    port, log = free_port(), stack.enter_context((folder / "log").open("w"))
    arguments = ("--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port))
    environment = {**os.environ, "LITELLM_LOG": "ERROR"}
    stack.enter_context(process(str(command), *arguments, env=environment, stdout=log, stderr=log))
    wait_for(port, "/health/liveliness")
    return {**found, "LiteLLM proxy": f"http://127.0.0.1:{port}/v1"}


# --------------------------------------------------------------------------------------- measure


async def block(operation: Operation, operations: int, tasks: int) -> Block:
    async def worker(count: int) -> list[float]:
        return [await operation() for _ in range(count)]

    counts = [operations // tasks + (number < operations % tasks) for number in range(tasks)]
    gc.collect()
    begun = time.perf_counter()
    seen = await asyncio.gather(*map(worker, counts))
    wall_s = time.perf_counter() - begun
    return Block(statistics.median(each for part in seen for each in part), wall_s / operations)


async def measure(title: str, contenders: Mapping[str, Operation], rounds: int, operations: int, tasks: int) -> None:
    samples: dict[str, list[Block]] = {name: [] for name in contenders}
    rng = random.Random(1)
    for number in range(rounds + 1):
        for name in rng.sample(list(contenders), len(contenders)):
            made = await block(contenders[name], operations, tasks)
            if number:  # the first round warms up
                samples[name].append(made)
    base = next(iter(samples.values()))
    print(f"### {title}, {tasks} at a time\n")
    print("| | median | added | calls/s | calls/s, min … max |\n|---|---|---|---|---|")
    for name, blocks in samples.items():
        added = statistics.median(own.median_s - plain.median_s for own, plain in zip(blocks, base, strict=True))
        rates = sorted(1 / each.wall_s for each in blocks)
        median = statistics.median(each.median_s for each in blocks)
        shown = "" if blocks is base else f"{added * 1e3:.2f} ms"
        print(
            f"| {name} | {median * 1e3:.2f} ms | {shown} | {statistics.median(rates):.0f} "
            f"| {rates[0]:.0f} … {rates[-1]:.0f} |"
        )
    print(flush=True)


async def main(rounds: int, operations: int) -> None:
    with ExitStack() as stack:
        urls = [provider(stack) for _ in range(3)]
        served = servers(stack, urls)
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
        client = httpx2.AsyncClient(trust_env=False, timeout=60, limits=limits)
        gateway = gateway_over(urls)
        wholes, streams = in_process(urls, client, gateway)
        direct = {**ASKED, "model": MODEL}
        http = {"provider, plain": whole(client, urls, direct)}
        http |= {name: whole(client, [url], ASKED) for name, url in served.items()}
        http_streams = {"provider, plain": streamed(client, urls, direct)}
        http_streams |= {name: streamed(client, [url], ASKED) for name, url in served.items()}
        print(f"litellm {_version('litellm')}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n", flush=True)
        for tasks, count in ((1, operations), (64, operations * 4)):
            await measure("In process, whole answers", wholes, rounds, count, tasks)
            await measure("In process, streams to the first chunk", streams, rounds, count, tasks)
            await measure("Over HTTP, whole answers", http, rounds, count, tasks)
            await measure("Over HTTP, streams to the first byte", http_streams, rounds, count, tasks)
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    os._exit(0)  # a task of LiteLLM's goes on for ever, and ignores that it is cancelled


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if sys.argv[1:2] == ["--serve"]:
        serve_app(int(sys.argv[2]), sys.argv[3:])
    else:
        given = [int(argument) for argument in sys.argv[1:]]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(*(given or (15, 48))))
