"""The link to a master that Sentinels look after."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from tests.ports import free_port
from tests.servers import RedisSentinel
from tests.storage.link.kit import COUNT, Changes, linked, outcome

from asgi_llm_guard.storage.redis_link import LinkError

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def sentinel_of_this_file() -> Iterator[RedisSentinel]:
    with RedisSentinel(password="of-the-data") as sentinel:
        yield sentinel


@pytest.fixture
def own_sentinel(sentinel_of_this_file: RedisSentinel) -> RedisSentinel:
    """For this file, which has its master changed: what a test has killed runs again for the next one."""
    for node in sentinel_of_this_file.nodes:
        if not node.running:
            node.start()
    return sentinel_of_this_file


async def test_finds_the_master(own_sentinel: RedisSentinel) -> None:
    """The calls go to the node that the Sentinels call the master, with the password of the data."""
    async with linked(own_sentinel.url) as link:
        assert await link.submit(COUNT, b"found", [b"1"]) == 1
        assert (await link.server_info()).role == "master"

    assert own_sentinel.master.call("GET", "found") == b"1"


async def test_asks_the_next_one_when_a_sentinel_is_gone(own_sentinel: RedisSentinel) -> None:
    """One Sentinel that answers is enough, wherever it stands in the URL."""
    url = own_sentinel.url.replace("@", f"@127.0.0.1:{free_port()},")
    async with linked(url) as link:
        assert await link.command("ECHO", "here") == b"here"


async def test_a_master_that_no_sentinel_knows_is_named(own_sentinel: RedisSentinel) -> None:
    """The calls fail as not sent, and say which name, and what each Sentinel said."""
    url = f"{own_sentinel.url}-misspelt".replace("@", f"@127.0.0.1:{free_port()},")
    async with linked(url) as link:
        error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert not error.sent
    assert "no Sentinel has a master 'guard-misspelt'" in str(error)
    assert "could not be reached" in str(error)
    assert str(error).count("does not know it") == 3
    assert "of-the-data" not in str(error)


async def test_the_sentinels_have_a_password_of_their_own() -> None:
    """`sentinel_password` is for the Sentinels, and the one before the host for the data."""
    with RedisSentinel() as sentinel:
        for each in sentinel.sentinels:
            each.call("ACL", "SETUSER", "default", ">of-the-sentinels")
        async with linked(f"{sentinel.url}?sentinel_password=of-the-sentinels") as link:
            assert await link.command("ECHO", "here") == b"here"
        async with linked(f"{sentinel.url}?sentinel_password=wrong") as link:
            error = await outcome(link.submit(COUNT, b"key", [b"1"]))

    assert isinstance(error, LinkError)
    assert str(error).count("refused the user or password") == 3
    assert "of-the-sentinels" not in str(error)


async def test_follows_a_planned_change_of_the_master(own_sentinel: RedisSentinel) -> None:
    """When the Sentinels promote the replica of a healthy master, calls are made there after a short trouble."""
    own_sentinel.wait_ok()
    async with linked(own_sentinel.url) as link:
        await link.submit(COUNT, b"planned", [b"1"])
        new = await asyncio.to_thread(own_sentinel.fail_over)
        at = await outcome(link.submit_command("CONFIG", "GET", "port"))
        while at != [b"port", str(new.port).encode()]:  # the old one takes calls until it is told
            error = await outcome(link.submit(COUNT, b"planned", [b"1"]))
            assert not isinstance(error, LinkError) or not error.sent or "lost" in str(error)
            at = await outcome(link.submit_command("CONFIG", "GET", "port"))
        assert isinstance(await link.submit(COUNT, b"planned", [b"1"]), int)


async def test_follows_the_promotion_after_the_master_died(own_sentinel: RedisSentinel) -> None:
    """When the master dies the link is down until another one is named, and then up by itself."""
    own_sentinel.wait_ok()
    changes = Changes()
    async with linked(own_sentinel.url, on_change=changes) as link:
        await link.submit(COUNT, b"died", [b"1"])
        old = own_sentinel.kill_master()
        await changes.last("down")
        await changes.last("up")

        port = await link.command("CONFIG", "GET", "port")
        assert port != [b"port", str(old.port).encode()]
        assert isinstance(await link.submit(COUNT, b"died", [b"1"]), int)
        assert changes.told == ["down", "up"]
