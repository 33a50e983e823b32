"""A client hook: which of a client's requests are guarded, under which admission, and how a refusal is told."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, Literal, TypedDict, Unpack

from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.cache import scoped_prompt_cache_key
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.exchange import Exchange, Outgoing
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.outcomes import REFUSAL_HEADER
from asgi_llm_guard.scope import current_scope
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire import dialect_for
from asgi_llm_guard.wire.fields import rate_limit_headers
from asgi_llm_guard.wire.refusals import Rendered, render
from asgi_llm_guard.wire.surfaces import Surface, surface_of

__all__ = ["Hook", "HookOptions"]

_NOBODY: Final = Refusal(
    policy="guard",
    code="invalid_request",
    message=(
        "no admission of this guard is open where this client is used: add GuardMiddleware to the application, wrap "
        "the job in `async with guard.open(Context(caller=...))`, or give the client a context: "
        "guard.httpx_client(context=Context(caller=...))"
    ),
)


class HookOptions(TypedDict, total=False):
    """What may be said of every hook."""

    context: Context | Callable[[], Context] | None
    """Who asks where no admission of the guard is open: a context, or what gives one for each request. `None`: such
    requests are refused."""
    hosts: Collection[str] | None
    """The only hosts that requests may go to, whatever is asked of them; `None`: all."""
    clamp: bool
    """Where only the output bound of a request does not fit, send it with one that does. Off."""
    include_usage: bool
    """Ask streams to tell what they used; clients that did not ask for it do not see it. On."""
    assumed_output_tokens: int | None
    """The output of a request without a limit of its own; `None`: the guard's."""
    streams: StreamRules | None
    """How long streamed answers may last, and whether they are cut; `None`: as the guard says."""
    unmeterable: Literal["deny", "pass"]
    """What happens to requests that start billed work whose cost no answer tells (batches, realtime, videos, …):
    `deny`, unless they may `pass` unseen."""
    unknown: Literal["deny", "pass"]
    """What happens to requests that are no known operation of a known provider: they `pass` unseen."""
    prompt_cache_secret: str | bytes | None
    """Make the provider's cache of beginnings of prompts another one for each caller and user: with this secret of
    at least 16 bytes, see `cache.scoped_prompt_cache_key`. `None`: it is left as it is."""
    prompt_cache_field: Literal["prompt_cache_key", "cache_salt"]
    """Where that is put: `prompt_cache_key` for OpenAI and Mistral, `cache_salt` for vLLM."""


class Hook:
    """How the requests of one client are guarded.

    Args:
        guard: decides, and settles.
        caches: the hook gives what is kept (`Exchange.kept`) in place of sending.
        options: see `HookOptions`.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(self, guard: Guard, *, caches: bool = False, **options: Unpack[HookOptions]) -> None:
        unexpected = ", ".join(sorted(options.keys() - HookOptions.__annotations__.keys()))
        if unexpected:
            raise TypeError(f"no such option: {unexpected}")
        context, hosts = options.get("context"), options.get("hosts")
        unmeterable, unknown = options.get("unmeterable", "deny"), options.get("unknown", "pass")
        field, secret = options.get("prompt_cache_field", "prompt_cache_key"), options.get("prompt_cache_secret")
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard: expected a Guard, got {guard!r}")
        if context is not None and not isinstance(context, Context) and not callable(context):
            raise ConfigurationError(
                f"context: expected a Context, a function that gives one, or None, got {context!r}"
            )
        if isinstance(hosts, str):
            raise ConfigurationError(f"hosts: expected a list such as ['api.openai.com'], got {hosts!r}")
        for name, value in (("unmeterable", unmeterable), ("unknown", unknown)):
            if value not in ("deny", "pass"):
                raise ConfigurationError(f"{name}: expected 'deny' or 'pass', got {value!r}")
        if field not in ("prompt_cache_key", "cache_salt"):
            raise ConfigurationError(f"prompt_cache_field: expected 'prompt_cache_key' or 'cache_salt', got {field!r}")
        if secret is not None:
            scoped_prompt_cache_key(Context(), secret)
        self.guard = guard
        self.cache = guard.cache if caches else None
        self.clamp = options.get("clamp", False)
        self.include_usage = options.get("include_usage", True)
        self.assumed_output_tokens = options.get("assumed_output_tokens")
        self._streams = options.get("streams")
        self._prompt_cache = (field, secret)
        self._unmeterable = unmeterable
        self._unknown = unknown
        self._context = context
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        guard.hooked = True

    @property
    def streams(self) -> StreamRules:
        """What holds for streamed answers."""
        return self._streams or self.guard.streams

    def begin(self, outgoing: Outgoing) -> Exchange | Denied | None:
        """What becomes of a request: `None`, it is not billed and passes; a refusal; or an exchange to be driven."""
        host = outgoing.host.lower()
        if self._hosts is not None and host not in self._hosts:
            message = f"the host {host[:128]!r} is not among those that this client may call"
            return self._refused(Refusal(policy="hosts", code="route_not_listed", message=message))
        surface = surface_of(outgoing.method, host, outgoing.path)
        dialect = surface.dialect
        if dialect is None:
            return self._not_metered(surface)
        scope = current_scope()
        admission = scope.admission if isinstance(scope, ActiveCall) else scope
        if admission is not None and scope is not None and admission.engine is self.guard.engine:
            return Exchange(self, outgoing, dialect, admission, scope)
        if self._context is None:
            return self._refused(_NOBODY)
        if self.guard.draining:
            return self._refused(DRAINING)
        context = self._context if isinstance(self._context, Context) else self._context()
        return Exchange(self, outgoing, dialect, self.guard.new_admission(context), None)

    def _not_metered(self, surface: Surface) -> Denied | None:
        if surface.kind == "unmeterable" and self._unmeterable == "deny":
            message = (
                f"{surface.name} of {surface.provider} is billed, and no answer to it tells what it cost; "
                "a client made with unmeterable='pass' may use it, unseen"
            )
        elif surface.kind == "unknown" and self._unknown == "deny":
            message = "this is no known operation of a known provider, and this client was made with unknown='deny'"
        else:
            return None
        return self._refused(Refusal(policy="surface", code="feature_not_allowed", message=message))

    def prompt_cache(self, context: Context) -> dict[str, str]:
        """The field that keeps the provider's cache of beginnings of prompts apart, if it is wanted."""
        field, secret = self._prompt_cache
        return {} if secret is None else {field: scoped_prompt_cache_key(context, secret)}

    def rendered(self, denied: Denied, outgoing: Outgoing) -> Rendered:
        """The answer that tells of a refusal, in the words of the API that was called."""
        dialect = dialect_for(outgoing.path, outgoing.host.lower())
        fields = rate_limit_headers(denied.receipts, denied.now_ms, disclose=self.guard.engine.disclose)
        scope = current_scope()
        if scope is not None:
            admission = scope.admission if isinstance(scope, ActiveCall) else scope
            fields.append((REFUSAL_HEADER.encode("ascii"), admission.refusal_token(denied).encode("ascii")))
        return render(
            denied,
            dialect=None if dialect is None else dialect.name,
            accept=outgoing.header(b"accept") or None,
            fields=fields,
        )

    def _refused(self, refusal: Refusal) -> Denied:
        return self.guard.engine.refused(Context(), None, refusal)
