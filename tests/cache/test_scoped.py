"""What others' caches are told, so that they keep apart whom this one keeps apart."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cache.kit import ADA, BOB

from asgi_llm_guard import CacheScope, Context, Guard
from asgi_llm_guard.cache import litellm_cache, scoped_prompt_cache_key
from asgi_llm_guard.errors import ConfigurationError, ContextError

SECRET = "of this service only"
SETTINGS = {"wiki": {"cache": True, "acl": "d1"}}

ids = st.one_of(st.none(), st.sampled_from(["a", "a:user:b", "b", "anonymous", "caller:a"]), st.text(min_size=1))


def controls(context: Context, scope: CacheScope) -> dict[str, object]:
    """What LiteLLM is told for a call of `context`."""
    guard = Guard([scope])
    with guard.open_sync(context) as admission:
        assert litellm_cache() == litellm_cache(admission)
        return litellm_cache()


def test_litellm_keeps_callers_apart() -> None:
    """T5, C11: each caller and user has a namespace of their own, from which they cannot be read, and the scope's time."""
    scope = CacheScope(ttl="10m")
    of_ada, of_bob = controls(ADA, scope), controls(BOB, scope)
    assert of_ada.keys() == {"namespace", "ttl", "s-maxage"}
    assert (of_ada["ttl"], of_ada["s-maxage"]) == (600, 600)
    assert re.fullmatch("[0-9a-f]{64}", str(of_ada["namespace"]))
    assert of_ada["namespace"] != of_bob["namespace"]
    assert of_ada == controls(ADA, scope)
    assert controls(ADA, CacheScope()).keys() == {"namespace"}


def test_litellm_keeps_knowledge_bases_apart() -> None:
    """T6: a changed access list is another namespace."""

    def namespace(acl: str) -> object:
        settings = {"wiki": {"cache": True, "acl": acl}}
        return controls(ADA, CacheScope(knowledge_base=lambda context: "wiki", settings=settings))["namespace"]

    assert namespace("d1") == namespace("d1") != namespace("d2")


@pytest.mark.parametrize(
    "scope", [CacheScope(enabled=False), CacheScope(knowledge_base=lambda context: "wiki"), CacheScope().shadow()]
)
def test_litellm_keeps_nothing_that_is_not_allowed(scope: CacheScope) -> None:
    """C12: where nothing may be kept, LiteLLM neither gives nor keeps."""
    nothing = {"no-cache": True, "no-store": True}
    assert controls(ADA, scope) == nothing
    assert controls(Context(), CacheScope()) == nothing
    with Guard([]).open_sync(ADA):
        assert litellm_cache() == nothing
    with pytest.raises(ContextError):
        litellm_cache()


@given(ids, ids, ids, ids)
def test_prompt_caches_are_scoped(one: str | None, two: str | None, three: str | None, four: str | None) -> None:
    """T7: two askers have one prompt cache key exactly if caller and user are the same."""
    first, second = Context(caller=one, user=two), Context(caller=three, user=four)
    keys = {scoped_prompt_cache_key(context, SECRET) for context in (first, second)}
    assert (len(keys) == 1) == ((one, two) == (three, four))
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_prompt_cache_keys_need_a_secret() -> None:
    """T7: without the secret nobody can tell whose key it is."""
    assert scoped_prompt_cache_key(ADA, SECRET) == scoped_prompt_cache_key(ADA, SECRET.encode())
    assert scoped_prompt_cache_key(ADA, SECRET) != scoped_prompt_cache_key(ADA, SECRET + "!")
    with pytest.raises(ConfigurationError, match="16 bytes, got 5"):
        scoped_prompt_cache_key(ADA, "short")
