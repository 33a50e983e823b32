"""Caches of others, each for whom it may be shared: LiteLLM's, and those of providers for the beginnings of prompts."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from asgi_llm_guard.admission import Admission, current_admission
from asgi_llm_guard.cache.keys import partition_digest
from asgi_llm_guard.claims import escape
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.plan import ask

__all__ = ["litellm_cache", "scoped_prompt_cache_key"]

_LEAST_SECRET: Final = 16


def litellm_cache(admission: Admission | None = None, call: Call | None = None) -> dict[str, object]:
    """The `cache` argument for a call with LiteLLM, which then keeps its answer for who asks here, and nobody else.

        await litellm.acompletion(model=..., messages=..., cache=litellm_cache())

    It has the namespace of the partition that the `CacheScope` among the policies allows, and its time. Where that allows
    nothing, neither what is kept is used nor the answer kept. What is revoked here is not revoked there: an access list,
    a version of documents or a caller that changes finds nothing; for all else, keep the time short.

    `admission`: the current one, unless another is given. `call`: what is known of the call, for policies that ask.

    Raises:
        ContextError: no admission is open here.
    """
    admission = current_admission() if admission is None else admission
    now_ms = admission.engine.clock.now_ms()
    directive = ask(admission.policies, admission.context, call, now_ms, requests=False).cache
    if directive is None or not directive.allowed:
        return {"no-cache": True, "no-store": True}
    controls: dict[str, object] = {"namespace": partition_digest(directive.partition)}
    if directive.ttl_s is not None:
        controls |= {"ttl": directive.ttl_s, "s-maxage": directive.ttl_s}
    return controls


def scoped_prompt_cache_key(context: Context, secret: str | bytes) -> str:
    """A text that is another one for each caller and user, and from which neither can be told.

    For the provider's cache of beginnings of prompts, so that nobody can tell by the time or the price of an answer what
    others have asked: OpenAI's and Mistral's `prompt_cache_key`, which only says where the provider looks first, and
    vLLM's `cache_salt`, which keeps them apart. Anonymous callers share one.

    `secret`: of your service, the same in all its processes, at least 16 bytes.

    Raises:
        ConfigurationError: the secret is shorter.
    """
    data = secret.encode() if isinstance(secret, str) else secret
    if len(data) < _LEAST_SECRET:
        raise ConfigurationError(f"secret: expected at least {_LEAST_SECRET} bytes, got {len(data)}")
    caller = "anonymous" if context.caller is None else f"caller:{escape(context.caller)}"
    user = "" if context.user is None else f":user:{escape(context.user)}"
    whom = f"{caller}{user}".encode("utf-8", "surrogatepass")
    return hmac.new(data, b"prompt cache\x00" + whom, hashlib.sha256).hexdigest()[:32]
