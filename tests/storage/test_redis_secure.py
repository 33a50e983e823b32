"""Nobody's ids reach beyond their own counters, and no secret is shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.servers import OwnRedis, RedisServer, unique_namespace
from tests.storage.values import DAY_MS, HOUR_MS, START, claim, draft, level, meter, record, settle, state_of, take

from asgi_llm_guard.claims import Bundle, Ended, Granted
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.redis import RedisStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Distinct, Lifetime, Rolling, Slots

pytestmark = pytest.mark.anyio

HOSTILE = (
    "*",
    "?[a-z]*",
    "}:e",
    "{other}",
    "a:b::c",
    "..:%3A%25{}%",
    "\r\nFLUSHALL\r\n",
    "*1\r\n$8\r\nFLUSHALL\r\n",
    "\x00\x01\x7f\x80\xff",
    "\u202egreen\u0000",
    "日本語🙂" * 10,
    "'); redis.call('FLUSHALL') --",
    "-",
    "a-b-",
    " ",
    "x" * 70_000,
    "é" * 40_000,
)


@pytest.fixture
async def redis(redis_server: RedisServer, namespace: str) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(redis_server.url, namespace=namespace, clock=FrozenClock(START), timeout_s=10)
    yield storage
    await storage.aclose()


async def live(storage: Storage, text: str) -> list[object]:
    """A call whose every id is `text`, from its admission to its end, and one that lapses; gives all answers."""
    on = (meter(Rolling(DAY_MS), subject=text, policy=text), meter(Slots(), subject=text), meter(Distinct(HOUR_MS)))
    claims = (claim(on[0], 3), claim(on[1], 1), claim(on[2], 1, text))
    answers: list[object] = [await storage.heartbeat(text)]
    for call_id in (text, f"{text}-1", f"x-{text}"):
        plan = (Bundle(call_id, claims, msgspec.structs.replace(draft(call_id), session=text, user=text)),)
        answers += [await storage.reserve(text, (plan,)), await storage.reserve(text, (plan,))]
    answers.append(await storage.amend(text, Bundle(text, claims[:2])))
    answers.append(await settle(storage, text, 2, record=msgspec.structs.replace(record(text, 2), session=text)))
    answers.append(await storage.read(on))
    await storage.retire(text)
    answers.append(await storage.records())
    # Slots that nobody holds need not be written down.
    answers.append([line for line in await state_of(storage) if b",5,0,0,0,0,null]" not in line])
    return answers


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
async def test_ids_may_be_any_text(redis: RedisStorage, redis_server: RedisServer, namespace: str, text: str) -> None:
    """T9: globs, braces, colons, protocol, control characters and very long text are ids like any other, for all verbs."""
    neighbour = RedisStorage(redis_server.url, namespace=unique_namespace(), clock=FrozenClock(START), timeout_s=10)
    await take(neighbour, "open", claim(meter(Lifetime(HOUR_MS)), 7))
    before = await state_of(neighbour)
    assert await live(redis, text) == await live(MemoryStorage(clock=FrozenClock(START)), text)
    copy = RedisStorage(redis_server.url, namespace=unique_namespace(), clock=FrozenClock(START), timeout_s=10)
    await copy.load([line async for line in redis.export()])
    assert await state_of(copy) == await state_of(redis)
    keys = {key for key in redis_server.call("KEYS", "*") if f"{{{namespace}}}".encode() in key}
    assert all(key.startswith(f"llmguard1:{{{namespace}}}:".encode()) for key in keys)
    assert await state_of(neighbour) == before
    await copy.aclose()
    await neighbour.aclose()


@pytest.mark.parametrize("name", ["", "a*", "a?", "[a]", "{a}", "a}b", "a:b", "a b", "a\n", "ä", "a" * 65, "a\x00"])
def test_a_namespace_is_a_plain_word(redis_server: RedisServer, name: str) -> None:
    """What would be a glob, a hash tag or another key is refused at configuration, in the argument and in the URL."""
    if name:
        with pytest.raises(ConfigurationError, match="namespace"):
            RedisStorage(redis_server.url, namespace=name)
    else:
        with pytest.raises(ConfigurationError):
            RedisStorage(f"{redis_server.url}?namespace=")


async def test_namespaces_that_begin_alike_are_strangers(redis_server: RedisServer) -> None:
    """An export, a load and a loss of one namespace touch no other, also where one's name begins with the other's."""
    base = unique_namespace()
    clock = FrozenClock(START)
    storages = [
        RedisStorage(redis_server.url, namespace=base + end, clock=clock, timeout_s=10) for end in ("", ".a", "-a", "_")
    ]
    for n, storage in enumerate(storages):
        await take(storage, "same", claim(meter(Lifetime(HOUR_MS)), n + 1))
    for n, storage in enumerate(storages):
        assert await level(storage, meter(Lifetime(HOUR_MS))) == (0, n + 1)
        assert len([line for line in await state_of(storage) if b'"hold"' in line]) == 1
        await storage.aclose()


async def test_a_password_is_shown_nowhere(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    """Neither errors, logs, nor the storage's text show the password, right or wrong, before and after failures."""
    caplog.set_level(logging.DEBUG)
    secret = "s3cret-pa55word"
    server = own_redis(password=secret)
    shown: list[str] = []
    right = RedisStorage(server.url, timeout_s=2)
    wrong = RedisStorage(server.url.replace(secret, "wr0ng-pa55word"), timeout_s=2)
    await take(right, "call", claim(meter(Slots())))
    for storage in (wrong, right):
        if storage is right:
            server.kill()
        for n in range(8):
            with pytest.raises(StorageError) as raised:
                await take(storage, f"next-{n}", claim(meter(Slots())))
            error: BaseException | None = raised.value
            while error is not None:
                shown += [str(error), repr(error), repr(vars(error))]
                error = error.__cause__ or error.__context__
        shown += [repr(storage), str(storage)]
    shown += [entry.getMessage() + str(entry.exc_info) for entry in caplog.records]
    with pytest.raises(ConfigurationError) as refused:
        RedisStorage(f"{server.url}&nonsense=1&namespace=a*")
    shown += [str(refused.value), repr(refused.value)]
    assert not [text for text in shown if "pa55word" in text]
    await asyncio.gather(right.aclose(), wrong.aclose())


async def test_a_call_id_of_another_namespace_is_unknown(redis: RedisStorage, redis_server: RedisServer) -> None:
    """Nobody ends or changes another namespace's call by its id."""
    other = RedisStorage(redis_server.url, namespace=unique_namespace(), clock=FrozenClock(START), timeout_s=10)
    on = claim(meter(Slots()))
    await take(redis, "call", on)
    assert (await settle(other, "call")).status == "cancelled"
    assert isinstance(await other.amend("me", Bundle("call", (on,))), Ended)
    assert isinstance(await redis.amend("me", Bundle("call", (on,))), Granted)
    await other.aclose()
