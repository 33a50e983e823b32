"""Takes the caller from what an authentication middleware has put into the scope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.identity.base import Identity, IdentityError, Scope, clean

__all__ = ["ScopeUser", "text_of", "texts_of"]


class ScopeUser:
    """Believes `scope["user"]`, as Starlette's `AuthenticationMiddleware` and its kin set it.

    The caller is the user's `identity`, or its `username`; `display_name` is never asked, because
    users choose it themselves. A user whose `is_authenticated` is not `True` is anonymous.

        ScopeUser(departments=lambda scope: scope["user"].groups)

    `caller`, `user`, `departments`, `agent` and `tags` are functions of the scope, so that they may
    look at `scope["auth"]` too. Numbers are taken as text, `None` means there is none.

    Raises:
        ConfigurationError: one of them is not a function.
    """

    __slots__ = ("_agent", "_caller", "_departments", "_tags", "_user")

    def __init__(
        self,
        *,
        caller: Callable[[Scope], object] | None = None,
        user: Callable[[Scope], object] | None = None,
        departments: Callable[[Scope], object] | None = None,
        agent: Callable[[Scope], object] | None = None,
        tags: Callable[[Scope], object] | None = None,
    ) -> None:
        options = {"caller": caller, "user": user, "departments": departments, "agent": agent, "tags": tags}
        for name, function in options.items():
            if function is not None and not callable(function):
                raise ConfigurationError(f"ScopeUser: {name} must be a function of the scope, got {function!r}")
        self._caller = caller
        self._user = user
        self._departments = departments
        self._agent = agent
        self._tags = tags

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The verified caller.

        Raises:
            ContextError: nothing has set `scope["user"]`, or the user has no name that could be used.
        """
        if "user" not in scope:
            raise ContextError(
                "ScopeUser: scope['user'] is not set; the authentication middleware must be outside GuardMiddleware "
                "(with app.add_middleware, the one added last is outermost)"
            )
        # `is True`: a method called is_authenticated would always be true.
        if getattr(scope["user"], "is_authenticated", False) is not True:
            return None
        caller = text_of(self._caller(scope) if self._caller else _name(scope["user"]), "The caller")
        if caller is None:
            return None
        return Identity(
            caller=caller,
            user=text_of(self._user(scope), "The user") if self._user else None,
            departments=texts_of(self._departments(scope), "The departments") if self._departments else (),
            agent=text_of(self._agent(scope), "The agent") if self._agent else None,
            tags=texts_of(self._tags(scope), "The tags") if self._tags else (),
        )


def text_of(value: object, what: str) -> str | None:
    """A verified text or whole number as an id.

    Raises:
        IdentityError: something else, or as `clean`; status 403.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if value.bit_length() < 512 else "9" * 512
    if not isinstance(value, str):
        raise IdentityError(f"{what} is neither a text nor a number.", status=403)
    try:
        return clean(value, what)
    except IdentityError as error:
        raise IdentityError(error.message, status=403) from None


def texts_of(value: object, what: str) -> tuple[str, ...]:
    """A verified list of texts, or one text, as ids without repetitions.

    Raises:
        IdentityError: as `text_of`.
    """
    if value is None:
        return ()
    items: Sequence[object] = (value,) if isinstance(value, (str, int)) else _items(value, what)
    texts = (text_of(item, what) for item in items)
    return tuple(dict.fromkeys(text for text in texts if text is not None))


def _items(value: object, what: str) -> Sequence[object]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    raise IdentityError(f"{what} are not a list of texts.", status=403)


def _name(user: Any) -> object:
    for attribute in ("identity", "username"):
        try:
            value = getattr(user, attribute, None)
        except NotImplementedError:  # Starlette's base class raises it for what a user leaves out
            continue
        if value is not None and value != "":
            return value
    raise ContextError(
        f"ScopeUser: a {type(user).__name__} has neither identity nor username; "
        "say ScopeUser(caller=lambda scope: scope['user'].…)"
    )
