"""`serve`: the gateway that the settings describe, in uvicorn."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.common import CONFIG_VARIABLE, Tool, command_options
from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.cli.files import EVERY
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.gateway import Gateway
    from asgi_llm_guard.settings import GuardSettings

__all__ = ["Served", "application", "serve"]

_GRACE_S: Final = 30
_FACTORY: Final = "asgi_llm_guard.cli.serve:application"
_EXPOSE: Final = "ASGI_LLM_GUARD_SERVE_EXPOSE"
_TELEMETRY: Final = "ASGI_LLM_GUARD_SERVE_TELEMETRY"
"""How the processes of several workers are told."""
_USAGE: Final = "/usage"
_PROBES: Final = frozenset({"/healthz", "/readyz"})


@click.command()
@command_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: everywhere.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True)
@click.option("--workers", type=click.IntRange(1, 256), envvar="WEB_CONCURRENCY", default=1, show_default=True)
@click.option("--expose", is_flag=True, help="Tell clients in headers which deployment has answered.")
@click.option("--telemetry", is_flag=True, help="Make spans and metrics: run it under opentelemetry-instrument.")
@click.option(
    "--grace",
    type=click.IntRange(0, 3_600),
    default=_GRACE_S,
    show_default=True,
    help="Seconds for open answers when it ends.",
)
@click.option("--log-level", type=click.Choice(["critical", "error", "warning", "info", "debug"]), default="info")
def serve(
    tool: Tool, host: str, port: int, workers: int, grace: int, log_level: str, *, expose: bool, telemetry: bool
) -> None:
    """Run the gateway that the settings describe: [gateway] with its deployments, under [[policies]].

    It speaks the dialects of /v1/chat/completions, /v1/responses, /v1/embeddings and /v1/messages, lists its models,
    and answers /healthz and /readyz. With [identity], callers see what is left for them at /usage; with [admin], the
    pages of those who run it are under its path. The settings file is followed while it runs. SIGTERM lets open answers
    end, settles the rest, and exits.

    Exit codes: 0 ended in good order; 3 the configuration is not valid.
    """
    try:
        import uvicorn
    except ImportError:
        raise Failure("serve needs uvicorn: pip install uvicorn", Exit.CONFIGURATION) from None
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s: %(name)s: %(message)s")
    settings = tool.settings()
    if settings.gateway is None:
        raise ConfigurationError(f"{tool.path}: gateway: is missing; serve runs a gateway, see docs/gateway.md")
    if workers > 1 and settings.storage.get_secret_value() == "memory://":
        raise ConfigurationError(
            f"{tool.path}: storage: memory:// is one process's own, and {workers} workers are asked for; "
            "use sqlite:///guard.db, or redis://"
        )
    os.environ[CONFIG_VARIABLE] = str(tool.path.resolve())
    os.environ[_EXPOSE] = "1" if expose else ""
    os.environ[_TELEMETRY] = "1" if telemetry else ""
    app: Any = _FACTORY
    if workers == 1:
        app = application()  # whatever is wrong with it is said here, in a line
    else:
        _validate(tool, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        # The server ends in good order, and sends itself the signal again: that is no failure.
        signal.signal(number, lambda _number, _frame: None)
    uvicorn.run(
        app,
        factory=workers > 1,
        host=host,
        port=port,
        workers=workers,
        log_level=log_level,
        timeout_graceful_shutdown=grace,
        proxy_headers=False,  # whose addresses are believed is the identity's matter
        server_header=False,
        lifespan="on",
    )


def application() -> Served:
    """The application of one process, as the environment names its settings.

    Raises:
        ConfigurationError: the settings are wrong, or describe no deployment that can be used.
    """
    from asgi_llm_guard.gateway import Gateway
    from asgi_llm_guard.settings.build import build_admin_options, build_gateway_arguments
    from asgi_llm_guard.settings.names import check_alerts
    from asgi_llm_guard.settings.reload import watch

    tool = Tool(os.environ[CONFIG_VARIABLE], as_json=False)
    settings = tool.settings()
    check_alerts(settings)
    guard = tool.guard(settings, needs=EVERY, makes=EVERY)
    arguments = build_gateway_arguments(settings)
    try:
        gateway = Gateway(guard, **arguments)
    except ConfigurationError as error:
        raise ConfigurationError(f"{tool.path}: gateway: {error}") from None
    served = Served(gateway, expose=bool(os.environ.get(_EXPOSE)))
    if settings.admin is not None:
        served.mount(settings.admin.path, guard.admin_app(build_admin_options(settings)))
    if settings.identity is not None:
        served.mount(_USAGE, guard.usage_app())
    watch(guard, settings, gateway=gateway, check=check_alerts)
    if os.environ.get(_TELEMETRY):
        from asgi_llm_guard.telemetry import instrument

        instrument(guard)
    return served


def _validate(tool: Tool, settings: GuardSettings) -> None:
    """Say here what `application` would say in each worker: one that does not start is started again for ever."""
    from asgi_llm_guard.gateway.entries import parse_deployments
    from asgi_llm_guard.settings import build_gateway_arguments
    from asgi_llm_guard.settings.build import build_admin_options
    from asgi_llm_guard.settings.names import check_alerts

    check_alerts(settings)
    tool.check("storage", settings, new=True)
    tool.guard(settings, needs=("ledger", "control"), makes=EVERY)  # counts in memory: the workers' storage is theirs
    if settings.admin is not None:
        build_admin_options(settings)
    parse_deployments(build_gateway_arguments(settings)["deployments"])


class Served:
    """The gateway's application, the probes of its guard, and what is mounted beside it. The guard ends with the server."""

    def __init__(self, gateway: Gateway, *, expose: bool) -> None:
        self._gateway = gateway.app(expose=expose)
        self._guard = gateway.guard
        self._health = gateway.guard.health_app()
        self._mounted: list[tuple[str, Any]] = []

    def mount(self, path: str, app: Any) -> None:
        """Have `app` answer below `path`."""
        self._mounted.append((path, app))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._gateway(scope, receive, self._closing(send))
            return
        path = scope["path"]
        if scope["type"] == "http" and path in _PROBES:
            await self._health(scope, receive, send)
            return
        for prefix, app in self._mounted:
            if path == prefix or path.startswith(f"{prefix}/"):
                inside = dict(scope) | {"root_path": scope.get("root_path", "") + prefix}
                await app(inside, receive, send)
                return
        await self._gateway(scope, receive, send)

    def _closing(self, send: Any) -> Any:
        """Close the guard before the server is told that it may end: it waits for nothing after that."""

        async def closing(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                await self._guard.aclose()
            await send(message)

        return closing
