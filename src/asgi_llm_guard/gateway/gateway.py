"""START HERE: the gateway, one entry for all LLM calls of an application.

question    what is asked, read once                        request.py
keep        the answer may be there already                 guard.cache
route       who is asked, in which order, and again         router.py, policy.py, strategies.py, health.py
attempt     one request, metered and settled                attempt.py, providers/, translate/
reply       the answer in the client's dialect              here
"""

from __future__ import annotations

import asyncio
import random as randomness
import time as clock
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.admission import Admission, Scope, current_scope
from asgi_llm_guard.cache import CacheRequest, Lookup, ProviderAnswer
from asgi_llm_guard.context import Context, Target
from asgi_llm_guard.errors import ConfigurationError, ContextError, LimitExceeded
from asgi_llm_guard.gateway.attempt import Whole
from asgi_llm_guard.gateway.deployment import Deployment
from asgi_llm_guard.gateway.errors import Failure, UnknownModel
from asgi_llm_guard.gateway.health import CooldownRules, Cooldowns, cooldown_entries
from asgi_llm_guard.gateway.limits import DeploymentLimit, DeploymentLimits
from asgi_llm_guard.gateway.policy import Fallbacks, RetryRules
from asgi_llm_guard.gateway.providers.base import Provider
from asgi_llm_guard.gateway.providers.registry import Providers
from asgi_llm_guard.gateway.request import DIALECTS, Question, target_of
from asgi_llm_guard.gateway.resolve import Directory
from asgi_llm_guard.gateway.router import Found, Router, TierDown
from asgi_llm_guard.gateway.running import Running
from asgi_llm_guard.gateway.stats import Stats
from asgi_llm_guard.gateway.strategies import Strategy
from asgi_llm_guard.gateway.translate import Chunk, ChunkReader, Completion, Timings
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.plan import ask
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Headers
from asgi_llm_guard.wire.shape import decode, pick

if TYPE_CHECKING:
    from asgi_llm_guard.gateway.app import GatewayApp

__all__ = ["Gateway", "Reply", "Result"]

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_PIECE: Final = 64 * 1024


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer that is no chat completion."""

    raw: dict[str, Any]
    """All of it."""
    usage: Usage | None = None
    """`None`: not reported."""
    model: str | None = None
    deployment: str | None = None
    timings: Timings | None = None


class Reply:
    """An answer on its way, in the dialect that it was asked in. Read it to its end, or close it."""

    __slots__ = ("_answer", "_closed", "_failures", "_found", "_leave", "_lookup", "_question", "cached")

    def __init__(
        self,
        question: Question,
        found: Found | None,
        *,
        lookup: Lookup | None,
        leave: Callable[[], None],
    ) -> None:
        self._question = question
        self._found = found
        self._lookup = lookup
        self._leave = leave
        self._closed = False
        self.cached = found is None
        """It was kept from another call: nobody was asked."""

    status: int = 200

    @property
    def stream(self) -> bool:
        """It comes in pieces, as it is made."""
        return self._question.stream

    @property
    def content_type(self) -> str:
        return _EVENTS if self.stream else _JSON

    @property
    def deployment(self) -> str | None:
        """Who answers; `None`: nobody was asked."""
        return None if self._found is None else self._found.attempt.place.name

    @property
    def model(self) -> str | None:
        """`provider/model` of who answers."""
        return None if self._found is None else self._found.attempt.place.deployment.full_model

    @property
    def lowered_from(self) -> str | None:
        """The model that was asked for, if a cheaper one answers because a budget is nearly spent."""
        return None if self._found is None else self._found.lowered_from

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The attempts that failed before, in order."""
        return () if self._found is None else self._found.failures

    @property
    def waited_s(self) -> float:
        """Seconds between attempts."""
        return 0.0 if self._found is None else self._found.waited_s

    @property
    def timings(self) -> Timings:
        """Of the attempt that answers, so far."""
        return Timings() if self._found is None else self._found.attempt.timings

    @property
    def call(self) -> ActiveCall | None:
        """The attempt that answers; `None`: nobody was asked."""
        return None if self._found is None else self._found.attempt.call

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes for the client. After the first one nothing is raised: what goes wrong is told in the stream."""
        lookup, found = self._lookup, self._found
        try:
            if found is None:
                assert lookup is not None  # noqa: S101 - it was found there
                assert lookup.answer is not None  # noqa: S101 - as above
                body = lookup.answer.body
                for start in range(0, len(body), _PIECE):
                    yield body[start : start + _PIECE]
            elif isinstance(found.answer, Whole):
                yield found.answer.body
            else:
                async for piece in found.answer:
                    if lookup is not None:
                        lookup.feed(piece)
                    yield piece
                if lookup is not None and found.attempt.call.outcome == "measured":
                    self._lookup = None  # it is stored in the background, and not to be let go of
                    lookup.finish()
        finally:
            await self.aclose()

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self])

    async def aclose(self) -> None:
        """Nobody reads it any more: the deployment is told, and what was counted is charged. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._found is not None and isinstance(self._found.answer, Running):
                await self._found.answer.aclose()
        finally:
            if self._lookup is not None:
                self._lookup.abandon()
            self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Gateway:
    """Deployments behind one entry. Shared by a whole process; it works in every event loop.

    Args:
        guard: admits and settles every attempt. It stays its owner's: closing the gateway does not close it.
        deployments: `Deployment`s, or entries of a configuration; `None`: `initialise` is told of them.
        aliases: other names for models and groups.
        strategy: in which order deployments are tried: `usage`, `weighted`, `least_busy`, `lowest_latency`,
            `lowest_cost`, or your own.
        fallbacks: which models take over; a mapping is that of `Fallbacks(models)`.
        retry: how often, and after how long, a failed call is made again.
        cooldowns: when a deployment that keeps failing is left alone.
        tier_down: a cheaper model when a budget is nearly spent. `None`: never.
        providers: your own, by the name that deployments have as `via`.
        context: who asks where no admission of the guard is open; a context, or what gives one. `None`: such calls
            are refused.
        streams: what holds for streamed answers; `None`: as the guard says.
        random, sleep, time: for tests.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        guard: Guard,
        deployments: Iterable[Mapping[str, Any] | Deployment] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        strategy: str | Strategy = "usage",
        fallbacks: Fallbacks | Mapping[str, Sequence[str]] | None = None,
        retry: RetryRules | None = None,
        cooldowns: CooldownRules | None = None,
        tier_down: TierDown | None = None,
        providers: Mapping[str, Provider] | None = None,
        context: Context | Callable[[], Context] | None = None,
        streams: StreamRules | None = None,
        random: randomness.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        time: Callable[[], float] = clock.perf_counter,
    ) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard: expected a Guard, got {guard!r}")
        if context is not None and not isinstance(context, Context) and not callable(context):
            raise ConfigurationError(f"context: expected a Context, what gives one, or None, got {context!r}")
        self.guard = guard
        self.cooldowns = Cooldowns(cooldowns, entries=cooldown_entries(guard.storage), clock=guard.clock)
        self.limits = DeploymentLimits()
        guard.engine.bind((self.limits,))
        self.providers = Providers(providers)
        self.stats = Stats(guard.clock)
        self._context = context
        self._directory = Directory(aliases=aliases, own=(providers or {}).keys())
        self.router = Router(
            self._directory,
            providers=self.providers,
            limits=self.limits,
            cooldowns=self.cooldowns,
            stats=self.stats,
            window_of=self.window_of,
            strategy=strategy,
            fallbacks=fallbacks if fallbacks is None or isinstance(fallbacks, Fallbacks) else Fallbacks(fallbacks),
            retry=retry,
            tier_down=tier_down,
            streams=lambda: streams or guard.streams,
            random=random,
            sleep=sleep,
            time=time,
        )
        guard.serve_models(self._targets)
        guard.hooked = True
        if deployments is not None:
            self.initialise(deployments)

    # ---------------------------------------------------------------------------- deployments

    def initialise(self, deployments: Iterable[Mapping[str, Any] | Deployment]) -> int:
        """Take the deployments, and say how many there are. Done once: a second call changes nothing.

        Raises:
            ConfigurationError: an entry is wrong, or none is left; a name that something leads to is not served.
        """
        changes = self._directory.changes
        self._directory.initialise(deployments)
        if self._directory.changes != changes:
            self._check_served(self._directory)
            self._watch()
        return len(self)

    def parse(self, entries: Iterable[Mapping[str, Any] | Deployment]) -> tuple[Deployment, ...]:
        """The deployments that this gateway would have with these entries in place of its own. Nothing is changed.

        Raises:
            ConfigurationError: as `initialise`.
        """
        directory = self._directory.like(entries)
        self._check_served(directory)
        return directory.deployments

    def add(self, deployment: Deployment) -> None:
        """From now on it may be asked.

        Raises:
            ConfigurationError: there is one of that name.
        """
        self._directory.add(deployment)
        self._watch()

    def remove(self, name: str) -> None:
        """From now on it is not asked; calls that run go on.

        Raises:
            ConfigurationError: there is none of that name.
        """
        self._directory.remove(name)
        self.limits.remove(name)
        self.stats.forget(name)
        self._watch()

    def _watch(self) -> None:
        for each in self.deployments:
            limit = DeploymentLimit(rpm=each.rpm, tpm=each.tpm, budgets=each.limits, max_parallel=each.max_parallel)
            if limit == DeploymentLimit():
                self.limits.remove(each.name)
            else:
                self.limits.put(each.name, limit)
        self.cooldowns.watch(each.name for each in self.deployments)

    def _check_served(self, directory: Directory) -> None:
        """Whether it serves the cheaper models that are asked near the end of a budget."""
        tier_down = self.router.tier_down
        for name in () if tier_down is None else tier_down.to.values():
            try:
                directory.resolve(name)
            except UnknownModel as error:
                raise ConfigurationError(f"tier_down: {error}") from None

    def __len__(self) -> int:
        """How many deployments there are; 0 before there are any."""
        return len(self._directory)

    def __bool__(self) -> bool:
        return True

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """All of them."""
        return self._directory.deployments

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for: aliases, groups and `provider/model`."""
        return self._directory.names

    def window_of(self, deployment: Deployment) -> int | None:
        """The context window of a deployment, in tokens; `None`: not known."""
        if deployment.context_window is not None:
            return deployment.context_window
        return self.guard.engine.describer.window(deployment.provider, deployment.priced_model)

    def window(self, model: str) -> int | None:
        """The smallest context window of those who serve a model; `None`: one of them is not known.

        Raises:
            UnknownModel: nobody serves it.
            NotInitialised: there are no deployments yet.
        """
        windows = [self.window_of(each) for each in self._directory.resolve(model).deployments]
        return None if None in windows else min(window for window in windows if window is not None)

    def _targets(self, name: str) -> Sequence[Target]:
        """The models that may answer to a name: those who serve it, those who take over, the cheaper one."""
        if not len(self):
            return ()
        try:
            resolved = self._directory.resolve(name)
        except UnknownModel:
            return ()
        found = list(resolved.deployments)
        for other in self.router.others(name, resolved):
            try:
                found += self._directory.resolve(other).deployments
            except UnknownModel:
                continue
        targets = [msgspec.structs.replace(target_of(each), deployment=None) for each in found]
        return tuple(dict.fromkeys(targets))

    # ------------------------------------------------------------------------------------ ask

    async def ask(
        self,
        dialect: str,
        body: Mapping[str, Any] | bytes,
        *,
        headers: Headers = (),
        fallbacks: bool = True,
    ) -> Reply:
        """Ask in a dialect: `openai`, `anthropic`, `openai_responses`, `openai_embeddings` or `openai_completions`.

        `headers`: of the client; only a few are sent on (`providers.base.FORWARDED`).

        Raises:
            LimitExceeded: our policies let nobody be asked.
            GatewayError: nobody has answered; see `gateway.errors`.
            BodyError: the request is malformed.
            ContextError: no admission is open here, and the gateway has no `context`.
        """
        if dialect not in DIALECTS:
            raise ConfigurationError(f"dialect: expected one of {', '.join(sorted(DIALECTS))}, got {dialect!r}")
        question = Question(self.guard.engine.describer, dialect, body, headers=headers)
        admission, parent, leave = await self._admission()
        lookup: Lookup | None = None
        try:
            lookup = await self._look_up(question, admission, parent)
            if lookup is not None and lookup.hit:
                return Reply(question, None, lookup=lookup, leave=leave)
            found = await self.router.route(question, admission, parent, fallbacks=fallbacks)
            if lookup is not None and lookup.leads:
                await self._keep(lookup, found)
        except BaseException:
            if lookup is not None:
                lookup.abandon()
            leave()
            raise
        return Reply(question, found, lookup=lookup, leave=leave)

    async def _admission(self) -> tuple[Admission, ActiveCall | None, Callable[[], None]]:
        """The admission to ask in, the call around it, and what ends the admission if it is the question's own."""
        scope: Scope | None = current_scope()
        admission = scope.admission if isinstance(scope, ActiveCall) else scope
        guard = self.guard
        if admission is not None and admission.engine is guard.engine:
            return admission, scope if isinstance(scope, ActiveCall) else None, _nothing
        if self._context is None:
            raise ContextError(
                "the gateway is asked where no admission of its guard is open: add GuardMiddleware to the application, "
                "wrap the job in `async with guard.open(Context(caller=...))`, or give the gateway a context"
            )
        context = self._context if isinstance(self._context, Context) else self._context()
        if guard.draining:
            raise LimitExceeded(guard.engine.refused(context, None, DRAINING))
        own = guard.new_admission(context, opaque=False)
        denied = await own.open(None, calls=False)
        if denied is not None:
            raise LimitExceeded(denied)
        guard.track(own)

        def leave() -> None:
            own.end()
            guard.untrack(own)

        return own, None, leave

    # ---------------------------------------------------------------------------------- cache

    async def _look_up(self, question: Question, admission: Admission, parent: ActiveCall | None) -> Lookup | None:
        """What is kept of it, if the guard keeps answers."""
        cache = self.guard.cache
        if cache is None:
            return None
        policies = (*(admission.policies if parent is None else parent.policies), self.limits)
        deployments = self._directory.resolve(question.model).deployments
        places = [question.place(each, self.providers.of(each)) for each in deployments]
        now_ms = self.guard.clock.now_ms()
        described = next(
            (
                place.call
                for place in places
                if place is not None
                and ask(policies, admission.context, place.call, now_ms, requests=False).refusal is None
            ),
            None,
        )
        if described is None:
            return None  # whoever may not be asked is told so where it is claimed
        models = ",".join(sorted({each.full_model for each in deployments}))
        call = ActiveCall(admission, parent, policies, msgspec.structs.replace(described, deployment=None))
        request = CacheRequest(
            host="gateway",
            path=f"/{question.dialect}/{models}",
            body=question.raw,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in question.headers],
            dialect=question.dialect,
            stream=question.stream,
        )
        return await cache.look_up(call, request)

    async def _keep(self, lookup: Lookup, found: Found) -> None:
        if isinstance(found.answer, Whole):
            await lookup.store(ProviderAnswer(status=200, content_type=_JSON, body=found.answer.body))
        else:
            lookup.answered(200, _EVENTS)

    # ----------------------------------------------------------------------------------- chat

    async def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, fallbacks: bool = True, **options: Any
    ) -> Completion:
        """Ask for a chat completion. `options`: any field of OpenAI's chat API.

        Raises:
            LimitExceeded, GatewayError, BodyError, ContextError: as `ask`.
        """
        options.pop("stream", None)
        body = {"model": model, "messages": messages, **options}
        async with await self.ask("openai", body, fallbacks=fallbacks) as reply:
            whole = await reply.read()
            return Completion.of(whole, deployment=reply.deployment, timings=reply.timings)

    async def stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, fallbacks: bool = True, **options: Any
    ) -> AsyncIterator[Chunk]:
        """The same as a stream of chunks. Leaving it closes the connection to the provider.

        An error in mid-stream is the last chunk: `Chunk.error`. What was used comes in the last chunk, whether it is
        asked for or not.

        Raises:
            LimitExceeded, GatewayError, BodyError, ContextError: as `ask`, before the first chunk.
        """
        options["stream_options"] = {**(options.get("stream_options") or {}), "include_usage": True}
        body = {"model": model, "messages": messages, **options, "stream": True}
        async with await self.ask("openai", body, fallbacks=fallbacks) as reply:
            reader = ChunkReader(deployment=reply.deployment)
            async for piece in reply:
                for chunk in reader.feed(piece):
                    yield chunk if chunk.usage is None else msgspec.structs.replace(chunk, timings=reply.timings)
            for chunk in reader.finish():
                yield chunk

    async def embed(self, model: str, input: Any, *, fallbacks: bool = True, **options: Any) -> Result:  # noqa: A002 - the API's own word
        """Ask for embeddings. `options`: any field of OpenAI's embeddings API.

        Raises:
            LimitExceeded, GatewayError, BodyError, ContextError: as `ask`.
        """
        return await self._result("openai_embeddings", {"model": model, "input": input, **options}, fallbacks)

    async def respond(self, model: str, input: Any, *, fallbacks: bool = True, **options: Any) -> Result:  # noqa: A002 - the API's own word
        """Ask for a response of OpenAI's Responses API, whole; for streams see `ask`.

        Raises:
            LimitExceeded, GatewayError, BodyError, ContextError: as `ask`.
        """
        options.pop("stream", None)
        return await self._result("openai_responses", {"model": model, "input": input, **options}, fallbacks)

    async def _result(self, dialect: str, body: Mapping[str, Any], fallbacks: bool) -> Result:
        async with await self.ask(dialect, body, fallbacks=fallbacks) as reply:
            whole = await reply.read()
            value = decode(whole)
            answer = dialect_named(dialect).read_response(200, whole)
            named = pick(value, "model")
            return Result(
                raw=value if isinstance(value, dict) else {},
                usage=answer.usage,
                model=named if isinstance(named, str) else reply.model,
                deployment=reply.deployment,
                timings=reply.timings,
            )

    # ------------------------------------------------------------------------------- lifetime

    def app(self, *, expose: bool = False) -> GatewayApp:
        """An ASGI application to mount: `Mount("/llm", gateway.app())`. See `gateway.app` for its paths.

        `expose`: tell clients who has answered, after how many attempts, and when (`x-guard-…` headers).
        """
        from asgi_llm_guard.gateway.app import GatewayApp

        return GatewayApp(self, expose=expose)

    async def aclose(self) -> None:
        """Close the connections that are kept open. The guard stays open."""
        await self.providers.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _nothing() -> None:
    """The admission is somebody else's."""
