"""Changes of administration data: one after the other, by who has seen what is there, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.control.kit import ANNA, BEN, CLOCK_MS, run_sql

from asgi_llm_guard.control import (
    Agent,
    AuditQuery,
    Change,
    Conflict,
    Control,
    Department,
    KnowledgeBase,
    NewerRelease,
    NotThere,
    Price,
    Raise,
    Stop,
)
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.sql import Connection, Database, open_database
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio

LATER = CLOCK_MS + 3_600_000
EVERYTHING = {
    ("department", "research"): {
        "models": ["openai/*"],
        "daily_cost": "5",
        "monthly_tokens": 1_000_000,
        "tz": "Europe/Berlin",
    },
    ("agent", "writer"): {"max_iterations": 25, "params": {"x_tier": "gold"}},
    ("price", "openai/gpt-4o"): {"entry": {"input": "2.5", "output": 10}},
    ("knowledge_base", "handbook"): {"cache": True, "acl": "a1", "version": "7"},
    ("raise", "r1"): {"policy": "quota", "unit": "usd", "amount": "2.5", "until_ms": LATER},
    ("stop", "s1"): {"scope": "user", "subject": "mia", "until_ms": LATER},
}


async def test_every_kind_is_kept(control: Control, open_control: Callable[[], Control]) -> None:
    """C16: departments, agents, prices, knowledge bases, raises and stops are data, and the same from any process."""
    for (kind, name), value in EVERYTHING.items():
        await control.put(kind, name, value, actor=ANNA)  # type: ignore[arg-type]  # one of the kinds

    state = await open_control().state()

    assert state.departments["research"].value == Department(
        name="research", models=("openai/*",), daily_cost=Decimal(5), monthly_tokens=1_000_000, tz="Europe/Berlin"
    )
    assert state.agents["writer"].value == Agent(name="writer", max_iterations=25, params={"x_tier": "gold"})
    assert state.prices["openai/gpt-4o"].value == Price(model="openai/gpt-4o", entry={"input": "2.5", "output": 10})
    assert state.knowledge_bases["handbook"].value == KnowledgeBase(id="handbook", cache=True, acl="a1", version="7")
    assert state.raises["r1"].value == Raise(id="r1", policy="quota", unit="usd", amount=Decimal("2.5"), until_ms=LATER)
    assert state.stops["s1"].value == Stop(id="s1", scope="user", subject="mia", until_ms=LATER)
    assert len(list(state)) == len(EVERYTHING)


async def test_a_change_names_its_version(control: Control, clock: FrozenClock) -> None:
    """Each change has a higher version, the entry has that of its last change, and time alone changes nothing."""
    first = await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    second = await control.put("agent", "reader", {"max_iterations": 6}, actor=ANNA)
    clock.advance(ms=60_000)
    same = await control.put("agent", "reader", {"max_iterations": 6}, actor=ANNA)
    third = await control.put("agent", "writer", {"max_iterations": 7}, actor=ANNA)

    assert first.version < second.version == same.version < third.version == clock.now_ms()
    assert second.agents["writer"].version == first.version
    assert third.agents["writer"].version == third.version
    assert third.agents["reader"].version == second.version
    assert await control.version() == third.version


async def test_fields_that_are_not_named_stay(control: Control) -> None:
    """A change of one limit leaves the others, and only the word takes a limit away: nothing does not (T13)."""
    await control.put("department", "research", {"daily_cost": "5", "monthly_cost": "100"}, actor=ANNA)
    state = await control.put("department", "research", {"daily_cost": "6"}, actor=ANNA)
    assert state.departments["research"].value.monthly_cost == 100
    with pytest.raises(
        ConfigurationError, match="department 'research': monthly_cost: null says nothing; say 'unlimited'"
    ):
        await control.put("department", "research", {"monthly_cost": None}, actor=ANNA)
    state = await control.put("department", "research", {"monthly_cost": "unlimited"}, actor=ANNA)
    assert state.departments["research"].value == Department(name="research", daily_cost=Decimal(6))


async def test_who_has_not_seen_the_last_change_is_told(control: Control, open_control: Callable[[], Control]) -> None:
    """A change that was made for another version changes nothing, and names both versions and who was faster."""
    seen = await control.put("agent", "writer", {"max_iterations": 5}, actor=ANNA)
    version = seen.agents["writer"].version
    now = await open_control().put("agent", "writer", {"max_iterations": 9}, actor=BEN, expected=version)

    with pytest.raises(Conflict) as caught:
        await control.put("agent", "writer", {"max_iterations": 6}, actor=ANNA, expected=version)

    conflict = caught.value
    assert (conflict.expected, conflict.version, conflict.by) == (version, now.version, "ben")
    assert str(conflict) == (
        f"agent 'writer' is at version {now.version}, last changed by ben, but version {version} was seen. "
        "Look at it again, and change that."
    )
    assert (await control.state()).agents["writer"].value.max_iterations == 9
    with pytest.raises(Conflict, match="it was to be new"):
        await control.put("agent", "writer", {"max_iterations": 6}, actor=ANNA, expected=0)
    await control.remove("agent", "writer", actor=BEN, expected=now.version)
    with pytest.raises(Conflict, match="is not there, last changed by ben"):
        await control.remove("agent", "writer", actor=ANNA, expected=now.version)
    again = await control.put("agent", "writer", {"max_iterations": 9}, actor=ANNA, expected=0)
    assert again.agents["writer"].version > now.version, "an entry that is there again is another one"


async def test_of_two_at_once_one_wins(open_control: Callable[[], Control]) -> None:
    """Of many who change the same version at the same time exactly one does; the others are told, and audited."""
    writers = [open_control() for _ in range(6)]
    seen = await writers[0].put("agent", "writer", {"max_iterations": 0}, actor=ANNA)
    version = seen.agents["writer"].version

    outcomes = await asyncio.gather(
        *(
            control.put("agent", "writer", {"max_iterations": number}, actor=ANNA, expected=version)
            for number, control in enumerate(writers, 1)
        ),
        return_exceptions=True,
    )

    won = [number for number, outcome in enumerate(outcomes, 1) if not isinstance(outcome, BaseException)]
    assert len(won) == 1
    assert all(isinstance(outcome, Conflict) for number, outcome in enumerate(outcomes, 1) if number not in won)
    assert (await writers[0].state()).agents["writer"].value.max_iterations == won[0]
    assert len(await writers[0].audit(AuditQuery(refused=True))) == len(writers) - 1
    assert (await writers[0].verify_audit()).sound


async def test_new_tables_are_made_once(open_control: Callable[[], Control]) -> None:
    """Processes that begin at the same time make the tables together, and no change is lost."""
    controls = [open_control() for _ in range(6)]
    await asyncio.gather(
        *(control.put("agent", f"a{n}", {"max_iterations": n}, actor=ANNA) for n, control in enumerate(controls))
    )
    assert len((await controls[0].state()).agents) == len(controls)


async def test_several_changes_are_one(control: Control) -> None:
    """S6: changes that are made together are made all, each with its row, or none of them."""
    state = await control.put_all(
        [
            Change(kind="agent", name="a", value={"max_iterations": 1}),
            Change(kind="agent", name="b", value=Agent(name="b", max_iterations=2)),
        ],
        actor=ANNA,
        reason="tidy up",
    )
    assert {entry.version for entry in state.agents.values()} == {state.version}
    assert [entry.target for entry in await control.audit()] == ["agent:b", "agent:a"]

    with pytest.raises(NotThere, match="there is no agent 'c'"):
        await control.put_all(
            [Change(kind="agent", name="a", value=None), Change(kind="agent", name="c", value=None)], actor=ANNA
        )
    after = await control.state()
    assert after.agents == state.agents
    refused = (await control.audit())[0]
    assert (refused.target, refused.refused) == ("agent:c", "not there: there is no agent 'c'")


async def test_spellings_of_a_model_are_one_entry(control: Control) -> None:
    """S4: a price is kept under the name that all spellings of its model share, so that there are never two."""
    await control.put("price", "OpenAI/GPT-4o", {"entry": {"input": 1, "output": 2}}, actor=ANNA)
    state = await control.put(
        "price", "openai/gpt-4o", Price(model="OPENAI/gpt-4o", entry={"input": 3, "output": 4}), actor=ANNA
    )
    assert {name: dict(entry.value.entry) for name, entry in state.prices.items()} == {
        "openai/gpt-4o": {"input": 3, "output": 4}
    }
    with pytest.raises(ConfigurationError, match="output missing"):
        await control.put("price", "nobody/knows", {"entry": {"input": 1}}, actor=ANNA)


async def test_export_goes_into_another_database(control: Control, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was exported is the same in another database, keys included; what else was there goes if that is wanted."""
    for (kind, name), value in EVERYTHING.items():
        await control.put(kind, name, value, actor=ANNA)  # type: ignore[arg-type]  # one of the kinds
    await control.new_key("svc", actor=ANNA)
    document = await control.export()
    other = Control(f"sqlite:///{tmp_path_factory.mktemp('other')}/c.db")
    await other.put("agent", "stray", {"max_iterations": 1}, actor=BEN)

    state = await other.load(document, actor=BEN, reason="moved")
    assert {(kind, name): entry.value for kind, name, entry in state if name != "stray"} == {
        (kind, name): entry.value for kind, name, entry in await control.state()
    }
    assert "stray" in state.agents
    assert "stray" not in (await other.load(document, actor=BEN, replace=True)).agents
    with pytest.raises(ConfigurationError, match="cannot be read"):
        await other.load(b"no document", actor=BEN)
    assert (await other.audit())[0].refused is not None
    await other.aclose()


async def test_a_database_that_is_away_is_no_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A database that does not answer is an error that says so, never an empty state."""
    control = Control(open_database("postgresql://nobody@127.0.0.1:1/none"))
    with pytest.raises(StorageError):
        await control.state()
    with pytest.raises(StorageError):
        await control.put("agent", "a", {}, actor=ANNA)
    await control.aclose()


async def test_everything_together_is_bounded(control: Control) -> None:
    """What would not fit into one document is refused, and nothing of it is kept."""
    large = {"params": {"x_text": "x" * 2_500_000}}
    await control.put("agent", "a", large, actor=ANNA)
    with pytest.raises(ConfigurationError, match="all entries together"):
        await control.put("agent", "b", large, actor=ANNA)
    assert set((await control.state()).agents) == {"a"}


async def test_a_value_goes_by_its_own_name(control: Control) -> None:
    """A value of another kind or of another name is refused, and one whose end is absurd as well."""
    with pytest.raises(ConfigurationError, match="agent 'a': the value says 'b'"):
        await control.put("agent", "a", Agent(name="b"), actor=ANNA)
    with pytest.raises(ConfigurationError, match="department 'a': expected a department, got a Agent"):
        await control.put("department", "a", Agent(name="a"), actor=ANNA)
    with pytest.raises(ConfigurationError, match="expected one of Department"):
        await control.put("agent", "a", 5, actor=ANNA)  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigurationError, match="until_ms"):
        await control.put("stop", "s", Stop(scope="all", until_ms=10**18), actor=ANNA)
    assert not list(await control.state())


async def test_tables_of_another_release_are_left_alone(
    control: Control, open_control: Callable[[], Control], database_url: str
) -> None:
    """Tables of another schema are an error that says so, and stay as they are."""
    await control.put("agent", "a", {}, actor=ANNA)
    run_sql(database_url, "UPDATE control_meta SET schema = 2")
    with pytest.raises(StorageError, match="the tables have schema 2; this release works with 1"):
        await open_control().state()


async def test_entries_of_a_newer_release_are_no_state(control: Control, database_url: str) -> None:
    """A database with a kind that this release does not know is not read in part."""
    await control.put("agent", "a", {}, actor=ANNA)
    run_sql(database_url, "INSERT INTO control_entries VALUES ('moon', 'x', 1, '{}')")
    run_sql(database_url, "UPDATE control_meta SET version = version + 1")
    with pytest.raises(NewerRelease, match="'moon'"):
        await control.state()


@pytest.mark.parametrize("change", ["put", "remove", "revoke_key", "load"])
async def test_changes_beside_entries_of_a_newer_release(control: Control, database_url: str, change: str) -> None:
    """While a newer release is rolled out, a change that was made is said to be made, though all cannot be read back; a key
    that has leaked can be revoked."""
    await control.put("agent", "a", {}, actor=ANNA)
    document = await control.export()
    _, key = await control.new_key("svc", actor=ANNA)
    run_sql(database_url, "INSERT INTO control_entries VALUES ('moon', 'x', 1, '{}')")
    run_sql(database_url, "UPDATE control_meta SET version = version + 1")
    before = await control.version()

    work: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: control.put("agent", "b", {"max_iterations": 5}, actor=ANNA),
        "remove": lambda: control.remove("agent", "a", actor=ANNA),
        "revoke_key": lambda: control.revoke_key(key.id, actor=ANNA),
        "load": lambda: control.load(document.replace(b'"a"', b'"c"'), actor=ANNA),
    }
    with pytest.raises(NewerRelease, match=r"the change was made, as version .* 'moon'") as caught:
        await work[change]()

    assert caught.value.made == await control.version() > before
    assert (await control.audit())[0].refused is None


async def test_a_change_that_cannot_be_read_back_is_said_to_be_made(control: Control, database_url: str) -> None:
    """Where the database goes away between a change and the answer, the change is known to have been made."""

    class Leaving:
        """A database that answers until something was changed."""

        def __init__(self, database: Database) -> None:
            self._database = database
            self.left = False

        async def write(self, work: Callable[[Connection], Any]) -> Any:
            done = await self._database.write(work)
            self.left = True
            return done

        async def read(self, work: Callable[[Connection], Any]) -> Any:
            if self.left:
                raise StorageError("gone")
            return await self._database.read(work)

    await control.put("agent", "a", {}, actor=ANNA)
    leaving = Leaving(control.database)
    other = Control(leaving, clock=FrozenClock(CLOCK_MS))  # type: ignore[arg-type]  # as much of one as is used
    with pytest.raises(StorageError, match=r"the change was made, as version .*: gone"):
        await other.put("agent", "b", {}, actor=ANNA)
    assert "b" in (await control.state()).agents


async def test_nothing_is_kept_that_nobody_can_read(control: Control) -> None:
    """One value that JSON cannot carry would keep every process from all entries: it is refused, and all stays readable."""
    stop = Stop(scope="all", reason=float("inf"))  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigurationError, match="stop 's': a value cannot be kept"):
        await control.put("stop", "s", stop, actor=ANNA)
    assert not list(await control.state())


@pytest.mark.parametrize("what", ["kind", "name", "expected", "overlap", "old", "new"])
async def test_numbers_that_cannot_be_shown_are_refused_wherever_they_stand(control: Control, what: str) -> None:
    """T13: a number that is too large to be written is told by where it stands, and the try is in the audit."""
    huge: Any = 10**5_000
    with pytest.raises(ConfigurationError, match=f"{what}: .* 16,610 bits"):
        match what:
            case "kind":
                await control.put(huge, "a", {}, actor=ANNA)
            case "name":
                await control.put("agent", huge, {}, actor=ANNA)
            case "expected":
                await control.put("agent", "a", {}, expected=huge, actor=ANNA)
            case "overlap":
                await control.rotate_key("k1", overlap=huge, actor=ANNA)
            case "old":
                await control.note("v", "t", actor=ANNA, old={"a": huge})
            case _:
                await control.note("v", "t", actor=ANNA, new={"a": huge})
    if what not in {"old", "new"}:
        assert "16,610 bits" in ((await control.audit())[0].refused or "")


async def test_a_row_that_is_no_entry(control: Control, open_control: Callable[[], Control], database_url: str) -> None:
    """What somebody has written past this package, and nobody can read, is said to be so, by reading and by changing it."""
    await control.put("agent", "a", {}, actor=ANNA)
    run_sql(database_url, "UPDATE control_entries SET value = '{nope'")
    other = open_control()
    with pytest.raises(NewerRelease, match="agent 'a' cannot be read"):
        await other.state()
    with pytest.raises(NewerRelease, match="agent 'a' cannot be read"):
        await other.put("agent", "a", {"max_iterations": 1}, actor=ANNA)
    run_sql(database_url, "DELETE FROM control_meta")
    for work in (other.state(), other.version(), other.put("agent", "b", {}, actor=ANNA), open_control().state()):
        with pytest.raises(StorageError, match="control_meta is gone"):
            await work


def test_settings_are_checked() -> None:
    """A database or a secret that cannot be used is told when the control is made."""
    with pytest.raises(ConfigurationError, match="control: expected"):
        Control("mysql://host/x")
    with pytest.raises(ConfigurationError, match="at least 16"):
        Control("sqlite://:memory:", secret="short")
