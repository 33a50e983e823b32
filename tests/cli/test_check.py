"""`check`: the doctor's findings over configurations, applications, storages and records."""

from __future__ import annotations

import sqlite3
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, WebSocketRoute
from starlette.routing import Route as Endpoint
from tests.cli.kit import call, document, fill, process, settings

from asgi_llm_guard import Budget, Guard, GuardMiddleware, Iterations, RateLimit, Route, guarded
from asgi_llm_guard.doctor import (
    Finding,
    Severity,
    examine_application,
    examine_clock,
    examine_guard,
    examine_prices,
    examine_records,
    guards_of,
    models_named,
    worst,
)
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.identity import ApiKeys, ScopeUser, TrustedHeaders
from asgi_llm_guard.policies import ModelAllow
from asgi_llm_guard.pricing import PriceBook

NOW = 1_795_269_600_000
CHAT = "/v1/chat/completions"


class SessionMiddleware:
    """Named as Starlette's, which needs a library of its own: middleware is recognised by its name."""

    def __init__(self, app: Any, secret_key: str) -> None:
        raise NotImplementedError


async def endpoint(request: Request) -> Response:
    raise NotImplementedError


def app(*layers: Callable[[Starlette], Any], guard: Guard | None = None, **options: Any) -> Starlette:
    """An application; `layers` are added as a service adds them, so the last one is the outermost."""
    made = Starlette(
        routes=[
            Endpoint(CHAT, endpoint, methods=["POST"]),
            Endpoint("/health", endpoint),
            Endpoint("/agents/{name}", endpoint, methods=["POST"]),
            WebSocketRoute("/live", endpoint),
        ]
    )
    for add in layers:
        add(made)
    if guard is not None:
        made.add_middleware(GuardMiddleware, guard=guard, **options)
    return made


class Nobody(AuthenticationBackend):
    """Verifies nobody; it is never asked."""


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def examined(guard: Guard, **options: Any) -> dict[str, Finding]:
    options = dict[str, Any](storage="sqlite", now_ms=NOW) | options
    return {finding.code: finding for finding in examine_guard(guard, **options)}


# ---------------------------------------------------------------------------------- application


@pytest.mark.parametrize(
    ("add", "severity", "said"),
    [
        (lambda made: made.add_middleware(GZipMiddleware), "warning", "compressed"),
        (lambda made: made.add_middleware(CORSMiddleware), "warning", "CORS"),
        (lambda made: made.add_middleware(AuthenticationMiddleware, backend=Nobody()), "error", "anonymous"),
        (lambda made: made.add_middleware(SessionMiddleware, secret_key="x"), "error", "anonymous"),
        (lambda made: made.add_middleware(TrustedHostMiddleware), "note", "counted first"),
    ],
    ids=["gzip", "cors", "authentication", "sessions", "hosts"],
)
def test_order_of_middleware(add: Callable[[Starlette], Any], severity: str, said: str) -> None:
    """S20: what has to stand outside the guard and stands inside is found, with how to move it; outside it is not."""
    guard = Guard([Iterations(5)], identity=ScopeUser())
    (finding,), _ = examine_application(app(add, guard=guard))
    assert (finding.code, finding.severity) == ("middleware_order", severity)
    assert said in finding.seen
    assert "outside" in finding.next_step
    outside = app(guard=guard)
    add(outside)
    assert examine_application(outside)[0] == []


def test_authentication_inside_matters_to_those_who_ask_it() -> None:
    """S20: an authentication inside the guard is nobody's harm where keys say who asks."""
    guard = Guard([Iterations(5)], identity=ApiKeys([], secret="x" * 32))
    made = app(lambda made: made.add_middleware(AuthenticationMiddleware, backend=Nobody()), guard=guard)
    assert examine_application(made)[0] == []


def test_wrapped_applications_are_looked_through() -> None:
    """S20: middleware that is put around an application by hand is found like what is added to it."""
    guard = Guard([Iterations(5)])
    made = GuardMiddleware(GZipMiddleware(app()), guard=guard)
    findings, paths = examine_application(made)
    assert codes(findings) == ["middleware_order"]
    assert {path.state for path in paths} == {"guarded", "passes"}
    assert guards_of(made) == [guard]


def test_applications_without_a_guard() -> None:
    """S20: an application that no guard is around, or in, is not guarded; a mounted one may be."""
    findings, paths = examine_application(app())
    assert codes(findings) == ["no_middleware"]
    assert {path.state for path in paths} == {"unguarded"}
    guard = Guard([Iterations(5)])
    outer = Starlette(routes=[Mount("/llm", app(guard=guard)), Endpoint("/open", endpoint)])
    findings, paths = examine_application(outer)
    assert findings == []
    assert {path.path: path.state for path in paths}[f"/llm{CHAT}"] == "guarded"
    assert {path.path: path.state for path in paths}["/open"] == "unguarded"
    assert guards_of(outer) == [guard]


def test_mounted_gateways_and_own_pages() -> None:
    """S20: a mounted gateway admits by itself, and the guard's own pages and probes are no one's to guard."""
    guard = Guard([Iterations(5)], identity=ScopeUser())
    deployment = {"provider": "openai", "model_name": "gpt-4o-mini", "api_key": "key-of-nobody"}
    gateway = Gateway(guard, [deployment])
    outer = Starlette(routes=[Mount("/ops", guard.health_app(at="/ops")), Mount("/llm", gateway.app())])
    findings, paths = examine_application(outer)
    assert findings == []
    assert {path.path: path.state for path in paths}["/ops"] == "own"
    assert [(path.state, path.policies) for path in paths if path.path == f"/llm{CHAT}"] == [
        ("guarded", ("iterations",))
    ]
    assert guards_of(outer) == [guard]
    assert examine_application(gateway.app())[0] == []


def test_policies_of_marked_functions() -> None:
    """S20: the policies that `@guarded` adds to an endpoint are listed with its route."""
    made = Starlette(
        routes=[Endpoint("/agent", guarded(RateLimit("1/minute", name="own"))(endpoint), methods=["POST"])]
    )
    made.add_middleware(GuardMiddleware, guard=Guard([Iterations(5)]))
    _, (path,) = examine_application(made)
    assert path.policies == ("iterations", "own")


def test_guarded_twice() -> None:
    """S20: two middleware of one guard around one application count each request twice."""
    guard = Guard([Iterations(5)])
    findings, _ = examine_application(GuardMiddleware(app(guard=guard), guard=guard))
    assert codes(findings) == ["guarded_twice"]


def test_routes_with_their_policies() -> None:
    """S20: each route is listed with what becomes of it, and with its policies in the order in which they are asked."""
    guard = Guard([Budget("$5/daily", per="user", name="budget")])
    routes = [Route(CHAT, extra=[RateLimit("5/minute", name="rate")]), Route("/live")]
    findings, paths = examine_application(app(guard=guard, routes=routes, unlisted="deny"))
    assert findings == []
    assert {path.path: (path.state, path.policies) for path in paths} == {
        CHAT: ("guarded", ("budget", "rate")),
        "/health": ("passes", ()),
        "/agents/{name}": ("refused", ()),
        "/live": ("guarded", ("budget",)),
    }


def test_guarded_routes_that_are_none() -> None:
    """S20: a guarded route that the application does not have guards nothing: a mistyped path, or method."""
    guard = Guard([Iterations(5)])
    routes = [Route("/v1/chat/completion"), Route(CHAT, ["DELETE"]), Route("/agents/{agent}"), Route("/live")]
    findings, _ = examine_application(app(guard=guard, routes=routes))
    assert codes(findings) == ["route_matches_nothing"] * 2
    assert "/v1/chat/completion " in findings[0].seen
    assert CHAT in findings[1].seen


# -------------------------------------------------------------------------------- configuration


def test_a_sound_configuration() -> None:
    """S20: verified callers, a shared storage and today's prices: nothing to find fault with."""
    guard = Guard([Budget("$5/daily", per="user")], identity=ApiKeys([], secret="x" * 32))
    assert examined(guard, now_ms=_date_ms(guard.prices)) == {}


def test_headers_that_everybody_may_send() -> None:
    """S20: identity from headers is unverified where every peer is believed, and not where proxies are listed."""
    guard = Guard([Iterations(5)], identity=TrustedHeaders(trust_headers=True))
    assert examined(guard)["unverified_identity"].severity == "error"
    guard = Guard([Iterations(5)], identity=TrustedHeaders(proxies=["10.0.0.0/8"]))
    assert "unverified_identity" not in examined(guard)


def test_no_identity_is_graver_where_policies_count_by_person() -> None:
    """S20: without an identity everybody is one caller: an error where limits are per user, else a warning."""
    assert examined(Guard([Budget("$5/daily", per="user")]))["no_identity"].severity == "error"
    assert examined(Guard([Budget("$5/daily", per="global")]))["no_identity"].severity == "warning"


def test_memory_is_no_shared_store() -> None:
    """S20: counters in memory are an error with several workers, and a warning with one."""
    guard = Guard([Iterations(5)])
    assert examined(guard, storage="memory", workers=4)["no_shared_store"].severity == "error"
    assert examined(guard, storage="memory")["memory_store"].severity == "warning"
    assert not {"no_shared_store", "memory_store"} & examined(guard, storage="redis", workers=4).keys()


def test_what_opens_limits_is_told() -> None:
    """S20: policies and settings that admit everything while something is wrong are named."""
    guard = Guard([Budget("$5/daily", per="global", name="open", on_outage="allow")], on_data_loss="accept")
    found = examined(guard, unpriced="allow", routes_listed=True)
    assert {"outage_open", "data_loss_open", "unpriced_free", "unlisted_pass"} <= found.keys()
    assert found["outage_open"].seen.startswith("open: ")
    shadow = Guard([Budget("$5/daily", per="global", on_outage="allow").shadow()])
    assert not {"outage_open", "unpriced_free"} & examined(shadow).keys()
    assert "no_policies" in examined(Guard())


def test_old_prices_are_told() -> None:
    """S20: a price list of more than 60 days is a warning."""
    guard = Guard([Iterations(5)])
    made_ms = _date_ms(guard.prices)
    assert "old_prices" not in examined(guard, now_ms=made_ms + 60 * 86_400_000)
    assert "61 days old" in examined(guard, now_ms=made_ms + 61 * 86_400_000)["old_prices"].seen


def _date_ms(prices: PriceBook) -> int:
    from datetime import UTC, datetime

    return int(datetime.fromisoformat(prices.date).replace(tzinfo=UTC).timestamp() * 1000)


def test_models_without_a_price() -> None:
    """S20: models that are named one by one and have no price are found: in allow-lists, as deployments, behind aliases."""
    allowed = ModelAllow({"mia": ["acme/one", "openai/*"], "*": ["openai/gpt-4o"]}, per="user")
    named = models_named([allowed], aliases=["acme/two", "a-group"])
    found = examine_prices(PriceBook.snapshot(), named)
    assert [finding.seen for finding in found] == [
        "no price is known for acme/one (allow-list models)",
        "no price is known for acme/two (alias)",
    ]
    own = PriceBook.snapshot(overrides={"acme/one": {"input": 1, "output": 1}, "acme/two": {"input": 1, "output": 1}})
    assert examine_prices(own, named) == []


def test_models_in_use_without_a_price() -> None:
    """S20: models that were called without a price are an error; with a price since, a note that says `reprice`."""
    error, note = examine_records(
        PriceBook.snapshot(), [("acme/unknown", 1_234, 0), ("openai/gpt-4o", 9, 5), ("openai/gpt-4o", 7, 0)]
    )
    assert (error.severity, error.code) == ("error", "unpriced_model")
    assert "1,234 calls" in error.seen
    assert (note.severity, note.code) == ("note", "was_unpriced")
    assert "5 calls" in note.seen


@pytest.mark.parametrize(
    ("store_ms", "found"),
    [
        (1_000, None),
        (-1_900, None),
        (3_050, None),
        (3_200, "0.1 s ahead"),
        (-2_100, "2.1 s behind"),
        (62_100, "59.0 s ahead"),
    ],
)
def test_clock_skew(store_ms: int, found: str | None) -> None:
    """S20: the storage's clock may differ by two seconds, and by as long as the question was on its way."""
    findings = examine_clock(NOW + store_ms, NOW, NOW + 1_100)
    assert findings == [] if found is None else found.split()[-1] in findings[0].seen
    assert codes(findings) == ([] if found is None else ["clock_skew"])


def test_the_worst_counts() -> None:
    """An error is graver than a warning, and that than a note."""
    error, warning, note = [Finding(severity=each, code="", seen="", next_step="") for each in get_args(Severity)]
    assert worst([]) is None
    assert worst([note]) == "note"
    assert worst([note, warning]) == "warning"
    assert worst([warning, error, note]) == "error"


# -------------------------------------------------------------------------------------- program

SOUND = """
[identity]
kind = "scope_user"
[[policies]]
kind = "budget"
limits = ["$5/daily"]
per = "user"
"""


def test_program_finds_unpriced_models_in_use(tmp_path: Path) -> None:
    """S20: `check` asks the ledger which models were used without a price, and names the override that is missing."""
    fill(tmp_path, calls=6, unpriced=2)
    told = document("check", "--config", settings(tmp_path, SOUND), code=1)
    assert [(finding["code"], finding["severity"]) for finding in told["findings"]] == [("unpriced_model", "error")]
    assert "acme/unknown (in use: 2 calls in 30 days)" in told["findings"][0]["seen"]
    assert '[prices.overrides."acme/unknown"]' in told["findings"][0]["next_step"]


def test_program_finds_nothing(tmp_path: Path) -> None:
    """S20: a sound service passes: exit 0, also with --strict, which counts warnings."""
    fill(tmp_path, calls=3)
    ran = call("check", "--strict", "--config", settings(tmp_path, SOUND))
    assert (ran.exit_code, ran.stdout.splitlines()[-1]) == (0, "Nothing to find fault with.")
    file = settings(tmp_path, SOUND + 'on_outage = "allow"\n')
    assert call("check", "--config", file).exit_code == 0
    assert call("check", "--strict", "--config", file).exit_code == 1


def test_program_makes_no_file(tmp_path: Path) -> None:
    """S20: a storage that does not exist yet is told, and not made by looking."""
    told = document("check", "--config", settings(tmp_path, SOUND))
    assert [finding["code"] for finding in told["findings"]] == ["no_file_yet"]
    assert not (tmp_path / "guard.db").exists()


def test_program_finds_a_storage_that_is_away(tmp_path: Path) -> None:
    """S20: a storage that does not answer is an error, but for --offline."""
    file = settings(tmp_path, SOUND, storage="redis://127.0.0.1:1")
    assert [finding["code"] for finding in document("check", "--config", file, code=1)["findings"]] == ["store_away"]
    assert document("check", "--offline", "--config", file)["findings"] == []


def test_program_finds_databases_that_are_away(tmp_path: Path) -> None:
    """S20: a ledger and administration data that cannot be reached are errors as the storage is."""
    fill(tmp_path, calls=1)
    text = SOUND + '[control]\nurl = "postgresql://nobody:canary-77@127.0.0.1:1/none"\n'
    ran = call("check", "--json", "--config", settings(tmp_path, text))
    assert ran.exit_code == 1
    assert "store_away" in ran.stdout
    assert "canary-77" not in ran.output


def test_program_finds_a_storage_of_another_schema(tmp_path: Path) -> None:
    """S19: a file of a schema that this release does not know is refused, and says which it is."""
    fill(tmp_path, calls=1)
    with sqlite3.connect(tmp_path / "guard.db") as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    ran = call("check", "--config", settings(tmp_path, SOUND))
    assert ran.exit_code != 0
    assert "999" in ran.output


def test_program_looks_into_an_application(tmp_path: Path) -> None:
    """S20: --app inspects a real application: a mark that nothing reaches, middleware inside the guard, its routes."""
    (tmp_path / "service.py").write_text(
        textwrap.dedent(
            """
            from starlette.applications import Starlette
            from starlette.middleware.gzip import GZipMiddleware
            from starlette.responses import JSONResponse
            from asgi_llm_guard import Guard, GuardMiddleware, Iterations, guarded

            guard = Guard([Iterations(5)])
            app = Starlette()

            def post(path):
                def add(function):
                    app.add_route(path, function, methods=["POST"])
                    return function
                return add

            @guarded(Iterations(3))
            @post("/agents/{name}")
            async def agent(request):
                return JSONResponse({})

            app.add_middleware(GZipMiddleware)
            app.add_middleware(GuardMiddleware, guard=guard)

            def make():
                return app
            """
        ),
        "utf-8",
    )
    import json

    for named in (["--app", "service:app"], ["--app", "service:make", "--factory"]):
        ran = process("check", "--json", *named, cwd=tmp_path)
        assert ran.returncode == 1, ran.stderr
        told = json.loads(ran.stdout)
        assert {"unwrapped_mark", "middleware_order"} <= {finding["code"] for finding in told["findings"]}
        assert told["routes"] == [
            {"path": "/agents/{name}", "methods": ["POST"], "state": "guarded", "policies": ["iterations"]}
        ]
    for wrong in ("service", "nothing:app", "service:nothing"):
        ran = process("check", "--app", wrong, cwd=tmp_path)
        assert ran.returncode in {2, 3}
        assert "Traceback" not in ran.stderr


def test_program_lists_routes_of_the_settings(tmp_path: Path) -> None:
    """S20: without an application, the routes are those of the settings, and what becomes of others."""
    text = SOUND + '[[routes]]\npath = "/v1/chat/completions"\n[[routes.extra]]\nkind = "iterations"\nlimit = 3\n'
    told = document("check", "--config", settings(tmp_path, text))
    assert [(route["path"], route["state"], route["policies"]) for route in told["routes"]] == [
        ("/v1/chat/completions", "guarded", ["user_budget", "iterations"]),
        ("(others)", "passes", []),
    ]


def test_program_knows_the_gateway(tmp_path: Path) -> None:
    """S20: deployments and departments' lists are among what has to have a price."""
    text = SOUND + (
        '[[policies]]\nkind = "quota"\n[departments.sales]\nmodels = ["acme/three"]\n'
        '[gateway]\n[[gateway.deployments]]\nprovider = "openai"\nmodel_name = "our-model"\napi_key = "key-of-nobody"\n'
    )
    findings = document("check", "--config", settings(tmp_path, text))["findings"]
    unpriced = [finding["seen"] for finding in findings if finding["code"] == "unpriced_model"]
    assert len(unpriced) == 2
    assert "deployment" in unpriced[0]
    assert "department sales" in unpriced[1]
