"""Administration data in SQL: every change is one transaction that checks, writes, and says who did it.

Rule 1: whoever changes anything takes the row of `control_meta` first: changes follow one another, over all processes.

Rule 2: an entry is changed by who has seen it: `expected` is the version that was seen. Of two who saw the same one, one
changes it, and the other is told by whom.

Rule 3: a change and its row in the audit are one. A try that was refused leaves a row, and nothing else.

Rule 4: no key and no secret is ever written. What is kept of a key is a keyed hash, and that is in no audit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.control import tables
from asgi_llm_guard.control.audit import Seals, append, find, verify
from asgi_llm_guard.control.changes import Actor, AuditEntry, AuditQuery, Change, Conflict, NotThere, Verified, text_of
from asgi_llm_guard.control.data import shown
from asgi_llm_guard.control.entries import apply, check_size, entry_of, target_of, warm_prices
from asgi_llm_guard.control.issuing import ended, issue, rotatable
from asgi_llm_guard.control.keys import ControlKeys
from asgi_llm_guard.control.live import LiveSettings, settings_of
from asgi_llm_guard.control.meta import meta_of, release, state_of, take, version_of
from asgi_llm_guard.control.numbers import check_sizes
from asgi_llm_guard.control.state import ControlState, Head, NewerRelease, decode, encode
from asgi_llm_guard.control.tries import SEVERAL, Counted, count, counted_before, has_ended
from asgi_llm_guard.control.values import Key, Kind, Value
from asgi_llm_guard.errors import ConfigurationError, GuardError, StorageError
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.identity.keys import ApiKeys
from asgi_llm_guard.sql import Connection, Database, open_database

__all__ = ["Control"]

_SEQ: Final = "SELECT seq, at_ms, version, actor, role, address, verb, target, old, new, reason, refused, digest"


class Control:
    """Administration data: `control = Control("sqlite:///control.db", secret=...)`.

    Args:
        database: a URL as of `open_database`, or a database.
        secret: makes the digests of keys, and the seals of the audit; at least 16 characters, from the environment or a
            secret file. Several while one is replaced: the first makes new ones. `None`: there are no keys, and
            whoever can write to the database can forge the audit.
        clock: the time; for tests.

    Raises:
        ConfigurationError: the URL or a secret is malformed.
    """

    def __init__(
        self,
        database: Database | str,
        *,
        secret: str | Sequence[str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.database = open_database(database, name="control") if isinstance(database, str) else database
        self._secrets = () if secret is None else (secret,) if isinstance(secret, str) else tuple(secret)
        for one in self._secrets:
            ApiKeys((), secret=one)  # checks it
        self._clock = clock or SystemClock()
        self._seals = Seals([one.encode() for one in self._secrets])
        self._pid = 0
        self._known: ControlState | None = None
        self.knowledge_bases = LiveSettings()
        """The settings of all knowledge bases, as they are now: `CacheScope(settings=control.knowledge_bases)`."""
        self.resolvers: list[ControlKeys] = []
        """What `keys` has given."""
        self._in_force: tuple[int, Sequence[Key]] | None = None
        """The version, and its keys, that they resolve by; `None`: nothing was loaded yet."""
        self._using = threading.Lock()

    # ---------------------------------------------------------------------------------- reading

    async def version(self) -> int:
        """The version of what is there now.

        Raises:
            StorageError: the database does not answer.
        """
        await self._ready()
        return await self.database.read(version_of)

    async def state(self) -> ControlState:
        """Everything as it is now.

        Raises:
            StorageError: the database does not answer.
            NewerRelease: it has entries that this release does not know.
        """
        await self._ready()
        known = self._known
        state = await self.database.read(lambda connection: state_of(connection, known))
        self._known = state
        return state

    async def audit(self, query: AuditQuery = AuditQuery()) -> Sequence[AuditEntry]:  # noqa: B008 - immutable
        """What was changed or refused, the newest first. Of many tries that were refused the first ones have a row each
        (see `tries.py`), the others are counted, and have one together when their hour is over.

        Raises:
            StorageError: the database does not answer.
        """
        await self._ready()
        await self._tell_counts()
        return await self.database.read(lambda connection: find(connection, query))

    async def verify_audit(self, *, since: Head | None = None) -> Verified:
        """Look through the whole audit for rows that are missing or were changed.

        `since`: the `head` of an earlier time that was kept elsewhere, such as that of a published state. Without one
        it shows in any case what was done to the table alone.

        Raises:
            StorageError: the database does not answer.
        """
        await self._ready()

        def look(connection: Connection) -> Verified:
            rows = connection.iterate(f"{_SEQ} FROM control_audit ORDER BY seq")
            return verify(rows, self._seals, meta_of(connection)[1], since)

        return await self.database.read(look)

    # --------------------------------------------------------------------------------- changing

    async def put(
        self,
        kind: Kind,
        name: str,
        value: Mapping[str, Any] | Value,
        *,
        actor: Actor,
        reason: str = "",
        expected: int | None = None,
    ) -> ControlState:
        """Add an entry, or change it.

        A mapping changes the fields that it names, and leaves the others as they are; only prices, raises and stops are
        replaced as a whole. A limit is a number, or `"unlimited"`; `None` is refused. A value (`Department(...)`)
        replaces the entry. What is as it was changes nothing, and leaves no row.

        `expected`: the version of the entry that was seen; 0: there must be none; `None`: whatever there is.

        Raises:
            ConfigurationError: a field is malformed; names it.
            Conflict: it was changed meanwhile.
            NewerRelease: there are entries that this release does not know, as while others run a newer one. The change
                was made: `made` is its version.
            StorageError: the database does not answer. Look whether it was done: nobody knows, but where it says so.
        """
        return await self.put_all(
            (Change(kind=kind, name=name, value=value, expected=expected),), actor=actor, reason=reason
        )

    async def remove(
        self, kind: Kind, name: str, *, actor: Actor, reason: str = "", expected: int | None = None
    ) -> ControlState:
        """Remove an entry: what code or a file says under its name holds again.

        Raises:
            NotThere: there is none.
            Conflict, StorageError: as `put`.
        """
        change = Change(kind=kind, name=name, value=None, expected=expected)
        return await self.put_all((change,), actor=actor, reason=reason)

    async def put_all(self, changes: Sequence[Change], *, actor: Actor, reason: str = "") -> ControlState:
        """Make several changes, or none of them: one version, and a row of the audit for each.

        Raises:
            ConfigurationError, Conflict, NotThere, StorageError: as `put` and `remove`.
        """
        version = await self._change(changes, actor=actor, reason=reason)
        return await self._after(version)

    async def note(
        self,
        verb: str,
        target: str,
        *,
        actor: Actor,
        reason: str = "",
        old: object = None,
        new: object = None,
        refused: str | None = None,
    ) -> None:
        """Add a row to the audit for what is no change of an entry: a reset, a stopped session, a refused try. A refused one
        after many others is only counted.

        `old`, `new`: JSON data; never with a secret in it.

        Raises:
            ConfigurationError: a number in them is far too large.
            StorageError: the database does not answer.
        """
        check_sizes(old, "old")
        check_sizes(new, "new")
        await self._ready()

        def work(connection: Connection) -> None:
            version, head = take(connection)
            at_ms = self._clock.now_ms()
            head = self._with_counts(connection, version, head, at_ms)

            def add(counted: Counted | None) -> None:
                nonlocal head
                if counted is not None:
                    head = self._told(connection, version, head, at_ms, counted)
                    return
                head = append(
                    connection, self._seals, head, at_ms=at_ms, version=version, actor=actor, verb=verb,
                    target=target, old=old, new=new, reason=reason, refused=refused,
                )  # fmt: skip

            if refused is None:
                add(None)
            else:
                count(connection, actor.name, text_of(verb), at_ms, add=add)
            release(connection, version, head)

        await self.database.write(work)

    async def _tell_counts(self) -> None:
        """Put the counts of hours that are over into the audit."""
        at_ms = self._clock.now_ms()
        if not await self.database.read(lambda connection: has_ended(connection, at_ms)):
            return

        def work(connection: Connection) -> None:
            version, head = take(connection)
            release(connection, version, self._with_counts(connection, version, head, at_ms))

        await self.database.write(work)

    def _with_counts(self, connection: Connection, version: int, head: Head, at_ms: int) -> Head:
        for counted in counted_before(connection, at_ms):
            head = self._told(connection, version, head, at_ms, counted)
        return head

    def _told(self, connection: Connection, version: int, head: Head, at_ms: int, counted: Counted) -> Head:
        return append(
            connection, self._seals, head, at_ms=at_ms, version=version, actor=counted.actor, verb=counted.verb,
            target=SEVERAL, refused=counted.why,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- keys

    def keys(self, *, then: Resolver | None = None, **options: Any) -> ControlKeys:
        """Resolves the keys, for `Guard(identity=...)`; `then` and the options as of `ControlKeys`.

        Raises:
            ConfigurationError: this control has no secret.
        """
        self._secret()
        resolver = ControlKeys(secret=self._secrets, then=then, clock=self._clock, **options)
        with self._using:
            if self._in_force is not None:
                resolver.load(self._in_force[1])
            self.resolvers.append(resolver)
        return resolver

    async def new_key(
        self,
        caller: str,
        *,
        actor: Actor,
        reason: str = "",
        user: str | None = None,
        departments: Sequence[str] = (),
        agent: str | None = None,
        tags: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        expires_at_ms: int | None = None,
    ) -> tuple[str, Key]:
        """A new random key of 256 bits, and what is kept of it. The key is nowhere else: show it once, then forget it.

        Raises:
            ConfigurationError: a field is malformed, or this control has no secret.
            StorageError: as `put`; a key that was kept all the same is one that nobody knows.
        """
        try:
            shown_once, key = self._issued(
                caller,
                user=user,
                departments=tuple(departments),
                agent=agent,
                tags=tuple(tags),
                params=params or {},
                expires_at_ms=expires_at_ms,
            )
        except ConfigurationError as error:
            await self.note("new_key", "key:", actor=actor, reason=reason, refused=f"invalid: {error}")
            raise
        change = Change(kind="key", name=key.id, value=key, expected=0)
        await self._change((change,), actor=actor, reason=reason, verb="new_key")
        return shown_once, key

    async def rotate_key(
        self,
        key_id: str,
        *,
        overlap: str,
        actor: Actor,
        reason: str = "",
        expected: int | None = None,
    ) -> tuple[str, Key]:
        """A new key in place of another one, which ends after `overlap` (`"7d"`, or `"0s"`: at once), or earlier if it
        was to end anyway. Until then both are known.

        Raises:
            NotThere: there is no such key.
            ConfigurationError: it is over, was rotated already, or the key before it is still active (two are active at
                most); or `overlap` is no duration.
            Conflict, StorageError: as `put`.
        """
        state = await self.state()
        now_ms = self._clock.now_ms()
        try:
            old, overlap_ms = rotatable(state, key_id, overlap, now_ms)
        except GuardError as error:
            await self.note("rotate_key", f"key:{key_id}", actor=actor, reason=reason, refused=_why(error))
            raise
        key = old.value
        shown_once, new = self._issued(
            key.caller,
            user=key.user,
            departments=key.departments,
            agent=key.agent,
            tags=key.tags,
            params=key.params,
            replaces=key_id,
        )
        ending = ended(key, now_ms + overlap_ms)
        changes = (
            Change(kind="key", name=key_id, value=ending, expected=old.version if expected is None else expected),
            Change(kind="key", name=new.id, value=new, expected=0),
        )
        await self._change(changes, actor=actor, reason=reason, verb="rotate_key")
        return shown_once, new

    async def revoke_key(
        self,
        key_id: str,
        *,
        actor: Actor,
        reason: str = "",
        expected: int | None = None,
    ) -> ControlState:
        """End a key now. One that is revoked stays so.

        Raises:
            NotThere, Conflict, StorageError: as `remove`.
        """
        await self._ready()
        # This entry alone: what a newer release has put beside it must not keep a key that has leaked.
        key, seen = await self.database.read(lambda connection: entry_of(connection, "key", key_id))
        if not isinstance(key, Key):
            await self.note("revoke_key", f"key:{key_id}", actor=actor, reason=reason, refused="there is no such key")
            raise NotThere("key", key_id)
        if key.revoked_ms is not None:
            return await self.state()
        revoked = msgspec.structs.replace(key, revoked_ms=self._clock.now_ms())
        change = Change(kind="key", name=key_id, value=revoked, expected=seen if expected is None else expected)
        return await self._after(await self._change((change,), actor=actor, reason=reason, verb="revoke_key"))

    # ----------------------------------------------------------------------------------- moving

    async def export(self) -> bytes:
        """Everything but the audit, as a JSON document. The digests of keys are in it, which hold with the same secret.

        Raises:
            StorageError, NewerRelease: as `state`.
        """
        return encode(await self.state())

    async def load(self, document: bytes, *, actor: Actor, reason: str = "", replace: bool = False) -> ControlState:
        """Take over what `export` gave, entry by entry, in one transaction. `replace`: remove everything else. A key that
        was revoked here since stays revoked.

        Raises:
            ConfigurationError: it is no such document, or of a newer release; nothing was changed.
            StorageError: as `put`.
        """
        try:
            given = decode(document)
        except ConfigurationError as error:
            await self.note("load", "all", actor=actor, reason=reason, refused=f"invalid: {error}")
            raise
        changes = [Change(kind=kind, name=name, value=entry.value) for kind, name, entry in given]
        if replace:
            there = await self.state()
            changes += [
                Change(kind=kind, name=name, value=None, expected=entry.version)
                for kind, name, entry in there
                if name not in given.of(kind)
            ]
        return await self._after(await self._change(changes, actor=actor, reason=reason))

    def prepare(self, state: ControlState) -> Callable[[], None]:
        """Make ready what this object gives (`keys`, `knowledge_bases`) for a state; calling the answer puts it in force.

        Raises:
            ConfigurationError: it cannot be; nothing was changed.
        """
        keys = [entry.value for entry in state.keys.values()]
        tables = [(resolver, resolver.table(keys)) for resolver in self.resolvers]
        settings = settings_of(state.knowledge_bases)

        def use() -> None:
            with self._using:
                if self._in_force is not None and state.version < self._in_force[0]:
                    return  # of another guard that was slower
                self._in_force = state.version, keys
                for resolver, table in tables:
                    resolver.use(table)
                for resolver in self.resolvers[len(tables) :]:  # made meanwhile
                    resolver.load(keys)
                self.knowledge_bases.use(settings)

        return use

    async def aclose(self) -> None:
        """Let go of the database."""
        await self.database.aclose()

    # ----------------------------------------------------------------------------------- inside

    async def _ready(self) -> None:
        """Make the tables, once in a process."""
        if self._pid == os.getpid():
            return
        now_ms = self._clock.now_ms()
        await self.database.write(lambda connection: tables.create(connection, now_ms))
        self._pid = os.getpid()

    async def _after(self, version: int) -> ControlState:
        """Everything as it is after a change; whoever cannot read it learns that the change was made all the same.

        Raises:
            NewerRelease, StorageError: as `state`.
        """
        try:
            return await self.state()
        except NewerRelease as error:
            told = NewerRelease(f"the change was made, as version {version}, but: {error}")
            told.made = version
            raise told from None
        except StorageError as error:
            raise StorageError(
                f"the change was made, as version {version}, but cannot be read back: {error}"
            ) from error

    async def _change(self, changes: Sequence[Change], *, actor: Actor, reason: str, verb: str | None = None) -> int:
        """Make the changes, and say so; or say why not. The version after it."""
        await self._ready()
        if any(change.kind == "price" for change in changes):
            warm_prices()
        tried: list[Change] = []

        def work(connection: Connection) -> int:
            version, head = take(connection)
            now_ms = self._clock.now_ms()
            changed = max(version + 1, now_ms)
            for change in changes:
                tried.append(change)
                kind, name = target_of(change)
                old, new = apply(connection, change, kind, name, changed, now_ms)
                if old == new:
                    continue
                head = append(
                    connection, self._seals, head, at_ms=now_ms, version=changed, actor=actor, verb=_verb(change, verb),
                    target=f"{kind}:{name}", old=_audited(old), new=_audited(new), reason=reason,
                )  # fmt: skip
                version = changed
            check_size(connection)
            release(connection, version, head)
            return version

        try:
            return await self.database.write(work)
        except (ConfigurationError, Conflict, NotThere) as error:
            last = tried[-1]
            target = f"{text_of(last.kind)}:{text_of(last.name)}"
            await self.note(_verb(last, verb), target, actor=actor, reason=reason, refused=_why(error))
            raise

    def _secret(self) -> str:
        if not self._secrets:
            raise ConfigurationError(
                "control: keys need a secret: Control(url, secret=os.environ['CONTROL_SECRET']), at least 16 characters"
            )
        return self._secrets[0]

    def _issued(self, caller: str, **fields: Any) -> tuple[str, Key]:
        return issue(caller, secret=self._secret(), now_ms=self._clock.now_ms(), **fields)


def _verb(change: Change, given: str | None) -> str:
    return given or ("remove" if change.value is None else "put")


def _audited(value: Value | None) -> dict[str, Any] | None:
    return None if value is None else shown(value)


def _why(error: GuardError) -> str:
    kind: Literal["conflict", "invalid", "not there"] = "invalid"
    if isinstance(error, Conflict):
        kind = "conflict"
    elif isinstance(error, NotThere):
        kind = "not there"
    return f"{kind}: {error}"
