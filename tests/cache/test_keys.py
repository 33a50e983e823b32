"""What counts in a key: everything that changes an answer, and nothing else."""

from __future__ import annotations

import json
import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cache.kit import ask_for

from asgi_llm_guard.cache import Cache
from asgi_llm_guard.cache.control import CacheControl, read_control
from asgi_llm_guard.cache.keys import (
    IRRELEVANT,
    STATEFUL,
    CacheRequest,
    Unfit,
    digest_of,
    name_digest,
    partition_digest,
    request_digest,
    value_digest,
)
from asgi_llm_guard.context import Call

NOTHING: frozenset[str] = frozenset()
CALL = Call(provider="openai", model="gpt-4o-mini")


def key(request: CacheRequest, call: Call | None = CALL, ignored: frozenset[str] = NOTHING) -> bytes:
    return request_digest(request, call, ignored)[0]


def ask_with(field: str, value: Any) -> CacheRequest:
    """The request with one more field."""
    fields: dict[str, Any] = {field: value}
    return ask_for(**fields)


SAME = key(ask_for())

CHANGES: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Hi!"}],
    "temperature": 0.1,
    "top_p": 0.5,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "n": 2,
    "seed": 1,
    "stop": ["x"],
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "logit_bias": {"1": 2},
    "system": "Be brief.",
    "user": "end-user",
    "metadata": {"user_id": "1"},
    "service_tier": "flex",
    "stream_options": {"include_usage": True},
    "unknown_to_us": 1,
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_counts(field: str) -> None:
    """C11: whatever a body says, known or not, is in the key; that a field is missing, too."""
    changed = key(ask_for(**{field: CHANGES[field]}))
    assert changed != SAME
    assert changed == key(ask_for(**{field: CHANGES[field]}))
    assert key(ask_with(field, None)) not in {SAME, changed}


@pytest.mark.parametrize("field", sorted(set(IRRELEVANT) - {"stream"}))
def test_hints_for_the_provider_do_not(field: str) -> None:
    """C11: where the provider is to keep what changes no answer."""
    assert key(ask_with(field, "x")) == SAME


@pytest.mark.parametrize("field", STATEFUL)
def test_requests_that_do_more_are_not_looked_up(field: str) -> None:
    """C12: a request that is to change something at the provider has to be made."""
    with pytest.raises(Unfit, match=field):
        key(ask_with(field, "x"))
    assert key(ask_with(field, False)) != SAME


def test_where_it_is_sent_counts() -> None:
    """C11: host with port, path, query, dialect, provider and model are in the key, and the letter case of a host is not."""
    assert key(ask_for(host="API.openai.com")) == SAME
    others = [
        key(ask_for(host="eu.api.openai.com")),
        key(ask_for(host="api.openai.com:8443")),
        key(ask_for(path="/v1/completions")),
        key(ask_for(path="/v1/chat/completions?api-version=2")),
        key(msgspec.structs.replace(ask_for(), dialect="openai")),
        key(ask_for(), msgspec.structs.replace(CALL, provider="azure")),
        key(ask_for(), msgspec.structs.replace(CALL, model="gpt-4o")),
        key(ask_for(), None),
        key(ask_for(stream=True)),
    ]
    assert len({SAME, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("Authorization", True),
        ("anthropic-beta", True),
        ("Anthropic-Version", True),
        ("OpenAI-Organization", True),
        ("x-goog-api-key", True),
        ("x-api-key", True),
        ("api-key", True),
        ("x-portkey-config", True),
        ("cookie", True),
        ("accept", True),
        ("unknown-to-us", True),
        ("host", True),
        ("user-agent", False),
        ("x-stainless-retry-count", False),
        ("traceparent", False),
        ("accept-encoding", False),
        ("idempotency-key", False),
    ],
)
def test_headers_that_change_answers_count(name: str, counts: bool) -> None:
    """C11, T7: versions, beta features and credentials of the provider are in the key; what changes with every
    request is not."""
    assert (key(ask_for(headers=[(name, "1")])) != SAME) == counts
    assert (key(ask_for(headers=[(name, "1")])) != key(ask_for(headers=[(name, "2")]))) == counts


def test_headers_count_in_any_order_and_letter_case() -> None:
    """C11: two requests with the same headers are the same, however they are written; none runs into another."""
    one = key(ask_for(headers=[("X-A", "1"), ("x-b", "2"), ("traceparent", "3")]))
    assert one == key(ask_for(headers=[("x-B", "2"), ("User-Agent", "4"), ("x-a", "1")]))
    assert one != key(ask_for(headers=[("x-a", "1"), ("x-b", "1")]))
    assert one != key(ask_for(headers=[("x-a", "1x-b"), ("", "2")]))
    assert one != key(ask_for(headers=[("x-a", "1"), ("x-a", "1"), ("x-b", "2")]))


def test_a_signature_stands_for_its_account() -> None:
    """C11: requests that AWS signs are told apart by the account, not by the signature."""
    signed = "AWS4-HMAC-SHA256 Credential={}/20261121/eu-west-1/bedrock/aws4_request, Signature={}"
    one, again, other = (
        key(ask_for(headers=[("Authorization", signed.format(*of))])) for of in (("A", 1), ("A", 2), ("B", 1))
    )
    assert one == again != other


def test_the_order_of_fields_is_free_and_of_their_parts_is_not() -> None:
    """C11: clients may order the fields as they like; inside a field the order is the model's to follow."""
    body = json.loads(ask_for(temperature=0).body)
    turned = CacheRequest(
        host="api.openai.com", path="/v1/chat/completions", body=json.dumps(dict(reversed(body.items()))).encode()
    )
    assert key(turned) == key(ask_for(temperature=0))
    spaced = msgspec.structs.replace(turned, body=json.dumps(body, indent=2).encode())
    assert key(spaced) == key(turned)
    schema: dict[str, Any] = {"properties": {"reason": {}, "verdict": {}}}
    other: dict[str, Any] = {"properties": {"verdict": {}, "reason": {}}}
    assert key(ask_for(response_format=schema)) != key(ask_for(response_format=other))


def test_values_are_told_apart_by_their_kind() -> None:
    """C11: numbers, texts, booleans and nothing are different things."""
    values: list[object] = [1, 1.5, "1", True, None, [1], {"a": 1}, [], {}, "", 0, False]
    assert len({key(ask_for(seed=value)) for value in values}) == len(values)


def test_fields_that_an_operator_names_do_not_count() -> None:
    """Fields of `ignore` are left out, and nothing else."""
    ignored = frozenset({"metadata"})
    assert key(ask_for(metadata={"request": "1"}), ignored=ignored) == key(ask_for(), ignored=ignored) == SAME
    assert key(ask_for(user="1"), ignored=ignored) != SAME
    ignored = Cache(ignore=["X-Run-Id"]).ignore
    assert key(ask_for(headers=[("X-Run-ID", "1")]), ignored=ignored) == SAME
    assert key(ask_for(headers=[("x-run", "1")]), ignored=ignored) != SAME


texts = st.text(max_size=4)
parts = st.lists(st.one_of(st.none(), texts), max_size=4)


@given(parts, parts)
def test_no_part_is_taken_for_another(one: list[str | None], other: list[str | None]) -> None:
    """T8: two lists of parts have one digest only if they are the same list."""
    assert (digest_of("k", *one) == digest_of("k", *other)) == (one == other)


bodies = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1, max_size=2),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
        max_leaves=5,
    ),
    max_size=3,
)


@given(bodies, bodies)
def test_two_bodies_have_one_key_only_if_they_say_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """T8: no two requests that differ are found under one key."""
    keys = [key(CacheRequest(host="h", path="/p", body=json.dumps(body).encode())) for body in (one, other)]
    # Fields may come in any order; what is in them may not.
    same = {name: json.dumps(value) for name, value in one.items()} == {
        name: json.dumps(value) for name, value in other.items()
    }
    assert (keys[0] == keys[1]) == same


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"1", b"\xff{}", b'{"a":1,"a":1}', b'{"m":[{"b":1,"b":2}]}', b'{"a":Infinity}'], ids=repr
)
def test_what_is_not_one_json_object_is_not_looked_up(body: bytes) -> None:
    """T8: a body that readers could understand in two ways has no key."""
    with pytest.raises(Unfit, match="body"):
        key(CacheRequest(host="h", path="/p", body=body))


def test_what_is_nested_too_deeply_is_not_looked_up() -> None:
    """T8: a body that is made to exhaust the stack has no key, and does no harm."""
    for body in (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"a":1e999}', b'{"a":' + b"9" * 5_000 + b"}"):
        with pytest.raises(Unfit):
            key(CacheRequest(host="h", path="/p", body=body))


def test_names_and_partitions_are_not_readable() -> None:
    """T7: the store shows neither who asked nor what; ids with halves of characters do no harm."""
    assert "ada" not in name_digest("caller:ada") + partition_digest("caller:ada")
    assert len(name_digest("caller:ada")) == 32
    assert partition_digest("caller:\ud800") != partition_digest("caller:\ud801")
    assert name_digest("\udfff") != name_digest("caller:ada") != partition_digest("caller:ada")


def test_keys_of_values() -> None:
    """Keys that applications give are told apart like bodies; what is no value is refused."""
    values = [1, "1", [1], {"a": 1}, {"a": "1"}, None, 1.5]
    assert len({value_digest("f", value) for value in values}) == len(values)
    assert value_digest("f", 1) != value_digest("g", 1) != value_digest("f", 1, "part")
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    wrong = ((object(), "has a object"), ([lambda: 0], "has a function"), (nested, "too deep"), (1e999, "a number"))
    for value, message in wrong:
        with pytest.raises(Unfit, match=message):
            value_digest("f", value)


@pytest.mark.parametrize(
    "values, control",
    [
        ([], CacheControl()),
        ([""], CacheControl()),
        (["public, max-stale=5, s-maxage=9, only-if-cached"], CacheControl()),
        (["no-store"], CacheControl(store=False, give=False)),
        (["NO-CACHE"], CacheControl(give=False)),
        (["max-age=60"], CacheControl(max_age_s=60)),
        (['max-age="60" , max-age=5'], CacheControl(max_age_s=5)),
        (["max-age=60", "no-cache"], CacheControl(give=False, max_age_s=60)),
        (["max-age=0"], CacheControl(give=False, max_age_s=0)),
        (["max-age=-1"], CacheControl(give=False, max_age_s=0)),
        (["max-age"], CacheControl(give=False, max_age_s=0)),
        (["max-age=²"], CacheControl(give=False, max_age_s=0)),
        (["max-age=99999999999999999999"], CacheControl(give=False, max_age_s=0)),
        (["no-cache", "max-age=60,no-store"], CacheControl(store=False, give=False, max_age_s=60)),
    ],
    ids=repr,
)
def test_requests_may_only_tighten(values: list[str], control: CacheControl) -> None:
    """T8: what asks for less is obeyed, the strictest of all; what asks for more, or is unknown, is passed over."""
    assert read_control(values) == control
