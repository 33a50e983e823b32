"""Values of every kind, for tests that hold for all of them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from asgi_llm_guard.control import Agent, Department, Key, KnowledgeBase, Price, Raise, Stop
from asgi_llm_guard.control.values import Value
from asgi_llm_guard.money import MAX_AMOUNT

names = st.text("abÄß-_./ :'\"\\%?", min_size=1, max_size=6).map(str.strip).filter(bool)
whole = st.integers(0, MAX_AMOUNT)
dollars = st.integers(0, MAX_AMOUNT).map(lambda nano: Decimal(nano).scaleb(-9))
instants = st.integers(1, 2**45)
params = st.dictionaries(
    st.sampled_from(["x_a", "x_b"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53) + 1, 2**53 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | names,
        lambda inside: st.lists(inside, max_size=2) | st.dictionaries(names, inside, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)


def optional(some: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | some


departments = st.builds(
    Department,
    name=names,
    models=optional(
        st.lists(st.sampled_from(["openai/gpt-4o", "anthropic/*", "mistral/small"]), max_size=2, unique=True).map(tuple)
    ),
    daily_tokens=optional(whole),
    monthly_tokens=optional(whole),
    daily_cost=optional(dollars),
    monthly_cost=optional(dollars),
    tz=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]),
)
agents = st.builds(Agent, name=names, max_iterations=optional(whole | st.just("unlimited")), params=params)
keys = st.builds(
    Key,
    id=names,
    prefix=st.just("lg-k1"),
    digest=st.binary(min_size=32, max_size=32).map(lambda data: f"blake2b:{data.hex()}"),
    caller=names,
    user=optional(names),
    departments=st.lists(names, max_size=2).map(tuple),
    agent=optional(names),
    tags=st.lists(names, max_size=2).map(tuple),
    params=params,
    created_ms=instants,
    expires_at_ms=optional(instants),
    revoked_ms=optional(instants),
    replaces=optional(names),
)
prices = st.builds(
    Price,
    model=st.sampled_from(["openai/gpt-4o", "acme/one", "acme/*", "two"]),
    entry=st.fixed_dictionaries({"input": st.integers(0, 100), "output": st.sampled_from(["0.5", 3, "12"])}),
    from_ms=optional(st.integers(1, 1000)),
    until_ms=optional(st.integers(1001, 2000)),
)
knowledge_bases = st.builds(KnowledgeBase, id=names, cache=st.booleans(), acl=names, version=optional(names))
raises = st.builds(
    Raise, id=names, policy=names, unit=st.just("usd"), amount=dollars.filter(bool), until_ms=instants, scope=optional(names),
    subject=optional(names), caller=optional(names), reason=names,
) | st.builds(Raise, id=names, policy=names, unit=st.just("tokens"), amount=st.integers(1, MAX_AMOUNT), until_ms=instants)  # fmt: skip
stops = st.builds(
    Stop,
    id=names,
    scope=st.sampled_from(["caller", "user", "department"]),
    subject=names,
    until_ms=optional(instants),
    reason=names,
) | st.builds(
    Stop, id=names, scope=st.just("session"), subject=names, caller=optional(names), until_ms=optional(instants)
)


def values() -> st.SearchStrategy[Value]:
    """Any value of any kind."""
    return st.one_of(departments, agents, keys, prices, knowledge_bases, raises, stops)
