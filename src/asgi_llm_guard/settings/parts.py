"""What the tables of the settings are made of: their bases, their small types, and calling a constructor with a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from asgi_llm_guard.denials.statuses import check_statuses
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import Extractor, baggage, body, first_of, header, vendor_header
from asgi_llm_guard.identity.base import check_params

__all__ = [
    "Agent",
    "Arguments",
    "Number",
    "Seconds",
    "Sources",
    "Statuses",
    "Table",
    "check_keys",
    "construct",
    "extractor_of",
    "problem",
]

# Arguments that only code can give, or that another part of the settings gives.
_NOT_IN_FILES: Final = frozenset({"agents", "book", "knowledge_base"})

_SOURCES: Final[Mapping[str, Callable[[str], Extractor]]] = {
    "header": header,
    "body": body,
    "baggage": baggage,
    "vendor_header": vendor_header,
}


def problem(message: str, key: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{message}", {"message": message, "key": key})


def construct(
    target: Callable[..., Any], arguments: Mapping[str, Any], *, also: Sequence[str] = (), **ours: object
) -> Any:
    """`target(**arguments, **ours)`, after a look at the names in `arguments`, which come from a table.

    `also`: keys of that table that are no arguments.
    """
    check_keys(target, arguments, also=also, but=ours)
    parameters = inspect.signature(target).parameters
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments and name not in ours:
            raise problem("is missing", name)
    try:
        return target(**arguments, **ours)
    except TypeError as error:  # a list where there is one value, or the other way round: told like any other mistake
        raise ConfigurationError(f"{target.__name__}: a value is of another type than it can be: {error}") from None


def check_keys(
    target: Callable[..., Any], arguments: Iterable[str], *, also: Sequence[str] = (), but: Iterable[str] = ()
) -> None:
    """Refuse keys that are no arguments of `target` and not among `also`; nor are those of `but`."""
    others = {*_NOT_IN_FILES, *but}.difference(also)
    known = list(dict.fromkeys([*also, *(name for name in inspect.signature(target).parameters if name not in others)]))
    for name in sorted(set(arguments).difference(known)):
        raise problem(f"unknown key; expected one of {', '.join(known)}", name)


def no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic takes ValueError for a wrong input
    return value


def check_agent(entry: dict[str, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in entry.items():
        try:
            checked |= check_params({name: value}, prefix="")
        except ConfigurationError as error:
            raise problem(str(error).removeprefix(f"{name}: "), name) from None
    return checked


def extractor_of(sources: Sequence[str]) -> Extractor:
    extractors = []
    for text in sources:
        kind, colon, name = text.partition(":")
        if not colon or kind not in _SOURCES:
            raise ConfigurationError(
                f"expected one of {', '.join(f'{known}:NAME' for known in _SOURCES)} (header:x-session-id), got {text!r}"
            )
        extractors.append(_SOURCES[kind](name))
    return first_of(*extractors)


def check_sources(sources: list[str]) -> list[str]:
    extractor_of(sources)
    return sources


Number = Annotated[int, BeforeValidator(no_boolean)]
Seconds = Annotated[float, BeforeValidator(no_boolean)]
Sources = Annotated[list[str], AfterValidator(check_sources)]
Agent = Annotated[dict[str, Any], AfterValidator(check_agent)]


def check_table_of_statuses(statuses: dict[str, int]) -> dict[str, int]:
    check_statuses(statuses)
    return statuses


Statuses = Annotated[dict[str, Number], AfterValidator(check_table_of_statuses)]


class Table(BaseModel):
    """A table whose keys are all listed here."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Arguments(BaseModel):
    """A table whose further keys are arguments of a constructor, which checks them."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    def arguments(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})
