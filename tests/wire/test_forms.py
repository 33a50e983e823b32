"""The look into a form: what is read, and what two parsers may read differently and is refused."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.wire.forms import FormView, read_any, read_form
from asgi_llm_guard.wire.peek import MAX_KEYS, BodyError, BodyView

TYPE = b"multipart/form-data; boundary=edge"


def part(name: str = "model", value: bytes = b"m", *, more: str = "", headers: str = "") -> bytes:
    return f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n{headers}\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--edge--\r\n"


def read(*parts: bytes) -> FormView:
    return read_form(form(*parts), TYPE)


def test_fields_are_read_as_what_they_are_asked_for() -> None:
    """A field is a text; it is a number or a boolean where one is asked for, and an inner name is in brackets."""
    view = read(
        part("model", "café".encode()),
        part("n", b"03"),
        part("stream", b"true"),
        part("stored", b"false"),
        part("user", b""),
        part("metadata[session_id]", b"s-1"),
        part("tags[]", b"a"),
        part("tags[]", b"b"),
    )
    assert view.text("model", longest=9) == "café"
    assert view.whole("n", least=1, most=9) == 3
    assert (view.flag("stream"), view.flag("stored"), view.flag("absent")) == (True, False, False)
    assert view.whole("user", least=1, most=9) is None
    assert view.get("metadata.session_id") == "s-1"
    assert view.get("tags[]") is None
    assert view.inside("metadata") is None
    assert view.raw("model") == '"café"'.encode()
    assert "model" in view
    assert view.text_bytes == sum(map(len, ("model", "cafe+", "n03", "streamtrue", "storedfalse", "user"))) + 23


def test_files_are_views_into_the_body() -> None:
    """Files keep their field and their bytes, whatever is in them; a name in any writing makes a field a file."""
    content = b"\x89PNG\r\n\r\n--edg\r\n--\r\n\xff"
    view = read(
        part("image[]", content, more='; filename="a.png"', headers="Content-Type: image/png\r\n"),
        part("image[]", b"", more='; filename="\\"b\\".png"'),
        part("mask", b"m", more="; filename*=UTF-8''m%C3%A4.png"),
        part("file", b"f", more="; filename=\"f\"; filename*=UTF-8''f"),
        part("filename", b"text"),
    )
    assert [(file.field, bytes(file.content)) for file in view.files] == [
        ("image[]", content),
        ("image[]", b""),
        ("mask", b"m"),
        ("file", b"f"),
    ]
    assert view.get("filename") == "text"


def test_model_in_a_file_is_no_model() -> None:
    """A field that has a file name is a file to every server, so no text is read from it."""
    assert read(part("model", b"m", more='; filename="x"')).text("model", longest=9) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"--edge--\r\n",
        b"--edge",
        b"--edge\r\n",
        b"--edge\r\n\r\nm\r\n--edge--",
        b"preamble\r\n" + form(part()),
        b"\r\n" + form(part()),
        b"--other\r\n" + form(part()),
        form(part())[:-4],
        form(part())[:-5],
        form(part()) + b"epilogue",
        form(part()) + form(part("n")),
        form(part()).replace(b"\r\n", b"\n"),
        form(part()).replace(b'name="model"', b"name=model"),
        form(part()).replace(b'name="model"', b'NAME="model"; name="n"'),
        form(part()).replace(b'name="model"', b'name="mod\\"el"'),
        form(part()).replace(b'name="model"', b"name*=UTF-8''model"),
        form(part()).replace(b'name="model"', b'name="mod\xffel"'),
        form(part()).replace(b"form-data", b"attachment"),
        form(part()).replace(b"Content-Disposition:", b"Content-Disposition :"),
        form(part()).replace(b"Content-Disposition: form-data; ", b"X: "),
        form(part(headers='Content-Disposition: form-data; name="n"\r\n')),
        form(part(headers="Content-Transfer-Encoding: base64\r\n")),
        form(part(headers=" folded: x\r\n")),
        form(part(headers="X: " + "y" * 5_000 + "\r\n")),
        form(part(value=b"\xff")),
        form(part(), part("model", b"dear")),
        form(part("x"), part("x")),
        form(part("Model")),
        form(part(), part("MODEL", b"dear")),
        form(part(value=b"m\r\n--edgeX")),
        form(*(part(f"f{number}") for number in range(MAX_KEYS + 1))),
    ],
)
def test_ambiguous_forms_are_refused(body: bytes) -> None:
    """T12: what two parsers of forms may read differently is refused with 400."""
    with pytest.raises(BodyError) as refused:
        read_form(body, TYPE)
    assert (refused.value.code, refused.value.status) == ("invalid_request", 400)
    assert "dear" not in refused.value.message


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary="a\\"b"',
        b"multipart/form-data; boundary=edge; boundary=other",
        b"multipart/form-data; charset=utf-16; boundary=edge",
        b"multipart/mixed; boundary=edge",
        b"multipart/form-data; boundary=" + b"e" * 71,
    ],
)
def test_types_that_are_not_plain_are_refused(content_type: bytes) -> None:
    """A boundary that is missing, quoted oddly or given twice is no boundary."""
    with pytest.raises(BodyError, match="content-type: expected multipart/form-data with a boundary"):
        read_any(form(part()), [(b"Content-Type", content_type)])


def test_which_kind_a_body_is() -> None:
    """The content type decides; without one, and with any other, a body is JSON."""
    assert isinstance(read_any(form(part()), [(b"CONTENT-TYPE", b'Multipart/Form-Data; boundary="edge"')]), FormView)
    for headers in ([], [(b"content-type", b"application/json")], [(b"content-type", b"text/plain")]):
        assert type(read_any(b"{}", headers)) is BodyView


@pytest.mark.parametrize("text", [b"x", b"-1", b"1.0", b"1e3", b" 1", b"\xd9\xa1", b"9" * 19, b"11", b"0"])
def test_malformed_numbers_are_refused(text: bytes) -> None:
    """Only digits are a number, within the bounds that are asked for; the message does not repeat the text."""
    with pytest.raises(BodyError, match="n: expected a whole number from 1 to 10, got something else"):
        read(part("n", text)).whole("n", least=1, most=10)


def test_malformed_booleans_are_refused() -> None:
    """Only `true` and `false` are booleans."""
    with pytest.raises(BodyError, match="stream: expected true or false, got something else"):
        read(part("stream", b"1")).flag("stream")


def test_forms_are_not_changed() -> None:
    """Nothing can be put into a form."""
    with pytest.raises(BodyError, match="the body is a form, which this route cannot change"):
        read(part()).replace({"n": 1})


@given(
    fields=st.dictionaries(st.from_regex(r"\A[a-z_]{1,9}\Z"), st.text(max_size=20), min_size=1, max_size=5),
    content=st.binary(max_size=200),
)
def test_what_clients_send_is_read(fields: dict[str, str], content: bytes) -> None:
    """Forms as httpx writes them are read field by field and byte by byte."""
    request = httpx.Request("POST", "https://x.example/", data=fields, files={"file": ("a b.mp3", content)})
    request.read()
    view = read_any(request.content, [(name.encode(), value.encode()) for name, value in request.headers.items()])
    assert isinstance(view, FormView)
    assert {name: view.get(name) for name in fields} == fields
    assert [(file.field, bytes(file.content)) for file in view.files] == [("file", content)]


@given(
    st.binary(max_size=300) | st.lists(st.sampled_from([part(), b"--edge", b"--", b"\r\n", b"\r\n\r\n"])).map(b"".join)
)
def test_no_bytes_break_it(body: bytes) -> None:
    """Any other body is a form or is refused; nothing else is raised."""
    try:
        view = read_form(body, TYPE)
    except BodyError:
        return
    assert view.body == body
