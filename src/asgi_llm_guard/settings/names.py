"""Names of policies in settings: where they stand, and whether there is a policy that is called so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.settings.build import build_policies, place
from asgi_llm_guard.settings.load import GuardSettings

__all__ = ["AlertName", "alert_names", "check_alerts", "deployment_policies", "unmatched"]

_KINDS: Final[tuple[Literal["policy", "scope"], ...]] = ("policy", "scope")
_DEPLOYMENTS: Final = "deployment_limits"


class AlertName(NamedTuple):
    """A policy or scope that an alert rule is about, as a pattern."""

    kind: Literal["policy", "scope"]
    name: str
    of: str
    """Of a scope: of which policies."""
    where: str
    """The key that says it, with its file and line."""


def alert_names(settings: GuardSettings) -> Iterator[AlertName]:
    """What the alert rules of these settings are about, but for `*`."""
    if settings.alerts is None:
        return
    for table in "thresholds", "burn_rates":
        for number, rule in enumerate(getattr(settings.alerts, table) or ()):
            for kind in _KINDS:
                name = getattr(rule, kind)
                if name != "*":
                    said = f"{place(settings, 'alerts', table, number, kind)}: alerts.{table}[{number}].{kind}"
                    yield AlertName(kind, name, rule.policy, said)


def deployment_policies(settings: GuardSettings) -> tuple[str, ...]:
    """What the limits of a gateway's deployments are called, where these settings have a gateway."""
    return () if settings.gateway is None else (_DEPLOYMENTS,)


def unmatched(settings: GuardSettings) -> list[AlertName]:
    """The alert rules that are about no policy of these settings, as they name one."""
    known = _known(settings)
    return [
        each
        for each in alert_names(settings)
        if each.kind == "policy" and not any(fnmatchcase(name, each.name) for name in known)
    ]


def _known(settings: GuardSettings) -> list[str]:
    policies = [policy.name for policy in build_policies(settings)]
    return list(dict.fromkeys([*policies, *deployment_policies(settings)]))


def check_alerts(settings: GuardSettings) -> None:
    """Check that each alert rule is about some policy. For services that are run from the settings alone: where code has
    policies of its own, a rule may be about one of them.

    Raises:
        ConfigurationError: a line for each rule that is about none.
    """
    known = _known(settings)
    problems = [
        f"{each.where}: there is no policy {each.name!r}{_hint(each.name, known)}" for each in unmatched(settings)
    ]
    if problems:
        raise ConfigurationError("\n".join(problems))


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known) or 'none'}"
