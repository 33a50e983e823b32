from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.values import ALICE, NOBODY

from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies import CacheDirective, CacheScope

IDS = st.one_of(
    st.none(), st.sampled_from(["public", "anonymous", "user", "kb", "a", "a:b", "user:a"]), st.text(min_size=1)
)


def directive(policy: CacheScope, context: Context = ALICE) -> CacheDirective:
    """What the policy tells the cache; it must say why if it says no."""
    verdict = policy.plan(context, None, 0)
    assert (verdict.claims, verdict.refusal) == ((), None)
    assert verdict.cache is not None
    assert verdict.cache.allowed or (verdict.cache.reason and not verdict.cache.partition)
    return verdict.cache


def with_kb(settings: Mapping[str, Mapping[str, object]] | None, *, public: bool = False) -> CacheScope:
    """A scope in which every request uses the knowledge base `wiki`."""
    return CacheScope(public=public, knowledge_base=lambda context: "wiki", settings=settings)


@given(IDS, IDS, IDS, IDS)
def test_distinct_askers_never_share(
    caller: str | None, user: str | None, caller2: str | None, user2: str | None
) -> None:
    """C11, T5: two askers have one partition exactly if caller and user are the same."""
    policy = CacheScope(public=True)
    one = directive(policy, Context(caller=caller, user=user))
    two = directive(policy, Context(caller=caller2, user=user2))
    assert (one.partition == two.partition) == ((caller, user) == (caller2, user2))


def test_verified_askers_may_share_with_themselves() -> None:
    """C12: without a knowledge base an enabled cache keeps a verified asker's answers."""
    policy = CacheScope(ttl="10m")
    assert directive(policy) == CacheDirective(
        True, "caller:key-1:user:alice", 600, names=("caller:key-1", "user:alice")
    )
    assert policy.plan(ALICE, None, 0) is policy.plan(ALICE, None, 1)


def test_off_is_off() -> None:
    """C12: a cache that is not enabled keeps nothing."""
    assert not directive(CacheScope(enabled=False, public=True)).allowed


def test_unverified_askers() -> None:
    """C12: without a verified asker nothing is kept, unless the scope is public, in a partition of its own."""
    assert not directive(CacheScope(), NOBODY).allowed
    assert directive(CacheScope(public=True), NOBODY).partition == "public"
    assert directive(CacheScope(public=True), ALICE).partition != "public"
    assert directive(CacheScope(), Context(user="alice")).allowed


def test_knowledge_base_with_explicit_settings() -> None:
    """C11, C12: allowed explicitly, an answer is kept under the digest of the access list."""
    first = directive(with_kb({"wiki": {"cache": True, "acl": "d1"}}))
    second = directive(with_kb({"wiki": {"cache": True, "acl": "d2"}}))
    assert first.allowed
    assert first.partition == "caller:key-1:user:alice:kb:wiki:d1"
    assert first.partition != second.partition


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"other": {"cache": True, "acl": "d"}},
        {"wiki": {}},
        {"wiki": {"cache": False, "acl": "d"}},
        {"wiki": {"acl": "d"}},
        {"wiki": {"cache": 1, "acl": "d"}},
        {"wiki": {"cache": "true", "acl": "d"}},
        {"wiki": {"cache": True}},
        {"wiki": {"cache": True, "acl": ""}},
        {"wiki": {"cache": True, "acl": 5}},
        {"wiki": None},
        {"wiki": "cache"},
    ],
    ids=repr,
)
def test_anything_but_explicit_is_not_cached(settings: Mapping[str, Mapping[str, object]] | None) -> None:
    """C12: missing, malformed or incomplete settings mean: not cached."""
    assert not directive(with_kb(settings)).allowed


class Unreadable(dict[str, Mapping[str, object]]):
    """Settings whose store does not answer."""

    def get(self, key: str, default: object = None) -> NoReturn:
        raise ConnectionError("the store is away")


def test_unreadable_settings(caplog: pytest.LogCaptureFixture) -> None:
    """C12: settings that cannot be read mean: not cached; the reason is logged."""
    with caplog.at_level(logging.WARNING):
        assert not directive(with_kb(Unreadable())).allowed
    assert "cannot be read" in caplog.text


def test_unreadable_knowledge_base(caplog: pytest.LogCaptureFixture) -> None:
    """C12: a request whose knowledge base cannot be told is not cached."""

    def fail(context: Context) -> str | None:
        raise KeyError("kb")

    assert not directive(CacheScope(knowledge_base=fail)).allowed
    for wrong in (5, b"wiki", ["wiki"]):
        settings: Any = {wrong if isinstance(wrong, bytes | int) else "wiki": {"cache": True, "acl": "d"}}
        policy = CacheScope(knowledge_base=lambda context, wrong=wrong: wrong, settings=settings)  # type: ignore[misc]
        assert not directive(policy).allowed
    assert "not cached" in caplog.text


def test_request_without_a_knowledge_base() -> None:
    """C12: a request that uses none is cached like any other."""
    policy = CacheScope(knowledge_base=lambda context: None, settings=Unreadable())
    assert directive(policy).partition == "caller:key-1:user:alice"


def test_settings_are_read_each_time() -> None:
    """C12, T6: a setting that is withdrawn holds for the next request."""
    settings: dict[str, dict[str, object]] = {"wiki": {"cache": True, "acl": "d"}}
    policy = with_kb(settings)
    assert directive(policy).allowed
    settings["wiki"]["cache"] = False
    assert not directive(policy).allowed


def test_knowledge_bases_are_never_public() -> None:
    """C12: an answer from a knowledge base is kept for verified askers only."""
    settings = {"wiki": {"cache": True, "acl": "d"}}
    assert not directive(with_kb(settings, public=True), NOBODY).allowed
    assert not directive(with_kb(settings), NOBODY).allowed


def test_shadow_keeps_nothing() -> None:
    """A cache scope in shadow changes no response: nothing is kept."""
    assert directive(CacheScope()).allowed
    assert not directive(CacheScope().shadow()).allowed


async def later(context: Context) -> str:
    return "wiki"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enabled": "yes"}, "cache.enabled"),
        ({"public": 1}, "cache.public"),
        ({"ttl": 0}, "cache.ttl"),
        ({"ttl": "soon"}, "cache.ttl"),
        ({"knowledge_base": "wiki"}, "cache.knowledge_base"),
        ({"knowledge_base": later}, "cache.knowledge_base"),
        ({"settings": [], "knowledge_base": len}, "cache.settings"),
        ({"settings": {}}, "needs knowledge_base"),
        ({"name": ""}, "name"),
    ],
)
def test_malformed_options(options: dict[str, object], message: str) -> None:
    """Every option is checked when the policy is built."""
    with pytest.raises(ConfigurationError, match=message):
        CacheScope(**options)  # type: ignore[arg-type]
