"""Names that are meant to be about something: what matches nothing has no effect, and says nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal

import msgspec

from asgi_llm_guard.doctor.findings import Finding, Severity
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.policies.base import Metered, Policy
from asgi_llm_guard.policies.providers import KNOWN_PROVIDERS, canonical_model, canonical_provider, provider_of
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.pricing.snapshot import bundled
from asgi_llm_guard.stops import Stop

__all__ = ["Known", "Named", "examine_names", "examine_raises", "named_by", "nearest"]

Kind = Literal["policy", "scope", "department", "agent", "model"]

_NEAR: Final = 0.7
"""How alike two names are of which one is taken for a slip of the other: 0 to 1, as `difflib` counts."""
_MOST_SHOWN: Final = 12


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A name, or of policies and scopes a pattern, and what says it."""

    kind: Kind
    name: str
    where: str
    """What is without effect if nothing is of that name, and where it stands."""
    of: str = "*"
    """Of a scope: of which policies, as a pattern."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration, the administration data and the keys name."""

    policies: Sequence[Policy]
    others: Collection[str] = ()
    """Names of policies that are known by name only."""
    departments: Collection[str] = ()
    agents: Collection[str] = ()
    models: Collection[str] = ()
    """In allow-lists, as deployments, behind aliases."""
    prices: PriceBook
    whole: bool = False
    """There can be no policies but these: the service is run from the settings alone."""


def examine_names(named: Iterable[Named], known: Known) -> list[Finding]:
    """Which of these names nothing is called, each with what comes near it.

    Policies may be named in code that nobody looks into, agents and departments by whoever verifies callers, so that only
    a near miss is more than a note.
    """
    findings = []
    for each in named:
        candidates = _candidates(each, known)
        if candidates is None:
            continue
        near = nearest(each.name, candidates)
        severity: Severity = "warning" if each.kind in {"policy", "scope"} or near is not None else "note"
        if each.kind == "policy" and known.whole:
            severity = "error"
        findings.append(
            Finding(
                severity=severity,
                code=f"unknown_{each.kind}",
                seen=f"{each.where}: no {each.kind} that is known is called {each.name!r}: it has no effect",
                next_step=f"did you mean {near!r}?" if near is not None else _next_step(each.kind, candidates),
            )
        )
    return findings


def named_by(raises: Iterable[Raise], stops: Iterable[Stop], now_ms: int) -> list[Named]:
    """What the raises and stops that hold now are about, where it can be known."""
    named: list[Named] = []
    for lifted in raises:
        if now_ms >= lifted.until_ms:
            continue
        where = f"the raise {lifted.id!r}" if lifted.id else f"a raise of {lifted.policy}"
        named.append(Named(kind="policy", name=lifted.policy, where=where))
        named += _subject(lifted.scope, lifted.subject, where)
    for stop in stops:
        if stop.holds(now_ms):
            where = f"the stop {stop.id!r}" if stop.id else "a stop"
            named += _subject(stop.scope, stop.subject, where)
    return named


def examine_raises(raises: Iterable[Raise], policies: Sequence[Policy], now_ms: int) -> list[Finding]:
    """Which of the raises that hold now lift no limit, though there is a policy of that name: the policy was changed since."""
    findings = []
    for lifted in raises:
        if now_ms >= lifted.until_ms:
            continue
        try:
            lifted.check(policies)
        except ConfigurationError as error:
            said = f"the raise {lifted.id!r}: " if lifted.id else ""
            findings.append(
                Finding(
                    severity="warning",
                    code="raise_without_effect",
                    seen=f"{said}{error}: it has no effect",
                    next_step="make another one for a limit that there is, and take this one away",
                )
            )
    return findings


def nearest(name: str, candidates: Collection[str]) -> str | None:
    """Of these the one that `name` is a slip of; `None`: it is like none of them."""
    by_case = {each.lower(): each for each in candidates}
    found = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=_NEAR)
    return by_case[found[0]] if found else None


def _subject(scope: str | None, subject: str | None, where: str) -> list[Named]:
    for kind in ("department", "agent", "model"):
        if scope == kind and subject:
            return [Named(kind=kind, name=subject, where=where)]
    return []


def _candidates(named: Named, known: Known) -> Collection[str] | None:
    """What it may have meant; `None`: there is something of that name."""
    match named.kind:
        case "policy":
            candidates = list(dict.fromkeys([*(policy.name for policy in known.policies), *known.others]))
            return None if any(fnmatchcase(each, named.name) for each in candidates) else candidates
        case "scope":
            about = [policy for policy in known.policies if fnmatchcase(policy.name, named.of)]
            scopes = list(
                dict.fromkeys([scope for policy in about if isinstance(policy, Metered) for scope in policy.scopes()])
            )
            # Policies without any were told by name, or count in scopes that nobody can list.
            return None if not scopes or any(fnmatchcase(each, named.name) for each in scopes) else scopes
        case "department" | "agent":
            candidates = list(known.departments if named.kind == "department" else known.agents)
            return None if named.name in candidates else candidates
        case "model":
            return None if _is_model(named.name, known) else [*known.models, *map("/".join, bundled())]


def _is_model(name: str, known: Known) -> bool:
    models = {canonical_model(model) for model in known.models}
    if name.endswith("/*"):
        provider = canonical_provider(name.removesuffix("/*"))
        return provider in KNOWN_PROVIDERS or any(model.startswith(f"{provider}/") for model in models)
    canonical = canonical_model(name)
    bare = {model.rpartition("/")[2] for model in models}
    return canonical in models | bare or known.prices.resolve(*provider_of(name)) is not None


def _next_step(kind: Kind, candidates: Collection[str]) -> str:
    if not candidates or kind == "model":
        return f"the configuration names no {kind}; see that it is the right name, or take it away"
    shown = ", ".join(list(candidates)[:_MOST_SHOWN])
    more = f", and {len(candidates) - _MOST_SHOWN} more" if len(candidates) > _MOST_SHOWN else ""
    return f"known are {shown}{more}; correct it, or take it away"
