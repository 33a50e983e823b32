"""How a process follows the administration data, and puts them in force.

Rule 1: two places are asked, at least each second: the database, and the document that is published to the storage which the
processes share anyway. The higher version counts. A change is in force everywhere within two seconds, also in processes
that do not reach the database.

Rule 2: whoever sees a version in the database that is not published yet publishes it: the process that wrote it may be gone.

Rule 3: a state is made ready as a whole before any of it is in force, and what cannot be made ready changes nothing: the
last one that could is kept, and `health` says why.

Rule 4: while neither place answers, the last state holds. A process that never had one refuses every request and call.

Rule 5: what code or a file says stays; administration data win over it by name, and what is removed from them gives it back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Final, Literal, Protocol

from asgi_llm_guard import background
from asgi_llm_guard.agents import AgentRegistry
from asgi_llm_guard.control.state import ControlState, decode, encode
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.policies.base import DepartmentAware, Policy, Quotas
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.shared import KeepsShared, Shared

__all__ = ["CHORE", "DOCUMENT", "NOT_LOADED", "Administration", "Follower", "Following"]

_log = logging.getLogger("asgi_llm_guard")

CHORE: Final = "control"
"""The name of the chore that follows."""
EVERY_S: Final = 0.75
"""A change is in force within two seconds also where it takes two turns: of a process that reaches the database and
publishes it, and of one that does not. Turns are up to a tenth longer."""
DOCUMENT: Final = "control"
"""The name that a state is published under."""

_LOAD_S: Final = 2.0
"""How long the first request waits for the first state."""
_ANSWER_S: Final = 0.25
"""How long a turn waits for the database."""
_PAUSE_S: Final = 0.25
"""After a first load that failed, requests do not wait for another one for so long."""
_REPUBLISH_MS: Final = 30_000
"""A storage that was flushed has the document again after so long."""

Following = Literal["loading", "ok", "stale", "refused"]
"""`ok`: the database answers, or what others publish does. `stale`: neither place answers. `refused`: there is a newer state that this process cannot put in force."""

NOT_LOADED: Final = Refusal(
    policy="guard",
    code="guard_unavailable",
    message="What the operators of this service have set could not be read yet. Try again in a moment.",
)
"""The refusal of everything until administration data were loaded once."""


class Administration(Protocol):
    """Where administration data come from: a `Control`."""

    async def version(self) -> int: ...

    async def state(self) -> ControlState: ...

    def prepare(self, state: ControlState, /) -> Callable[[], None]:
        """Make ready what it gives to others; calling the answer puts it in force.

        Raises:
            ConfigurationError: it cannot be.
        """
        ...


class Follower:
    """Follows one administration for one guard.

    Args:
        administration: where the data come from.
        engine: the guard's.
        agents: its registry, which what is followed is laid over.
    """

    def __init__(self, administration: Administration, engine: Engine, agents: AgentRegistry) -> None:
        self.administration = administration
        self.state: ControlState | None = None
        """What is in force; `None`: nothing was loaded yet."""
        self.following: Following = "loading"
        self.since_ms = engine.clock.now_ms()
        """When `following` changed last."""
        self.why = ""
        """What is wrong, in a sentence for operators; empty: nothing is."""
        self.applied_ms: int | None = None
        """When what is in force came into force in this process."""
        self._engine = engine
        self._agents = agents
        self._prices = engine.describer.prices
        self._prices_change_ms: int | None = None
        self._books: weakref.WeakSet[Quotas] = weakref.WeakSet()
        self._departments: Mapping[str, Mapping[str, object]] = {}
        self._published = (0, 0)
        """Which version is known to be published, and when that is looked at again."""
        self._revoke: set[str] = set()
        """Knowledge bases whose kept answers are still to be revoked."""
        self._reading: asyncio.Task[ControlState] | None = None
        """Asks the database, perhaps since an earlier turn."""
        self._loading: Future[None] | None = None
        self._not_before = 0.0
        self._lock = threading.Lock()
        engine.follow(self)
        engine.chores.add(CHORE, EVERY_S, self.step)

    @property
    def version(self) -> int | None:
        """Of what is in force; `None`: nothing was loaded yet."""
        return None if self.state is None else self.state.version

    @property
    def loaded(self) -> bool:
        """Whether a state is in force. If none is, loading one begins: a process that gets no request until it is ready
        would else never be."""
        if self.state is None:
            self._begin_loading()
        return self.state is not None

    def health(self) -> dict[str, object]:
        """What a readiness probe may show: no ids, no limits, no addresses."""
        return {"state": self.following, "version": self.version, "since_ms": self.since_ms}

    # ------------------------------------------------------------------------------------- guard

    async def closed(self) -> Refusal | None:
        """Why nothing may be admitted. Loads the first state, and waits for it at most two seconds."""
        if self.state is not None:
            return None
        loading = self._begin_loading()
        if loading is not None:
            waiting = asyncio.wrap_future(loading)
            await asyncio.wait((waiting,), timeout=_LOAD_S)
        return None if self.state is not None else NOT_LOADED

    def _begin_loading(self) -> Future[None] | None:
        """The load that is going on, by all who wait for it together; `None`: the last one has just failed."""
        with self._lock:
            if self._loading is None:
                if time.monotonic() < self._not_before:
                    return None
                self._loading = background.begin(self._load())
            return self._loading

    async def _load(self) -> None:
        try:
            await self._engine.chores.run(CHORE)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is loaded, and the chore tries again
            _log.warning("control: nothing could be loaded yet: %s", error)
        finally:
            with self._lock:
                self._loading = None
                self._not_before = time.monotonic() + _PAUSE_S

    def forked(self) -> None:
        """This is a child process now: nobody loads anything in it yet. What is in force stays."""
        self._reading = self._loading = None
        self._lock = threading.Lock()

    def bound(self, policy: Policy) -> None:
        """A policy was bound to the guard: the quotas that it keeps to are followed from now on."""
        if isinstance(policy, DepartmentAware) and policy.book not in self._books:
            self._books.add(policy.book)
            policy.book.lay_over(self._departments)

    def set_prices(self, prices: PriceBook) -> None:
        """Have these be the prices of code or a file; what is administered is laid over them.

        Raises:
            ConfigurationError: what is administered cannot be laid over them; nothing was changed.
        """
        now_ms = self._engine.clock.now_ms()
        laid = prices if self.state is None else _laid_over(prices, self.state, now_ms)
        self._prices, self._engine.describer.prices = prices, laid

    # -------------------------------------------------------------------------------------- step

    async def step(self) -> None:
        """Look in both places; put in force what is newer, and publish what is not. One turn of the chore."""
        answered, newest = False, self.state
        wrong = ""
        try:
            read = await self._read_in_time()
            answered = True
            if newest is None or read.version > newest.version:
                newest = read
        except (StorageError, ConfigurationError) as error:
            read, wrong = None, _sentence(error)
            answered = isinstance(error, ConfigurationError)
        shared = self._shared()
        if shared is not None:
            try:
                document = await shared.document(DOCUMENT, known=0 if newest is None else newest.version)
                if document is not None:
                    newest = await asyncio.to_thread(decode, document.data)
                answered = True
            except (StorageError, ConfigurationError) as error:
                refused = isinstance(error, ConfigurationError)
                # What cannot be put in force is worse than a place that is away.
                wrong = _sentence(error) if refused or not wrong else wrong
                answered = answered or refused
        if newest is None and self._reading is not None:  # requests wait for it, and there is nothing else
            await asyncio.wait((self._reading,), timeout=_LOAD_S)
            try:
                read = newest = await self._answer(self._reading)
                wrong, answered = "", True
            except (StorageError, ConfigurationError) as error:
                wrong = _sentence(error)
        if newest is not None and newest is not self.state:
            wrong = await self._put_in_force(newest) or wrong
        elif self._prices_change_ms is not None and self._engine.clock.now_ms() >= self._prices_change_ms:
            self._change_prices()
        await self._revoke_answers()
        if shared is not None and read is not None and read is self.state:
            await self._publish(shared, read)
        self._tell(wrong, answered=answered)

    async def _read_in_time(self) -> ControlState:
        """As `_read`. A database that does not answer holds up no turn: it is asked on beside them."""
        task = self._reading
        if task is None:
            task = self._reading = asyncio.create_task(self._read())
            task.add_done_callback(_seen)
            await asyncio.wait((task,), timeout=_ANSWER_S)
        return await self._answer(task)

    async def _answer(self, task: asyncio.Task[ControlState]) -> ControlState:
        if not task.done():
            raise StorageError("the database does not answer in time")
        self._reading = None
        return await task

    async def _read(self) -> ControlState:
        """What is in the database: read whole only where it is another version."""
        if self.state is not None and await self.administration.version() == self.state.version:
            return self.state
        return await self.administration.state()

    def _shared(self) -> Shared | None:
        storage = self._engine.storage
        if not isinstance(storage, KeepsShared):
            return None
        try:
            return storage.shared()
        except ConfigurationError:
            return None  # this one keeps nothing beside counters: the database alone is followed

    async def _publish(self, shared: Shared, state: ControlState) -> None:
        version, again_ms = self._published
        now_ms = self._engine.clock.now_ms()
        if version == state.version and now_ms < again_ms:
            return
        try:
            await shared.publish(DOCUMENT, state.version, await asyncio.to_thread(encode, state))
        except StorageError:
            return  # the next turn tries again
        except ValueError as error:
            _log.error(
                "control: the data cannot be published, so only processes that reach the database follow: %s", error
            )
        self._published = (state.version, now_ms + _REPUBLISH_MS)

    def _tell(self, wrong: str, *, answered: bool) -> None:
        if self.state is None:
            following: Following = "loading"
        elif not answered:
            following = "stale"
        else:
            following = "refused" if wrong and not wrong.startswith(_AWAY) else "ok"
        if (following, wrong) != (self.following, self.why):
            if wrong:
                kept = "nothing is loaded yet" if self.state is None else f"version {self.state.version} stays in force"
                _log.warning("control: %s; %s", wrong, kept)
            elif self.why:
                _log.warning("control: version %s is in force; all is well again", self.version)
            self.why = wrong
        if following != self.following:
            self.following, self.since_ms = following, self._engine.clock.now_ms()

    # ------------------------------------------------------------------------------------- force

    async def _put_in_force(self, state: ControlState) -> str:
        """Make everything ready, then put it in force; or say why not, with nothing changed."""
        engine, old = self._engine, self.state
        now_ms = engine.clock.now_ms()
        departments = {name: entry.value.quota for name, entry in state.departments.items()}
        agents = {name: entry.value.limits for name, entry in state.agents.items()}
        try:
            own = self._prices
            prices = await asyncio.to_thread(_laid_over, own, state, now_ms)
            use = await asyncio.to_thread(self.administration.prepare, state)
            if own is not self._prices:  # code has changed its own meanwhile
                prices = _laid_over(self._prices, state, now_ms)
        except ConfigurationError as error:
            return _sentence(error)
        # From here on nothing can fail. What takes away comes before what gives.
        engine.overrides.set_stops([entry.value for entry in state.stops.values()], administered=True)
        use()
        self._departments = departments
        for book in tuple(self._books):
            book.lay_over(departments)
        self._agents.lay_over(agents)
        engine.describer.prices = prices
        engine.overrides.set_raises([entry.value for entry in state.raises.values()], administered=True)
        self._prices_change_ms = _next_change(state, now_ms)
        if old is not None:
            names = {*old.knowledge_bases, *state.knowledge_bases}
            self._revoke |= {name for name in names if old.knowledge_bases.get(name) != state.knowledge_bases.get(name)}
        self.applied_ms = now_ms
        self.state = state
        engine.gate = None
        return ""

    def _change_prices(self) -> None:
        """A price has begun to hold, or has ended."""
        assert self.state is not None  # noqa: S101 - it said when
        now_ms = self._engine.clock.now_ms()
        self._engine.describer.prices = _laid_over(self._prices, self.state, now_ms)
        self._prices_change_ms = _next_change(self.state, now_ms)

    async def _revoke_answers(self) -> None:
        """Answers that were kept before the settings of their knowledge base changed are found no more."""
        cache = self._engine.cache
        if cache is None:
            self._revoke.clear()
        while cache is not None and self._revoke:
            name = min(self._revoke)
            try:
                await cache.revoke(knowledge_base=name)
            except StorageError:
                return  # the next turn tries again; until it can, no answer is given either
            self._revoke.discard(name)


_AWAY: Final = "away: "


def _seen(task: asyncio.Task[ControlState]) -> None:
    """What it raises is told at the next turn, if there is one."""
    if not task.cancelled():
        task.exception()


def _sentence(error: Exception) -> str:
    """What goes wrong, for the log and for operators. Where it is the place that is away, it begins with `_AWAY`."""
    return f"{_AWAY if isinstance(error, StorageError) else ''}{str(error).removeprefix('control: ')}"


def _laid_over(prices: PriceBook, state: ControlState, now_ms: int) -> PriceBook:
    """
    Raises:
        ConfigurationError: the prices cannot be laid over these.
    """
    hold = {model: entry.value.entry for model, entry in state.prices.items() if entry.value.holds(now_ms)}
    return prices.laid_over(hold, origin=f"administered price (version {state.version})")


def _next_change(state: ControlState, now_ms: int) -> int | None:
    """When the next price begins or ends to hold."""
    instants = [at for entry in state.prices.values() for at in (entry.value.from_ms, entry.value.until_ms)]
    return min((at for at in instants if at is not None and at > now_ms), default=None)
