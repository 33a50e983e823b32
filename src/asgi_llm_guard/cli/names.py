"""What `check` knows by name, and which rules are about nothing of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_llm_guard.doctor import Finding, GuardedPath
    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.policies.base import Policy
    from asgi_llm_guard.settings import GuardSettings

__all__ = ["without_effect"]


def without_effect(
    guard: Guard,
    settings: GuardSettings | None,
    *,
    extra: Sequence[Policy],
    paths: Iterable[GuardedPath],
    models: Sequence[str],
    alone: bool,
) -> list[Finding]:
    """Alert rules, raises and stops that are about nothing that is known.

    `extra`: policies of routes. `paths`: those of an application, with the names of policies in its code. `models`: those
    that the configuration names. `alone`: no code but the program's runs this guard.
    """
    from asgi_llm_guard.doctor import Known, Named, examine_names, examine_raises, named_by
    from asgi_llm_guard.settings.names import alert_names, deployment_policies

    overrides = guard.engine.overrides
    raises = () if overrides.raises is None else overrides.raises.raises
    stops = () if overrides.stops is None else overrides.stops.stops
    now_ms = time.time_ns() // 1_000_000
    lifting = examine_raises(raises, (*guard.policies, *extra), now_ms)
    named = named_by(raises, stops, now_ms)
    others = [name for path in paths for name in path.policies]
    if settings is not None:
        named += [Named(kind=each.kind, name=each.name, of=each.of, where=each.where) for each in alert_names(settings)]
        others += deployment_policies(settings)
    if not named:
        return lifting
    keys = [*_keys(guard), *_keys_of_file(settings)]
    known = Known(
        policies=(*guard.policies, *extra),
        others=others,
        departments=sorted({*_departments(guard, settings), *(name for key in keys for name in key["departments"])}),
        agents=sorted({*_agents(guard, settings), *(key["agent"] for key in keys if key["agent"] is not None)}),
        models=models,
        prices=guard.prices,
        whole=alone and settings is not None and settings.gateway is not None,
    )
    return [*lifting, *examine_names(named, known)]


def _departments(guard: Guard, settings: GuardSettings | None) -> Iterator[str]:
    from asgi_llm_guard.policies import QuotaBook

    if settings is not None:
        yield from settings.departments
    state = None if guard.follower is None else guard.follower.state
    yield from () if state is None else state.departments
    for policy in guard.policies:
        book = getattr(policy, "book", None)
        if isinstance(book, QuotaBook):
            yield from book.snapshot[1]


def _agents(guard: Guard, settings: GuardSettings | None) -> Iterator[str]:
    if settings is not None:
        yield from settings.agents
    state = None if guard.follower is None else guard.follower.state
    yield from () if state is None else state.agents


def _keys(guard: Guard) -> Iterator[dict[str, Any]]:
    """Whom the keys of administration data stand for."""
    state = None if guard.follower is None else guard.follower.state
    for entry in () if state is None else state.keys.values():
        yield {"departments": entry.value.departments, "agent": entry.value.agent}


def _keys_of_file(settings: GuardSettings | None) -> Iterator[dict[str, Any]]:
    from asgi_llm_guard.identity.keys import read_toml

    file = getattr(None if settings is None else settings.identity, "file", None)
    if settings is not None and file is not None:
        for key in read_toml(settings.directory / file).get("keys", ()):
            yield {"departments": key.get("departments", ()), "agent": key.get("agent")}
