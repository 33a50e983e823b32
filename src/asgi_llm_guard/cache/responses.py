"""The response cache: an answer that was given once is given again to whoever may have it.

    look_up     the scope's word, the key, then one step at the storage: a kept answer, or the lead, or neither
    hit         rates are taken, nothing else; the ledger gets a record that says `cached`
    lead        the caller makes the call, then `store`s its answer or lets go of the key
    pass        the caller makes the call, and nothing is kept

Rule 1: an answer is found by everything that it depends on (`keys.py`), inside one exact partition. Partition and request
are kept with the answer and compared again when it is found: what does not agree is not given.
Rule 2: what is not known to be allowed is not: without a scope's word, with settings that cannot be read, with a storage
that does not answer, nothing is given and nothing kept, and the call is made.
Rule 3: only answers that say that they are complete are kept (`answers.py`).
Rule 4: of all workers that ask the same at the same time one leads. The others wait for it, for a while.
Rule 5: the caller may ask for less (`Cache-Control`), never for more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Final

import msgspec

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.cache.control import CacheControl, read_control
from asgi_llm_guard.cache.keys import (
    CacheRequest,
    Unfit,
    digest_of,
    name_digest,
    partition_digest,
    request_digest,
    value_digest,
)
from asgi_llm_guard.cache.lookup import Entry, Lookup, Target, decode
from asgi_llm_guard.cache.options import Cache, keeper
from asgi_llm_guard.claims import escape
from asgi_llm_guard.errors import ConfigurationError, LimitExceeded, StorageError
from asgi_llm_guard.events import CacheHit, CacheMiss, emit
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import CacheDirective
from asgi_llm_guard.storage.base import Interruptible, Storage
from asgi_llm_guard.storage.entries import Flights, InFlight, Kept, Leading

__all__ = ["ResponseCache"]

_log = logging.getLogger("asgi_llm_guard.cache")

_SPACE: Final = "cache"
_EVERYTHING: Final = "everything"
"""The name that all answers belong to."""
_MOST_REASONS: Final = 100


class ResponseCache:
    """The cache of one guard: `guard.cache`."""

    def __init__(self, settings: Cache, storage: Storage) -> None:
        """`storage`: the guard's.

        Raises:
            ConfigurationError: it cannot keep answers, and `settings` names no other; or these are no settings.
        """
        if not isinstance(settings, Cache):
            raise ConfigurationError(f"cache: expected a Cache such as Cache(ttl='1h'), got {settings!r}")
        storage = storage if settings.storage is None else settings.storage
        self.settings = settings
        self._storage = storage
        self._interruptible = storage if isinstance(storage, Interruptible) else None
        self.flights = Flights(keeper("cache", storage).entries(_SPACE, settings.bounds))
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()

    # ------------------------------------------------------------------------------- look up

    async def look_up(self, call: ActiveCall, request: CacheRequest) -> Lookup:
        """Whether the answer to `request` is kept, for a `call` that has claimed nothing yet.

        A hit has taken its rates, and is over: there is nothing to claim, to record or to end. After a lead or a pass
        the call is made as ever. Policies that refuse by themselves (a model that is not allowed) refuse here.

        Raises:
            LimitExceeded: refused; nothing was taken.
        """
        directive = self._directive(call)
        control = read_control(
            [
                call.admission.cache_control,
                *(value for name, value in request.headers if name.lower() == "cache-control"),
            ]
        )
        try:
            digest, stream = request_digest(request, call.call, self.settings.ignore)
            if stream and not self.settings.streams:
                raise Unfit("streams are not kept")  # noqa: TRY301 - as the others
        except Unfit as unfit_:
            return self._pass(call, str(unfit_))
        return await self._look_up(call, directive, control, digest, stream=stream)

    async def look_up_value(self, call: ActiveCall, kind: str, key: object, *, requests: bool = False) -> Lookup:
        """The same of a value that the application makes: `kind` says which, and `key` of what.

        `requests`: a hit takes the rates of policies that count requests as well.
        """
        directive = self._directive(call)
        control = read_control([call.admission.cache_control])
        described = call.call
        try:
            digest = value_digest(
                "value",
                key,
                kind,
                None if described is None else described.provider,
                None if described is None else described.model,
                None if described is None else str(described.max_output_tokens),
                None if described is None else described.service_tier,
            )
        except Unfit as unfit_:
            return self._pass(call, str(unfit_))
        return await self._look_up(call, directive, control, digest, requests=requests)

    def _directive(self, call: ActiveCall) -> CacheDirective | None:
        """What the scopes say.

        Raises:
            LimitExceeded: a policy refuses by itself.
        """
        admission = call.admission
        engine = admission.engine
        asked = ask(call.policies, admission.context, call.call, engine.clock.now_ms(), requests=False)
        if asked.refusal is not None:
            raise LimitExceeded(engine.refused(admission.context, call.call, asked.refusal))
        return asked.cache

    async def _look_up(
        self,
        call: ActiveCall,
        directive: CacheDirective | None,
        control: CacheControl,
        digest: bytes,
        *,
        stream: bool = False,
        requests: bool = False,
    ) -> Lookup:
        if directive is None:
            self._warn_once("nothing is kept of a call without a scope", "add CacheScope() to the policies")
            return self._pass(call, "no CacheScope is among the policies")
        if not directive.allowed:
            return self._pass(call, directive.reason)
        if not control.store:
            return self._pass(call, "the request says no-store")
        if self._interruptible is not None and not self._interruptible.available():
            return self._pass(call, "the storage is away")
        target = self._target(directive, digest, stream=stream)
        lookup = Lookup(self, call, target)
        try:
            found, entry = await self._join(lookup, target, control)
        except StorageError as error:
            self._warn_once("the storage does not answer", error)
            return self._pass(call, "the storage does not answer")
        if isinstance(found, Leading):
            self._tell_miss(call, "")
            lookup.lead()
            return lookup
        if isinstance(found, InFlight) or entry is None:
            return self._pass(call, "another call asks the same, and is not done")
        await call.claim_hit(entry.usage, requests=requests)
        call.end()
        self._counts["hits"] += 1
        self._counts["waited"] += lookup.waited
        emit(call.admission.engine.observers, CacheHit(call.admission.context, call.call, found.age_ms, lookup.waited))
        lookup.give(entry, found.age_ms)
        return lookup

    def _target(self, directive: CacheDirective, digest: bytes, *, stream: bool) -> Target:
        ttl_ms = self.settings.ttl_ms
        if directive.ttl_s is not None:
            ttl_ms = min(ttl_ms, directive.ttl_s * 1000)
        partition = partition_digest(directive.partition)
        return Target(
            key=digest_of("key", self.settings.version, partition, digest).hex(),
            partition=partition,
            request=digest,
            names=tuple(map(name_digest, (_EVERYTHING, *directive.names))),
            ttl_ms=ttl_ms,
            stream=stream,
        )

    async def _join(
        self, lookup: Lookup, target: Target, control: CacheControl
    ) -> tuple[Kept | Leading | InFlight, Entry | None]:
        """What the storage says, after waiting for another call that asks the same; and the answer, if there is one
        that may be given. One that may not is made anew."""
        limit_ms = target.ttl_ms if control.max_age_s is None else min(target.ttl_ms, control.max_age_s * 1000)
        # What another call has begun before this request is not fresh enough for one that wants no kept answer.
        wait_s = self.settings.wait_s if control.give else 0.0
        found = await lookup.join(wait_s=wait_s, fresh=not control.give)
        entry = self._agreeing(found, target, limit_ms)
        if isinstance(found, Kept) and entry is None:
            found = await lookup.join(wait_s=wait_s, fresh=True)
            entry = self._agreeing(found, target, limit_ms)
        return found, entry

    def _agreeing(self, found: Kept | Leading | InFlight, target: Target, limit_ms: int) -> Entry | None:
        """What was found, if it is what was looked for. The key says so already: this is the second look."""
        # An age below 0: the store's clock was set back, and nobody knows how old it is.
        if not isinstance(found, Kept) or not 0 <= found.age_ms < limit_ms:
            return None
        try:
            entry = decode(found.value)
        except msgspec.MsgspecError as error:
            self._warn_once("what was kept cannot be read", error)
            return None
        if entry.partition != target.partition or entry.request != target.request:
            _log.error("cache: the entry of another partition or request was found under a key; it is not given")
            return None
        return entry

    # -------------------------------------------------------------------------------- revoke

    async def revoke(
        self, *, caller: str | None = None, user: str | None = None, knowledge_base: str | None = None
    ) -> None:
        """Answers of this caller, this user, or from this knowledge base are not found any more, in any process.

        Each of those that are given is revoked. An answer that is being made just now is not kept.

        Raises:
            ValueError: none is given.
            StorageError: the storage does not answer. Until it does, none of its answers is given, either; revoke
                again.
        """
        named = (("caller", caller), ("user", user), ("kb", knowledge_base))
        names = [f"{kind}:{escape(one)}" for kind, one in named if one is not None]
        if not names:
            raise ValueError("revoke: expected caller=, user= or knowledge_base=; clear() forgets everything")
        for name in names:
            await self.flights.entries.bump(name_digest(name))

    async def clear(self) -> None:
        """Nothing that was kept so far is found any more, in any process.

        Raises:
            StorageError: as `revoke`.
        """
        await self.flights.entries.bump(name_digest(_EVERYTHING))

    async def forget_lost(self, storage: object) -> None:
        """`storage` was flushed or rolled back: if answers are kept there, none of before is given.

        Raises:
            StorageError: as `revoke`.
        """
        if storage is self._storage:
            await self.clear()

    def stats(self) -> dict[str, int | dict[str, int]]:
        """What this process has seen: `hits` (`waited` of them for another call), `misses`, `passed` without a look,
        `stored`, and `unstored`. `reasons` counts why calls were passed and answers not stored."""
        counts = {name: self._counts[name] for name in ("hits", "waited", "misses", "passed", "stored", "unstored")}
        return {**counts, "reasons": dict(self._reasons)}

    # --------------------------------------------------------------------------------- inside

    def _pass(self, call: ActiveCall, reason: str) -> Lookup:
        self._counts["passed"] += 1
        self._count_reason(reason)
        self._tell_miss(call, reason)
        return Lookup(self, call)

    def _tell_miss(self, call: ActiveCall, reason: str) -> None:
        self._counts["misses"] += not reason
        emit(call.admission.engine.observers, CacheMiss(call.admission.context, call.call, reason))

    def _count_reason(self, reason: str) -> None:
        # Some name what a provider says.
        known = reason in self._reasons or len(self._reasons) < _MOST_REASONS
        self._reasons[reason if known else "another one"] += 1

    def stored(self, reason: str | None) -> bool:
        self._counts["stored" if reason is None else "unstored"] += 1
        if reason is not None:
            self._count_reason(reason)
        return reason is None

    def soon(self, work: Coroutine[None, None, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            background.run(work, anywhere=True)
        else:
            task = loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _warn_once(self, what: str, why: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            _log.warning("cache: %s: %s; this is said once", what, why)
