"""`@guarded(cache=True)`: what a call of a function depends on, and its return value as it is kept.

A value is kept only if it comes back as what it was: of the type that the function is annotated with, and equal. A
function without an annotation may return what JSON says by itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import typing
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from asgi_llm_guard.cache.answers import ProviderAnswer, unfit_value
from asgi_llm_guard.cache.keys import Unfit
from asgi_llm_guard.cache.lookup import Lookup
from asgi_llm_guard.errors import ConfigurationError

__all__ = ["FunctionCache"]

_log = logging.getLogger("asgi_llm_guard.cache")


class FunctionCache:
    """How one function is cached. `key` makes a call's key from its arguments, in place of the arguments themselves.

    Raises:
        ConfigurationError: the function streams, returns what cannot be kept, or depends on more than its arguments.
    """

    def __init__(self, function: Callable[..., Any], key: Callable[..., object] | None) -> None:
        code = inspect.unwrap(function)
        while isinstance(code, functools.partial):
            code = inspect.unwrap(code.func)
        name = str(getattr(code, "__qualname__", None) or type(code).__qualname__)
        if name.endswith("<lambda>"):
            raise ConfigurationError(
                "@guarded(cache=...): a lambda has no name that tells its values from those of another one; write it with def"
            )
        if inspect.isasyncgenfunction(code) or inspect.isgeneratorfunction(code):
            raise ConfigurationError(f"@guarded {name}: cache= is for functions that return a value; this one streams")
        if key is None and (
            isinstance(function, functools.partial)
            or not inspect.isfunction(code)
            or code.__closure__
            or _wrappers_have_values(function)
        ):
            raise ConfigurationError(
                f"@guarded {name}: its value depends on more than its arguments (an object, a partial, variables of the "
                "function around it, or values of a decorator); say on what: cache=lambda *args, **kwargs: [...]"
            )
        self.kind = _kind(code, name)
        self._name = name
        self._key = key
        self._code = code
        self._form: _Form | None = None
        self._warned = False
        with contextlib.suppress(NameError):  # of a type that is defined later: it is asked for again
            self._form = _form(code, name)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """What a call with these arguments depends on.

        Raises:
            TypeError: these are no arguments of the function.
        """
        if self._key is not None:
            return self._key(*args, **kwargs)
        bound = inspect.signature(self._code).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def answer(self, value: object) -> ProviderAnswer | str:
        """`value` as it is kept; or why it is not."""
        form = self._known_form()
        try:
            body = form.encode(value)
            same, told = _same(form.decode(body), value), msgspec.json.decode(body)
        except Exception:  # noqa: BLE001 - of whatever library the value is; it is told below
            body, same, told = b"", False, None
        if not same:
            reason = f"a {type(value).__name__} does not come back as what it was"
            if not self._warned:
                self._warned = True
                _log.warning("cache: %s returned a value that is not kept: %s; this is said once", self._name, reason)
            return reason
        return unfit_value(told) or ProviderAnswer(status=0, content_type="", body=body)

    def value(self, found: Lookup) -> Any:
        """What was kept. What is of no use is forgotten.

        Raises:
            Unfit: it was kept by another release of the function, which returned something else.
        """
        assert found.answer is not None  # noqa: S101 - it is a hit
        try:
            return self._known_form().decode(found.answer.body)
        except Exception as error:
            found.forget()
            raise Unfit(f"what was kept is not what {self._name} returns") from error

    def _known_form(self) -> _Form:
        if self._form is None:
            try:
                self._form = _form(self._code, self._name)
            except (NameError, ConfigurationError):  # too late to refuse it: what JSON cannot say is not kept
                self._form = _Json()
        return self._form


def _wrappers_have_values(function: Any) -> bool:
    """Whether a decorator that a function was put into holds more than functions: it may say another thing elsewhere."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        for cell in getattr(function, "__closure__", None) or ():
            try:
                if not callable(cell.cell_contents):
                    return True
            except ValueError:  # it is filled later
                return True
        function = inner
    return False


def _kind(function: Any, name: str) -> str:
    """What tells a function from all others: where several may have one name, the place of its code, too."""
    module = getattr(function, "__module__", "")
    code = getattr(function, "__code__", None)
    if code is not None and (module == "__main__" or "<locals>" in name):
        return f"{module}:{name}:{code.co_filename}:{code.co_firstlineno}"
    return f"{module}:{name}"


class _Form(Protocol):
    """How values of one type are written."""

    def encode(self, value: Any) -> bytes: ...

    def decode(self, body: bytes) -> Any: ...


class _Json:
    """What JSON says by itself."""

    def encode(self, value: Any) -> bytes:
        return msgspec.json.encode(value)

    def decode(self, body: bytes) -> Any:
        return msgspec.json.decode(body)


class _Typed:
    """What `msgspec` reads: structs, dataclasses, typed dicts and lists of them."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def encode(self, value: Any) -> bytes:
        return msgspec.json.encode(value)

    def decode(self, body: bytes) -> Any:
        return self._decode(body)


class _Modelled:
    """Models of pydantic, and what else has their two methods."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def encode(self, value: Any) -> bytes:
        text: str = value.model_dump_json()
        return text.encode()

    def decode(self, body: bytes) -> Any:
        return self._kind.model_validate_json(body)


def _form(function: Callable[..., Any], name: str) -> _Form:
    hints = typing.get_type_hints(function) if hasattr(function, "__annotations__") else {}
    kind = hints.get("return", Any)
    if kind is Any:
        return _Json()
    if callable(getattr(kind, "model_validate_json", None)) and callable(getattr(kind, "model_dump_json", None)):
        return _Modelled(kind)
    try:
        custom = isinstance(msgspec.inspect.type_info(kind), msgspec.inspect.CustomType)
    except TypeError:
        custom = True
    if custom:
        raise ConfigurationError(
            f"@guarded {name}: cache= cannot keep a {getattr(kind, '__name__', kind)}; return text, numbers, lists and "
            "mappings, a dataclass, or a model of msgspec or pydantic"
        )
    return _Typed(kind)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and bool(one == other)
