"""What follows when an attempt has failed: once more, another deployment, another model, or the end. Pure.

| class | once more at the same deployment | at another of its group | then another model |
|---|---|---|---|
| `overload`, `timeout`, `connection`, `empty`, `other` | after a pause | at once | yes |
| `rate_limit` | after `Retry-After`, or a pause, while it is not cooling down | at once | yes |
| `auth`, `quota`, `not_found` | no | at once | yes |
| `context_overflow` | no | one with a larger window | one with a larger window |
| `content_policy` | no | no | one that is listed for it, else yes |
| `invalid` | no | no | no |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.failures import ERROR_CLASSES, ErrorClass

__all__ = ["MAX_DEPTH", "Fallbacks", "RetryRules", "Step", "Walk", "larger_windows"]

MAX_DEPTH: Final = 5
"""So many other models are tried at most, unless told otherwise."""

_LONGEST_S: Final = 600.0
_MOST: Final = 100

_NEVER: Final[frozenset[str]] = frozenset({"invalid", "content_policy"})
"""The same request meets the same answer, unless told otherwise."""
_ELSEWHERE: Final[frozenset[str]] = frozenset({"auth", "quota", "not_found", "context_overflow"})
"""It is the deployment's doing, and time does not mend it, unless told otherwise."""


class Random(Protocol):
    """What is needed of `random.Random`."""

    def random(self) -> float: ...


# ------------------------------------------------------------------------------------ retries


class Step(msgspec.Struct, frozen=True):
    """Try the same model again."""

    where: Literal["here", "elsewhere"]
    """`here`: the same deployment; `elsewhere`: another one of its group."""
    wait_s: float = 0.0


class RetryRules(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and after how long, a failed call is made again to the same model.

    Raises:
        ConfigurationError: a figure is out of its range, or an error class or a group is unknown.
    """

    retries: int = 3
    """After the first attempt, at most so many; from 0 to 100."""
    pause_s: float = 5.0
    """Before the same deployment is asked again; another one is asked at once. From 0 to 600."""
    jitter: float = 0.25
    """Up to this part of a pause is added to it at random, from 0 to 1, so that callers do not come back in step."""
    max_wait_s: float = 60.0
    """A provider that asks for a longer wait is not waited for. From 0 to 600."""
    classes: Mapping[ErrorClass, int] = msgspec.field(default_factory=dict)
    """Another number of retries by error class. Where it is not 0, the class is worth a pause, too."""
    groups: Mapping[str, RetryRules] = msgspec.field(default_factory=dict)
    """Other rules by group of deployments, or by model; in any spelling."""

    def __post_init__(self) -> None:
        for name, most in (("pause_s", _LONGEST_S), ("max_wait_s", _LONGEST_S), ("jitter", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ConfigurationError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")
        _count(self.retries, "retries")
        for name, retries in self.classes.items():
            if name not in ERROR_CLASSES:
                raise ConfigurationError(f"classes: expected one of {', '.join(sorted(ERROR_CLASSES))}, got {name!r}")
            _count(retries, f"classes[{name!r}]")
        for group, rules in self.groups.items():
            if not isinstance(rules, RetryRules) or rules.groups:
                raise ConfigurationError(f"groups[{group!r}]: expected RetryRules without groups, got {rules!r}")

    def step(
        self,
        failure: ErrorClass,
        *,
        made: int,
        elsewhere: bool,
        here: bool = True,
        retry_after_s: float | None = None,
        random: Random,
    ) -> Step | None:
        """What to do after the `made`-th attempt (from 1) at this model; `None`: no more of it.

        `elsewhere`: another deployment of the group may be called. `here`: this one may be called again, as it is not
        cooling down. `retry_after_s`: what the provider asked for. After a `context_overflow` only a deployment with
        a larger window counts as another one.
        """
        told = self.classes.get(failure)
        if made > (told if told is not None else 0 if failure in _NEVER else self.retries):
            return None
        if elsewhere:
            return Step("elsewhere")
        if not here or (failure in _ELSEWHERE and told is None):
            return None
        if retry_after_s is not None and retry_after_s > self.max_wait_s:
            return None
        wait_s = self.pause_s if retry_after_s is None else max(retry_after_s, 0.0)
        return Step("here", wait_s * (1 + self.jitter * random.random()))


def _count(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ConfigurationError(f"{name}: expected a whole number from 0 to {_MOST}, got {value!r}")


# ---------------------------------------------------------------------------------- fallbacks


class Fallbacks:
    """Which models take over, and in which order.

    After a model come those of its own list, and after each of these first those of *its* list. When all of these
    have failed, the `default` ones are tried. No model is tried twice, so loops end.

    Args:
        models: by model the ones that take over from it.
        default: for all models, after their own.
        context: by model the ones that take over where its window is too small. Beside these, all of its other
            fallbacks whose window is larger, or not known, do.
        content: by model the ones that take over where its provider will not answer; where a model is not listed, its
            other fallbacks do.
        max_depth: so many other models are tried at most, from 0 to 100.

    Raises:
        ConfigurationError: something else than lists of names.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[str]] | None = None,
        *,
        default: Sequence[str] = (),
        context: Mapping[str, Sequence[str]] | None = None,
        content: Mapping[str, Sequence[str]] | None = None,
        max_depth: int = MAX_DEPTH,
    ) -> None:
        _count(max_depth, "max_depth")
        self.max_depth = max_depth
        self.models = _chains(models, "models")
        self.context = _chains(context, "context")
        self.content = _chains(content, "content")
        self.default = _names(default, "default")

    @property
    def names(self) -> frozenset[str]:
        """Every model that may take over."""
        chains = (*self.models.values(), *self.context.values(), *self.content.values(), self.default)
        return frozenset(name for chain in chains for name in chain)

    def with_windows(self, windows: Mapping[str, int | None]) -> Fallbacks:
        """These, and for each model those with a larger window in place of what `context` does not say of it."""
        context = larger_windows(windows) | self.context
        return Fallbacks(
            self.models, default=self.default, context=context, content=self.content, max_depth=self.max_depth
        )

    def spelled(self, spell: Callable[[str], str]) -> Fallbacks:
        """The same under other names. Chains of models that are one then follow each other."""
        return Fallbacks(
            _spelled(self.models, spell),
            default=[spell(name) for name in self.default],
            context=_spelled(self.context, spell),
            content=_spelled(self.content, spell),
            max_depth=self.max_depth,
        )

    def walk(self, model: str, *, windows: Mapping[str, int | None] | None = None, enabled: bool = True) -> Walk:
        """The way of one call that asks for `model`. `windows`: the largest input in tokens by model, where known.

        `enabled=False`: there is none, the model itself is all that is tried.
        """
        return Walk(self, model, windows or {}, self.max_depth if enabled else 0)


class Walk:
    """Where one call goes, model by model. Ends for certain: no model is given twice, and never more than the depth."""

    def __init__(self, fallbacks: Fallbacks, model: str, windows: Mapping[str, int | None], left: int) -> None:
        self._fallbacks = fallbacks
        self._windows = windows
        self._left = left
        self._seen = {model}
        self._ahead: list[str] = list(reversed(fallbacks.default))
        """What comes next is at the end."""
        self._above: int | None = None
        """A window of this size is too small."""
        self.model = model
        """The one that is tried now."""

    def after(self, failure: ErrorClass | Literal["unavailable"]) -> str | None:
        """The model to try after the present one has failed so; `None`: there is none.

        `unavailable`: none of its deployments could be called, as they cool down or have used up what we allow them.
        """
        if failure == "invalid":
            return None
        self._ahead += reversed(self._chain(failure))
        while self._ahead and self._left:
            name = self._ahead.pop()
            if name in self._seen or self._too_small(name):
                continue
            self._seen.add(name)
            self._left -= 1
            self.model = name
            return name
        return None

    @property
    def seen(self) -> frozenset[str]:
        """Every model that was tried or is tried now."""
        return frozenset(self._seen)

    def _chain(self, failure: str) -> tuple[str, ...]:
        chains, model = self._fallbacks, self.model
        if failure == "context_overflow":
            window = self._windows.get(model)
            if window is not None:
                self._above = window if self._above is None else max(self._above, window)
            return chains.context.get(model, ()) + chains.models.get(model, ())
        if failure == "content_policy" and model in chains.content:
            return chains.content[model]
        return chains.models.get(model, ())

    def _too_small(self, name: str) -> bool:
        window = self._windows.get(name)
        return self._above is not None and window is not None and window <= self._above


def larger_windows(windows: Mapping[str, int | None]) -> dict[str, tuple[str, ...]]:
    """For each name those whose window is larger, the smallest of these first; nothing where a window is not known.

    Names of models make the fallbacks for inputs that are too large; names of deployments of one group its
    large-context part.
    """
    known = sorted((window, place, name) for place, (name, window) in enumerate(windows.items()) if window is not None)
    return {
        name: larger
        for window, _, name in known
        if (larger := tuple(other for other_window, _, other in known if other_window > window))
    }


def _chains(chains: Mapping[str, Sequence[str]] | None, name: str) -> dict[str, tuple[str, ...]]:
    if chains is None:
        return {}
    if not isinstance(chains, Mapping):
        raise ConfigurationError(f"{name}: expected lists of models by model, got {chains!r}")
    return {model: _names(chain, f"{name}[{model!r}]") for model, chain in chains.items()}


def _spelled(chains: Mapping[str, Sequence[str]], spell: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    spelled: dict[str, tuple[str, ...]] = {}
    for model, chain in chains.items():
        key = spell(model)
        spelled[key] = (*spelled.get(key, ()), *map(spell, chain))
    return spelled


def _names(names: Iterable[str], where: str) -> tuple[str, ...]:
    found = () if isinstance(names, str) else tuple(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in found):
        raise ConfigurationError(f"{where}: expected a list of models, got {names!r}")
    return found
