"""What may be administered: the same as what may be configured, and nothing that could be a mistake."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.control.strategies import values

from asgi_llm_guard.control import Department, Key, NewerRelease
from asgi_llm_guard.control.data import TYPES, kind_of, read, shown, written
from asgi_llm_guard.control.numbers import check_sizes, told
from asgi_llm_guard.control.state import ControlState, Head, decode, encode, made
from asgi_llm_guard.control.values import KINDS, Kind, Value, name_of
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import ApiKeys

DIGEST = ApiKeys.hash("lg-k1-0123456789abcdef", "s" * 16)
BAD_NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    "-1",
    True,
    False,
    1e300,
    10**400,
    "1e400",
    "NaN",
    "infinity",
    None,
    [],
    {},
]
LIMITS: list[tuple[Kind, dict[str, Any], str]] = [
    ("department", {}, "daily_tokens"),
    ("department", {}, "monthly_tokens"),
    ("department", {}, "daily_cost"),
    ("department", {}, "monthly_cost"),
    ("agent", {}, "max_iterations"),
    ("raise", {"policy": "quota", "unit": "usd", "until_ms": 1}, "amount"),
    ("raise", {"policy": "quota", "unit": "tokens", "until_ms": 1}, "amount"),
    ("raise", {"policy": "quota", "unit": "usd", "amount": 1}, "until_ms"),
    ("stop", {"scope": "user", "subject": "mia"}, "until_ms"),
    ("price", {"entry": {"input": 1, "output": 1}}, "from_ms"),
    ("price", {"entry": {"input": 1, "output": 1}}, "until_ms"),
]


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=lambda bad: repr(bad)[:12])
@pytest.mark.parametrize(
    "kind, rest, field", LIMITS, ids=[f"{kind}-{number}" for number, (kind, *_) in enumerate(LIMITS)]
)
def test_no_limit_is_no_number(kind: Kind, rest: dict[str, Any], field: str, bad: object) -> None:
    """T13: NaN, infinity, negatives, booleans, what is absurdly large and `null` are no limits; the field is named."""
    with pytest.raises(ConfigurationError, match=field):
        read(kind, "x", {**rest, field: bad})


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, made in TYPES.items() for field in made.__struct_fields__], ids=str
)
@pytest.mark.parametrize("huge", [10**5_000, -(10**5_000)], ids=["huge", "minus huge"])
def test_numbers_that_cannot_be_shown_are_named(kind: Kind, field: str, huge: int) -> None:
    """T13: a number of more digits than Python writes is refused as any other one that is too large, with its field, where
    it stands by itself and where it stands in something else."""
    rest: dict[Kind, dict[str, Any]] = {
        "key": {"prefix": "lg-k1", "digest": DIGEST, "caller": "c"},
        "price": {"entry": {"input": 1, "output": 1}},
        "raise": {"policy": "quota", "unit": "usd", "amount": 1, "until_ms": 1},
        "stop": {"scope": "user", "subject": "mia"},
    }
    for bad in (huge, [huge], {"x_a": huge}, {"x_a": [{"deep": huge}]}):
        with pytest.raises(ConfigurationError, match=rf"{kind} 'x': {field}.*2\^53 - 1, got one of 16,610 bits"):
            read(kind, "x", {**rest.get(kind, {}), field: bad})


def test_values_of_code_may_not_be_huge_either() -> None:
    """T13: a value that code makes names the field, too."""
    with pytest.raises(ConfigurationError, match=r"department 'x': daily_tokens: .* 16,610 bits"):
        Department(name="x", daily_tokens=10**5_000)
    with pytest.raises(ConfigurationError, match="a number of 16,610 bits"):
        Department(name=10**5_000)  # type: ignore[arg-type]  # the point
    assert told([10**5_000]) == "a list"
    assert told("x" * 300) == "'" + "x" * 199 + "…"
    check_sizes([[[[[[[[[[[[[[[[[[10**5_000]]]]]]]]]]]]]]]]]], "too deep to be looked into")


@pytest.mark.parametrize("kind", ["raise", "stop"])
@pytest.mark.parametrize("bad", [5, math.inf, [], True], ids=repr)
def test_reasons_are_texts(kind: Kind, bad: object) -> None:
    """S6: a reason that is no text is refused; infinity would be kept as nothing, which nobody could read again."""
    rest = {"policy": "quota", "unit": "usd", "amount": 1, "until_ms": 1} if kind == "raise" else {"scope": "all"}
    with pytest.raises(ConfigurationError, match="reason: expected a text"):
        read(kind, "x", {**rest, "reason": bad}, ours=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, True, 1e300, "NaN", None, []], ids=repr)
def test_no_price_is_no_number(bad: object) -> None:
    """T13: nor are they prices."""
    with pytest.raises(ConfigurationError, match="'openai/gpt-4o': input"):
        read("price", "openai/gpt-4o", {"entry": {"input": bad, "output": 1}})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2**53, pytest.param(object(), id="object")], ids=str)
@pytest.mark.parametrize("kind", ["agent", "key"])
def test_params_come_back_as_they_are(kind: Kind, bad: object) -> None:
    """T13: what JSON cannot carry without a loss is refused in the limits of agents and keys, however deep."""
    rest = {"prefix": "lg-k1", "digest": DIGEST, "caller": "c"} if kind == "key" else {}
    with pytest.raises(ConfigurationError, match="x_a"):
        read(kind, "x", {**rest, "params": {"x_a": {"b": [bad]}}})


@pytest.mark.parametrize(
    "kind, data, message",
    [
        ("department", {"models": "openai/*"}, "models: expected a list of texts"),
        ("department", {"tz": "Mars/Base"}, "department 'x': .*Mars/Base"),
        ("department", {"color": "red"}, "unknown field 'color'; expected models, daily_tokens"),
        ("department", {"name": "y"}, "department 'x': name says 'y'"),
        ("department", {"models": ["a"] * 1_001}, "at most 1000"),
        ("agent", {"params": {"x_a": [[[[[[[[[1]]]]]]]]]}}, "nested more than 8 deep"),
        ("agent", {"params": {"x_a": {5: 1}}}, "expected texts as names"),
        ("price", {"entry": [1]}, "entry: expected rates"),
        ("key", {"prefix": "lg 1", "digest": DIGEST, "caller": "c"}, "prefix"),
        ("department", ["daily_cost"], "expected its fields, got a list"),
        ("agent", {"params": {"tier": 1}}, "names of your own begin with x_"),
        ("agent", {"max_iterations": 2.5}, "max_iterations"),
        ("price", {}, "price 'x': entry missing"),
        ("price", {"entry": {"input": 1, "output": 1}, "from_ms": 5, "until_ms": 5}, "until_ms must be after from_ms"),
        ("price", {"entry": {"colour": 1}}, "not a price"),
        ("knowledge_base", {"cache": True}, "acl is missing"),
        ("knowledge_base", {"cache": 1}, "cache: expected true or false"),
        ("knowledge_base", {"acl": "a\nb"}, "control characters"),
        ("raise", {"policy": "quota", "unit": "usd", "amount": 0, "until_ms": 1}, "amount must be above 0"),
        ("stop", {"scope": "planet", "subject": "x"}, "scope must be one of"),
        ("key", {"prefix": "lg", "digest": "my key", "caller": "c"}, "never the key itself"),
    ],
)  # fmt: skip
def test_mistakes_are_named(kind: Kind, data: Any, message: str) -> None:
    """S5: a mistake is refused with the entry, the field and what is allowed."""
    with pytest.raises(ConfigurationError, match=message):
        read(kind, "x", data)


@pytest.mark.parametrize("name", [" mia", "mia ", "mia\u200b", "mia\n", "\u202emia"], ids=ascii)
@pytest.mark.parametrize(
    "kind, data, field",
    [
        ("stop", {"scope": "user"}, "subject"),
        ("stop", {"scope": "model"}, "subject"),
        ("stop", {"scope": "session", "subject": "s1"}, "caller"),
        ("raise", {"policy": "quota", "unit": "usd", "amount": 1, "until_ms": 1}, "subject"),
        ("raise", {"unit": "usd", "amount": 1, "until_ms": 1}, "policy"),
    ],
)
def test_nobody_is_stopped_in_vain(kind: Kind, data: dict[str, Any], field: str, name: str) -> None:
    """S8: a stop, or a raise, that could be of nobody is refused: what was typed is not what is called so."""
    with pytest.raises(ConfigurationError, match=f"{kind} 'x': {field}: expected a name without spaces"):
        read(kind, "x", {**data, field: name}, ours=False)
    assert kind_of(read(kind, "x", {**data, field: name})) == kind  # what was kept before goes on being read


def test_half_a_character() -> None:
    """What no JSON can carry is refused where it is said, whether it is a name or a value."""
    for params in {"x_a": "\ud800"}, {"x_a": {"\ud800": 1}}, {"x_a": ["\ud800"]}:
        with pytest.raises(ConfigurationError, match="half of a character"):
            read("agent", "x", {"params": params})


def test_documents_that_are_none() -> None:
    """Whatever was published in the place of a document is refused as such."""
    deep = b'{"format":1,"entries":{"agent":{"w":[1,{"params":' + b'{"x_a":' * 5_000 + b"1" + b"}" * 5_000 + b"}]}}}"
    for data in b"", b"\xff", b"[]", b'{"format":1e400}', b'{"format":1,"version":' + b"9" * 5_000 + b"}", deep:
        with pytest.raises(ConfigurationError, match="what was published"):
            decode(data)


@pytest.mark.parametrize("name", ["", " x", "x ", "a\nb", "a\r\nX: y", "\u202eevil", "n" * 257, None, 5])
def test_names_are_plain(name: Any) -> None:
    """A name is text that can be shown, in a line of a log as well as in an address."""
    with pytest.raises(ConfigurationError):
        read("agent", name, {})


def test_a_key_cannot_be_written_by_others() -> None:
    """T25: digest, beginning and age of a key are nobody's to say, and a key in a wrong field is not in the message."""
    for field in ("digest", "prefix", "created_ms", "revoked_ms", "replaces", "key"):
        with pytest.raises(ConfigurationError, match="unknown field") as caught:
            read("key", "k1", {"caller": "c", field: "canary-key"}, ours=False)
        assert "canary-key" not in str(caught.value)


def test_a_key_is_shown_without_its_digest() -> None:
    """T25: neither for people nor in a log is the digest of a key shown."""
    key = Key(id="k1", prefix="lg-k1", digest=DIGEST, caller="svc")
    assert "digest" not in shown(key)
    assert DIGEST not in repr(key)
    assert DIGEST not in str(shown(key))


def test_kinds_are_complete() -> None:
    """Every kind has a type, and every type a kind."""
    assert tuple(TYPES) == KINDS
    assert set(TYPES.values()) == set(get_args(Value))


@given(values())
def test_values_come_back(value: Value) -> None:
    """What is written of a value is read as the same value."""
    kind = kind_of(value)
    assert read(kind, name_of(value), written(value)) == value


@given(st.lists(values(), max_size=8), st.integers(1, 2**50))
def test_a_state_comes_back(some: list[Value], version: int) -> None:
    """A published state is read as the same state."""
    entries = {(kind_of(value), name_of(value)): value for value in some}
    state = made(version, Head(3, "ab"), iter([(kind, value, version) for (kind, _), value in entries.items()]))
    assert decode(encode(state)) == state
    assert encode(decode(encode(state))) == encode(state)


@pytest.mark.parametrize(
    "document",
    [
        b'{"format": 2, "version": 5}',
        b'{"format": 1, "version": 5, "entries": {"moon": {"x": [1, {}]}}}',
        b'{"format": 1, "version": 5, "entries": {"agent": {"x": [1, {"mood": "good"}]}}}',
    ],
)
def test_what_a_newer_release_wrote_is_refused_whole(document: bytes) -> None:
    """A format, a kind or a field that is not known: nothing of it is taken."""
    with pytest.raises(NewerRelease):
        decode(document)


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"format": "1"}', b"\xff"])
def test_what_is_no_state_is_refused(document: bytes) -> None:
    """Bytes that are no state are an error that says so."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        decode(document)


def test_versions_of_documents_may_be_numbers() -> None:
    """The version of a knowledge base is kept as text, however it was given."""
    assert read("knowledge_base", "x", {"version": 7}) == read("knowledge_base", "x", {"version": "7"})
    with pytest.raises(ConfigurationError, match="version"):
        read("knowledge_base", "x", {"version": True})


def test_an_empty_state_has_nothing() -> None:
    """A new database has no entries."""
    assert list(ControlState(version=1)) == []
    assert Department(name="x").quota["daily_cost"] is None
