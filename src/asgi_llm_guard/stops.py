"""Stops: what may call no more, at once and until somebody says otherwise. Pure.

Rule 1: a stop is of somebody (a caller, a user, a session, an agent, a department), of a model, or of everything.

Rule 2: it ends new requests and calls and those that are running, but no health and no administration: whoever
made a mistake has to be able to take it back.

Rule 3: what is stopped by name is compared as policies compare it: models in canonical spelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, get_args

import msgspec

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.providers import canonical_model, models_of, provider_of, qualified
from asgi_llm_guard.policies.subjects import ANONYMOUS

__all__ = ["Stop", "StopScope", "Stops"]

StopScope = Literal["caller", "user", "session", "agent", "department", "model", "all"]


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """One stop.

    Raises:
        ConfigurationError: the scope is unknown, the subject is missing or is one too many, or a field is malformed.
    """

    scope: StopScope
    subject: str = ""
    """Who or what is stopped; empty for `all`. A model with its provider (`openai/gpt-5`) or without, which is that
    model from any provider; all models of a provider as `openai/*`. The caller `anonymous` is whoever is not verified."""
    caller: str | None = None
    """For a session: whose it is, since two callers may use the same id. `None`: the sessions of that id of all callers."""
    until_ms: int | None = None
    """When it ends; `None`: when it is removed."""
    reason: str = ""
    """For operators; not shown to callers."""
    id: str = ""
    """Its name in administration data."""

    def __post_init__(self) -> None:
        if self.scope not in get_args(StopScope):
            raise ConfigurationError(f"stop: scope must be one of {', '.join(get_args(StopScope))}, got {self.scope!r}")
        if not isinstance(self.subject, str) or (self.scope == "all") != (not self.subject.strip()):
            wanted = "no subject" if self.scope == "all" else f"the name of a {self.scope}"
            raise ConfigurationError(f"stop: expected {wanted} with scope {self.scope!r}, got {self.subject!r}")
        if self.scope == "model" and "*" in self.subject.removesuffix("/*"):
            raise ConfigurationError(
                f"stop: expected a model such as 'openai/gpt-5' or 'openai/*', got {self.subject!r}"
            )
        if self.caller is not None and (self.scope != "session" or not isinstance(self.caller, str) or not self.caller):
            raise ConfigurationError(
                f"stop: caller says whose session is stopped; it goes with scope 'session', got {self.caller!r} "
                f"with {self.scope!r}"
            )
        until_ms = self.until_ms
        if until_ms is not None and (isinstance(until_ms, bool) or not isinstance(until_ms, int) or until_ms < 0):
            raise ConfigurationError(f"stop: until_ms must be ms since the epoch, or None, got {until_ms!r}")

    def holds(self, now_ms: int) -> bool:
        """Whether it has not ended."""
        return self.until_ms is None or now_ms < self.until_ms

    @property
    def refusal(self) -> Refusal:
        """What callers are told. Names nobody: who was stopped need not learn what else is."""
        what = "The model that was asked for" if self.scope == "model" else "This"
        message = f"{what} has been stopped by the operators of this service. Do not try again; ask them."
        return Refusal(policy="stop", code="stopped", message=message, scope=_SHOWN[self.scope])


_SHOWN: Final[Mapping[str, str]] = {scope: "global" if scope == "all" else scope for scope in get_args(StopScope)}


class Stops:
    """Several stops, to be asked of every call. Immutable.

    Raises:
        ConfigurationError: something else is among them.
    """

    __slots__ = ("_all", "_models", "_sessions", "_who", "stops")

    def __init__(self, stops: Iterable[Stop]) -> None:
        self.stops: Sequence[Stop] = tuple(stops)
        self._all: list[Stop] = []
        self._who: dict[tuple[str, str], list[Stop]] = {}
        self._sessions: dict[str, list[Stop]] = {}
        self._models: dict[str, list[Stop]] = {}
        for stop in self.stops:
            if not isinstance(stop, Stop):
                raise ConfigurationError(f"stops: expected Stop(scope=…, subject=…), got {stop!r}")
            if stop.scope == "all":
                self._all.append(stop)
            elif stop.scope == "session":
                self._sessions.setdefault(stop.subject, []).append(stop)
            elif stop.scope == "model":
                self._models.setdefault(_model(stop.subject), []).append(stop)
            else:
                self._who.setdefault((stop.scope, stop.subject), []).append(stop)

    def __bool__(self) -> bool:
        return bool(self.stops)

    def of_context(self, context: Context, now_ms: int) -> Stop | None:
        """The stop that holds for whoever asks, if there is one."""
        for stop in self._all:
            if stop.holds(now_ms):
                return stop
        if self._sessions and context.session is not None:
            for stop in self._sessions.get(context.session, ()):
                if stop.holds(now_ms) and (stop.caller is None or stop.caller == (context.caller or ANONYMOUS)):
                    return stop
        if not self._who:
            return None
        for who in _names(context):
            for stop in self._who.get(who, ()):
                if stop.holds(now_ms):
                    return stop
        return None

    def of_call(self, call: Call, now_ms: int) -> Stop | None:
        """The stop of a model that answers the call, or may answer in its place, if there is one.

        Of a call that is one of several, every one has to be stopped: each is asked for itself when it is made.
        """
        if not self._models:
            return None
        if call.one_of:
            stopped = [self.of_call(each, now_ms) for each in call.one_of]
            return stopped[0] if None not in stopped else None
        for provider, model in _models(call):
            full = qualified(provider, model)
            given, _, bare = full.partition("/")
            # The last part, too: where one provider serves the models of others, their names stand in front.
            for name in dict.fromkeys((full, f"{given}/*", bare, full.rpartition("/")[2])):
                for stop in self._models.get(name, ()):
                    if stop.holds(now_ms):
                        return stop
        return None

    def find(self, context: Context, call: Call | None, now_ms: int) -> Stop | None:
        """The stop that holds for a request or call; `None`: it may be made."""
        stop = self.of_context(context, now_ms)
        return self.of_call(call, now_ms) if stop is None and call is not None else stop


def _names(context: Context) -> Iterable[tuple[str, str]]:
    yield "caller", context.caller or ANONYMOUS
    if context.user is not None:
        yield "user", context.user
    if context.agent is not None:
        yield "agent", context.agent
    for department in context.departments:
        yield "department", department


def _models(call: Call) -> Iterable[tuple[str | None, str]]:
    yield from models_of(call)
    if call.priced_as is not None:  # `model` is only a name that somebody gave it
        yield provider_of(call.priced_as)


def _model(subject: str) -> str:
    """The canonical form of what is stopped: `openai/gpt-5`, `openai/*`, or the bare name for every provider's."""
    name = subject.strip()
    if name.endswith("/*"):
        return f"{qualified(name.removesuffix('/*'), 'x').removesuffix('/x')}/*"
    return canonical_model(name) if "/" in name else name.lower()
