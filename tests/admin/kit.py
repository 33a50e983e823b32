"""What the tests of the administration page have in common: a guard with a past, its page, and who logs in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_llm_guard import Budget, DepartmentQuota, Guard, GuardMiddleware, Iterations, ProviderBudget, Quota, QuotaBook
from asgi_llm_guard.admin import AdminCredential, AdminOptions, Role
from asgi_llm_guard.control import Actor, AuditEntry, AuditQuery, Control
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.testing import FrozenClock, asgi_client
from asgi_llm_guard.usage import Usage, UsageRecord

__all__ = ["CALLER_KEY", "HOSTILE", "NOW_MS", "SECRET", "TOKENS", "Desk", "desk", "fill", "options", "record"]

NOW_MS: Final = 1_795_348_800_000  # 2026-11-22T12:00:00Z
SECRET: Final = "canary-secret-of-the-admin-page"
CALLER_KEY: Final = "lg-canary-key-of-a-caller-0123456789abcdef"
HOSTILE: Final = "<script>alert('x')</script>\u202egnp.exe"

TOKENS: Final[Mapping[Role, str]] = {
    "viewer": "lga-viewer-token-of-32-characters-00",
    "operator": "lga-operator-token-of-32-characters-0",
    "admin": "lga-admin-token-of-32-characters-0000",
}


def options(**more: Any) -> AdminOptions:
    """Three credentials, named as their roles."""
    credentials = [
        AdminCredential(name=role, role=role, digest=AdminCredential.hash(token, SECRET))
        for role, token in TOKENS.items()
    ]
    return AdminOptions(**{"credentials": credentials, "secret": SECRET, **more})


@dataclass(slots=True, kw_only=True)
class Desk:
    """A guard, the page over it, and a service around both."""

    guard: Guard
    control: Control | None
    clock: FrozenClock
    service: Starlette
    guarded: GuardMiddleware
    clients: list[httpx2.AsyncClient] = field(default_factory=list)

    def client(self, role: Role | None = None, *, headers: Mapping[str, str] = {}) -> httpx2.AsyncClient:
        """A client of the page; with a role it sends that one's token."""
        client = asgi_client(self.guarded)
        client.headers.update(dict(headers))
        if role is not None:
            client.headers["authorization"] = f"Bearer {TOKENS[role]}"
        self.clients.append(client)
        return client

    async def browser(self, role: Role) -> httpx2.AsyncClient:
        """A client that has logged in by the form."""
        client = self.client(headers={"origin": "http://testserver"})
        page = await client.get("/admin/login")
        answer = await client.post(
            "/admin/login", data={"login_token": hidden(page.text, "login_token"), "next": "/", "token": TOKENS[role]}
        )
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/"), answer.text
        return client

    async def audit(self, **query: Any) -> Sequence[AuditEntry]:
        """The newest first."""
        assert self.control is not None
        return await self.control.audit(AuditQuery(**query))

    async def aclose(self) -> None:
        for client in self.clients:
            await client.aclose()
        await self.guard.aclose()
        if self.control is not None:
            await self.control.aclose()


def hidden(page: str, name: str) -> str:
    """The value of a hidden field."""
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found is not None, name
    return found[1]


def record(number: int, **more: Any) -> UsageRecord:
    """A settled call."""
    told: dict[str, Any] = {
        "call_id": f"call-{number}",
        "at_ms": NOW_MS - 60_000,
        "ended_ms": NOW_MS - 59_000,
        "caller": "service-a",
        "user": "mia",
        "departments": ("research",),
        "agent": "writer",
        "session": "session-1",
        "route": "/v1/chat/completions",
        "provider": "openai",
        "model": "gpt-5.6-mini",
        "usage": Usage(input_tokens=1_000, output_tokens=200),
        "cost_nanousd": 12_500_000,
        "tokens": 1_200,
        "latency_ms": 900,
    }
    return UsageRecord(**{**told, **more})


async def fill(guard: Guard, records: Sequence[UsageRecord]) -> None:
    """Put records into the guard's ledger."""
    assert guard.ledger is not None
    await guard.ledger.append(records)


def desk(folder: Path, *, control: bool = True, middleware: Mapping[str, Any] | None = None, **more: Any) -> Desk:
    """A service with a guarded route, its administration page at `/admin` and its callers' page at `/usage`."""
    clock = FrozenClock(NOW_MS)
    data = Control(f"sqlite:///{folder}/control.db", secret=SECRET, clock=clock) if control else None
    keys = ApiKeys(
        [
            ApiKeys.generate(caller="nobody", secret=SECRET)[1],
            _key(CALLER_KEY),
        ],
        secret=SECRET,
        unknown="anonymous",
    )
    book = QuotaBook({"research": DepartmentQuota(daily_cost="10", monthly_cost="100", daily_tokens=1_000_000)})
    guard = Guard(
        **{
            "policies": [
                Quota(book),
                Budget("$50/1d", per="user"),
                ProviderBudget({"openai": "$100/1d"}),
                Iterations(25),
            ],
            "storage": f"sqlite:///{folder}/guard.db",
            "identity": keys,
            "control": data,
            "clock": clock,
            **more,
        }
    )

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"path": request.url.path})

    service = Starlette(
        routes=[
            Mount("/admin", guard.admin_app(options())),
            Mount("/usage", guard.usage_app()),
            Route("/ask", answer, methods=["POST"]),
        ]
    )
    return Desk(
        guard=guard,
        control=data,
        clock=clock,
        service=service,
        guarded=GuardMiddleware(service, guard, **(middleware or {})),
    )


def _key(key: str) -> Any:
    from asgi_llm_guard.identity.keys import ApiKey

    return ApiKey(id="k1", digest=ApiKeys.hash(key, SECRET), caller="service-a", user="mia", departments=("research",))


def person(name: str, role: str = "admin") -> Actor:
    return Actor(name=name, role=role, address="10.0.0.1")
