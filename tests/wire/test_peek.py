"""The look into a request body: what is refused, what is read, and what it may cost."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.wire.openai_chat import OpenAIChat
from asgi_llm_guard.wire.peek import MAX_KEYS, BodyError, body_too_large, check_encoding, read_body

FIXTURES = Path(__file__).parent / "fixtures" / "openai"
GOOD = b'{"model":"m","max_tokens":5}'

HOSTILE: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "white space only": (b" \n ", None),
    "not JSON": (b"model=m", None),
    "a list": (b'[{"model":"m"}]', None),
    "a text": (b'"model"', None),
    "null": (b"null", None),
    "cut off": (b'{"model":"m"', None),
    "trailing data": (b'{"model":"m"}{"model":"x"}', None),
    "trailing NUL": (b'{"model":"m"}\0', None),
    "trailing comma": (b'{"model":"m",}', None),
    "comment": (b'{"model":"m"/* cheap */}', None),
    "single quotes": (b"{'model':'m'}", None),
    "bare keys": (b'{model:"m"}', None),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, None),
    "UTF-16 with mark": (GOOD.decode().encode("utf-16"), None),
    "UTF-16 without mark": (GOOD.decode().encode("utf-16-be"), None),
    "UTF-32": (GOOD.decode().encode("utf-32"), None),
    "Latin-1 in a value nobody reads": ('{"model":"m","x":"é"}'.encode("latin-1"), None),
    "overlong UTF-8": (b'{"model":"m","x":"\xc0\xaf"}', None),
    "surrogate in UTF-8": (b'{"model":"\xed\xa0\x80"}', None),
    "lone high surrogate": (b'{"model":"\\ud83d....."}', None),
    "lone low surrogate in a value nobody reads": (b'{"model":"m","x":["\\ude00....."]}', None),
    "raw newline in a text": (b'{"model":"m\n"}', None),
    "NaN": (b'{"model":"m","temperature":NaN}', None),
    "Infinity": (b'{"model":"m","max_tokens":Infinity}', None),
    "deep lists": (b'{"model":"m","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
    "deep objects": (b'{"model":"m","x":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", None),
    "deep and never closed": (b'{"model":' + b"[" * 200_000, None),
    "flood of keys": (b"{" + b",".join(b'"%d":0' % key for key in range(100_000)) + b"}", None),
    "model twice": (b'{"model":"cheap","messages":[],"model":"dear"}', "model"),
    "model twice, once escaped": (b'{"model":"cheap","mo\\u0064el":"dear"}', "model"),
    "model twice, same value": (b'{"model":"m", "model":"m"}', "model"),
    "max_tokens twice": (b'{"model":"m","max_tokens":1,"max_tokens":100000}', "max_tokens"),
    "messages twice": (b'{"model":"m","messages":[],"messages":[1]}', "messages"),
    "any key twice": (b'{"model":"m","seed":1,"seed":2}', None),
    "the shortest member twice": (b'{"n":1,"n":1}', "n"),
    "metadata twice": (b'{"model":"m","metadata":{},"metadata":{"session_id":"s"}}', "metadata"),
    "key in another case": (b'{"model":"m","MAX_TOKENS":100000}', "max_tokens"),
    "key with a Kelvin sign": ('{"model":"m","max_to\u212aens":100000}'.encode(), "max_tokens"),
    "key with a long s": ('{"model":"m","\u017ftream":true}'.encode(), "stream"),
    "stream_options with a key twice": (
        b'{"model":"m","stream_options":{"include_usage":false,"include_usage":true}}',
        "stream_options",
    ),
    "stream_options a list": (b'{"model":"m","stream_options":[]}', "stream_options"),
    "include_usage a text": (b'{"model":"m","stream_options":{"include_usage":"yes"}}', "stream_options.include_usage"),
    "no model": (b'{"messages":[]}', "model"),
    "model null": (b'{"model":null}', "model"),
    "model empty": (b'{"model":""}', "model"),
    "model a number": (b'{"model":7}', "model"),
    "model a list": (b'{"model":["cheap","dear"]}', "model"),
    "model with a line break": (b'{"model":"m\\r\\nx-admin: 1"}', "model"),
    "model too long": (b'{"model":"' + b"m" * 257 + b'"}', "model"),
    "max_tokens negative": (b'{"model":"m","max_tokens":-1}', "max_tokens"),
    "max_tokens true": (b'{"model":"m","max_tokens":true}', "max_tokens"),
    "max_tokens a text": (b'{"model":"m","max_tokens":"5"}', "max_tokens"),
    "max_tokens a fraction": (b'{"model":"m","max_tokens":5.5}', "max_tokens"),
    "max_tokens huge": (b'{"model":"m","max_tokens":2147483648}', "max_tokens"),
    "max_tokens 1e999": (b'{"model":"m","max_tokens":1e999}', "max_tokens"),
    "max_tokens of 30 digits": (b'{"model":"m","max_tokens":' + b"9" * 30 + b"}", "max_tokens"),
    "max_tokens of 400 digits": (b'{"model":"m","max_tokens":' + b"9" * 400 + b"}", "max_tokens"),
    "max_tokens of 5000 digits": (b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}", "max_tokens"),
    "max_tokens an object": (b'{"model":"m","max_tokens":{}}', "max_tokens"),
    "max_completion_tokens negative": (b'{"model":"m","max_completion_tokens":-5}', "max_completion_tokens"),
    "n zero": (b'{"model":"m","n":0}', "n"),
    "n negative": (b'{"model":"m","n":-1}', "n"),
    "n true": (b'{"model":"m","n":true}', "n"),
    "n huge": (b'{"model":"m","n":1000000000}', "n"),
    "stream a number": (b'{"model":"m","stream":1}', "stream"),
    "stream a text": (b'{"model":"m","stream":"true"}', "stream"),
}


@pytest.mark.parametrize(("body", "field"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bodies_are_refused(body: bytes, field: str | None) -> None:
    """T17: a body that could be read in two ways, or bounds nothing, is a 400 that names the field."""
    with pytest.raises(BodyError) as refused:
        OpenAIChat().read_request(read_body(body))
    assert (refused.value.status, refused.value.code, refused.value.field) == (400, "invalid_request", field)
    assert (field or "body").rpartition(".")[2] in refused.value.message


def test_message_repeats_nothing_of_the_body() -> None:
    """T16: what a client wrote never reaches logs or answers through an error's message."""
    for body in (
        b'{"model":"m","se\\r\\ncret":1,"se\\r\\ncret":2}',
        b'{"model":"secret\\n"}',
        b'{"model":"m","max_tokens":"secret"}',
        b'{"model":"m","stream_options":{"secret":1,"secret":1}}',
        b'secret {"model":"m"}',
    ):
        with pytest.raises(BodyError) as refused:
            OpenAIChat().read_request(read_body(body))
        assert "secret" not in str(refused.value)
        assert str(refused.value).isprintable()


def test_good_body_is_read() -> None:
    """Texts, numbers and booleans are found at their path, also inside objects; what is absent or null is `None`."""
    view = read_body((FIXTURES / "request.json").read_bytes())
    assert view.get("metadata.session_id") == "trip-81"
    assert view.get("max_completion_tokens") == 640
    assert view.get("stream") is True
    assert view.get("user") is None
    assert view.get("user.id") is None
    assert view.get("metadata.absent") is None
    assert read_body(b'{"metadata":null,"user":null}').get("metadata.session_id") is None
    assert read_body(b'{"user":null}').get("user") is None
    assert "user" not in view
    assert "model" in view
    assert view.raw("model") == b'"gpt-nova"'
    assert view.raw("user") is None
    assert msgspec.json.decode(view.raw("messages") or b"")[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"metadata":{"session_id":{"a":1}}}', "metadata.session_id"),
        (b'{"metadata":{"session_id":["a"]}}', "metadata.session_id"),
        (b'{"metadata":{"session_id":1e999}}', "metadata.session_id"),
        (b'{"metadata":"s"}', "metadata"),
        (b'{"metadata":{"session_id":"a","session_id":"b"}}', "metadata"),
        (b'{"metadata":{' + b",".join(b'"%d":0' % key for key in range(MAX_KEYS + 1)) + b"}}", "metadata"),
    ],
    ids=["object", "list", "number out of range", "metadata a text", "twice", "too many keys"],
)
def test_malformed_inner_values_are_refused_when_read(body: bytes, path: str) -> None:
    """An id that is not a single value, or is given twice, is refused, not guessed."""
    view = read_body(body)
    with pytest.raises(BodyError) as refused:
        view.get("metadata.session_id")
    assert (refused.value.status, refused.value.field) == (400, path)


def test_whole_numbers_may_be_written_as_floats() -> None:
    """`512.0` and `5e2` are whole numbers; the result is an `int`."""
    view = read_body(b'{"a":512.0,"b":5e2,"c":0}')
    assert [view.whole(name, least=0, most=1000) for name in "abcd"] == [512, 500, 0, None]
    assert type(view.whole("a", least=0, most=1000)) is int


def test_largest_number_of_keys_is_allowed() -> None:
    """`MAX_KEYS` keys are read; one more is refused."""
    keys = [b'"%d":0' % key for key in range(MAX_KEYS + 1)]
    assert read_body(b"{" + b",".join(keys[:-1]) + b"}").get("0") == 0
    with pytest.raises(BodyError, match="more than 1000 keys"):
        read_body(b"{" + b",".join(keys) + b"}")


def test_replace_keeps_every_other_byte() -> None:
    """Changed values are spliced in and new keys added at the end; spacing, order and escapes stay."""
    body = b' {\t"mo\\u0064el" : "m" ,\n "x":[1, {"}":"]\\""}], "n":1 }\r\n'
    view = read_body(body)
    assert view.replace({}) == body
    assert view.replace({"model": "é"}) == body.replace(b'"m"', '"é"'.encode())
    assert view.replace({"n": None, "seed": True}) == body.replace(b'"n":1 }', b'"n":null ,"seed":true}')
    assert view.replace({"a": msgspec.Raw(b"[ ]"), "b": 2}) == body.replace(b"1 }", b'1 ,"a":[ ],"b":2}')
    assert read_body(b"{ }").replace({"a": 1}) == b'{ "a":1}'


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4)
    ),
    max_leaves=6,
)
_OBJECTS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda key: key.casefold() != "n"),
    _VALUES,
    max_size=6,
)


@given(_OBJECTS, _OBJECTS, st.sampled_from([None, 1]), st.booleans())
def test_replace_agrees_with_a_whole_parse(
    old: dict[str, object], new: dict[str, object], indent: int | None, ascii_only: bool
) -> None:
    """Whatever the body and the changes, the result parses to the old object with the changes applied."""
    body = json.dumps(old, indent=indent, ensure_ascii=ascii_only).encode()
    assert json.loads(read_body(body).replace(new)) == {**old, **new}


@given(_OBJECTS, st.data())
def test_no_key_may_occur_twice(members: dict[str, object], data: st.DataObject) -> None:
    """Wherever a second member with a known key stands, and however it is escaped, the body is refused."""
    pairs = [(json.dumps(key), json.dumps(value)) for key, value in members.items()] or [('"a"', "1")]
    again = json.loads(data.draw(st.sampled_from(pairs))[0])
    escaped = '"' + "".join(f"\\u{unit:04x}" for unit in _utf16(again)) + '"'
    pairs.insert(data.draw(st.integers(0, len(pairs))), (escaped, json.dumps(data.draw(_VALUES))))
    body = "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
    with pytest.raises(BodyError, match="occurs twice"):
        read_body(body.encode())


def _utf16(text: str) -> list[int]:
    data = text.encode("utf-16-be")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]


_FRAGMENTS = st.sampled_from(
    [b"{", b"}", b'"a"', b'"n"', b'"\\u0061"', b":", b",", b" ", b"1", b"[", b"]", b'"', b"\xc3"]
)


@given(
    st.binary()
    | st.lists(_FRAGMENTS).map(b"".join)
    | st.lists(_FRAGMENTS, max_size=3).map(lambda middle: b'{"n":1' + b"".join(middle) + b"}")
)
def test_any_bytes_give_a_view_or_a_body_error(body: bytes) -> None:
    """No bytes make it fail in another way."""
    try:
        view = read_body(body)
    except BodyError:
        return
    assert view.replace({}) == body
    assert isinstance(json.loads(body), dict)


def test_a_flood_of_keys_costs_few_steps() -> None:
    """T17: past `MAX_KEYS` no further key is looked at, so a syntax error behind them is not even found."""
    flood = b"{" + b",".join(b'"%d":0' % key for key in range(MAX_KEYS + 1))
    with pytest.raises(BodyError, match="more than"):
        read_body(flood + b",,,")


@pytest.mark.parametrize("value", [b"gzip", b"br", b"GZIP", b"identity, gzip", b"utf-8"])
def test_encoded_bodies_are_refused(value: bytes) -> None:
    """A body that would have to be decompressed is a 415, whatever the case of the header's name."""
    with pytest.raises(BodyError) as refused:
        check_encoding([(b"content-type", b"application/json"), (b"Content-Encoding", value)])
    assert (refused.value.status, refused.value.code) == (415, "body_encoded")


def test_plain_bodies_are_accepted() -> None:
    """No `content-encoding`, an empty one and `identity` are the same."""
    check_encoding([])
    check_encoding([(b"content-type", b"application/json"), (b"content-encoding", b"")])
    check_encoding([(b"content-encoding", b" Identity ")])


def test_large_bodies_have_their_own_error() -> None:
    """Whoever counts the bytes refuses with 413 and names the bound."""
    error = body_too_large(65_536)
    assert (error.status, error.code, error.field) == (413, "body_too_large", None)
    assert "65536" in error.message
