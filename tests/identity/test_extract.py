"""Ids that the client may choose: where they are read from, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import (
    DEFAULT_SESSION,
    Extractor,
    IdentityError,
    baggage,
    body,
    first_of,
    header,
    vendor_header,
)


@dataclass(frozen=True, slots=True)
class Json:
    """A body that was read, as the guard hands it to extractors."""

    content: Mapping[str, Any]

    def get(self, path: str, /) -> Any:
        value: Any = self.content
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def test_default_session_order() -> None:
    """A2: the four places are asked in order, and the first that has an id wins."""
    everything = {"metadata": {"session_id": "three"}, "litellm_metadata": {"session_id": "four"}}
    one, two = (b"x-litellm-session-id", b"one"), (b"x-session-id", b"two")

    assert DEFAULT_SESSION.extract([two, one], Json(everything)) == "one"
    assert DEFAULT_SESSION.extract([two], Json(everything)) == "two"
    assert DEFAULT_SESSION.extract([], Json(everything)) == "three"
    assert DEFAULT_SESSION.extract([], Json({"litellm_metadata": {"session_id": "four"}})) == "four"
    assert DEFAULT_SESSION.extract([(b"accept", b"*/*")], Json({})) is None


def test_default_session_names() -> None:
    """A4: the extractor lists its headers and fields, for the refusal that asks for one of them."""
    assert DEFAULT_SESSION.names == (
        "header x-litellm-session-id",
        "header x-session-id",
        "field metadata.session_id",
        "field litellm_metadata.session_id",
    )


@pytest.mark.parametrize(
    "extractor, needs_body",
    [
        (header("x"), False),
        (body("x"), True),
        (baggage("x"), False),
        (vendor_header("x-*-id"), False),
        (first_of(header("x"), baggage("y")), False),
        (first_of(header("x"), first_of(body("y"))), True),
    ],
)
def test_needs_body(extractor: Extractor, needs_body: bool) -> None:
    """The guard learns from the extractor whether the body must be read."""
    assert extractor.needs_body is needs_body


def test_names() -> None:
    """A4: every kind of source can be named to the caller."""
    extractor = first_of(baggage("session.id"), vendor_header("x-*-session-id"))
    assert extractor.names == ("baggage entry session.id", "header x-*-session-id")


def test_unread_body_has_no_id() -> None:
    """A request whose body was not read has no id in it."""
    assert body("metadata.session_id").extract([], None) is None


@pytest.mark.parametrize(
    "value, expected",
    [
        ("s1", "s1"),
        (42, "42"),
        (0, "0"),
        (-7, "-7"),
        (1.5, "1.5"),
        (None, None),
        ("", None),
        ("  ", None),
        (" s ", "s"),
    ],
)
def test_body_values(value: object, expected: str | None) -> None:
    """A2: numbers are accepted as text; null and empty texts count as absent."""
    assert body("a.b").extract([], Json({"a": {"b": value}})) == expected


@pytest.mark.parametrize("value", [True, False, ["s1"], {"id": "s1"}, float("nan"), float("inf")])
def test_body_values_of_other_types(value: object) -> None:
    """An id that is neither a text nor a number is refused by the field's name."""
    with pytest.raises(IdentityError) as caught:
        body("a.b").extract([], Json({"a": {"b": value}}))
    assert (caught.value.status, caught.value.message) == (400, "The field a.b must be a text or a number.")


@pytest.mark.parametrize("value", [10**5000, -(10**5000), 10**300], ids=["5000 digits", "negative", "300 digits"])
def test_body_huge_numbers(value: int) -> None:
    """A number of thousands of digits is too long, whatever Python thinks of writing it out."""
    with pytest.raises(IdentityError, match="The field n is longer than 256 characters"):
        body("n").extract([], Json({"n": value}))


@pytest.mark.parametrize(
    "value", [b"a\r\nx: y", b"a\nb", b"a\x00b", b"a\x7fb", b"\x1b[31m", "a\u202eb".encode(), b"\xff\xfe"]
)
def test_control_characters(value: bytes) -> None:
    """T16: an id that could break a log line or a header is refused; the message does not repeat it."""
    with pytest.raises(IdentityError) as caught:
        header("x-session-id").extract([(b"x-session-id", value)])
    assert caught.value.status == 400
    assert "x-session-id" in caught.value.message
    assert caught.value.message.isprintable()
    assert value.decode("latin-1") not in caught.value.message


def test_lone_surrogates() -> None:
    """T16: half a character from a JSON escape is refused before it reaches a log that cannot encode it."""
    with pytest.raises(IdentityError, match="The field s contains"):
        body("s").extract([], Json({"s": "\ud800"}))


def test_length() -> None:
    """T9: an id of 256 characters is taken and one of 257 is not; the bound can be set."""
    extractor = header("x-session-id")
    assert extractor.extract([(b"x-session-id", b"s" * 256)]) == "s" * 256
    with pytest.raises(IdentityError, match=r"^The header x-session-id is longer than 256 characters\.$"):
        extractor.extract([(b"x-session-id", b"s" * 257)])
    with pytest.raises(IdentityError, match="longer than 8"):
        header("x-session-id", max_length=8).extract([(b"x-session-id", b"s" * 9)])


@pytest.mark.parametrize("text", ["Zoë", "会话-1", "a b", "user@example.org", "😀"])
def test_all_scripts(text: str) -> None:
    """Ids may be written in any script."""
    assert header("x-session-id").extract([(b"x-session-id", text.encode())]) == text


@pytest.mark.parametrize("second", [b"x-session-id", b"x_session_id", b"x-session_id"])
@pytest.mark.parametrize("extractor", [header("X-Session-Id"), DEFAULT_SESSION])
def test_duplicate_headers(extractor: Extractor, second: bytes) -> None:
    """T1: a header that is sent twice is refused, and so is its other spelling beside it."""
    with pytest.raises(
        IdentityError, match=r"^The header x-session-id must be sent once, in one spelling\.$"
    ) as caught:
        extractor.extract([(b"x-session-id", b"a"), (b"accept", b"*/*"), (second, b"a")], None)
    assert caught.value.status == 400


def test_other_spelling_alone_is_another_header() -> None:
    """`x_session_id` is not `x-session-id`, unless the service names both."""
    sent = [(b"session_id", b"old")]
    assert header("session-id").extract(sent) is None
    assert first_of(header("session-id"), header("session_id")).extract(sent, None) == "old"


def test_empty_header_is_absent() -> None:
    """An empty header lets the next extractor have its turn."""
    assert DEFAULT_SESSION.extract([(b"x-litellm-session-id", b"  "), (b"x-session-id", b"s")], None) == "s"


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([b"session.id=s1"], "s1"),
        ([b"a=b, session.id = s1 ;ttl=3, c=d"], "s1"),
        ([b"a=b", b"session.id=s%201%2C%C3%A9"], "s 1,é"),
        ([b"xsession.id=no,session.id.x=no,session.id"], None),
        ([b"session.id="], None),
        ([b"a=session.id=s1"], None),
        ([], None),
    ],
)
def test_baggage(lines: list[bytes], expected: str | None) -> None:
    """An entry is found on any line of the baggage, decoded, without its properties."""
    assert baggage("session.id").extract([(b"baggage", line) for line in lines]) == expected


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"session.id=a,session.id=b", "must be sent once"),
        (b"session.id=%FF", "is not percent-encoded UTF-8"),
        (b"session.id=\xff", "is not percent-encoded UTF-8"),
        (b"session.id=a%0D%0Ab", "contains control characters"),
        (b"session.id=" + b"s" * 257, "is longer than 256 characters"),
    ],
)
def test_malformed_baggage(line: bytes, problem: str) -> None:
    """T16: an entry that is sent twice or hides control characters is refused by its name."""
    with pytest.raises(IdentityError, match=f"The baggage entry session.id {problem}"):
        baggage("session.id").extract([(b"baggage", line)])


def test_vendor_headers() -> None:
    """Conformance 83: a named trace header beats vendors' session headers, whose odd values are ignored."""
    extractor = first_of(header("X-LiteLLM-Trace-Id"), vendor_header("X-*-Session-Id"))
    vendor = (b"x-acme-session-id", b"abcd_1234-XY")

    assert extractor.extract([vendor, (b"x-litellm-trace-id", b"trace")], None) == "trace"
    assert extractor.extract([vendor], None) == "abcd_1234-XY"
    assert extractor.extract([(b"x-acme-session-id", b"short")], None) is None
    assert extractor.extract([(b"x-acme-session-id", b"two words here")], None) is None
    assert extractor.extract([(b"x-acme-session-id", b"s" * 257)], None) is None
    assert (
        extractor.extract([(b"x-acme-session-id", b"short"), (b"x-b-session-id", b"long-enough")], None)
        == "long-enough"
    )
    assert extractor.extract([(b"x-session-id", b"abcd1234"), (b"x--session-id", b"abcd1234")], None) is None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: header("x session"), "expected a header's name such as 'x-session-id', got 'x session'"),
        (lambda: header(""), "got ''"),
        (lambda: header("a-b-c-d-e-f-g-h-i-j"), "at most 8 hyphens"),
        (lambda: header("x", max_length=0), "max_length: expected a whole number from 1 to 4096, got 0"),
        (lambda: header("x", max_length=True), "got True"),
        (lambda: body("a..b"), "expected a dotted path such as 'metadata.session_id', got 'a..b'"),
        (lambda: body("x", max_length=5000), "got 5000"),
        (lambda: baggage("a b"), "expected a key such as 'session.id', got 'a b'"),
        (lambda: vendor_header("x-session-id"), "expected a name with one '\\*'"),
        (lambda: vendor_header("x-*-session-id", min_length=0), "min_length"),
        (first_of, "at least one extractor"),
        (lambda: first_of("x-session-id"), r"say header\('x-session-id'\)"),  # type: ignore[arg-type]
    ],
)
def test_configuration(build: Any, message: str) -> None:
    """A wrong extractor is refused when it is built, with what was expected and seen."""
    with pytest.raises(ConfigurationError, match=message):
        build()


def is_sound(read: Callable[[], str | None]) -> bool:
    """Whether reading gives an id that may go into a log line, none, or a 400 that may."""
    try:
        value = read()
    except IdentityError as error:
        return error.status == 400 and error.message.isprintable()
    return value is None or (0 < len(value) <= 256 and value.isprintable() and value == value.strip())


@given(
    st.lists(
        st.tuples(st.sampled_from([b"x-session-id", b"x_session_id", b"baggage", b"x-a-id"]), st.binary(max_size=300))
    )
)
def test_any_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """T16, T17: whatever the headers are, the answer is a sound id, none, or a 400 that can be logged."""
    extractor = first_of(header("x-session-id"), baggage("s"), vendor_header("x-*-id"))
    assert is_sound(lambda: extractor.extract(headers, None))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_body_value(value: object) -> None:
    """T16, T17: whatever stands in the body, the answer is a sound id, none, or a 400 that can be logged."""
    assert is_sound(lambda: body("a").extract([], Json({"a": value})))
