"""The user that an authentication middleware has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser, UnauthenticatedUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_llm_guard.errors import ConfigurationError, ContextError
from asgi_llm_guard.identity import Identity, IdentityError, ScopeUser


@dataclass
class Account(BaseUser):
    id: object = "u1"
    groups: Any = ()
    is_authenticated: Any = True
    username: str = ""
    display_name: str = field(default="Ada", init=False)

    @property
    def identity(self) -> Any:
        return self.id


class OnlyUsername(BaseUser):
    username = "ada"
    is_authenticated = True


class OnlyDisplayName(BaseUser):
    display_name = "Ada"
    is_authenticated = True


class CallableFlag:
    identity = "ada"

    def is_authenticated(self) -> None: ...


def test_with_starlette() -> None:
    """Behind Starlette's own middleware the caller is the user that it has authenticated."""

    class Backend(AuthenticationBackend):
        async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
            name = conn.headers.get("x-test-user")
            return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None

    resolve = ScopeUser(tags=lambda scope: scope["auth"].scopes)

    async def whoami(request: Request) -> JSONResponse:
        identity = resolve(request.scope)
        return JSONResponse(None if identity is None else [identity.caller, *identity.tags])

    app = Starlette(routes=[Route("/", whoami)])
    app.add_middleware(AuthenticationMiddleware, backend=Backend())
    client = TestClient(app)
    assert client.get("/", headers={"x-test-user": "ada"}).json() == ["ada", "authenticated"]
    assert client.get("/").json() is None


def test_mapping_functions() -> None:
    """Departments, agent, user and tags come from functions of the scope; numbers become texts."""
    resolve = ScopeUser(
        caller=lambda scope: scope["user"].id,
        user=lambda _: "eve",
        departments=lambda scope: scope["user"].groups,
        agent=lambda _: None,
        tags=lambda _: "beta",
    )
    request = {"user": Account(id=7, groups={"sales", "research"})}
    assert resolve(request) == Identity(caller="7", user="eve", departments=("research", "sales"), tags=("beta",))


@pytest.mark.parametrize(
    "user", [UnauthenticatedUser(), Account(is_authenticated=False), CallableFlag(), object(), None]
)
def test_not_authenticated(user: object) -> None:
    """T1: only a user that says `is_authenticated = True`, and not a method of that name, is believed."""
    assert ScopeUser()({"user": user}) is None


def test_no_id_is_anonymous() -> None:
    """A user for whom the service's own function finds no caller is anonymous."""
    assert ScopeUser(caller=lambda _: None)({"user": Account()}) is None
    assert ScopeUser(departments=lambda _: None)({"user": Account()}) == Identity(caller="u1")


def test_username() -> None:
    """A user without an identity is known by its username."""
    assert ScopeUser()({"user": OnlyUsername()}) == Identity(caller="ada")
    assert ScopeUser()({"user": Account(id="", username="ada")}) == Identity(caller="ada")


def test_display_name_is_no_identity() -> None:
    """T1: a name that users choose themselves never becomes the caller."""
    with pytest.raises(ContextError, match="OnlyDisplayName has neither identity nor username"):
        ScopeUser()({"user": OnlyDisplayName()})


def test_middleware_order() -> None:
    """A guard outside the authentication middleware is told so, instead of treating everybody as anonymous."""
    with pytest.raises(ContextError, match="authentication middleware must be outside GuardMiddleware"):
        ScopeUser()({"type": "http"})


@pytest.mark.parametrize(
    "resolve, message",
    [
        (ScopeUser(caller=lambda _: ["ada"]), "The caller is neither a text nor a number."),
        (ScopeUser(caller=lambda _: True), "The caller is neither a text nor a number."),
        (ScopeUser(caller=lambda _: 10**5000), "The caller is longer than 256 characters."),
        (ScopeUser(caller=lambda _: "a\nb"), "The caller contains control characters or"),
        (ScopeUser(departments=lambda _: {"a": "b"}), "The departments are not a list of texts."),
        (ScopeUser(departments=lambda _: [None, ["b"]]), "The departments is neither a text nor a number."),
    ],
)
def test_values_of_other_types(resolve: ScopeUser, message: str) -> None:
    """T16: a user whose data cannot be an id is refused, without repeating it."""
    with pytest.raises(IdentityError) as caught:
        resolve({"user": Account()})
    assert caught.value.status == 403
    assert caught.value.message.startswith(message)


def test_configuration() -> None:
    """A mapping that is not a function is refused when the resolver is built."""
    with pytest.raises(ConfigurationError, match="departments must be a function of the scope, got 'groups'"):
        ScopeUser(departments="groups")  # type: ignore[arg-type]


def test_identity_needs_a_caller() -> None:
    """A resolver of one's own cannot return an identity without a caller."""
    with pytest.raises(ConfigurationError, match="a resolver returns None for the anonymous caller"):
        Identity(caller="")
