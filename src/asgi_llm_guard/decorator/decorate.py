"""`guarded`: what it is told, and which wrapper a function gets."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from asgi_llm_guard.cache import FunctionCache
from asgi_llm_guard.context import Context
from asgi_llm_guard.decorator.run import Work
from asgi_llm_guard.decorator.wrappers import (
    async_generator,
    cached_coroutine,
    cached_plain,
    coroutine,
    generator,
    plain,
)
from asgi_llm_guard.describe import check_description
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.marks import mark
from asgi_llm_guard.policies.base import Policy

__all__ = ["guarded", "policies_of"]

F = TypeVar("F", bound=Callable[..., Any])

_METHODS: Final = ("get", "head", "post", "put", "patch", "delete", "options")

_wrappers: weakref.WeakKeyDictionary[Callable[..., Any], tuple[Policy, ...]] = weakref.WeakKeyDictionary()
"""Every guarded function, and its policies."""


def guarded(
    *policies: Policy,
    model: str | None = None,
    provider: str | None = None,
    max_output_tokens: int | None = None,
    input: Callable[..., object] | None = None,  # noqa: A002 - the providers' own word
    input_tokens: int | None = None,
    choices: int = 1,
    guard: Guard | None = None,
    context: Context | Callable[..., Context] | None = None,
    cache: bool | Callable[..., object] = False,
) -> Callable[[F], F]:
    """Admit each call of the function under the guard's policies and these, and settle what it used.

    Usage is taken from calls made inside it, else from the return value or the streamed items.

    Args:
        policies: in addition to the guard's.
        model: describes the call: what is reserved before the function runs. Without it, the call
            that the request described is meant, else only what one call costs whatever it is.
        provider: where the model's name does not tell.
        max_output_tokens: the most it may generate; `None`: the model's maximum is held.
        input: gives the text or messages that will be sent, from the function's arguments, so that
            their tokens can be bounded.
        input_tokens: a bound that is known. With neither, the texts, messages and models among the
            arguments are counted, plus the guard's `assumed_input_tokens` for what the function adds.
        choices: how many answers it asks for.
        guard: for use outside a guarded application. `None`: the current admission's guard.
        context: with `guard`, outside any admission: who asks, or what gives it from the arguments.
            `None`: the shared anonymous caller.
        cache: give the return value again to calls with the same arguments, as the guard's cache and the `CacheScope`
            among the policies allow. A function makes the key from the arguments. See `docs/cache.md`.

    Raises:
        ConfigurationError: wrong arguments; when the module is loaded.
        ContextError: when called: no admission is open, and no `guard` was given.
        LimitExceeded: when called: refused. In a handler, the middleware answers it.
    """
    if len(policies) == 1 and callable(policies[0]) and not isinstance(policies[0], Policy):
        raise ConfigurationError("@guarded needs parentheses: @guarded() or @guarded(Iterations(5))")
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ConfigurationError(f"@guarded: expected policies such as Iterations(5), got {policy!r}")
    described = {"provider": provider, "max_output_tokens": max_output_tokens, "choices": choices}
    if model is None and (provider, max_output_tokens, input, input_tokens, choices) != (None, None, None, None, 1):
        raise ConfigurationError("@guarded: provider, max_output_tokens, input and choices need a model")
    if model is not None:
        check_description(model, input_tokens=input_tokens, max_output_tokens=max_output_tokens, choices=choices)
    if context is not None and guard is None:
        raise ConfigurationError("@guarded: context= is for use with guard=; inside a request the caller is known")
    if not isinstance(cache, bool) and not callable(cache):
        raise ConfigurationError(f"@guarded: cache= is True, False or a function of the arguments, got {cache!r}")
    work = Work(policies, model, described, input, input_tokens, guard, context, cache)

    def decorate(function: F) -> F:
        if inspect.isclass(function):
            return cast("F", _class(function, work))
        return cast("F", _wrap(function, work))

    return decorate


def policies_of(function: object) -> tuple[Policy, ...]:
    """The policies that `@guarded` adds to a function; none to others."""
    return _wrappers.get(function, ()) if callable(function) else ()


def _wrap(function: Callable[..., Any], work: Work) -> Callable[..., Any]:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_wrap(function.__func__, work))
    if not callable(function):
        raise ConfigurationError(f"@guarded: expected a function, got {function!r}")
    target = _code(function)
    if inspect.isasyncgenfunction(target):
        kind = async_generator
    elif inspect.isgeneratorfunction(target):
        kind = generator
    elif inspect.iscoroutinefunction(target):
        kind = coroutine
    else:
        kind = plain
    start = functools.partial(work.start, function, target in _wrappers)
    if work.cache is False:
        wrapper = kind(function, start)
    else:
        cached = FunctionCache(function, None if work.cache is True else work.cache)
        wrapper = (cached_coroutine if kind is coroutine else cached_plain)(function, start, cached)
    functools.update_wrapper(wrapper, function)
    _keep_signature(function, wrapper)
    mark(function, wrapper)
    _wrappers[wrapper] = work.policies
    return wrapper


def _class(endpoint: type, work: Work) -> type:
    """A class-based endpoint: each of its HTTP methods is guarded."""
    names = [name for name in _METHODS if name in vars(endpoint)]
    if not names:
        raise ConfigurationError(
            f"@guarded on the class {endpoint.__qualname__}: it has no get, post or other HTTP method of its own; "
            "decorate the method that makes the call"
        )
    for name in names:
        setattr(endpoint, name, _wrap(vars(endpoint)[name], work))
    return endpoint


def _keep_signature(function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Give the wrapper the function's signature, with postponed annotations evaluated where they were written.

    FastAPI before 0.11x looks names up in the wrapper's module, where they are not known.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError):
        return  # names that exist for type checkers only: newer frameworks unwrap and look for themselves
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # functions may have one
    annotations = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not inspect.Parameter.empty
    }
    if signature.return_annotation is not inspect.Signature.empty:
        annotations["return"] = signature.return_annotation
    wrapper.__annotations__ = annotations


def _code(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs when `function` is called: says which kind of function it is."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__  # an object that is called
