"""A whole service with canaries in everything that is secret, a thousand requests to it, and all that it leaves behind.

The service is the Starlette example with its settings file, and what users put beside it: a cache, hooked clients,
functions, handlers that fail, alerts with a webhook, administration data, a ledger, probes, and telemetry.

To search another place, add it to `SURFACES`: a name, and a coroutine that gives its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Final

import httpx2
from click.testing import CliRunner
from examples.demo import PRICES
from examples.starlette_app import app as example
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.routing import Route as Endpoint
from tests.middleware.asgi import request

from asgi_llm_guard import Budget, CacheScope, Guard, GuardMiddleware, Route, current_admission, guarded
from asgi_llm_guard.admin import AdminCredential, AdminOptions
from asgi_llm_guard.alerts import Alerts, Webhook
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.cli.root import program
from asgi_llm_guard.gateway import CooldownRules, Gateway, RetryRules
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.settings import build_gateway_arguments, build_guard_arguments, load_settings
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.telemetry import JsonLines, LogCorrelation, LogRefusals, instrument
from asgi_llm_guard.testing import Behaviour, Disconnect, FakeProvider, asgi_client
from asgi_llm_guard.testing.sale import FakeRequest

__all__ = ["SURFACES", "Service", "ask_everything", "service"]

CHAT: Final = "/v1/chat/completions"
PROMPT: Final = "the canary sings at noon"  # words, which nothing takes for a key and masks
IDENTITY: Final = "canary-secret-of-the-keys-0123456789"
TELEMETRY: Final = "canary-secret-of-the-telemetry"
WEBHOOK: Final = "canary-secret-of-the-webhook-0123456789"
ADMIN: Final = "canary-secret-of-the-admin-page-0123456789"
PROVIDERS: Final = {
    "OPENAI_API_KEY": "sk-canary-of-openai-0123456789",
    "ANTHROPIC_API_KEY": "sk-ant-canary-of-anthropic-0123456789",
}
EXAMPLE: Final = Path(example.__file__).parent
CALLERS: Final = 25
_BLOB: Final = re.compile(r"X'([0-9A-Fa-f]+)'")


@dataclass
class Service:
    """The service, its clients, and everything that it has said to anybody but the caller that a text belongs to."""

    app: Any
    guard: Guard
    provider: FakeProvider
    http: httpx2.AsyncClient
    keys: list[str]
    token: str
    folder: Path
    lines: StringIO
    spans: InMemorySpanExporter
    tracers: TracerProvider
    meters: MeterProvider
    registry: CollectorRegistry
    errors: list[str] = field(default_factory=list)
    """Head and body of each answer that was an error, and the heads of all others."""
    trouble: int | None = None
    """Which of the troubles of a provider it has now."""
    statuses: dict[int, int] = field(default_factory=dict)
    dump: Callable[[], str] | None = None
    """What a server keeps, where the storage is one."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must be nowhere."""
        return (*self.keys, *PROVIDERS.values(), IDENTITY, TELEMETRY, WEBHOOK, ADMIN, self.token)

    def found(self, text: str, *, prompts: bool = True) -> list[str]:
        """The canaries in a text, each once."""
        wanted = (*self.secrets, PROMPT) if prompts else self.secrets
        return [canary for canary in wanted if canary in text]

    async def post(self, path: str, body: Any, key: str | None, **headers: str) -> httpx2.Response:
        sent = {"content-type": "application/json", **headers}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.http.post(path, content=content, headers=sent)
        self.note(answer)
        return answer

    def note(self, answer: httpx2.Response) -> None:
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        self.errors.append(str(answer.headers))
        if answer.status_code >= 400:
            # A provider's own words about a request may go back to whoever has sent it.
            text = answer.text.replace(f"You asked: {PROMPT}", "")
            self.errors.append(text)


@contextlib.asynccontextmanager
async def service(
    folder: Path,
    set_variable: Callable[[str, str], None],
    *,
    storage: str | None = None,
    dump: Callable[[], str] | None = None,
    cached: bool = False,
) -> AsyncIterator[Service]:
    """The service as its files in `folder` describe it. `cached`: answers are kept, in a file of their own."""
    keys = _configure(folder, set_variable)
    settings = load_settings(folder / "guard.toml")
    arguments = build_guard_arguments(settings)
    small = Budget({"caller-2": "$0.00005/1d"}, per="user", name="small")  # soon used up, for an alert
    arguments["policies"] = [*arguments["policies"], CacheScope(), small]
    provider = FakeProvider(prices=PRICES)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(_logs())
        async with provider.serve() as url:
            if cached:
                arguments["cache"] = Cache(storage=SqliteStorage(folder / "answers.db"), streams=True)
            webhook = Webhook(
                f"{url.root}/hooks", secret="env:GUARD_WEBHOOK_SECRET", allow=["127.0.0.1"], first_retry_s=0.1
            )
            guard = Guard(
                **{
                    **arguments,
                    "identity": example.key_required(arguments["identity"]),
                    "storage": storage or f"sqlite:///{folder / 'guard.db'}",
                    "alerts": Alerts(webhooks=[webhook]),
                    "control": f"sqlite:///{folder / 'control.db'}",
                    "ledger": f"sqlite:///{folder / 'ledger.db'}" if storage else None,
                    "observers": [LogRefusals()],
                }
            )
            deployments = example.everywhere_at(str(url), build_gateway_arguments(settings))
            twins = [{**entry, "name": f"{entry['name']}-again"} for entry in deployments["deployments"]]
            deployments["deployments"] = [*deployments["deployments"], *twins]  # what is not alone cools down
            rules = CooldownRules(cooldown_s=0.05, max_cooldown_s=0.05)  # what was shared of one stays to be found
            gateway = Gateway(
                guard, **{**deployments, "cooldowns": rules, "retry": RetryRules(retries=1, pause_s=0.001)}
            )
            token, credential = AdminCredential.generate("root", "admin", secret=ADMIN)
            app = _around(guard, gateway, str(url), AdminOptions(credentials=[credential], secret=ADMIN))
            spans, registry = InMemorySpanExporter(), CollectorRegistry()
            tracers, meters = TracerProvider(), MeterProvider([PrometheusMetricReader(registry=registry)])
            tracers.add_span_processor(SimpleSpanProcessor(spans))
            instrument(guard, tracer_provider=tracers, meter_provider=meters, id_secret=TELEMETRY)
            lines.handler.addFilter(LogCorrelation(guard))
            async with guard, gateway, asgi_client(app) as http:
                await guard.chores.run("control")
                made = Service(
                    app=app, guard=guard, provider=provider, http=http, keys=keys, token=token, folder=folder,
                    lines=lines.stream, spans=spans, tracers=tracers, meters=meters, registry=registry, dump=dump,
                )  # fmt: skip
                _have_troubles(made)
                yield made
            tracers.shutdown()
            meters.shutdown()


def _configure(folder: Path, set_variable: Callable[[str, str], None]) -> list[str]:
    """The files of the example, with keys of our own; gives the keys."""
    shutil.copy(EXAMPLE / "guard.toml", folder / "guard.toml")
    keys, tables = [], []
    for number in range(CALLERS):
        agent = "crawler" if number == 0 else None
        department = "sales" if number % 5 == 1 else "research"
        key, record = ApiKeys.generate(f"caller-{number}", secret=IDENTITY, departments=[department], agent=agent)
        keys.append(key)
        table = {"id": record.id, "digest": record.digest, "caller": record.caller, "departments": [department]}
        lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
        tables.append("\n".join(["[[keys]]", *lines, *([f'agent = "{agent}"'] if agent else [])]))
    (folder / "keys.toml").write_text("\n\n".join(tables), "utf-8")
    set_variable("LLM_GUARD_IDENTITY__SECRET", IDENTITY)
    set_variable("LLM_GUARD_STORAGE", f"sqlite:///{folder / 'guard.db'}")
    set_variable("GUARD_WEBHOOK_SECRET", WEBHOOK)
    for name, value in PROVIDERS.items():
        set_variable(name, value)
    return keys


class _Lines:
    def __init__(self) -> None:
        self.stream = StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonLines())


@contextlib.contextmanager
def _logs() -> Any:
    """Everything that our loggers write, of all levels, with tracebacks."""
    logger, lines = logging.getLogger("asgi_llm_guard"), _Lines()
    before = logger.level
    logger.addHandler(lines.handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(lines.handler)
        logger.setLevel(before)


def _around(guard: Guard, gateway: Gateway, provider_url: str, admin: AdminOptions) -> Any:
    """The application: the gateway of the example, handlers of its own, and the guard's pages."""
    client = guard.httpx_client(
        base_url=provider_url, headers={"authorization": f"Bearer {PROVIDERS['OPENAI_API_KEY']}"}
    )

    async def hooked(request: Request) -> Response:
        answer = await client.post("/chat/completions", json=await request.json())
        return JSONResponse({"answered": answer.status_code})

    async def hooked_in_a_stream(request: Request) -> Response:
        async with client.stream("POST", "/chat/completions", json={**await request.json(), "stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                break  # and leaves it
        return JSONResponse({"answered": answer.status_code})

    @guarded(model="openai/gpt-4o-mini")
    async def fails(request: Request) -> Response:
        text = f"{request.headers.get('authorization')} {PROVIDERS['OPENAI_API_KEY']} {await request.body()!r}"
        raise RuntimeError(f"the application's own error: {text}")

    async def explicit(request: Request) -> Response:
        async with guard.call(
            model="openai/gpt-4o-mini", input=str(await request.json()), max_output_tokens=20
        ) as call:
            call.dispatched()
            raise ValueError(f"{PROMPT} {PROVIDERS['OPENAI_API_KEY']} {current_admission().context}")

    inner = Starlette(
        routes=[
            Endpoint("/mine/hooked", hooked, methods=["POST"]),
            Endpoint("/mine/stream", hooked_in_a_stream, methods=["POST"]),
            Endpoint("/mine/fails", fails, methods=["POST"]),
            Endpoint("/mine/explicit", explicit, methods=["POST"]),
            Mount("/ops", guard.health_app(at="/ops")),
            Mount("/admin", guard.admin_app(admin)),
            Mount("/usage", guard.usage_app()),
            Mount("/", gateway.app(expose=True)),
        ]
    )
    mine = [Route(f"/mine/{name}", dialect=None) for name in ("hooked", "stream", "fails", "explicit")]
    return GuardMiddleware(inner, guard, routes=mine)


# ------------------------------------------------------------------------------------ requests


def _body(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{PROMPT} {number}"}]
    return {"model": "gpt-4o-mini", "max_tokens": 20, "messages": messages, **more}


def _have_troubles(made: Service) -> None:
    """Let the provider fail in every way, one at a time, as whoever it was asked as."""
    for key in PROVIDERS.values():
        for number, behaviour in enumerate(_troubles(key)):

            def met(request: FakeRequest, *, key: str = key, number: int = number) -> bool:
                trouble = None if made.trouble is None else made.trouble % TROUBLES
                return trouble == number and key in str(request.headers)

            made.provider.when(met, behaviour)


def _troubles(key: str) -> list[Behaviour]:
    """What a provider answers, and what it repeats in its errors."""
    told = f"You asked: {PROMPT}. Incorrect API key provided: {key}."
    return [
        Behaviour.error(401, message=told),
        Behaviour.error(400, message=told),
        Behaviour.error(403, message=told),
        Behaviour.error(404, message=told),
        Behaviour.error(422, message=told),
        Behaviour.error(429, message=told, retry_after=0),
        Behaviour.error(500, message=told),
        Behaviour.error(503, message=told),
        Behaviour.cut(after_chunks=1),
        Behaviour.cut(),
        Behaviour.stream_error(after_chunks=1),
        Behaviour.malformed(),
        Behaviour.empty(),
        Behaviour.no_usage(),
    ]


async def ask_everything(made: Service, requests: int) -> None:
    """So many requests, of every kind in turn."""
    for number in range(requests):
        key = made.keys[1 + number % (CALLERS - 1)]
        turn = number % len(KINDS)
        rounds = number // len(KINDS)
        made.trouble = rounds // 2 if rounds % 2 else None  # every other round, all goes well
        with contextlib.suppress(httpx2.HTTPError, RuntimeError, ValueError, OSError):
            await KINDS[turn](made, number, key)
    await made.provider.idle()


TROUBLES: Final = len(_troubles(""))


async def _plain(made: Service, number: int, key: str) -> None:
    await made.post(
        CHAT, _body(number), key, **{"x-session-id": f"session-{number}", "x-request-id": f"request-{number}"}
    )


async def _streamed(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number, stream=True), key)


async def _anthropic(made: Service, number: int, key: str) -> None:
    await made.post("/v1/messages", _body(number, model="claude-haiku-4-5"), None, **{"x-api-key": key})


async def _responses(made: Service, number: int, key: str) -> None:
    await made.post(
        "/v1/responses", {"model": "gpt-4o-mini", "max_output_tokens": 20, "input": f"{PROMPT} {number}"}, key
    )


async def _hooked(made: Service, number: int, key: str) -> None:
    await made.post("/mine/hooked", _body(number), key)


async def _hooked_stream(made: Service, number: int, key: str) -> None:
    await made.post("/mine/stream", _body(number), key)


async def _fails(made: Service, number: int, key: str) -> None:
    await made.post("/mine/fails", _body(number), key)


async def _explicit(made: Service, number: int, key: str) -> None:
    await made.post("/mine/explicit", _body(number), key)


async def _left(made: Service, number: int, key: str) -> None:
    sent = json.dumps(_body(number, stream=True)).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
    await request(CHAT, body=sent, headers=headers).run(Disconnect(made.app, after_messages=2))


async def _again(made: Service, number: int, key: str) -> None:
    for _ in range(2):
        await made.post(CHAT, _body(number), key)


async def _wrong_key(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number), f"{key[:-4]}-bad")


async def _two_keys(made: Service, number: int, key: str) -> None:
    made.note(
        await made.http.post(
            CHAT, json=_body(number), headers=[("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")]
        )
    )


async def _key_elsewhere(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number), None, authorization=f"Basic {key}", **{"api-key": key})


async def _not_allowed(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number, model="gpt-4o" if number % 2 else "openai/no-such-model"), key)


async def _too_much(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number, max_tokens=16_000, n=100, model="gpt-4o"), key)


async def _broken_body(made: Service, number: int, key: str) -> None:
    bodies = [
        b'{"model": "gpt-4o-mini", "messages": "' + PROMPT.encode(),
        b'{"model": "gpt-4o-mini", "model": "gpt-4o", "messages": [{"role": "user", "content": "%s"}]}'
        % PROMPT.encode(),
        json.dumps(_body(number, max_tokens=PROMPT)).encode(),
        json.dumps({"model": {"a": PROMPT}, "messages": PROMPT}).encode(),
        json.dumps(_body(number, metadata={"session_id": f"{PROMPT}\r\nX: y"})).encode(),
        PROMPT.encode("utf-16"),
    ]
    await made.post(CHAT, bodies[number % len(bodies)], key)


async def _loops(made: Service, number: int, key: str) -> None:
    await made.post(CHAT, _body(number), made.keys[0], **{"x-session-id": "loop"})


async def _nowhere(made: Service, number: int, key: str) -> None:
    await made.post("/nowhere", _body(number), key, **{"idempotency-key": f"once-{number}"})


Kind = Callable[[Service, int, str], Awaitable[None]]
KINDS: Final[tuple[Kind, ...]] = (
    _plain, _streamed, _anthropic, _responses, _hooked, _hooked_stream, _fails, _explicit, _left, _wrong_key, _two_keys,
    _key_elsewhere, _not_allowed, _too_much, _broken_body, _loops, _nowhere, _again,
)  # fmt: skip


# ------------------------------------------------------------------------------------ surfaces


async def _logged(made: Service) -> str:
    return made.lines.getvalue()


async def _traced(made: Service) -> str:
    return "\n".join(span.to_json() for span in made.spans.get_finished_spans())


async def _measured(made: Service) -> str:
    return (await asyncio.to_thread(generate_latest, made.registry)).decode()


async def _answered(made: Service) -> str:
    return "\n".join(made.errors)


async def _files(made: Service) -> str:
    """Every file that was written, but for the keys that the operator has made and the answers that are kept."""
    kept = {path for path in made.folder.iterdir() if path.suffix == ".toml" or path.name.startswith("answers.db")}
    return "\n".join(path.read_bytes().decode("latin-1") for path in made.folder.iterdir() if path not in kept)


async def _tables(made: Service) -> str:
    """What the databases have, as SQL: a text that is spread over pages of a file is in one piece here."""
    found = []
    for path in made.folder.glob("*.db"):
        if path.name != "answers.db":
            with contextlib.closing(sqlite3.connect(path)) as database:
                found += list(database.iterdump())
    # Blobs are written as X'…' there.
    return "\n".join([*found, *(bytes.fromhex(blob).decode("latin-1") for blob in _BLOB.findall("".join(found)))])


async def _server(made: Service) -> str:
    return "" if made.dump is None else made.dump()


async def _exported(made: Service) -> str:
    return "\n".join([line.decode() async for line in made.guard.storage.export()])


async def _records(made: Service) -> str:
    return repr(await made.guard.storage.records())


async def _state(made: Service) -> str:
    return repr((made.guard.health(), made.guard.policies, made.guard.identity, made.guard.storage, made.guard))


async def _probes(made: Service) -> str:
    return await _pages(made, ("/ops/healthz", "/ops/readyz", "/healthz", "/readyz"), {})


async def _models(made: Service) -> str:
    return await _pages(made, ("/v1/models",), {"authorization": f"Bearer {made.keys[1]}"})


async def _usage(made: Service) -> str:
    accepts = ("text/html", "application/json")
    key = {"authorization": f"Bearer {made.keys[1]}"}
    return "".join(
        [await _pages(made, ("/usage/", "/usage/api/usage"), {**key, "accept": accept}) for accept in accepts]
    )


async def _administration(made: Service) -> str:
    paths = (
        "/", "/departments", "/sessions", "/refusals", "/limits", "/raises", "/keys", "/health", "/audit", "/agents",
        "/prices", "/knowledge-bases",
    )  # fmt: skip
    return await _pages(made, [f"/admin{path}" for path in paths], {"authorization": f"Bearer {made.token}"})


async def _commands(made: Service) -> str:
    """What the command line prints."""
    printed = []
    for command in (["check"], ["usage"], ["usage", "--by", "user"], ["top"], ["sessions"], ["keys", "list"]):
        for more in ([], ["--json"]):
            config = ["--config", str(made.folder / "guard.toml")]
            result = await asyncio.to_thread(CliRunner().invoke, program, [*command, *config, *more])
            printed.append(f"{result.output}{result.exception!r}")
    return "\n".join(printed)


async def _pages(made: Service, paths: Iterable[str], headers: Mapping[str, str]) -> str:
    found = []
    for path in paths:
        answer = await made.http.get(path, headers=dict(headers))
        found.append(f"{answer.status_code} {answer.headers} {answer.text}")
    return "\n".join(found)


Surface = Callable[[Service], Awaitable[str]]
SURFACES: Final[Mapping[str, Surface]] = {
    "logs": _logged,
    "spans": _traced,
    "metrics": _measured,
    "error bodies and heads": _answered,
    "files": _files,
    "tables": _tables,
    "server": _server,
    "export": _exported,
    "records": _records,
    "state": _state,
    "probes": _probes,
    "models": _models,
    "usage pages": _usage,
    "administration pages": _administration,
    "commands": _commands,
}
"""Everywhere that a secret or a prompt could turn up."""
