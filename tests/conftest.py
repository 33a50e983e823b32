from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from tests.fault_proxy import FaultProxy
from tests.servers import (
    OwnRedis,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    shared_cluster,
    shared_redis,
    shared_sentinel,
    shared_valkey,
    unique_namespace,
)

from asgi_llm_guard import background

# No test leaves this machine: its thousands of HTTP clients need not read everybody's certificates, 20 ms each.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("nobody.pem"))

# The same examples on every run: a red test is the change's doing. `make check-full` searches for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, derandomize=False, max_examples=2_000)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws from the constants of whatever modules of ours are loaded: with several processes, that is
    other examples on every run. Only where it is to search for new ones, it may.
    """
    if config.getoption("--hypothesis-profile", None) != "full":
        none = Constants()
        providers._get_local_constants = lambda: none


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: no full collection need look at these millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Servers and SDKs of the tests are built on asyncio; one loop kind for all of them."""
    return "asyncio"


@pytest.fixture(autouse=True)
def end_what_is_left() -> Iterator[None]:
    """A guard that a test has not closed beats, works and logs errors no more while the tests behind it run."""
    hearts, chores = set(background._background._hearts), _chores()
    yield
    for heart in set(background._background._hearts) - hearts:
        background.let_go(heart)
    for chore in _chores() - chores:
        background.later(chore.cancel)


def _chores() -> set[asyncio.Task[object]]:
    """What guards do now and then, in the background."""
    loop = background._background._loop
    if loop is None:
        return set()
    return {task for task in asyncio.all_tasks(loop) if getattr(task.get_coro(), "__qualname__", "") == "_repeat"}


# Shared servers start when the first test asks, and end with the process. A test that needs to stop, flush or
# reconfigure a server asks for one of its own.


@pytest.fixture
def redis_server() -> RedisServer:
    return shared_redis()


@pytest.fixture
def valkey_server() -> RedisServer:
    return shared_valkey()


@pytest.fixture
def redis_cluster() -> RedisCluster:
    return shared_cluster()


@pytest.fixture
def redis_sentinel() -> RedisSentinel:
    return shared_sentinel()


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    """Starts servers for one test, which may do to them what it likes: `own_redis(program="valkey", appendonly=True)`."""
    with contextlib.ExitStack() as servers:
        yield lambda **options: servers.enter_context(RedisServer(**options))


@pytest.fixture
def fault_proxy() -> Iterator[Callable[[str], FaultProxy]]:
    """Starts proxies for one test: `fault_proxy(server.url)`."""
    with contextlib.ExitStack() as proxies:
        yield lambda url: proxies.enter_context(FaultProxy(url))


@pytest.fixture
def namespace() -> str:
    """A namespace that nobody else has on a shared server."""
    return unique_namespace()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A new, empty database of this process's PostgreSQL."""
    from tests.postgres import shared_postgres  # not everywhere is there a driver

    server = shared_postgres()
    url = server.new_database()
    yield url
    server.drop_database(url)
