"""Requests per second over sockets: uvicorn with one worker, 16 connections, guarded and not, in turns.

    python -m benchmarks.sockets [rounds] [seconds per block]

Each contender is a server process of its own; one client process drives them one after the other, in an order that
changes from round to round. The request is a chat completion of 1 KB, the endpoint parses it and answers with its usage.
The guard holds six claims and the bound of live session ids, reads the body, meters the answer and settles.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, cast

import uvicorn
import uvloop
from benchmarks.asgi import BODY, PATH, USER, App, Receive, Scope, Send, endpoint, guarded
from tests.servers import RedisServer

CONNECTIONS: Final = 16
SESSIONS: Final = 100
_ANY_PORT: Final = 0


def identified(app: App) -> App:
    """What an authentication middleware leaves behind."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["user"] = USER
        await app(scope, receive, send)

    return call


def serve(storage: str) -> None:
    app = endpoint() if storage == "none" else guarded(endpoint(), storage=storage)
    config = uvicorn.Config(
        identified(app), host="127.0.0.1", port=_ANY_PORT, loop="uvloop", http="httptools", log_level="warning", lifespan="off"
    )  # fmt: skip
    socket = config.bind_socket()
    print(socket.getsockname()[1], flush=True)
    uvicorn.Server(config).run([socket])


def request(session: int) -> bytes:
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: llm.example\r\ncontent-type: application/json\r\n"
        f"x-session-id: s-{session}\r\ncontent-length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


class Client(asyncio.Protocol):
    """One connection: the next request goes out when the answer has come."""

    def __init__(self, until: float, latencies: list[float]) -> None:
        self.until = until
        self.latencies = latencies
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        self.buffer = b""
        self.begun = time.perf_counter()
        self.transport.write(request(random.randrange(SESSIONS)))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        assert head.startswith(b"HTTP/1.1 200"), self.buffer
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self.latencies.append(now - self.begun)
        if now < self.until:
            self.send()
        else:
            self.transport.close()
            self.done.set_result(None)


async def block(port: int, seconds: float) -> tuple[float, list[float]]:
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    clients = [
        (await loop.create_connection(lambda: Client(begun + seconds, latencies), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    await asyncio.gather(*(client.done for client in clients))
    return len(latencies) / (time.perf_counter() - begun), latencies


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
        return
    numbers = [float(argument) for argument in sys.argv[1:]]
    rounds, seconds = [*numbers, *(8.0, 1.5)[len(numbers) :]]
    with RedisServer() as redis, tempfile.TemporaryDirectory() as folder:
        storages = {
            "bare Starlette": "none",
            "guard, memory": "memory://",
            "guard, SQLite": f"sqlite:///{Path(folder, 'guard.db')}",
            "guard, Redis": f"{redis.url}?timeout=5",
        }
        command = [sys.executable, "-m", "benchmarks.sockets", "serve"]
        servers = {
            name: subprocess.Popen([*command, storage], stdout=subprocess.PIPE, text=True, env={**os.environ})
            for name, storage in storages.items()
        }
        try:
            ports = {}
            for name, server in servers.items():
                assert server.stdout is not None
                ports[name] = int(server.stdout.readline())
            report(asyncio.Runner(loop_factory=uvloop.new_event_loop), ports, int(rounds), seconds)
        finally:
            for server in servers.values():
                server.terminate()
            for server in servers.values():
                server.wait(20)


def report(runner: asyncio.Runner, ports: dict[str, int], rounds: int, seconds: float) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ports}
    samples: dict[str, list[float]] = {name: [] for name in ports}
    with runner:
        for port in ports.values():
            runner.run(block(port, 0.5))
        for number in range(rounds):
            for name in random.Random(number).sample(list(ports), len(ports)):
                rate, latencies = runner.run(block(ports[name], seconds))
                rates[name].append(rate)
                samples[name] += latencies
    bare = rates["bare Starlette"]
    print(f"{rounds} rounds of {seconds} s, {CONNECTIONS} connections\n")
    print("| | requests/s, median | min … max | ratio, median | min … max | p99 |\n|---|---|---|---|---|---|")
    for name, values in rates.items():
        ratios = [own / other for own, other in zip(values, bare, strict=True)]
        p99 = sorted(samples[name])[int(len(samples[name]) * 0.99)]
        print(
            f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} … {max(values):,.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} … {max(ratios):.2f} | {p99 * 1e3:.1f} ms |"
        )


if __name__ == "__main__":
    main()
