"""Which models may be called: allow-lists that compare canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from asgi_llm_guard.claims import Meter
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies._scoped import NOTHING, Per, ScopedPolicy, Subject, is_owned, quoted
from asgi_llm_guard.policies.base import Verdict
from asgi_llm_guard.policies.providers import canonical_model, models_of, qualified

__all__ = ["ModelAllow", "ModelList"]

_OTHERS: Final = "*"
_PER_LIST: Final = frozenset({"user", "caller", "agent", "department", "tag"})


class ModelList:
    """A list of models: exact names, and beginnings that end in `*`.

    Spelling is canonical on both sides: no case, known spellings of providers. An entry without a
    provider (`gpt-5`, `gpt-5*`) allows that model from any provider; one with a provider
    (`openai/gpt-5`, `openai/*`) from that one. `*` allows everything; an entry without a slash never
    reaches over one. The empty list allows nothing.

    Raises:
        ConfigurationError: not a list of texts, an empty entry, or a `*` that is not at the end.
    """

    __slots__ = ("_bare", "_bare_beginnings", "_everything", "_full", "_full_beginnings", "entries")

    def __init__(self, entries: object, *, name: str = "models") -> None:
        if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
            raise ConfigurationError(
                f"{name}: expected a list of models such as ['openai/gpt-5', 'claude-*'], got {entries!r}"
            )
        self.entries = tuple(_entry(each, name) for each in entries)
        self._everything = _OTHERS in self.entries
        exact = [entry for entry in self.entries if not entry.endswith("*")]
        beginnings = [entry[:-1] for entry in self.entries if entry.endswith("*")]
        self._full = frozenset(canonical_model(entry) for entry in exact if "/" in entry)
        self._bare = frozenset(entry.lower() for entry in exact if "/" not in entry)
        self._full_beginnings = tuple(_beginning(entry) for entry in beginnings if "/" in entry)
        self._bare_beginnings = tuple(entry.lower() for entry in beginnings if "/" not in entry)

    def allows(self, call: Call) -> bool:
        """Whether the call's resolved model is in the list, and so are all that may answer in its place."""
        return self.forbidden(call) is None

    def forbidden(self, call: Call) -> str | None:
        """The first of the call's models that is not in the list, in canonical spelling; `None`: all are."""
        if self._everything:
            return None
        names = (qualified(provider, model) for provider, model in models_of(call))
        return next((name for name in names if not self._has(name)), None)

    def _has(self, full: str) -> bool:
        if full in self._full or full.startswith(self._full_beginnings):
            return True
        _, slash, bare = full.partition("/")
        bare = bare if slash else full
        return "/" not in bare and (bare in self._bare or bare.startswith(self._bare_beginnings))


class ModelAllow(ScopedPolicy[tuple[tuple[Subject, ModelList | None], ...]]):
    """Only these models: any other call is refused (403), before anything is reserved.

    `models` is one list for everybody, or, with `per`, a mapping from the subject's name to its
    list, `"*"` being everybody else's. Somebody in neither, or a context without that scope and no
    `"*"`, may call nothing. With several departments or tags all of them must allow the model.
    A request that has described no call is not judged. Where other models may answer in its place (OpenRouter's
    `models`, fallbacks), all of them must be allowed.

    Raises:
        ConfigurationError: a list is malformed; a mapping without `per`, or `per` without a mapping.
    """

    __slots__ = ("_default", "_lists")

    def __init__(
        self,
        models: Iterable[str] | Mapping[str, Iterable[str]],
        *,
        per: Per = "global",
        name: str = "models",
        status: int | None = None,
    ) -> None:
        super().__init__(per=per, name=name, counts="calls", status=status)
        self._lists: dict[str, ModelList] = {}
        if isinstance(models, Mapping):
            if per not in _PER_LIST:
                raise ConfigurationError(
                    f"{name}: a mapping needs per to be one of {', '.join(sorted(_PER_LIST))}, got {per!r}"
                )
            for subject, entries in models.items():
                if not isinstance(subject, str) or not subject.strip():
                    raise ConfigurationError(f"{name}: expected the name of a {per} or '*', got {subject!r}")
                self._lists[subject] = ModelList(entries, name=f"{name}[{subject!r}]")
            self._default = self._lists.pop(_OTHERS, None)
        elif per != "global":
            raise ConfigurationError(
                f"{name}: per={per!r} needs a mapping from each {per} to its models, got {models!r}"
            )
        else:
            self._default = ModelList(models, name=name)

    def listed(self, context: Context, call: Call, *, others: bool) -> tuple[str, ...]:
        """The models that the caller's lists name one by one. `others`: also where the list is not the caller's own."""
        if not self._enforce:
            return ()
        return tuple(
            entry
            for subject in self._subjects(context, call) or (_NOBODY,)
            if others or is_owned(self.per, subject)
            for models in [self._list(subject)]
            if models is not None
            for entry in models.entries
            if not entry.endswith("*")
        )

    @property
    def entries(self) -> tuple[str, ...]:
        """What all of its lists say, each entry once."""
        lists = [*self._lists.values(), *([self._default] if self._default is not None else [])]
        return tuple(dict.fromkeys(entry for each in lists for entry in each.entries))

    def plan(self, context: Context, call: Call | None, now_ms: int) -> Verdict:  # noqa: ARG002 - see Policy.plan
        """A refusal unless the resolved model is allowed; never a claim."""
        if call is None:
            return NOTHING
        key = self._identify(context, call)
        lists = self._memo.get(key)
        if lists is None:
            subjects = self._subjects(context, call)
            found = tuple((subject, self._list(subject)) for subject in subjects) or ((_NOBODY, self._default),)
            lists = self._keep(key, found, subjects)
        for subject, models in lists:
            model = qualified(call.provider, call.model) if models is None else models.forbidden(call)
            if model is not None:
                return self._forbidden(model, subject, models)
        return NOTHING

    def scopes(self) -> tuple[str, ...]:
        """None: it never claims."""
        return ()

    def samples(self) -> tuple[Meter, ...]:
        """None: it never claims."""
        return ()

    def _list(self, subject: Subject) -> ModelList | None:
        # Unverified callers have no name that an entry could mean.
        return self._default if subject.parts == _ANONYMOUS_PARTS else self._lists.get(subject.name, self._default)

    def _forbidden(self, model: str, subject: Subject, models: ModelList | None) -> Verdict:
        whose = f" for {self.per} {quoted(subject.name)}" if subject.name else ""
        return self._refuse(
            "model_not_allowed",
            f"{self.name}: the model {quoted(model)} is not allowed{whose}. "
            "Ask for another one, or have it put on the list.",
            scope=self.per,
            subject=subject.name,
            allowed=() if models is None else models.entries,
            owned=is_owned(self.per, subject),
        )


_NOBODY: Final = Subject("", ())
_ANONYMOUS_PARTS: Final = ("anonymous",)


def _entry(entry: object, name: str) -> str:
    text = entry.strip() if isinstance(entry, str) else ""
    if not text or text == "/":
        raise ConfigurationError(f"{name}: expected the name of a model, got {entry!r}")
    if "*" in text[:-1]:
        raise ConfigurationError(f"{name}: '*' may only stand at the end, got {entry!r}")
    return text


def _beginning(entry: str) -> str:
    """The canonical form of `provider/model…` as a beginning: the provider is canonical, the rest lower-case."""
    provider, _, rest = entry.partition("/")
    return f"{qualified(provider, 'x').removesuffix('/x')}/{rest.lower()}"
