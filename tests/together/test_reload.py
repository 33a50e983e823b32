"""Another configuration and administration data together: neither takes the other's place, not even for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from tests.cli.kit import settings

from asgi_llm_guard import Budget, Context, Guard, GuardMiddleware, Iterations, Quota, QuotaBook, Route
from asgi_llm_guard.cli.serve import application
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.following import CHORE
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.identity import Identity
from asgi_llm_guard.settings import build_gateway_arguments, build_guard_arguments, load_settings, watch
from asgi_llm_guard.settings.reload import CHORE as RELOAD
from asgi_llm_guard.testing import FrozenClock, asgi_client

pytestmark = pytest.mark.anyio

ANNA = Actor(name="anna", role="admin")


async def test_administered_quotas_hold_before_a_new_configuration_does(clock: FrozenClock) -> None:
    """No call of any thread finds the quotas of a changed file without what is administered laid over them."""
    control = Control("sqlite://:memory:", clock=clock)
    await control.put("department", "research", {"daily_cost": 0}, actor=ANNA)
    guard = Guard([Quota(QuotaBook({"research": {"daily_cost": 100}}))], clock=clock, control=control)
    in_force: list[bool] = []

    class Noticed(QuotaBook):
        """Notes whether calls go by it already when what is administered is laid over it."""

        def lay_over(self, quotas: Mapping[str, Any]) -> None:
            in_force.append(any(isinstance(policy, Quota) and policy.book is self for policy in guard.policies))
            super().lay_over(quotas)

    async with guard:
        async with guard.open(Context(caller="ada")):
            pass
        await guard.chores.run(CHORE)
        book = Noticed({"research": {"daily_cost": 100}})
        guard.replace(policies=[Quota(book)])
        quota = book.get("research")
        assert quota is not None
        assert quota.daily_cost == 0
        assert in_force[:1] == [False]


async def listed(guard: Guard, route: str) -> tuple[list[str], list[str]]:
    """The limits of a department, and those that a call of it by a route would claim on."""
    call = guard.describe("openai/gpt-4o-mini")
    standing = await guard.standing(Context(route=route, departments=("research",)), call)
    return (
        [meter.policy for meter, _ in await guard.meters_of("department", "research")],
        [row.policy for row in standing.rows],
    )


async def test_limits_of_routes_that_are_no_more_are_not_shown() -> None:
    """S7: what pages and callers are shown of limits goes by the routes in force, at once and once they were asked for."""
    routes = [
        Route("/x", extra=[Budget("$5/daily", per="department", name="of_x")]),
        Route("/y", extra=[Budget("$6/daily", per="department", name="of_y")]),
    ]
    async with Guard([Iterations(50)], identity=lambda _: Identity(caller="ada")) as guard:
        application: Any = GuardMiddleware(Starlette(), guard=guard, routes=routes)
        assert await listed(guard, "/x") == (["of_x", "of_y"], ["of_x"])

        for _ in range(2):
            guard.replace(routes=[Route("/x"), routes[1]])
            assert await listed(guard, "/x") == (["of_y"], [])
            assert await listed(guard, "/y") == (["of_y"], ["of_y"])
            async with asgi_client(application) as client:
                await client.post("/y")
            assert await listed(guard, "/y") == (["of_y"], ["of_y"])

        guard.replace(routes=[])
        with pytest.raises(ConfigurationError, match="no policy counts per 'department'"):
            await listed(guard, "/y")


ALERTING = """
[[policies]]
kind = "budget"
limits = ["$5/1d"]
per = "caller"
name = "{name}"

[[alerts.thresholds]]
policy = "spending"

[gateway]
[[gateway.deployments]]
provider = "openai"
model_name = "gpt-4o-mini"
api_key = "key-of-nobody"
"""


async def test_a_service_takes_no_file_over_that_it_would_not_start_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3: a changed file whose alerts are about a policy that is no more is refused by `serve`, as when it starts."""
    file = settings(tmp_path, ALERTING.format(name="spending"))
    monkeypatch.setenv("LLM_GUARD_CONFIG", str(file))
    guard = application()._guard
    async with guard:
        file.write_text(file.read_text("utf-8").replace('name = "spending"', 'name = "renamed"'), "utf-8")
        await guard.chores.run(RELOAD)
        assert [policy.name for policy in guard.policies] == ["spending"]
        with pytest.raises(ConfigurationError, match="there is no policy 'spending'"):
            application()


SERVED = """
storage = "memory://"

[gateway]
aliases = {{ quick = "openai/gpt-4o-mini" }}

[gateway.tier_down]
to = {{ "openai/gpt-4o" = "anthropic/claude-haiku-4-5" }}

{deployments}
"""
DEPLOYMENT = """
[[gateway.deployments]]
name = "{0}"
provider = "{1}"
model_name = "{2}"
api_key = "key-of-nobody"
"""
MINI, LARGE, SMALL = (
    DEPLOYMENT.format("mini", "openai", "gpt-4o-mini"),
    DEPLOYMENT.format("large", "openai", "gpt-4o"),
    DEPLOYMENT.format("small", "anthropic", "claude-haiku-4-5"),
)


@pytest.mark.parametrize("left", [MINI + LARGE, LARGE + SMALL, ""])
async def test_deployments_that_a_gateway_would_not_start_with(tmp_path: Path, left: str) -> None:
    """M14: a changed file without the deployments that an alias or a cheaper model leads to changes nothing."""
    file = tmp_path / "guard.toml"
    file.write_text(SERVED.format(deployments=MINI + LARGE + SMALL), "utf-8")
    read = load_settings(file)
    async with Guard(**build_guard_arguments(read)) as guard, Gateway(
        guard, **build_gateway_arguments(read)
    ) as gateway:  # fmt: skip
        reload = watch(guard, read, gateway=gateway)
        file.write_text(SERVED.format(deployments=left), "utf-8")
        assert not await reload.check()
        assert reload.error is not None
        assert [each.name for each in gateway.deployments] == ["mini", "large", "small"]
        with pytest.raises(ConfigurationError):
            Gateway(Guard(), **build_gateway_arguments(load_settings(file)))


async def test_the_callers_page_of_a_service_that_knows_its_callers_no_more() -> None:
    """M13: after a change that takes the identity away nobody is shown the figures of all, and none gets a failure."""
    async with Guard([Iterations(50)], identity=lambda _: Identity(caller="ada")) as guard:
        page: Any = guard.usage_app()
        async with asgi_client(page) as client:
            assert (await client.get("/v1/usage")).json()["caller"] == "ada"
            guard.replace(identity=None)
            answer = await client.get("/v1/usage")
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"
