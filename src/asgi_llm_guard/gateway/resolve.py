"""From the name of a model to those who serve it. Pure.

A name is looked for in this order; the first that fits counts:

1. an alias: looked for again under what it stands for,
2. a group: `auto` is that of all deployments, unless they say otherwise,
3. `provider/model`, in any spelling that `policies.providers` knows,
4. the name of a deployment,
5. a bare model, if those who serve it are of one provider.

What is compared is canonical; what is sent is the model as its deployment spells it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.deployment import ANY_MODEL, Deployment, is_name
from asgi_llm_guard.gateway.entries import parse_deployments
from asgi_llm_guard.gateway.errors import NotInitialised, UnknownModel
from asgi_llm_guard.policies.providers import provider_of, qualified

__all__ = ["Directory", "Resolved"]

_LONGEST: Final = 256
_KEPT: Final = 1024
_DEEPEST: Final = 8
_SHOWN: Final = 80
_LISTED: Final = 20


class Resolved(NamedTuple):
    """Who may be asked for a model."""

    name: str
    """As it was asked for; an alias: what it stands for."""
    deployments: tuple[Deployment, ...]
    """At least one. One that serves every model of its provider is as if it served this one alone."""
    key: str
    """One for all spellings of the name: a group's or a deployment's name, or `provider/model`."""


class Directory:
    """The deployments of a gateway, by everything that they can be asked for by.

    They may come and go while it is in use: whoever has resolved a name keeps what it got.

    Args:
        deployments: deployments, or entries for `parse_deployments`; `None`: they come with `initialise`.
        aliases: from a name to a model, a group or another alias.
        own: the names of providers of your own.
        environ: see `parse_deployments`.

    Raises:
        ConfigurationError: two deployments of one name; an alias that leads nowhere or in a circle.
    """

    __slots__ = ("_aliases", "_index", "_initialised", "_memo", "_own", "changes")

    def __init__(
        self,
        deployments: Iterable[Mapping[str, Any] | Deployment] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        own: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._own = frozenset(own)
        self._aliases = _checked(aliases or {})
        self._index: _Index | None = None
        self._memo: dict[str, Resolved] = {}
        self._initialised = False
        self.changes = 0
        """How often deployments have come or gone."""
        if deployments is not None:
            self.initialise(deployments, environ=environ)

    def initialise(
        self, deployments: Iterable[Mapping[str, Any] | Deployment], *, environ: Mapping[str, str] | None = None
    ) -> int:
        """Take the deployments, and say how many there are. Done once: a second call changes nothing.

        Raises:
            ConfigurationError: as `parse_deployments`; none is left; an alias leads nowhere.
        """
        if not self._initialised:
            given = parse_deployments(deployments, environ=environ, own=self._own)
            if not given:
                raise ConfigurationError("deployments: none is left; give at least one that has a model and a key")
            twice = next((each.name for each in given if self.get(each.name) is not None), None)
            if twice is not None:
                raise ConfigurationError(f"there is a deployment called {twice!r}, which was added before")
            index = _Index((*self.deployments, *given))
            for alias, target in self._aliases.items():
                self._check_alias(alias, target, index)
            self._take(index)
            self._initialised = True
        return len(self)

    def like(self, deployments: Iterable[Mapping[str, Any] | Deployment]) -> Directory:
        """Another one of other deployments, with the same aliases and providers.

        Raises:
            ConfigurationError: as `initialise`.
        """
        return type(self)(deployments, aliases=self._aliases, own=self._own)

    def add(self, deployment: Deployment) -> None:
        """From now on it may be asked.

        Raises:
            ConfigurationError: there is one of that name.
        """
        if self.get(deployment.name) is not None:
            raise ConfigurationError(f"there is a deployment called {deployment.name!r}; remove it first")
        self._take(_Index((*self.deployments, deployment)))

    def remove(self, name: str) -> Deployment:
        """From now on it is not asked; calls that run go on.

        Raises:
            ConfigurationError: there is none of that name.
        """
        gone = self.get(name)
        if gone is None:
            raise ConfigurationError(f"there is no deployment called {name!r}")
        self._take(_Index(tuple(each for each in self.deployments if each is not gone)))
        return gone

    def __len__(self) -> int:
        """How many deployments there are; 0 before there are any."""
        return 0 if self._index is None else len(self._index.by_name)

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """All of them, in the order in which they came."""
        return () if self._index is None else tuple(self._index.by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for: aliases, groups and `provider/model`."""
        index = self._index
        return () if index is None else tuple(dict.fromkeys((*self._aliases, *index.groups, *index.full)))

    def get(self, name: str) -> Deployment | None:
        """The deployment of that name."""
        return None if self._index is None else self._index.by_name.get(name)

    def resolve(self, name: str) -> Resolved:
        """Who serves a model.

        Raises:
            NotInitialised: there are no deployments yet.
            UnknownModel: nobody does, or several providers do and the name does not say which; says what to write.
        """
        index, memo = self._index, self._memo
        if index is None:
            raise NotInitialised
        found = memo.get(name)
        if found is None:
            if not isinstance(name, str) or not 0 < len(name.strip()) <= _LONGEST:
                raise UnknownModel(f"model: expected a name of 1 to {_LONGEST} characters")
            found = index.find(self._meant(name.strip()))
            if len(memo) < _KEPT:
                memo[name] = found
        return found

    def alias(self, name: str) -> str | None:
        """The alias that this is, in the one spelling that there is of it; `None`: it is none."""
        folded = name.strip().lower()
        return folded if folded in self._aliases else None

    def _meant(self, name: str) -> str:
        for _ in range(_DEEPEST):
            target = self._aliases.get(name.lower())
            if target is None:
                break
            name = target
        return name

    def _check_alias(self, alias: str, target: str, index: _Index) -> None:
        try:
            index.find(self._meant(target))
        except UnknownModel as error:
            raise ConfigurationError(f"aliases[{alias!r}]: {error}") from None

    def _take(self, index: _Index) -> None:
        self._memo = {}  # a new one: what is being resolved still goes into the old one
        self._index = index
        self.changes += 1


class _Index:
    """One set of deployments; never changed."""

    __slots__ = ("any_model", "bare", "by_name", "full", "groups", "providers")

    def __init__(self, deployments: Iterable[Deployment]) -> None:
        self.by_name: dict[str, Deployment] = {}
        self.groups: dict[str, list[Deployment]] = {}
        self.full: dict[str, list[Deployment]] = {}
        self.bare: dict[str, list[Deployment]] = {}
        self.any_model: dict[str, list[Deployment]] = {}
        for each in deployments:
            self.by_name[each.name] = each
            if each.model == ANY_MODEL:  # which model a group would mean, nobody could say
                self.any_model.setdefault(each.provider, []).append(each)
                continue
            for group in each.groups:
                self.groups.setdefault(group.lower(), []).append(each)
            self.full.setdefault(each.full_model, []).append(each)
            self.bare.setdefault(each.model.lower(), []).append(each)
        self.providers = {each.provider for each in self.by_name.values()}

    def find(self, name: str) -> Resolved:
        group = self.groups.get(name.lower())
        if group is not None:
            return Resolved(name.lower(), tuple(group), name.lower())
        provider, bare = provider_of(name, known=self.providers)
        if provider is not None and bare != name:
            found = [*self.full.get(qualified(provider, bare), ()), *self._of_any(provider, bare)]
            if found:
                return Resolved(name, tuple(found), found[0].full_model)
        named = self.by_name.get(name)
        if named is not None and named.model != ANY_MODEL:
            return Resolved(name, (named,), name)
        bare_ones = self._find_bare(name, provider)
        return Resolved(name, tuple(bare_ones), bare_ones[0].full_model)

    def _find_bare(self, name: str, provider: str | None) -> list[Deployment]:
        exact = self.bare.get(name.lower(), [])
        spelled = sorted({each.full_model for each in exact})
        if len({each.provider for each in exact}) > 1:
            raise UnknownModel(f"model {name[:_SHOWN]!r} is served by several providers; write {' or '.join(spelled)}")
        if exact:
            return [*exact, *self._of_any(exact[0].provider, name)]
        if provider in self.any_model and is_name(name):
            return self._of_any(provider, name)
        if len(self.providers) == 1 and provider is None:
            found = self._of_any(next(iter(self.providers)), name)
            if found:
                return found
        known = [*self.groups, *self.full, *(f"{each}/{ANY_MODEL}" for each in self.any_model)]
        more = f", and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        raise UnknownModel(f"model {name[:_SHOWN]!r} is not known here; try {', '.join(known[:_LISTED])}{more}")

    def _of_any(self, provider: str, model: str) -> list[Deployment]:
        if not is_name(model):
            return []
        return [replace(each, model=model) for each in self.any_model.get(provider, ())]


def _checked(aliases: Mapping[str, str]) -> dict[str, str]:
    checked: dict[str, str] = {}
    for name, target in aliases.items():
        if not (isinstance(name, str) and name.strip() and isinstance(target, str) and target.strip()):
            raise ConfigurationError(f"aliases: expected names of models, got {name!r}: {target!r}")
        checked[name.strip().lower()] = target.strip()
    for name, meant in checked.items():
        seen, target = {name}, meant.lower()
        while target in checked:
            if target in seen or len(seen) == _DEEPEST:
                raise ConfigurationError(
                    f"aliases[{name!r}]: leads in a circle, or through more than {_DEEPEST} others"
                )
            seen.add(target)
            target = checked[target].lower()
    return checked
