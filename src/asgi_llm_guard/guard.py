"""START HERE: the guard, and the flow of one call.

    extract   who asks: identity, session, agent                    middleware/, identity/
    describe  what is asked: model, bounds of tokens and cost       describe.py, estimate.py, pricing
    ask       every policy for its claims, or its refusal           plan.py, policies/
    reserve   all claims or none, in one atomic step                engine/, storage/
    decide    `Denied`, or an open `Admission` with its calls       denials/, admission.py
    handle    the application runs                                  middleware/, decorator/
    record    what the provider says was used                       wire/
    price     what it cost                                          pricing
    settle    the held amounts become the real ones, once           charge.py, storage/
    emit      observers are told                                    events.py

Rule 1: a refusal has taken nothing, from any policy.
Rule 2: whatever is taken is settled exactly once, on every way out; if the process dies, by its
owner's lapse.
Rule 3: unknown is not zero: no usage, no price and no store each end in a decision that shows.
Rule 4: nothing that a client sends widens a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, overload

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall, Admission, current_scope
from asgi_llm_guard.agents import AgentRegistry
from asgi_llm_guard.cache import Cache, Key, OpenCachedCall, OpenCachedCallSync, ResponseCache
from asgi_llm_guard.claims import Meter, Reading
from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.configuration import Configuration
from asgi_llm_guard.context import Call, Context, Target
from asgi_llm_guard.denials.statuses import check_statuses
from asgi_llm_guard.describe import Describer
from asgi_llm_guard.draining import Draining
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.engine.data_loss import OnDataLoss
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.estimate import Counter
from asgi_llm_guard.events import Observer
from asgi_llm_guard.filtering import under_budget
from asgi_llm_guard.following import Follower
from asgi_llm_guard.guard_arguments import (
    check_agents,
    check_extractor,
    check_one_of,
    check_resolver,
    check_seconds,
    check_stream_rules,
    check_whole,
)
from asgi_llm_guard.guard_parts import bind_alerts, local_storage, open_control
from asgi_llm_guard.identity.base import Resolver
from asgi_llm_guard.identity.extract import DEFAULT_SESSION, Extractor
from asgi_llm_guard.learning import LearnedOutput
from asgi_llm_guard.opening import DRAINING, OpenAdmission, OpenAdmissionSync, OpenCall, OpenCallSync, new_call
from asgi_llm_guard.operating import Operated
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage import open_storage, with_leases
from asgi_llm_guard.storage.base import KeepsLedger, Storage, Verbs
from asgi_llm_guard.storage.streams import KeepsStreams
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.windows import duration_ms

if TYPE_CHECKING:
    import httpx
    import httpx2

    from asgi_llm_guard.admin import AdminOptions
    from asgi_llm_guard.admin.app import AdminApp
    from asgi_llm_guard.admin.usage import UsageApp
    from asgi_llm_guard.alerts import Alerts
    from asgi_llm_guard.control.store import Control
    from asgi_llm_guard.health import HealthApp
    from asgi_llm_guard.ledger import Ledger, Retention
    from asgi_llm_guard.ledger.attach import Bookkeeping

__all__ = ["DRAINING", "Guard", "OpenCall", "new_call"]

_ASSUMED_INPUT_TOKENS: Final = 2_000
_DRAIN_S: Final = 5.0


class Guard(Operated):
    """Policies over a storage: what decides before a call is made, and settles after it.

    Args:
        policies: asked in this order; the first that refuses is named in the refusal.
        storage: `memory://`, `sqlite:///path/to/file.db`, or a `Storage`.
        identity: who is verified (`ApiKeys`, `ScopeUser`, …). `None`: everybody is the shared
            anonymous caller, and start-up warns of it.
        agents: limits by agent: `{"researcher": {"max_iterations": 25}}`.
        session: where the session id is read from; header and body fields by default.
        control: administration data that are followed while the guard runs (`docs/administration.md`): a `Control`, or
            the URL of its database. They win over `agents`, `prices` and quota books by name. `None`: there are none.
        ledger: where usage records are summed up for reports (`docs/ledger.md`): a `Ledger`, or the URL of its database.
            `None`: in the file of a SQLite storage, in memory beside one in memory; nowhere, with Redis. A `Retention`:
            there, for so long. It is closed with the guard, as the storage and the administration data are.
        prices: what a call costs; the shipped snapshot by default, unknown models refused where a
            money policy applies.
        clock: the time; for tests.
        observers: are told every event.
        alerts: who is told when a limit is nearly used up, or too fast (`docs/alerts.md`). `None`: nobody.
        hold_wait_s: how long a call waits, in seconds, where only the holds of others stand in its way.
        max_waiting: how many calls may wait at the same time; more are refused at once.
        max_overage: a reported usage of more than so many times what was held is not believed: that much is
            charged, and a `UsageAnomaly` tells of it. Where the hold was an assumption, what the model can take and
            give is believed in any case. `None`: every report is.
        streams: what holds for streamed answers (`docs/streams.md`): deadlines, and what becomes of one that is longer
            than what can be held for it. `None`: there are none, and it goes on.
        disclose: `owned`: refusals show limits and counts of scopes that the caller owns; `all`: of all.
        on_data_loss: what to do when the storage was flushed or rolled back (`docs/outages.md`): `deny` every
            call until `accept_data_loss`, `accept` and begin at zero, or `rebuild` from what this process knows.
        statuses: HTTP statuses by code (`budget_exhausted`) or rule (`budget`), in place of the table.
        approval_url: where more may be asked for, as refusals of what can be granted tell it: a URL that may have
            `{policy}`, `{code}`, `{scope}` and `{subject}` in it. The subject is empty where the caller may not know it.
        session_limit, anonymous_session_limit: live session ids for each caller, and for all
            anonymous ones together.
        session_overflow: what happens to new ids beyond that: `deny` (429), or `share` one counter.
        session_ttl: how long an id counts as live after it was last admitted; at least as long as
            the longest session window.
        assumed_input_tokens: the input of a call that is described without its text.
        assumed_output_tokens: the output of a call without a limit of its own; `None`: the model's maximum.
        learn_output: hold for the output that this share of the answers so far was not longer than (`"p99"`), by
            route and model, where that is less than the bound; what longer ones cost is charged beyond the hold.
            `None`: always hold for the bound. See `docs/prices.md`.
        counter: an exact token counter in place of the bound by bytes.
        cache: keeps answers and gives them again, as the `CacheScope` among the policies allows (`docs/cache.md`).
        max_body_bytes: the longest request body that is read where a dialect is known or a session
            extractor needs it, in bytes; longer ones get a 413.

    Raises:
        ConfigurationError: an argument is wrong; here, never at request time.
    """

    def __init__(
        self,
        policies: Sequence[Policy] = (),
        *,
        storage: Storage | str = "memory://",
        identity: Resolver | None = None,
        agents: Mapping[str, Mapping[str, object]] | None = None,
        control: Control | str | None = None,
        ledger: Ledger | Retention | str | None = None,
        session: Extractor = DEFAULT_SESSION,
        prices: PriceBook | None = None,
        clock: Clock | None = None,
        observers: Sequence[Observer] = (),
        alerts: Alerts | None = None,
        hold_wait_s: float = 0.25,
        max_waiting: int = 1000,
        max_overage: int | None = 10,
        streams: StreamRules | None = None,
        disclose: Literal["owned", "all"] = "owned",
        on_data_loss: OnDataLoss = "deny",
        statuses: Mapping[str, int] | None = None,
        approval_url: str | None = None,
        session_limit: int = 10_000,
        anonymous_session_limit: int = 100_000,
        session_overflow: Literal["deny", "share"] = "deny",
        session_ttl: str = "1d",
        assumed_input_tokens: int = _ASSUMED_INPUT_TOKENS,
        assumed_output_tokens: int | None = None,
        learn_output: str | None = None,
        counter: Counter | None = None,
        cache: Cache | None = None,
        max_body_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        check_resolver(identity)
        check_extractor("session", session)
        check_one_of("disclose", disclose, "owned", "all")
        check_one_of("session_overflow", session_overflow, "deny", "share")
        check_one_of("on_data_loss", on_data_loss, "deny", "accept", "rebuild")
        for name, value in (
            ("session_limit", session_limit),
            ("anonymous_session_limit", anonymous_session_limit),
            ("max_waiting", max_waiting),
            ("assumed_input_tokens", assumed_input_tokens),
            ("max_body_bytes", max_body_bytes),
        ):
            check_whole(name, value)
        if assumed_output_tokens is not None:
            check_whole("assumed_output_tokens", assumed_output_tokens)
        if max_overage is not None:
            check_whole("max_overage", max_overage)
        check_stream_rules(streams)
        check_seconds("hold_wait_s", hold_wait_s, 60)
        self.clock = clock or SystemClock()
        self.max_body_bytes = max_body_bytes
        self.hooked = False
        """A client hook is installed: every call is seen."""
        self.own_paths: frozenset[str] = frozenset()
        """Paths at which `GuardMiddleware` lets probes pass, unless another route takes them: those of `health_app`."""
        self._routes: dict[str, tuple[Policy, ...]] = {}
        self._names: list[Callable[[str], Sequence[Target]]] = []
        registry = AgentRegistry(check_agents(agents))
        self._stored = open_storage(storage, clock=self.clock) if isinstance(storage, str) else storage
        self._engine = Engine(
            storage=self._stored,
            clock=self.clock,
            observers=observers,
            hold_wait_s=hold_wait_s,
            max_waiting=max_waiting,
            max_overage=max_overage,
            disclose=disclose,
            statuses=check_statuses(statuses or {}),
            session_limit=session_limit,
            anonymous_session_limit=anonymous_session_limit,
            session_overflow=session_overflow,
            session_ttl_ms=duration_ms(session_ttl, name="session_ttl"),
            agents=registry,
            sources=session.names,
            local_storage=local_storage(self.clock),
            with_leases=partial(with_leases, clock=self.clock),
            on_data_loss=on_data_loss,
            approval_url=approval_url,
            describer=Describer(
                prices=prices or PriceBook.snapshot(),
                clock=self.clock,
                counter=counter,
                assumed_input_tokens=assumed_input_tokens,
                assumed_output_tokens=assumed_output_tokens,
                learned=None if learn_output is None else LearnedOutput(learn_output),
            ),
        )
        # Before policies are bound: what they may lease is no matter of the cache's.
        self.cache = None if cache is None else ResponseCache(cache, self._engine.storage)
        """Answers that are kept; `None`: none are."""
        if self.cache is not None:
            self._engine.keep_answers(self.cache)
        self.control = open_control(control, self.clock)
        """Administration data; `None`: there are none."""
        self.follower = None if self.control is None else Follower(self.control, self._engine, registry)
        """Follows them, and puts them in force; `None`: there are none."""
        self._agents = registry
        self.configuration = Configuration(
            self._engine.bind(policies), identity, session, session is not DEFAULT_SESSION, streams or StreamRules()
        )
        """What requests, jobs and calls that begin now go by."""
        self._draining = Draining(self._engine)
        self._books: Bookkeeping | None = None
        self._attach(ledger, lazily=True)
        if alerts is not None:
            bind_alerts(alerts, self)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, watch: bool = False) -> Self:
        """A guard as a TOML file, the environment and secret files describe it; see `docs/settings.md`.

        `watch`: follow these files while the guard is open. What is wrong in them changes nothing, and is logged.

        Raises:
            ConfigurationError: names the file, the key, the value and what is allowed.
        """
        from asgi_llm_guard.settings import build_guard_arguments, load_settings
        from asgi_llm_guard.settings import watch as follow

        settings = load_settings(path)
        guard = cls(**build_guard_arguments(settings))
        if watch:
            follow(guard, settings)
        return guard

    @property
    def ledger(self) -> Ledger | None:
        """Usage records with their sums, and counts of refusals; `None`: this storage has no place for them, and no other
        was named. A storage in memory has one from the first time that it is asked for."""
        return None if self.books is None else self.books.ledger

    @property
    def books(self) -> Bookkeeping | None:
        """What this process does for the ledger; `None`: there is none."""
        if self._books is None:
            self._attach(None, lazily=False)
        return self._books

    def _attach(self, given: Ledger | Retention | str | None, *, lazily: bool) -> None:
        storage = self._stored
        if given is None and (not isinstance(storage, KeepsLedger) or (lazily and isinstance(storage, KeepsStreams))):
            return  # there is none; or one in memory, that nobody may ever ask for
        from asgi_llm_guard.ledger.attach import attach, open_ledger

        ledger = open_ledger(given, storage, clock=self.clock)
        if ledger is not None:
            self._books = attach(self, ledger, storage)

    @property
    def storage(self) -> Storage:
        """Where the counters live."""
        return self._engine.storage

    @property
    def prices(self) -> PriceBook:
        """What calls cost. May be replaced at any time; calls that are open keep their bound. Prices that are administered
        stay laid over it."""
        return self._engine.describer.prices

    @prices.setter
    def prices(self, prices: PriceBook) -> None:
        self._set_prices(prices)

    def _set_prices(self, prices: PriceBook) -> None:
        if self.follower is not None:
            self.follower.set_prices(prices)
        else:
            self._engine.describer.prices = prices

    @property
    def control_version(self) -> int | None:
        """The version of the administration data that are in force here; `None`: there are none, or none was loaded."""
        return None if self.follower is None else self.follower.version

    def known_models(self, name: str) -> tuple[Target, ...]:
        """The models that a gateway of this guard would ask for `name`; empty: it is none of its names."""
        return tuple([target for find in self._names for target in find(name)])

    def serve_models(self, find: Callable[[str], Sequence[Target]]) -> None:
        """Have guarded requests name what `find` knows: groups, aliases and deployments of a gateway. They are bounded
        by the dearest model that may answer, and admitted if one of those models may be."""
        self._names.append(find)
        self._engine.describer.known_models = self.known_models

    @property
    def engine(self) -> Engine:
        """What the skins (middleware, decorator, hooks) drive."""
        return self._engine

    def observe(self, observer: Observer, /) -> Callable[[], None]:
        """Tell `observer` every event from now on, until what is given is called."""
        return self._engine.observe(observer)

    def begin_reading(self, meters: Sequence[Meter], /) -> Future[tuple[Reading, ...]]:
        """Read the state of meters in the background. From any thread; the answer need not be waited for."""
        return background.begin(self._engine.storage.read(meters))

    def begin_counting(self) -> Future[int]:
        """Count the open holds of all processes in the background, as `begin_reading`."""
        return background.begin(self._engine.storage.open_holds())

    def measure(self, around: Callable[[Storage], Verbs] | None, /) -> None:
        """Ask the storage through what `around` makes of it (to measure it); `None`: directly."""
        self._engine.store.measure(around)

    def current_ids(self) -> tuple[str | None, str | None]:
        """The ids of the request and of the call that this code runs in; `None`: it runs in none."""
        scope = current_scope()
        if scope is None:
            return None, None
        call = scope if isinstance(scope, ActiveCall) else None
        admission = scope.admission if isinstance(scope, ActiveCall) else scope
        return admission.context.request_id, None if call is None or call.hold is None else call.hold.call_id

    @property
    def open_admissions(self) -> int:
        """How many requests and jobs are open in this process."""
        return len(self._draining.open)

    def describe(self, model: str, **described: Any) -> Call:
        """A call with its upper bounds of tokens and cost; see `Describer.describe` for the arguments."""
        return self._engine.describer.describe(model, **described)

    # --------------------------------------------------------------------------------- open

    def open(self, context: Context | None = None, *, extra: Sequence[Policy] = ()) -> OpenAdmission:
        """`async with guard.open(Context(caller="job:nightly"))`: an admission outside HTTP.

        Claims what a request costs (rates, slots); every call inside claims its own.

        Raises:
            LimitExceeded: on entering; nothing was taken.
        """
        return OpenAdmission(self, context or Context(), self._engine.bind(extra))

    def open_sync(self, context: Context | None = None, *, extra: Sequence[Policy] = ()) -> OpenAdmissionSync:
        """`with guard.open_sync(...)`: as `open`, for synchronous code."""
        return OpenAdmissionSync(self, context or Context(), self._engine.bind(extra))

    @overload
    def call(self, *, extra: Sequence[Policy] = (), cache_key: None = None, **described: Any) -> OpenCall: ...

    @overload
    def call(self, *, extra: Sequence[Policy] = (), cache_key: Key, **described: Any) -> OpenCachedCall: ...

    def call(
        self, *, extra: Sequence[Policy] = (), cache_key: Key | None = None, **described: Any
    ) -> OpenCall | OpenCachedCall:
        """`async with guard.call(model="anthropic/claude-…", max_output_tokens=800) as call`.

        Takes the arguments of `describe`. Without a `model` it stands for the call that the
        request described. Leaving the block settles it: by what was recorded, else by the hold.
        `cache_key`: what the answer depends on; it is looked up first (`docs/cache.md`).

        Raises:
            ConfigurationError: wrong arguments, or a key without a cache; before anything is claimed.
            ContextError: on entering, outside any admission.
            LimitExceeded: on entering; nothing was taken.
        """
        if cache_key is not None:
            return OpenCachedCall(self._new_call(described, extra), self._cache(), cache_key)
        return OpenCall(self._engine, self._described(described), self._engine.bind(extra))

    @overload
    def call_sync(self, *, extra: Sequence[Policy] = (), cache_key: None = None, **described: Any) -> OpenCallSync: ...

    @overload
    def call_sync(self, *, extra: Sequence[Policy] = (), cache_key: Key, **described: Any) -> OpenCachedCallSync: ...

    def call_sync(
        self, *, extra: Sequence[Policy] = (), cache_key: Key | None = None, **described: Any
    ) -> OpenCallSync | OpenCachedCallSync:
        """`with guard.call_sync(...)`: as `call`, for synchronous code."""
        if cache_key is not None:
            return OpenCachedCallSync(self._new_call(described, extra), self._cache(), cache_key)
        return OpenCallSync(self._engine, self._described(described), self._engine.bind(extra))

    def _new_call(self, described: dict[str, Any], extra: Sequence[Policy]) -> Callable[[], ActiveCall]:
        return partial(new_call, self._engine, self._described(described), self._engine.bind(extra))

    def _cache(self) -> ResponseCache:
        if self.cache is None:
            raise ConfigurationError("guard.call: cache_key needs a cache: Guard([..., CacheScope()], cache=Cache())")
        return self.cache

    def _described(self, arguments: dict[str, Any]) -> Call | None:
        if not arguments:
            return None
        if "model" not in arguments:
            raise ConfigurationError(f"guard.call: {', '.join(sorted(arguments))} given without a model")
        return self._engine.describer.describe(arguments.pop("model"), **arguments)

    def new_admission(
        self,
        context: Context,
        *,
        extra: Sequence[Policy] = (),
        opaque: bool | None = None,
        policies: tuple[Policy, ...] | None = None,
    ) -> Admission:
        """An admission that has claimed nothing yet. `extra` must be bound (see `bind`).

        `opaque`: calls may be made in it that nobody sees; `None`: unless a client hook is installed. `policies`: those of
        the configuration under which it has begun; `None`: of now.
        """
        policies = self.policies if policies is None else policies
        if extra:
            policies = (*policies, *extra)
        return Admission(self._engine, context, policies, opaque=not self.hooked if opaque is None else opaque)

    # -------------------------------------------------------------------------------- hooks

    @overload
    def httpx_client(self, *, library: Literal["auto", "httpx2"] = "auto", **options: Any) -> httpx2.AsyncClient: ...

    @overload
    def httpx_client(self, *, library: Literal["httpx"], **options: Any) -> httpx.AsyncClient: ...

    def httpx_client(self, *, library: Literal["auto", "httpx", "httpx2"] = "auto", **options: Any) -> Any:
        """`AsyncOpenAI(http_client=guard.httpx_client())`: a client whose requests to providers are guarded.

        Args:
            library: `httpx` for SDKs that are built on it; `auto`: httpx2, or httpx where that is all there is.
            options: those of `AsyncGuardTransport`, and of the library's `AsyncClient`. Unless they say
                otherwise, redirects are followed and an answer may take 600 seconds, as with the SDKs' own clients.

        Raises:
            NotInstalledError: the library is missing.
        """
        from asgi_llm_guard.httpx import async_client

        return async_client(self, library=library, **options)

    @overload
    def httpx_client_sync(self, *, library: Literal["auto", "httpx2"] = "auto", **options: Any) -> httpx2.Client: ...

    @overload
    def httpx_client_sync(self, *, library: Literal["httpx"], **options: Any) -> httpx.Client: ...

    def httpx_client_sync(self, *, library: Literal["auto", "httpx", "httpx2"] = "auto", **options: Any) -> Any:
        """`OpenAI(http_client=guard.httpx_client_sync())`: as `httpx_client`, for synchronous code."""
        from asgi_llm_guard.httpx import sync_client

        return sync_client(self, library=library, **options)

    # ------------------------------------------------------------------------------- filter

    async def filter(self, deployments: object) -> list[Any]:
        """Those of `deployments` (a list, or a single one) whose provider is under budget.

        Works before any routing strategy. A deployment without a budget, or whose provider is not
        known, stays. An empty list stays empty.

        Raises:
            LimitExceeded: none is left; names each provider's spend and limit, and the soonest reset.
            StorageError: the storage does not answer, and a budget says `on_outage="deny"`.
        """
        return await under_budget(self._engine, self.policies, deployments)

    # ------------------------------------------------------------------------------ lifetime

    async def heartbeat(self) -> None:
        """Keep this process's holds alive now. Done every 5 seconds in the background; for tests."""
        await self._engine.heart.heartbeat()

    @property
    def ready(self) -> bool:
        """Whether calls are decided by the storage, and new ones are taken: for readiness probes. Administration data that
        were not loaded yet begin to be when this is asked."""
        loaded = self.follower is None or self.follower.loaded
        return loaded and self._engine.store.available and not self._draining.begun

    def health(self) -> dict[str, object]:
        """What a readiness probe may show: no ids, no limits, no addresses.

        `storage` is `ok`, `failed` or `lost` (its data), since `since_ms`; `last_error` the class of its last
        error. `unsettled` settlements wait for it, `degraded` requests and calls are open that were admitted
        without it, `waiting` calls wait for the holds of others, and `processes` shared it when last heard of.
        `control`: which version of the administration data is in force, and whether they can be followed.
        `behind` records were not in the ledger yet when this process looked last.
        """
        engine, store = self._engine, self._engine.store
        state = "failed" if store.state == "ok" and not store.available else store.state
        return {
            "ready": self.ready,
            "draining": self._draining.begun,
            "storage": state,
            "since_ms": store.since_ms,
            "last_error": store.last_error,
            "unsettled": engine.unsettled,
            "degraded": engine.degraded,
            "waiting": engine.waiting,
            "processes": store.here.processes,
            "control": None if self.follower is None else self.follower.health(),
            "behind": 0 if self._books is None else self._books.behind,
        }

    @property
    def beat_ms(self) -> int | None:
        """When the storage answered a heartbeat of this process last, in ms since the epoch; `None`: never."""
        return self._engine.heart.beat_ms

    @property
    def skew_ms(self) -> int:
        """How far the storage's clock was ahead of this process's then."""
        return self._engine.heart.skew_ms

    def health_app(self, *, at: str = "", max_price_age: str | None = None, max_clock_skew_s: float = 30) -> HealthApp:
        """`Mount("/ops", guard.health_app(at="/ops"))`: an ASGI app with `/healthz` and `/readyz` (`docs/outages.md`).

        No limit ever stands in the way of its two paths: `at` says where they are in the application that
        `GuardMiddleware` is around.

        Args:
            at: the path that it is mounted at; empty: at the root.
            max_price_age: not ready with list prices older than this (`"90d"`); `None`: their age is only shown.
            max_clock_skew_s: not ready with a clock that is further than this from the storage's.

        Raises:
            ConfigurationError: an argument is wrong.
        """
        from asgi_llm_guard.health import HealthApp

        if at and (not at.startswith("/") or at.endswith("/")):
            raise ConfigurationError(f"health_app: at must be a path such as '/ops', or empty, got {at!r}")
        app = HealthApp(self, max_price_age=max_price_age, max_clock_skew_s=max_clock_skew_s)
        self.own_paths |= {f"{at}/healthz", f"{at}/readyz"}
        return app

    def admin_app(self, options: AdminOptions) -> AdminApp:
        """`app.mount("/admin", guard.admin_app(AdminOptions(credentials=[…], secret=…)))`: pages, forms and an API for
        those who run the service (`docs/admin.md`). It opens for its own credentials alone, and no limit blocks it.

        Raises:
            NotInstalledError: jinja2 is missing.
        """
        from asgi_llm_guard.admin import make_admin_app

        return make_admin_app(self, options)

    def usage_app(self, *, tz: str = "UTC") -> UsageApp:
        """`app.mount("/usage", guard.usage_app())`: what is left for whoever asks, as a page and as JSON. `tz`: in which
        the page shows instants. No limit blocks it.

        Raises:
            ConfigurationError: the guard has no identity, or the time zone is none.
            NotInstalledError: jinja2 is missing.
        """
        from asgi_llm_guard.admin import make_usage_app

        return make_usage_app(self, tz=tz)

    async def accept_data_loss(self) -> None:
        """Go on with a storage that has lost its data, with the counters as they are now.

        Nothing happens where nothing was lost, or where the storage cannot tell.

        Raises:
            StorageError: the storage does not answer; calls are refused as before.
        """
        await self._engine.loss.accept()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the service is going down."""
        return self._draining.begun

    def track(self, admission: Admission) -> None:
        """Count `admission` as open until `untrack`. One that was still being granted as the service went down ends."""
        self._draining.track(admission)

    def untrack(self, admission: Admission) -> None:
        """The admission has ended."""
        self._draining.open.discard(admission)

    async def drain(self, timeout_s: float = _DRAIN_S) -> int:
        """Refuse new requests, wait up to `timeout_s` seconds for open ones, end and settle the rest.

        Streams that are still running get their dialect's last event. Calls are charged for what has been seen of them.
        When it returns, this process holds nothing, and everything is written. Gives the number of admissions that had
        to be settled while they were still running.
        """
        return await self._draining.drain(timeout_s)

    def resume(self) -> None:
        """Take new requests after a `drain`: the application starts again, as it does with every test client."""
        self._draining.begun = False

    def started(self) -> None:
        """The application is served now: chores begin, and signals are handled if they are to be."""
        self._engine.chores.begin()
        self._draining.started()

    def install_signal_handlers(self, timeout_s: float = _DRAIN_S) -> None:
        """Drain at SIGTERM and SIGINT, together with whatever the server does then (`docs/operations.md`).

        Servers wait for streams before they tell an application that it shuts down, or tell it nothing (mounted
        applications, `lifespan="off"`). With this, what is new is refused from the signal on, streams have `timeout_s`
        seconds, and the rest is ended and settled. Where nobody else handles the signal, the process ends by it then.
        Servers that put in their own handlers later are followed by `GuardMiddleware`, when it is served.

        Raises:
            ConfigurationError: not on the main thread, or the time is no number of seconds from 0.
        """
        self._draining.handle_signals(timeout_s)

    async def aclose(self) -> None:
        """Drain without waiting, settle what the storage did not take before, and let go of the storage."""
        await self.drain(0)
        await self._engine.close()
        if self._books is not None:
            await self._books.ledger.aclose()
        if self.control is not None:
            await self.control.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
