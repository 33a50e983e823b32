"""A guard follows its files: all of what they say, or nothing of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from asgi_llm_guard import Context, Guard, GuardMiddleware
from asgi_llm_guard.control import Actor
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded
from asgi_llm_guard.events import ConfigurationChanged, ConfigurationRejected, Event
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.settings import (
    GuardSettings,
    Reload,
    build_gateway_arguments,
    build_guard_arguments,
    build_middleware_arguments,
    load_settings,
    watch,
)
from asgi_llm_guard.settings.reload import CHORE

pytestmark = pytest.mark.anyio

SECRET = "a secret that is long enough"
LIMIT = '[[policies]]\nkind = "iterations"\nlimit = {limit}\n'

Open = Callable[..., AbstractAsyncContextManager[tuple[Guard, Reload, list[Event]]]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guard.toml"


def write(file: Path, text: str | None) -> None:
    """Put the text into the file; `None`: remove it."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")


@pytest.fixture
def opened(file: Path) -> Open:
    """Opens a guard on the file, with this text in it."""

    @asynccontextmanager
    async def open_guard(text: str) -> AsyncIterator[tuple[Guard, Reload, list[Event]]]:
        write(file, text)
        settings = load_settings(file)
        async with Guard(**build_guard_arguments(settings)) as guard:
            events: list[Event] = []
            guard.observe(events.append)
            yield guard, watch(guard, settings), events

    return open_guard


async def admitted(guard: Guard, session: str, *, calls: int = 10, **who: Any) -> int:
    """How many calls in a row are admitted."""
    context = Context(**{"caller": "acme", "session": session, **who})
    for number in range(calls):
        try:
            async with guard.open(context), guard.call(model="openai/gpt-4o-mini", max_output_tokens=1):
                pass
        except LimitExceeded:
            return number
    return calls


async def test_what_changed_holds(file: Path, opened: Open) -> None:
    """A changed limit holds from the next call on, and what was counted stays counted."""
    async with opened(LIMIT.format(limit=2)) as (guard, reload, events):
        assert await admitted(guard, "one") == 2
        before = reload.version
        write(file, LIMIT.format(limit=5))
        await guard.chores.run(CHORE)
        assert await admitted(guard, "one") == 3
        assert await admitted(guard, "two") == 5
        assert reload.version != before
        assert reload.error is None
        assert [event for event in events if isinstance(event, ConfigurationChanged)] == [
            ConfigurationChanged(reload.version)
        ]


async def test_a_mistake_changes_nothing(file: Path, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """With a mistake in the file the last good configuration holds; the mistake is told once, with its line."""
    async with opened(LIMIT.format(limit=2)) as (guard, reload, events):
        version = reload.version
        write(file, 'disclose = "owned"\n' + LIMIT.format(limit='"many"'))
        with caplog.at_level(logging.ERROR):
            assert [await reload.check() for _ in range(3)] == [False] * 3
        assert await admitted(guard, "one") == 2
        (rejected,) = [event for event in events if isinstance(event, ConfigurationRejected)]
        assert rejected == ConfigurationRejected(version, reload.error or "")
        assert f"{file}, line 4: policies[0]: iterations.limit: expected a whole number" in rejected.error
        assert [record.levelname for record in caplog.records if str(file) in record.getMessage()] == ["ERROR"]

        write(file, LIMIT.format(limit=3))
        assert await reload.check()
        assert reload.error is None
        assert await admitted(guard, "two") == 3


@pytest.mark.parametrize(
    "broken",
    ["[[policies", "\udcff", f"max_waiting = {'1' * 5_000}", f"gateway = {'[' * 5_000}{']' * 5_000}", None],
    ids=["not TOML", "not text", "a long number", "deep", "gone"],
)
async def test_a_file_that_cannot_be_read_changes_nothing(file: Path, opened: Open, broken: str | None) -> None:
    """A file that is half written, or is gone for a moment, changes nothing."""
    async with opened(LIMIT.format(limit=2)) as (guard, reload, _):
        write(file, broken)
        assert not await reload.check()
        assert str(file) in (reload.error or "")
        assert await admitted(guard, "one") == 2
        write(file, LIMIT.format(limit=2))
        assert await reload.check()
        assert reload.error is None


async def test_a_file_that_is_named_before_it_is_there(
    file: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Settings that name a file which comes later hold as soon as it is there; what is wrong until then is told once."""
    async with opened(LIMIT.format(limit=2)) as (guard, reload, events):
        write(file, LIMIT.format(limit=3) + '[identity]\nkind = "api_keys"\nfile = "keys.toml"\n')
        with caplog.at_level(logging.ERROR):
            assert [await reload.check() for _ in range(3)] == [False] * 3
        assert f"{file}, line 4: identity: " in caplog.records[0].message
        assert len(events) == len(caplog.records) == 1
        file.with_name("keys.secret").write_text(SECRET, encoding="utf-8")
        file.with_name("keys.toml").write_text('secret_file = "keys.secret"\n', encoding="utf-8")
        assert await reload.check()
        assert reload.error is None
        assert await admitted(guard, "one") == 3


async def test_a_change_between_reading_and_following(file: Path) -> None:
    """What changes after the settings were read, and before anybody follows them, holds with the first look."""
    write(file, LIMIT.format(limit=2))
    settings = load_settings(file)
    write(file, LIMIT.format(limit=3))
    async with Guard(**build_guard_arguments(settings)) as guard:
        reload = watch(guard, settings)
        assert await reload.check()
        assert await admitted(guard, "one") == 3
        assert not await reload.check()


async def test_a_change_while_another_is_taken_over(file: Path) -> None:
    """What changes while an earlier change is read and put in force holds with the next look."""

    class Slow(Guard):
        """Somebody writes while it changes."""

        def replace(self, **changes: Any) -> None:
            super().replace(**changes)
            if reload.version == settings.content:
                write(file, LIMIT.format(limit=4))

    write(file, LIMIT.format(limit=2))
    settings = load_settings(file)
    async with Slow(**build_guard_arguments(settings)) as guard:
        reload = watch(guard, settings)
        write(file, LIMIT.format(limit=3))
        assert await reload.check()
        assert await admitted(guard, "one") == 3
        assert await reload.check()
        assert await admitted(guard, "two") == 4


async def test_a_long_file(file: Path, opened: Open) -> None:
    """A change far behind the beginning of a long file is seen, too."""
    comment = "# " + "x" * 100 + "\n"
    async with opened(comment * 50_000 + LIMIT.format(limit=2)) as (guard, reload, _):
        write(file, comment * 50_000 + LIMIT.format(limit=3))
        assert await reload.check()
        assert await admitted(guard, "one") == 3


async def test_keys_beside_those_that_are_administered(file: Path, opened: Open) -> None:
    """T25: a key that was taken out of the file beside the administered keys ends, and administered ones stay."""
    plain, record = ApiKeys.generate("acme", secret=SECRET)
    keys = file.with_name("keys.toml")
    keys.write_text(record.to_toml(), encoding="utf-8")
    text = f"""
        [control]
        url = "sqlite:///{file.with_name("control.db")}"
        secret = "{SECRET}"
        [identity]
        kind = "control"
        file = "keys.toml"
        secret = "{SECRET}"
    """
    async with opened(text) as (guard, reload, _):
        assert guard.control is not None
        administered, _ = await guard.control.new_key("zoe", actor=Actor(name="anna"))
        await guard.chores.run("control")
        transport = httpx2.ASGITransport(app=GuardMiddleware(_echo, guard=guard))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:

            async def status(key: str) -> int:
                return (await client.post("/", headers={"authorization": f"Bearer {key}"})).status_code

            assert (await status(plain), await status(administered)) == (200, 200)
            keys.write_text("", encoding="utf-8")
            assert await reload.check()
            assert (await status(plain), await status(administered)) == (403, 200)


@pytest.mark.parametrize(
    "line",
    [
        'storage = "sqlite:///other.db"',
        'session_overflow = "share"',
        'exempt = ["/health"]',
        "[cache]",
        "[[routes]]\npath = '/x'",
    ],
)
async def test_what_cannot_change(file: Path, opened: Open, line: str) -> None:
    """What only a new start can change is named, and nothing else of the file holds either."""
    async with opened(LIMIT.format(limit=2)) as (guard, reload, _):
        write(file, f"{line}\n{LIMIT.format(limit=5)}")
        assert not await reload.check()
        assert f"{line.strip('[]').split()[0].split(']')[0]}: cannot change while the service runs" in (
            reload.error or ""
        )
        assert await admitted(guard, "one") == 2


async def test_a_key_that_was_left_out_is_the_default_again(file: Path, opened: Open) -> None:
    """What the file does not say any more is as if it had never said it."""
    text = LIMIT.format(limit=9) + "[agents.crawler]\nmax_iterations = 1\n[statuses]\niterations = 418\n"
    async with opened(text.replace("418", "403")) as (guard, reload, _):
        assert await admitted(guard, "one", agent="crawler") == 1
        write(file, LIMIT.format(limit=9))
        assert await reload.check()
        assert await admitted(guard, "two", agent="crawler") == 9
        assert guard.engine.telling.statuses == {}


async def test_files_that_the_settings_name(file: Path, opened: Open) -> None:
    """A changed keys file is followed, too: a key that was taken away ends."""
    keys = file.with_name("keys.toml")
    plain, record = ApiKeys.generate("acme", secret=SECRET)
    file.with_name("keys.secret").write_text(SECRET, encoding="utf-8")
    keys.write_text(f'secret_file = "keys.secret"\n{record.to_toml()}', encoding="utf-8")
    async with opened('[identity]\nkind = "api_keys"\nfile = "keys.toml"\n') as (guard, reload, _):
        app = GuardMiddleware(_echo, guard=guard)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"authorization": f"Bearer {plain}"}
            assert (await client.post("/", headers=headers)).status_code == 200
            keys.write_text('secret_file = "keys.secret"\n', encoding="utf-8")
            assert await reload.check()
            assert (await client.post("/", headers=headers)).status_code == 403


async def test_routes(file: Path) -> None:
    """The routes of the middleware are those of the file."""
    write(file, "[[routes]]\npath = '/one'\n" + LIMIT.format(limit=1))
    settings = load_settings(file)
    async with Guard(**build_guard_arguments(settings)) as guard:
        app = GuardMiddleware(_echo, guard=guard, **build_middleware_arguments(settings))
        reload = watch(guard, settings)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:

            async def statuses(path: str, session: str) -> list[int]:
                headers = {"x-session-id": session}
                return [(await client.post(path, headers=headers)).status_code for _ in range(2)]

            assert await statuses("/one", "a") == [200, 429]
            assert await statuses("/two", "b") == [200, 200]
            write(file, "[[routes]]\npath = '/two'\n" + LIMIT.format(limit=1))
            assert await reload.check()
            assert await statuses("/one", "c") == [200, 200]
            assert await statuses("/two", "d") == [200, 429]


DEPLOYMENT = '[[gateway.deployments]]\nname = "{name}"\nprovider = "openai"\nmodel_name = "{model}"\napi_key = "k"\n'


async def test_deployments(file: Path) -> None:
    """Conformance 27: deployments of the gateway come, go and change with the file; its other settings need a new start."""
    one, two = DEPLOYMENT.format(name="one", model="gpt-4o"), DEPLOYMENT.format(name="two", model="gpt-4o-mini")
    write(file, one)
    settings = load_settings(file)
    guard = Guard(**build_guard_arguments(settings))
    async with guard:
        gateway = Gateway(guard, **build_gateway_arguments(settings))
        async with gateway:
            reload = watch(guard, settings, gateway=gateway)
            write(file, one + two)
            assert await reload.check()
            assert [each.name for each in gateway.deployments] == ["one", "two"]
            write(file, two + "rpm = 7\n")
            assert await reload.check()
            assert [(each.name, each.rpm) for each in gateway.deployments] == [("two", 7)]
            write(file, two + "[gateway.retry]\nretries = 1\n")
            assert not await reload.check()
            assert "gateway.retry: cannot change" in (reload.error or "")
            assert [(each.name, each.rpm) for each in gateway.deployments] == [("two", 7)]


async def test_nobody_has_to_ask(file: Path) -> None:
    """A guard that watches its file follows it by itself, within two seconds."""
    write(file, LIMIT.format(limit=2))
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def see(event: Event) -> None:
        if isinstance(event, ConfigurationChanged):
            loop.call_soon_threadsafe(changed.set)

    async with Guard.from_file(file, watch=True) as guard:
        guard.observe(see)
        assert await admitted(guard, "one") == 2
        file.with_name("new").write_text(LIMIT.format(limit=4), encoding="utf-8")
        file.with_name("new").rename(file)
        async with asyncio.timeout(60):  # a machine may be busy
            await changed.wait()
        assert await admitted(guard, "two") == 4


async def test_alert_rules_that_lose_their_policy(opened: Open, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S3: a change that takes away the policy that an alert rule is about holds, and the log says with the rule's line that
    it has no effect any more; rules that were about none before, as about one of code, are not told."""
    alerts = '[[alerts.thresholds]]\npolicy = "mine"\n[[alerts.thresholds]]\npolicy = "of_code"\n'
    policy = '[[policies]]\nkind = "iterations"\nlimit = 5\nname = "{}"\n'
    async with opened(policy.format("mine") + alerts) as (_, reload, _):
        write(file, policy.format("theirs") + alerts)
        with caplog.at_level(logging.WARNING, "asgi_llm_guard"):
            assert await reload.check()
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}, line 6: alerts.thresholds[0].policy: no policy is called 'mine' any more: the alert rule has no effect"
    ]


async def test_settings_of_code_have_no_file() -> None:
    """Settings that were built in code cannot be watched."""
    async with Guard() as guard:
        with pytest.raises(ConfigurationError, match="read from no file"):
            watch(guard, GuardSettings())


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})
