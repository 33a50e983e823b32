"""Keys: shown once, kept as keyed hashes, with a stated end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.control.kit import ANNA, BEN, CLOCK_MS, SECRET, dump

from asgi_llm_guard.control import AuditQuery, Conflict, Control, ControlKeys, Key, NotThere
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import ApiKeys, Identity, IdentityError
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000


def sent(key: str | None) -> dict[str, object]:
    return {"type": "http", "headers": [] if key is None else [(b"authorization", f"Bearer {key}".encode())]}


async def follow(control: Control) -> None:
    """What the follower does with the keys."""
    control.prepare(await control.state())()


async def test_a_key_is_its_caller(control: Control) -> None:
    """Who shows a new key is who it was made for, with its user, departments, agent, tags and limits."""
    keys = control.keys()
    shown, key = await control.new_key(
        "svc", user="mia", departments=["research"], agent="writer", tags=["eu"], params={"max_iterations": 5}, actor=ANNA
    )  # fmt: skip
    await follow(control)

    assert keys(sent(shown)) == Identity(
        caller="svc", user="mia", departments=("research",), agent="writer", tags=("eu",), params={"max_iterations": 5}
    )
    assert shown.startswith(f"{key.prefix}-")
    assert keys(sent(None)) is None
    for wrong in (shown + "x", shown[:-1], "lg-k1-nobody-knows-this-key"):
        with pytest.raises(IdentityError, match="not known, or not valid"):
            keys(sent(wrong))


async def test_nothing_secret_is_kept(control: Control, database_url: str) -> None:
    """T25: no table, document, export, audit, message or name of a value holds a key or the secret, after any change."""
    control.keys()
    shown, key = await control.new_key("svc", actor=ANNA, reason="for the service")
    rotated, new = await control.rotate_key(key.id, overlap="1h", actor=ANNA)
    await control.revoke_key(new.id, actor=BEN)
    await control.put("key", key.id, {"departments": ["research"]}, actor=ANNA)
    for mistake in ({"key": shown}, {"digest": shown}, {"caller": ""}):
        with pytest.raises(ConfigurationError) as caught:
            await control.put("key", key.id, mistake, actor=ANNA)
        assert shown not in str(caught.value)

    everything = "\n".join([
        dump(database_url), (await control.export()).decode(), repr(await control.state()), repr(await control.audit()), repr(key),
    ])  # fmt: skip

    assert "svc" in everything
    for canary in (shown, rotated, shown.split("-", 2)[2], rotated.removeprefix(new.prefix), SECRET):
        assert canary not in everything


async def test_a_rotated_key_dies_at_the_stated_time(control: Control, clock: FrozenClock) -> None:
    """T25: old and new key are known until the stated end of the old one, to the millisecond, and then the new one alone."""
    keys = control.keys()
    old_shown, old = await control.new_key("svc", departments=["research"], actor=ANNA)
    new_shown, new = await control.rotate_key(old.id, overlap="1h", actor=ANNA)
    await follow(control)

    state = await control.state()
    assert state.keys[old.id].value.expires_at_ms == CLOCK_MS + HOUR_MS
    assert new.replaces == old.id
    assert (new.caller, new.departments) == (old.caller, old.departments)
    clock.advance(ms=HOUR_MS - 1)
    assert keys(sent(old_shown)) == keys(sent(new_shown)) != None  # noqa: E711 - all three are compared
    clock.advance(ms=1)
    with pytest.raises(IdentityError) as caught:
        keys(sent(old_shown))
    assert caught.value.status == 403
    assert keys(sent(new_shown)) is not None


async def test_two_keys_are_active_at_most(control: Control, clock: FrozenClock) -> None:
    """A key that was rotated is not rotated again while its successor lives, nor one that is over; it never lives longer."""
    _, first = await control.new_key("svc", actor=ANNA, expires_at_ms=CLOCK_MS + 60_000)
    _, second = await control.rotate_key(first.id, overlap="1d", actor=ANNA)
    assert (await control.state()).keys[first.id].value.expires_at_ms == CLOCK_MS + 60_000
    with pytest.raises(ConfigurationError, match=f"rotate '{second.id}' instead"):
        await control.rotate_key(first.id, overlap="1d", actor=ANNA)
    await control.revoke_key(second.id, actor=ANNA)
    await control.rotate_key(first.id, overlap="0s", actor=ANNA)
    assert not (await control.state()).keys[first.id].value.is_active(clock.now_ms())
    with pytest.raises(ConfigurationError, match="is over"):
        await control.rotate_key(first.id, overlap="1d", actor=ANNA)
    with pytest.raises(NotThere):
        await control.rotate_key("k0", overlap="1d", actor=ANNA)
    with pytest.raises(ConfigurationError, match="overlap"):
        await control.rotate_key(second.id, overlap="soon", actor=ANNA)
    refused = await control.audit(AuditQuery(refused=True))
    assert [row.verb for row in refused] == ["rotate_key"] * 4


async def test_a_resolver_that_is_made_later(control: Control) -> None:
    """A resolver that is made after the keys were loaded, or while they are, resolves by them at once."""
    shown, _ = await control.new_key("svc", actor=ANNA)
    await follow(control)
    assert control.keys()(sent(shown)) == Identity(caller="svc")
    other, _ = await control.new_key("other", actor=ANNA)
    use = control.prepare(await control.state())
    keys = control.keys()
    use()
    assert keys(sent(other)) == Identity(caller="other")


async def test_a_guard_that_is_slower(control: Control) -> None:
    """T25: of two guards over one control, the one that comes last with an older state brings no revoked key back."""
    keys = control.keys()
    shown, key = await control.new_key("svc", actor=ANNA)
    slow = control.prepare(await control.state())
    await control.revoke_key(key.id, actor=ANNA)
    await follow(control)
    slow()
    with pytest.raises(IdentityError):
        keys(sent(shown))


async def test_of_three_keys_in_a_row_two_are_active(control: Control, clock: FrozenClock) -> None:
    """T25: a key whose predecessor is still active is rotated only without an overlap, or when that one is over."""
    _, first = await control.new_key("svc", actor=ANNA)
    _, second = await control.rotate_key(first.id, overlap="1d", actor=ANNA)
    with pytest.raises(ConfigurationError, match=f"'{first.id}', is still active, and two are at most"):
        await control.rotate_key(second.id, overlap="1d", actor=ANNA)
    _, third = await control.rotate_key(second.id, overlap="0s", actor=ANNA)
    keys = (await control.state()).keys
    assert [key for key, entry in keys.items() if entry.value.is_active(clock.now_ms())] == sorted([first.id, third.id])
    with pytest.raises(ConfigurationError, match=f"'{first.id}', is still active"):
        await control.rotate_key(third.id, overlap="1d", actor=ANNA)
    clock.advance(seconds=86_400)
    await control.rotate_key(third.id, overlap="1d", actor=ANNA)


async def test_a_revoked_key_does_not_come_back(control: Control) -> None:
    """T25: a key that was revoked stays so, whatever of before is put in its place: a value, or a whole document."""
    _, key = await control.new_key("svc", actor=ANNA)
    before, document = (await control.state()).keys[key.id].value, await control.export()
    await control.revoke_key(key.id, actor=ANNA)
    for replace in False, True:
        state = await control.load(document, replace=replace, actor=ANNA)
        assert state.keys[key.id].value.revoked_ms == CLOCK_MS
    state = await control.put("key", key.id, before, actor=ANNA)
    assert state.keys[key.id].value.revoked_ms == CLOCK_MS


async def test_a_revoked_key_is_known_no_more(control: Control, clock: FrozenClock) -> None:
    """A revoked key is refused, stays revoked, and is still there to be read about."""
    keys = control.keys()
    shown, key = await control.new_key("svc", actor=ANNA)
    await follow(control)
    assert keys(sent(shown)) is not None
    state = await control.revoke_key(key.id, actor=BEN, reason="leaked")
    await follow(control)
    with pytest.raises(IdentityError):
        keys(sent(shown))
    clock.advance(seconds=-5)
    with pytest.raises(IdentityError):
        keys(sent(shown))  # whatever the clock says
    assert await control.revoke_key(key.id, actor=ANNA) == state
    assert state.keys[key.id].value.revoked_ms == CLOCK_MS
    assert (await control.audit())[0].reason == "leaked"
    with pytest.raises(NotThere):
        await control.revoke_key("k0", actor=ANNA)


async def test_of_two_who_rotate_one_does(control: Control, open_control: Callable[[], Control]) -> None:
    """A rotation of a key that somebody has just changed is a conflict, and makes no key."""
    _, key = await control.new_key("svc", actor=ANNA)
    version = (await control.state()).keys[key.id].version
    await open_control().put("key", key.id, {"tags": ["eu"]}, actor=BEN)
    with pytest.raises(Conflict):
        await control.rotate_key(key.id, overlap="1h", actor=ANNA, expected=version)
    assert list((await control.state()).keys) == [key.id]


async def test_what_is_said_of_a_key_can_be_changed(control: Control) -> None:
    """Departments, limits and the end of a key change while the key stays; a new one is only made as one."""
    keys = control.keys()
    shown, key = await control.new_key("svc", user="mia", actor=ANNA, expires_at_ms=CLOCK_MS + 1_000)
    await control.put("key", key.id, {"departments": ["research"], "user": "", "expires_at_ms": "never"}, actor=ANNA)
    await follow(control)
    assert keys(sent(shown)) == Identity(caller="svc", departments=("research",))
    with pytest.raises(NotThere, match="there is no key 'k9'"):
        await control.put("key", "k9", {"caller": "svc"}, actor=ANNA)
    with pytest.raises(ConfigurationError, match="null says nothing; say 'never' to take it away"):
        await control.put("key", key.id, {"expires_at_ms": None}, actor=ANNA)


async def test_keys_of_a_file_work_beside(control: Control) -> None:
    """A key that is not administered is looked up in the file, and one that nobody knows is refused."""
    file_key, record = ApiKeys.generate("from-file", secret="secret-of-the-file")
    keys = control.keys(then=ApiKeys([record], secret="secret-of-the-file"))
    shown, key = await control.new_key("svc", actor=ANNA)
    await follow(control)

    assert keys(sent(shown)) == Identity(caller="svc")
    assert keys(sent(file_key)) == Identity(caller="from-file")
    assert keys(sent(None)) is None
    with pytest.raises(IdentityError):
        keys(sent("lg-k1-nobody-knows-this-key"))
    await control.revoke_key(key.id, actor=ANNA)
    await follow(control)
    with pytest.raises(IdentityError):
        keys(sent(shown))


async def test_two_keys_are_nobody_whoever_else_is_asked(control: Control) -> None:
    """A malformed request is refused as such, and nobody else is asked about it."""
    keys = control.keys(then=lambda _scope: Identity(caller="anybody"))
    await follow(control)
    both = {"type": "http", "headers": [(b"x-api-key", b"lg-k1-one-of-two-keys"), (b"api-key", b"lg-k1-other-of-them")]}
    with pytest.raises(IdentityError, match="two different") as caught:
        keys(both)
    assert caught.value.status == 400
    assert keys(sent("lg-k1-nobody-knows-this-key")) == Identity(caller="anybody")


async def test_a_key_that_nobody_knows_makes_nobody_anonymous(control: Control) -> None:
    """A wrong key beside another authentication that says nothing is refused, unless anonymous callers are wanted."""

    def nobody(_scope: object) -> None:
        return None

    strict, lenient = control.keys(then=nobody), control.keys(then=nobody, unknown="anonymous")
    alone = control.keys(unknown="anonymous")
    await follow(control)
    wrong = sent("lg-k1-nobody-knows-this-key")
    with pytest.raises(IdentityError):
        strict(wrong)
    assert lenient(wrong) is None
    assert alone(wrong) is None


def test_without_keys_nobody_is_let_in() -> None:
    """Before keys were loaded a request is refused with 503: an anonymous caller might have limits of its own."""
    keys = ControlKeys(secret=SECRET)
    assert not keys.loaded
    for request in (sent("lg-k1-nobody-knows-this-key"), sent(None)):
        with pytest.raises(IdentityError) as caught:
            keys(request)
        assert caught.value.status == 503
    keys.load([])
    assert keys.loaded
    assert keys(sent(None)) is None


async def test_a_new_secret_takes_over(control: Control, database_url: str) -> None:
    """With two secrets keys of both are known; new ones are made with the first, and end the need for the second."""
    shown, _ = await control.new_key("old", actor=ANNA)
    both = Control(database_url, secret=["the-next-secret-of-it", SECRET])
    new_shown, _ = await both.new_key("new", actor=ANNA)
    later = Control(database_url, secret="the-next-secret-of-it")
    of_both, of_later = both.keys(), later.keys()
    await follow(both)
    await follow(later)

    assert {identity.caller for identity in map(of_both, map(sent, (shown, new_shown))) if identity} == {"old", "new"}
    assert of_later(sent(new_shown)) == Identity(caller="new")
    with pytest.raises(IdentityError):
        of_later(sent(shown))
    await both.aclose()
    await later.aclose()


async def test_keys_need_a_secret(database_url: str) -> None:
    """Without a secret there are no keys, and that is said where one is asked for, and audited."""
    control = Control(database_url)
    with pytest.raises(ConfigurationError, match="keys need a secret"):
        control.keys()
    with pytest.raises(ConfigurationError, match="keys need a secret"):
        await control.new_key("svc", actor=ANNA)
    assert [row.refused is not None for row in await control.audit()] == [True]
    await control.aclose()


async def test_a_new_key_is_checked(control: Control) -> None:
    """T13: a key for nobody, one that has ended or one with a malformed limit is not made; each try is audited."""
    for fields in (
        {"caller": ""},
        {"caller": "c", "expires_at_ms": CLOCK_MS},
        {"caller": "c", "params": {"max_iterations": -1}},
    ):
        with pytest.raises(ConfigurationError):
            await control.new_key(actor=ANNA, **fields)
    assert len(await control.audit(AuditQuery(verb="new_key", refused=True))) == 3
    assert not (await control.state()).keys


def test_settings_are_checked() -> None:
    """What cannot resolve keys is refused when it is built."""
    with pytest.raises(ConfigurationError, match="then"):
        ControlKeys(secret=SECRET, then=5)  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigurationError):
        ControlKeys(secret="short")


def test_ends_are_exact() -> None:
    """The end of a key is taken to the millisecond, whatever binary fractions make of it."""
    digest = ApiKeys.hash("lg-k1-0123456789abcdef", "s" * 16)
    clock = FrozenClock(0)
    for ends in (1_795_000_000_001, 69_784_880_314_217, 69_784_880_314_218):
        keys = ControlKeys(secret="s" * 16, clock=clock)
        keys.load([Key(id="k1", prefix="lg-k1", digest=digest, caller="c", expires_at_ms=ends)])
        clock.set(ends - 1)
        assert keys(sent("lg-k1-0123456789abcdef")) is not None
        clock.set(ends)
        with pytest.raises(IdentityError):
            keys(sent("lg-k1-0123456789abcdef"))
